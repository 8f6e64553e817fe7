"""What the benchmarks reckon with."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import groups, layout, search_cost, step, sweep_against_plain, views
from benchmarks import record as records
from benchmarks.ablations import harness
from benchmarks.peers import plain_optuna
from benchmarks.profile import part_of
from benchmarks.record import command_of, measured_alike, on_cpu, own_sweep, watched
from benchmarks.search_cost import SPECS, Search, at_random, averaged, checked, grid_file, key_of, product, reached
from methods.contract import supervised_loss
from orchestrator.sweep.space import grid
from orchestrator.trial.plan import Cell


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """Trials of 8 seconds that score what they end with all along; one of them is good."""
    prepared = checked(json.dumps(SPECS["clipart"]))
    keys = [key_of(c.method, knobs) for c in prepared.cells for knobs in grid(prepared.spaces[c.method], c.method)]
    trials = {}
    for number, key in enumerate(keys):
        value = 0.9 if number == 40 else (number * 37 % 101) / 200
        trials[key] = {"seconds": 8.0, "curve": [(s / 8, value, float(s)) for s in range(1, 9)]}
    return {"spec": SPECS["clipart"], "trials": trials}


def test_a_replayed_search_pays_for_what_it_trains_and_for_that_once(table: dict[str, Any]) -> None:
    paid: list[float] = []

    def heard(search: Search) -> Search:
        def steps(table: dict[str, Any], seed: int) -> Iterator[tuple[float, float]]:
            paid.clear()
            for seconds, value in search(table, seed):
                paid.append(seconds)
                yield seconds, value

        return steps

    (spent, count, _), (sooner, fewer, _) = reached(table, heard(product("gp", "none")), 3, [0.89, 0.45])
    assert len(paid) == count > fewer
    assert spent == 8.0 * sum(seconds > 0 for seconds in paid)
    assert sooner == 8.0 * sum(seconds > 0 for seconds in paid[:fewer])
    [(stopped, _, _)] = reached(table, heard(product("gp", "asha")), 3, [0.89])
    assert stopped < 8.0 * sum(seconds > 0 for seconds in paid)
    (some, _, hit), (nothing, trials, missed) = reached(table, at_random, 3, [0.1, 2.0])
    assert (hit, missed) == (True, False)
    assert some < nothing
    assert (nothing, trials) == (8.0 * len(table["trials"]), len(table["trials"]))


@pytest.mark.parametrize(("options", "mark"), [((), "clipart"), (("--repeats", "3", "--task", "icons"), "icons_means")])
def test_a_grid_is_published_under_its_own_name(monkeypatch: pytest.MonkeyPatch, options: Any, mark: str) -> None:
    published: list[str] = []
    monkeypatch.setattr(search_cost, "publish", lambda name, result, text: published.append(name))
    monkeypatch.setattr(search_cost, "SEARCHES", {"random": search_cost.SEARCHES["random"]})
    monkeypatch.setattr(search_cost, "ORDERS", 3)
    monkeypatch.setattr(sys, "argv", ["search_cost", "--replay", *options])
    search_cost.main()
    assert published == [f"search_cost_{mark}"]


def test_a_grid_of_several_students_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec = {
        **SPECS["clipart"],
        "students": ["timm/test_vit", "timm/test_resnet"],
        "methods": {"finetune": {"lr": [0.1]}},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.setattr(sys, "argv", ["search_cost", "--spec", str(tmp_path / "two.yaml"), "--storage", str(tmp_path)])
    with pytest.raises(SystemExit):
        search_cost.main()
    assert "one teacher and one student" in capsys.readouterr().err


def test_a_configuration_of_several_seeds_scores_their_mean_and_costs_their_sum() -> None:
    runs = [{"seconds": 4.0, "curve": [(0.5, v, 2.0), (1.0, 2 * v, 4.0)]} for v in (0.1, 0.3, 9.0)]
    found = averaged({"task": "clipart", "spec": {}, "machine": "m", "runs": {"k": runs}}, 2)["trials"]["k"]
    assert found == {"seconds": 8.0, "curve": [(0.5, pytest.approx(0.2), 4.0), (1.0, pytest.approx(0.4), 8.0)]}
    with pytest.raises(SystemExit, match="has 3 seeds, not 4"):
        averaged({"task": "clipart", "spec": {}, "machine": "m", "runs": {"k": runs}}, 4)


@pytest.mark.parametrize("task", SPECS)
def test_the_recorded_grid_is_whole(task: str) -> None:
    known = json.loads(grid_file(task).read_text(encoding="utf-8"))["runs"]
    prepared = checked(json.dumps(SPECS[task]))
    keys = {key_of(c.method, knobs) for c in prepared.cells for knobs in grid(prepared.spaces[c.method], c.method)}
    assert set(known) == keys
    assert all(run["curve"][-1][2] == run["seconds"] for runs in known.values() for run in runs)


def test_a_benchmark_reads_no_more_of_a_sweep_file_than_it_says(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntask: {data: 'folder:images'}\nstudents: [timm/test_vit]\nmethods: {finetune: {lr: [0.1, 0.2]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = own_sweep(Path("mine.yaml"))
    assert set(found) == {"name", "task", "students", "methods"}
    assert found["task"]["data"] == f"folder:{tmp_path}/images"
    assert found["methods"] == {"finetune": {"lr": [0.1, 0.2]}}
    with pytest.raises(SystemExit, match=r"Did you mean 'mine\.yaml'"):
        own_sweep(Path("mine.yml"))


TRIAL = "run_trial (orchestrator/trial/run.py:1);fit (orchestrator/train/loop.py:1);"
PASS = "run_trial (orchestrator/trial/run.py:1);entries (orchestrator/data/passes.py:1);"


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (TRIAL + "learning_rate (orchestrator/train/loop.py:9)", "training loop, the rest"),
        (TRIAL + "step (torch/optim/adamw.py:1)", "optimiser"),
        (PASS + "_join (orchestrator/data/passes.py:9)", "teacher's pass, the rest"),
        (PASS + "live_outputs (orchestrator/data/passes.py:9);forward (timm/x.py:1)", "teacher's forward passes"),
        ("main (x.py:1);poll (ray/_private/worker.py:1)", "Ray in the driver and in trials"),
    ],
)
def test_a_stack_counts_for_its_innermost_part(stack: str, part: str) -> None:
    assert part_of(stack) == part


def test_a_command_is_told_as_it_is_typed() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--trials", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--student-size", type=int, default=48)
    typed = ["--dry", "--trials", "6", "12"]
    assert command_of("x", parser, parser.parse_args(typed)) == "python -m benchmarks.x --dry --trials 6 12"
    assert command_of("x", parser, parser.parse_args([*typed, "--student-size", "32"]), ["dry"]) == (
        "python -m benchmarks.x --trials 6 12 --student-size 32"
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images for train, without val and test, none of them a square; beside them another file."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for name, number in itertools.product(("bag", "coat"), range(10)):
        (folder / name).mkdir(exist_ok=True)
        pixels = draw.integers(0, 255, (40, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "bag" / ".DS_Store").write_bytes(b"no image")
    return folder


def setting_of(photos: Path, **changes: Any) -> dict[str, Any]:
    given = {"data": f"folder:{photos}", "teacher": "timm/test_resnet", "teacher_size": 32, "shots": 3}
    return {**sweep_against_plain.DEFAULTS, **given, **changes}


def test_the_peer_takes_as_many_images_as_the_other_side_and_squashes_none(photos: Path, tmp_path: Path) -> None:
    found = plain_optuna.load_data(f"folder:{photos}", side=40)
    assert {split: len(labels) for split, (_, labels) in found.items()} == {"train": 12, "val": 4, "test": 4}
    assert found["train"][0].shape == (12, 3, 40, 40)
    whole = [np.array(Image.open(path)) for path in photos.glob("*/*.png")]
    middles = [torch.from_numpy(pixels[:, 20:60]).permute(2, 0, 1) for pixels in whole]
    assert all(any(torch.equal(image, middle) for middle in middles) for image in found["train"][0])
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("bag", "coat"):
            (tmp_path / split / name).symlink_to(photos / name)
    ready = plain_optuna.load_data(f"folder:{tmp_path}")
    assert {split: len(labels) for split, (_, labels) in ready.items()} == {"train": 16, "val": 20, "test": 4}
    with pytest.raises(SystemExit, match="no images of train"):
        plain_optuna.load_data(f"folder:{tmp_path}/nothing")


@pytest.mark.parametrize("pool", [3, 20, 32])
def test_the_peers_batches_are_full_however_few_images_there_are(pool: int) -> None:
    rows = plain_optuna.batches(np.arange(pool), 32, np.random.default_rng(0))
    drawn = [next(rows) for _ in range(pool)]
    assert {len(batch) for batch in drawn} == {32}
    assert set(np.bincount(np.concatenate(drawn))) == {32}
    bench = SimpleNamespace(labelled=np.arange(pool), unlabelled=np.arange(0), batch=32, steps=5)
    for known, others in plain_optuna.Bench.batches(bench):  # type: ignore[arg-type]
        assert (len(known), len(others)) == (32, 0)


def test_the_peers_head_of_two_classes_has_two_rows() -> None:
    features, weight, bias = torch.randn(5, 7).double(), np.ones((1, 7)), np.array([0.5])
    both, biases = map(torch.from_numpy, plain_optuna.two_sided(weight, bias))
    chance = torch.softmax(features @ both.T + biases, 1)[:, 1]
    assert torch.allclose(chance, torch.sigmoid(features.sum(1) + 0.5))
    many = plain_optuna.two_sided(np.ones((3, 7)), np.ones(3))
    assert many[0].shape == (3, 7)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit"])
def test_the_peer_builds_networks_that_know_no_size_and_normalises_as_they_want(name: str) -> None:
    network = plain_optuna.build_teacher(name, 48)
    pixels = plain_optuna.normalised(torch.full((1, 3, 96, 96), 255, dtype=torch.uint8), 48, network)
    config = network.pretrained_cfg
    wanted = (1 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    assert torch.allclose(pixels[0, :, 0, 0], wanted, atol=1e-6)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert network(pixels).shape[0] == 1


def test_a_teacher_without_equal_blocks_leaves_wecolora_out_of_both_sides(photos: Path) -> None:
    setting = setting_of(photos)
    methods, reasons = sweep_against_plain.served(setting, 2)
    assert methods == ["kd", "tdmr"]
    assert len(reasons) == 1
    assert reasons[0].startswith("wecolora needs a vit teacher")
    spec = sweep_against_plain.spec_of(setting, sweep_against_plain.trials_of(2, 2, methods), photos)
    assert set(spec["methods"]) == set(methods)
    costs = sweep_against_plain.check_ratio(spec, 2)
    assert set(costs) == {"teacher", "student"}
    numbers = dict.fromkeys(("peer_s", "ours_s", "peer_cpu_s", "ours_cpu_s", "again_s"), 1.0)
    numbers |= dict.fromkeys(("cold_start_s", "loop_s", "store_s", "teacher_images", "peer_teacher_images"), 1.0)
    result = {"setting": {**setting, "factor": 2}, "mflop": costs, "left_out": reasons, "command": "c"}
    sizes: dict[str, Any] = {"4": [{**numbers, "outside_loop_s": {}}]}
    text = sweep_against_plain.table({**result, "machine": "m", "versions": "v", "sizes": sizes})
    assert "Left out on both sides: wecolora" in text
    assert "its own copy" not in text
    vit = setting_of(photos, teacher="timm/test_vit", teacher_size=64)
    assert sweep_against_plain.served(vit, 2) == (["kd", "tdmr", "wecolora"], [])


def test_processes_share_a_gpu_where_there_are_too_few(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    for count, share in ((0, None), (1, 0.5), (2, None)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        spec = sweep_against_plain.spec_of(setting_of(photos), {}, photos)
        assert spec["train"].get("gpus_per_worker") == share


SWEEP: dict[str, Any] = {
    "name": "mine",
    "task": {"shots": 3},
    "teachers": [{"model": "timm/test_vit", "image_size": 32, "pretrained": False}],
    "students": [{"model": "timm/test_resnet", "image_size": 32}],
    "train": {"steps": 2, "batch": 4},
}


def sweep_of(photos: Path, methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**SWEEP, "task": {**SWEEP["task"], "data": f"folder:{photos}"}, "methods": methods, **changes}


def test_a_step_is_that_of_the_last_stage_that_reads_outputs(photos: Path, tmp_path: Path) -> None:
    probe, kd = Cell("teacher_probe", 0, None), Cell("kd", 0, 0)
    base = sweep_of(photos, {"teacher_probe": {}, "kd": {"teacher_tuning": ["lora"]}})
    cases: list[step.Case] = [(base, probe, {}), (base, kd, {"teacher_tuning": "lora"})]
    context = step.context_of(str(tmp_path), base, cases, None)
    assert step.job_of(context, probe, {}) is None
    job = step.job_of(context, kd, {"teacher_tuning": "lora"})
    assert job is not None
    assert job.outputs
    assert job.stage.trains == "student"


def test_a_student_alone_has_the_tasks_own_loss() -> None:
    student = torch.nn.Linear(3, 2)
    batch: Any = SimpleNamespace(images=torch.randn(4, 3), labels=torch.tensor([[1.0, 0.0]] * 4))
    learner: Any = SimpleNamespace(student=student)
    found = step.Alone(learner, "multilabel").loss(batch, 0.0)["loss"]
    assert torch.equal(found, supervised_loss(student(batch.images), batch.labels, "multilabel"))


def test_views_compares_a_method_that_learns_from_outputs(photos: Path, tmp_path: Path) -> None:
    raw = sweep_of(photos, {"teacher_probe": {}, "finetune": {}, "lora": {}, "kd": {}}, storage=str(tmp_path))
    assert views.arm_of(records.checked(raw)).method == "kd"
    raw["methods"] = {"teacher_probe": {}, "lora": {}}
    with pytest.raises(SystemExit, match="learns from outputs"):
        views.arm_of(records.checked(raw))


def test_views_table_keeps_where_it_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorded = json.loads((views.RESULTS / "views.json").read_text(encoding="utf-8")) | {"machine": "another machine"}
    records.write_result(tmp_path / "views.json", recorded)
    published: list[dict[str, Any]] = []
    monkeypatch.setattr(views, "RESULTS", tmp_path)
    monkeypatch.setattr(views, "PICTURE", tmp_path / "views.svg")
    monkeypatch.setattr(views, "publish", lambda mark, result, text: published.append(result))
    monkeypatch.setattr(sys, "argv", ["views", "--table", "--storage", str(tmp_path)])
    views.main()
    told = ("machine", "versions", "command")
    assert [published[0][key] for key in told] == [recorded[key] for key in told]


def test_a_recorded_grid_of_more_seeds_is_not_replaced(tmp_path: Path) -> None:
    def grid_of(seeds: int, spec: Any = 1) -> dict[str, Any]:
        return {"spec": {"a": spec}, "runs": {"k": [{"seconds": 1.0}] * seeds}}

    path = tmp_path / "grid.json"
    for given, there in ((grid_of(1), 1), (grid_of(3), 3), (grid_of(1), 3), (grid_of(1, spec=2), 1)):
        search_cost.keep(path, given)
        assert search_cost.seeds_of(json.loads(path.read_text(encoding="utf-8"))) == there


def test_a_grid_whose_first_configuration_pays_for_others_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    methods = {"kd": {"lr": [0.1, 0.2], "teacher_tuning": ["none", "lora"]}}
    assert search_cost.shared_stages(search_cost.prepared_grid(sweep_of(photos, methods), tmp_path)) == ["kd: tune"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(sweep_of(photos, methods)))
    monkeypatch.setattr(sys, "argv", ["search_cost", "--spec", str(tmp_path / "mine.yaml"), "--storage", str(tmp_path)])
    with pytest.raises(SystemExit):
        search_cost.main()
    assert "kd: tune" in capsys.readouterr().err
    plain = sweep_of(photos, {"kd": {"lr": [0.1, 0.2]}})
    assert search_cost.shared_stages(search_cost.prepared_grid(plain, tmp_path)) == []


def test_both_sides_of_groups_train_on_the_same_images_with_the_same_batch_norm(tmp_path: Path) -> None:
    options = argparse.Namespace(data="packaged/clipart", steps=1, batch=2)
    spec = groups.spec_of(tmp_path, options, 1, "test_resnet")
    assert spec["task"]["shots"] is None
    assert spec["train"]["sync_batchnorm"] is False


def test_cpu_seconds_of_a_process_that_hides_its_environment_are_counted() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    hidden = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {burn!r}], env={{}})"
    _, _, spent = watched([sys.executable, "-c", hidden], every_s=0.05)
    assert spent > 0.35


def test_measurements_are_joined_only_where_all_that_they_depend_on_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    about = {"setting": {"batch": 2}, "machine": "m", "versions": "torch 1"}
    assert measured_alike(path, about) is None
    records.write_result(path, {**about, "rows": [1]})
    assert measured_alike(path, about) == {**about, "rows": [1]}
    for key, other in (("setting", {"batch": 3}), ("machine", "n"), ("versions", "torch 2")):
        assert measured_alike(path, {**about, key: other}) is None


@pytest.mark.parametrize(
    ("options", "written"), [((), True), (("--seeds", "1"), False), (("--steps", "9"), False), (("--dry",), False)]
)
def test_an_ablation_is_written_at_its_own_seeds_and_steps_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], written: bool
) -> None:
    def row(raw: dict[str, Any], arm: Any, seed: int) -> dict[str, Any]:
        return {"val_metric": 0.5, "seed": seed, "params_total": 1, "params_trained": 1, "optimizer_steps": 1}

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(harness, "run_arm", row)
    raw = {"task": {"data": "none"}, "train": {"steps": 3}}
    given = [*options, "--storage", "elsewhere"]
    harness.compare("one", "which?", raw, [harness.Arm("a", "kd")], given, lambda storage: {"more": storage})
    assert (tmp_path / "one.json").is_file() == written
    if written:
        found = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
        assert (found["more"], statistics.mean(found["arms"][0]["values"])) == ("elsewhere", 0.5)


def test_the_recorded_layouts_are_what_the_page_says() -> None:
    text = layout.table(json.loads((records.RESULTS / "layout.json").read_text(encoding="utf-8")))
    assert f"<!-- layout -->\n{text}\n<!-- end -->" in records.PAGE.read_text(encoding="utf-8")


def test_a_benchmark_on_the_cpu_refuses_a_sweep_that_asks_for_a_gpu() -> None:
    assert on_cpu({"train": {"device": "auto"}}) == {"train": {"device": "auto"}}
    with pytest.raises(SystemExit, match=r"train\.device: cuda"):
        on_cpu({"train": {"device": "cuda"}})


def test_a_table_of_steps_names_teachers_where_there_are_several() -> None:
    one = {"method": "kd", "student": "s", "ms": {"none": [(1.0, 1.0)], "stored": [(1.0, 1.0)]}}
    one |= {"stored_cpu": [1.0], "stored_wall": [1.0], "live_cpu": []}
    about = {"command": "c", "machine": "m", "versions": "v", "setting": {"batch": 1, "rounds": 1, "steps": 1}}
    assert "| method | student |" in step.table({**about, "rows": [one]})
    assert "| kd | t | s |" in step.table({**about, "rows": [{**one, "teacher": "t"}]})
