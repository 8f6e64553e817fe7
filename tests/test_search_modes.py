"""Whole sweeps in one process on one local cluster: samplers, stopping rules, budgets, objectives, a moved folder."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console
from small import small_spec

from orchestrator.errors import FullDiskError
from orchestrator.select.leaderboard import print_leaderboard
from orchestrator.select.results import leaderboard, read_trials
from orchestrator.spec import SweepSpec
from orchestrator.store import Store
from orchestrator.sweep.choice import recommend
from orchestrator.sweep.event_files import write_event_files
from orchestrator.sweep.export import export_trial
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import FINAL, Clock, Ledger, open_sweep
from orchestrator.sweep.run import prepare, run
from orchestrator.sweep.study import Study

pytestmark = pytest.mark.ray
FINETUNE = {"finetune": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    from orchestrator.sweep.cluster import start_ray

    start_ray(1)
    yield
    ray.shutdown()


def swept(spec: SweepSpec) -> tuple[Path, list[dict[str, Any]]]:
    """Runs a sweep to its end: its folder and rows."""
    folder = create(spec)
    run(prepare(spec), folder)
    return folder, Ledger(folder).rows()


def resumed(folder: Path) -> list[dict[str, Any]]:
    run(prepare(open_sweep(folder)), folder)
    return Ledger(folder).rows()


def events(folder: Path) -> Any:
    """What TensorBoard reads in a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


@pytest.mark.slow  # half a minute; stopping early is in test_sweep.py
def test_median_prunes_what_stays_below_the_median_of_earlier_trials(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        methods={"finetune": {"lr": [0.003, 0.002, 0.004, 1e-7, 2e-7]}},
        search={"trials": 5, "sampler": "grid", "scheduler": "median", "concurrency": 1},
        train={"steps": 80, "batch": 12, "views": 2},
    )
    _, rows = swept(spec)
    assert [r["status"] for r in rows[:3]] == ["complete"] * 3, [r["reason"] for r in rows]
    pruned = [r for r in rows if r["status"] == "pruned"]
    assert pruned, [(r["status"], r["val_metric"]) for r in rows]
    for row in pruned:
        assert row["reason"].startswith("stopped by median at ")
        assert row["student_path"] == ""


def test_random_draws_the_same_trials_from_the_same_seed_and_others_from_another(colours: Path, tmp_path: Path) -> None:
    def spec(number: int, seed: int) -> SweepSpec:
        search = {"trials": 3, "sampler": "random", "defaults_first": False, "seed": seed, "concurrency": 1}
        return small_spec(colours, tmp_path / str(number), methods=FINETUNE, search=search)

    _, rows = swept(spec(0, 3))
    assert [r["status"] for r in rows] == ["complete"] * 3, [r["reason"] for r in rows]
    drawn = [json.loads(r["config"])["knobs"]["lr"] for r in rows]
    assert len(set(drawn)) == 3
    assert all(1e-4 <= lr <= 1e-2 for lr in drawn)
    for number, seed in ((1, 3), (2, 4)):
        prepared = prepare(spec(number, seed))
        study = Study(prepared.spec, create(prepared.spec), prepared.cells, prepared.spaces, prepared.task.info)
        again = [study.ask().knobs["lr"] for _ in range(3)]
        assert (again == drawn) == (seed == 3)
        assert seed == 3 or not set(again) & set(drawn)


def test_no_trial_is_proposed_once_the_device_hours_are_used_up(colours: Path, tmp_path: Path) -> None:
    search = {"trials": 5, "concurrency": 1, "device_hours": 1e-6}
    folder, rows = swept(small_spec(colours, tmp_path, methods=FINETUNE, search=search))
    assert [r["status"] for r in rows] == ["complete"]
    assert rows[0]["device_seconds"] >= 1e-6 * 3600
    used = Clock(folder).before
    assert used > 0
    assert [r["trial_id"] for r in resumed(folder)] == ["t0000"]
    assert Clock(folder).before > used


def test_the_time_budget_counts_what_earlier_lives_of_the_sweep_have_used(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, methods=FINETUNE, search={"trials": 3, "time_budget_s": 1000})
    folder = create(spec)
    (folder / "clock.json").write_text(json.dumps({"seconds": 1000}))
    run(prepare(spec), folder)
    assert Ledger(folder).rows() == []
    assert Clock(folder).before >= 1000


def test_several_objectives_give_the_front_in_the_study_and_in_the_leaderboard(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        students=[{"model": f"timm/{name}", "image_size": 32} for name in ("test_convnext", "test_vit")],
        methods=FINETUNE,
        objectives=["val_metric", "flops"],
        search={"trials": 6, "concurrency": 1, "repeats": 2},
    )
    folder, rows = swept(spec)
    assert [r["status"] for r in rows] == ["complete"] * 6, [r["reason"] for r in rows]
    points = {r["trial_id"]: (r["val_metric"], -r["flops"]) for r in rows}
    front = {a for a, p in points.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points.values())}
    board = leaderboard(read_trials(folder), spec.objectives)
    assert set(board[board["pareto"]]["trial_id"]) == front
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.db")))
    study = optuna.load_study(study_name="small", storage=storage)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert {f"t{t.number:04d}" for t in study.best_trials} == front
    for row in rows:  # the search hears the mean of the repeats
        values = json.loads(row["val_values"])
        assert len(values) == row["repeats"] == 2
        assert study.trials[row["number"]].values[0] == pytest.approx(sum(values) / 2)
    assert sorted(p.name for p in (folder / "students").iterdir()) == [r["trial_id"] for r in rows]
    stream = io.StringIO()
    print_leaderboard(Console(file=stream, width=120, color_system=None), read_trials(folder), spec.objectives)
    assert "* on the Pareto front of val_metric and flops." in stream.getvalue()


def test_a_sweep_is_continued_by_a_path_relative_to_where_one_stands(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = create(small_spec(colours, tmp_path, methods=FINETUNE, search={"trials": 1}))
    monkeypatch.chdir(folder.parent)
    assert [row["status"] for row in resumed(Path(folder.name))] == ["complete"]


def test_a_moved_and_renamed_sweep_is_resumed_chosen_from_and_exported(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path / "runs", methods=FINETUNE, search={"trials": 1})
    folder, before = swept(spec)
    changed = {**spec.model_dump(mode="json"), "search": {"trials": 2}}
    (folder / "sweep.yaml").write_text(SweepSpec.model_validate(changed).to_yaml())
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    folder = (tmp_path / "elsewhere" / "small").rename(tmp_path / "elsewhere" / "renamed")
    rows = resumed(folder)
    write_event_files(folder)
    assert [r["status"] for r in rows] == ["complete"] * 2
    assert rows[0] == before[0]
    assert not (tmp_path / "runs").exists()
    shown = events(folder / "tensorboard" / "t0001-finetune")
    assert shown.Scalars("result/val_metric")[0].value == pytest.approx(rows[1]["val_metric"])
    assert [e.step for e in shown.Scalars("train/loss")] == list(range(1, spec.train.steps + 1))
    plugin = events(folder / "tensorboard").SummaryMetadata("_hparams_/experiment").plugin_data
    assert plugin.plugin_name == "hparams"
    assert all(name in plugin.content for name in (b"Method", b"Teacher", b"Student", b"finetune.lr"))
    choice = recommend(folder)
    assert choice["val_metric"] == max(r["val_metric"] for r in rows)
    assert export_trial(folder, tmp_path / "exported", None, "safetensors")["trial_id"] == choice["trial_id"]
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1.6 MB, which two students of this file's sweep fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        pytest.skip(f"mounting a small file system needs rights that are missing here: {problem}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_sweep_in_a_sentence_and_with_room_it_goes_on(colours: Path, small_disk: Path) -> None:
    search = {"trials": 2, "concurrency": 1}
    spec = small_spec(colours, small_disk / "runs", methods=FINETUNE, search=search, store={"min_free_gb": 0})
    folder = create(spec)
    with pytest.raises(
        FullDiskError, match=r"^The disk of .* is full.* Make room, then continue with `.* resume .*`\.$"
    ):
        run(prepare(spec), folder)
    store = Store(small_disk / "runs" / "store")
    assert [store.damaged(e) for e in store.entries()] == [[]] * len(store.entries())
    assert not list((store.root / ".tmp").iterdir())
    assert [p.name for p in folder.glob("students/.*")] == []
    assert not [r for r in Ledger(folder).rows() if r["status"] in FINAL]  # no trial is to blame
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert [r["status"] for r in resumed(folder)] == ["complete"] * 2
