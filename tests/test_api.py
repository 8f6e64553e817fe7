"""The notebook's face: the same as the command line, and promoting the best trials with new seeds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from small import small_spec, study_of
from test_study import row
from typer.testing import CliRunner

from methods import discover, method_names
from orchestrator import Sweep
from orchestrator.cli import app
from orchestrator.errors import UserError, WorkError
from orchestrator.spec import Section, SweepSpec
from orchestrator.sweep.choice import recommend
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger, open_sweep
from orchestrator.sweep.promote import check_promoted, promoted_spec, rank_sentences, ranks
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.row import blank_row

ROOT = Path(__file__).parent.parent


def test_importing_it_imports_nothing_slow() -> None:
    code = "import sys, orchestrator; print([m for m in ('torch', 'ray', 'pandas', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    # A second look at the best trial, which reads no images, needs pandas alone.
    code = "import sys, orchestrator.sweep.choice; print([m for m in ('torch', 'ray', 'optuna') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": {"kdd": {}}},
        {"teachers": ["packaged/vit_clipat"]},
        {"students": [{"model": "local:absent.safetensors", "architecture": "timm/test_resnet"}]},
        {"task": {"data": "folder:absent"}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_not_there_is_told_before_torch_is_imported(wrong: dict[str, Any]) -> None:
    raw = {
        "name": "x",
        "task": {"data": "packaged/clipart"},
        "teachers": ["packaged/vit_clipart"],
        "students": [{"model": "timm/test_resnet"}],
        "methods": {"kd": {}},
        **wrong,
    }
    code = f"""
import sys
from orchestrator.errors import UserError
from orchestrator.spec import parse_spec
from orchestrator.sweep.folder import check_places
try:
    check_places(parse_spec({raw!r}))
except UserError:
    print("refused", [m for m in ("torch", "timm", "ray") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "refused []"


def test_names_of_methods_read_from_their_files_are_those_of_their_classes() -> None:
    assert method_names() == tuple(discover())


@pytest.mark.ray
def test_the_documented_code_runs(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    spec = small_spec(colours, tmp_path / "runs")
    Path("sweep.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    names: dict = {}
    try:
        exec(code, names)
    finally:
        ray.shutdown()
    sweep, again, board = names["sweep"], names["again"], names["board"]
    assert isinstance(board, pd.DataFrame)
    assert (board["status"] == "complete").sum() == 4
    first = board.iloc[0]
    assert names["best"]["trial_id"] == first["trial_id"]
    assert names["best"]["runner_up"]["trial_id"] == board.iloc[1]["trial_id"]
    assert json.loads((tmp_path / "student" / "config.json").read_text())
    assert again.folder == tmp_path / "runs" / "small-promoted"
    rows = again.trials()
    assert rows["repeats"].tolist() == [2, 2]
    assert {json.dumps(json.loads(c)["knobs"]) for c in rows["config"]} == {
        json.dumps(json.loads(c)["knobs"]) for c in board["config"][:2]
    }
    changes = sweep.ranks(again)
    assert sorted(c["trial_id"] for c in changes) == sorted(board["trial_id"][:2])
    assert {c["rank_before"] for c in changes} == {1, 2}
    assert [c["rank"] for c in changes] == [1, 2]
    assert changes[0]["val_metric"] >= changes[1]["val_metric"]


def begun(colours: Path, tmp_path: Path, **changes: object) -> Path:
    """A sweep of three trials by hand, the second of which is the best, and the slowest."""
    spec = small_spec(colours, tmp_path, **changes)
    folder = create(spec)
    study, ledger = study_of(spec, folder), Ledger(folder)
    for number, value in enumerate((0.4, 0.6, 0.5)):
        config = study.ask()
        ended = row("complete", val_metric=value, params_total=1000.0, student_path="students/x", latency_ms=10 * value)
        ledger.write(blank_row(spec, config) | ended)
        study.tell(number, ended)
    ledger.publish()
    return folder


def test_promoted_trials_get_new_seeds_and_draws_and_are_never_stopped(colours: Path, tmp_path: Path) -> None:
    folder = begun(colours, tmp_path, search={"trials": 3, "seed": 7, "repeats": 2, "scheduler": "asha"})
    spec = promoted_spec(folder, 2, 4)
    assert [start.method for start in spec.search.begin] == ["kd", "wecolora"]
    assert (spec.search.trials, spec.search.repeats, spec.search.scheduler) == (2, 4, "none")
    assert (spec.search.seed, spec.task.draw) == (9, 2)  # after the seeds and draws of two repeats
    study = study_of(spec, tmp_path / spec.name)
    assert [study.ask().cell.method for _ in range(2)] == ["kd", "wecolora"]


def recorded(folder: Path, *trials: tuple[dict[str, Any], dict[str, Any]]) -> Path:
    """Rows of kd with these knobs, in the order in which they were proposed."""
    spec, ledger = open_sweep(folder), Ledger(folder)
    for number, (knobs, ended) in enumerate(trials):
        config = TrialConfig(f"t{number:04d}", number, Cell("kd", 0, 0), knobs, 0)
        ledger.write(blank_row(spec, config) | row("complete", student_path="students/x") | ended)
    ledger.publish()
    return folder


def again(spec: SweepSpec, *ended: dict[str, Any]) -> Path:
    """A promoted sweep, its trials proposed by its study, that ended so."""
    folder = create(spec)
    study, ledger = study_of(spec, folder), Ledger(folder)
    for values in ended:
        ledger.write(blank_row(spec, study.ask()) | row("complete", student_path="students/x", repeats=3) | values)
    ledger.publish()
    return folder


def test_promoted_trials_are_the_best_by_the_metric_that_is_named(colours: Path, tmp_path: Path) -> None:
    folder = begun(colours, tmp_path)
    spec = promoted_spec(folder, 2, 3, metric="latency_ms")
    assert [start.method for start in spec.search.begin] == ["finetune", "wecolora"]
    assert [(o.metric, o.direction) for o in spec.objectives] == [("latency_ms", "min"), ("val_metric", "max")]
    with pytest.raises(UserError, match=r"--metric: unknown metric 'latency'.*Did you mean 'latency_ms'"):
        promoted_spec(folder, 2, 3, metric="latency")
    slower, faster = {"val_metric": 0.9, "latency_ms": 7.0}, {"val_metric": 0.1, "latency_ms": 3.0}
    found = ranks(folder, again(spec, slower, faster))
    assert [(f["trial_id"], f["rank"], f["rank_before"]) for f in found] == [("t0002", 1, 2), ("t0000", 2, 1)]
    assert "lower on average than in the first sweep" not in rank_sentences(found)[1]
    with pytest.raises(UserError, match="or by another metric"):
        check_promoted(spec.model_copy(update={"objectives": open_sweep(folder).objectives}), tmp_path / spec.name)


def test_no_limit_of_the_first_sweep_stops_a_promoted_one(colours: Path, tmp_path: Path) -> None:
    cluster = {"nodes": {"small": {"max": 1, "resources": {"CPU": 4.0}}}, "prices": {"small": 1.0}}
    stops = {"trials": 3, "budget": 1.0, "device_hours": 1.0, "time_budget_s": 9.0, "scheduler": "asha"}
    search = promoted_spec(begun(colours, tmp_path, search=stops, cluster=cluster), 2, 3).search
    assert (search.budget, search.device_hours, search.time_budget_s, search.scheduler) == (None, None, None, "none")


def test_a_configuration_that_was_tried_several_times_is_promoted_once(colours: Path, tmp_path: Path) -> None:
    knobs = {"lr": [0.001, 0.01], "temperature": [2, 4, 8]}
    spec = small_spec(colours, tmp_path, methods={"kd": knobs}, search={"trials": 20})
    folder = recorded(
        create(spec),
        ({"lr": 0.01, "temperature": 4.0}, {"val_metric": 0.8}),  # the field's default, which the file has as 4
        ({"lr": 0.001, "temperature": 2}, {"val_metric": 0.7}),
        ({"lr": 0.01, "temperature": 4}, {"val_metric": 0.9}),
        ({"lr": 0.001, "temperature": 2}, {"val_metric": 0.4}),
        ({"lr": 0.01, "temperature": 4}, {"val_metric": 0.95, "status": "pruned"}),
    )
    promoted = promoted_spec(folder, 3, 3)
    assert [s.knobs for s in promoted.search.begin] == [
        {"lr": 0.01, "temperature": 4},
        {"lr": 0.001, "temperature": 2},
    ]
    found = ranks(folder, again(promoted, {"val_metric": 0.5}, {"val_metric": 0.6}))
    assert [(f["trial_id"], f["rank"], f["rank_before"], f["val_before"]) for f in found] == [
        ("t0001", 1, 2, 0.7),
        ("t0002", 2, 1, 0.9),
    ]


def test_trials_that_a_promoted_sweep_has_beside_the_promoted_ones_have_no_place(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, methods={"kd": {"temperature": [2, 4, 8]}})
    ended = [{"val_metric": value} for value in (0.9, 0.8, 0.7)]
    folder = recorded(create(spec), *(({"temperature": t}, e) for t, e in zip((2.0, 4.0, 8.0), ended, strict=True)))
    longer = promoted_spec(folder, 2, 3)
    longer = longer.model_copy(update={"search": longer.search.model_copy(update={"trials": 3})})
    found = ranks(folder, again(longer, {"val_metric": 0.5}, {"val_metric": 0.6}, {"val_metric": 0.9}))
    assert [(f["trial_id"], f["rank"]) for f in found] == [("t0001", 1), ("t0000", 2)]


def ends(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """In place of the cluster: a sweep whose trials all end so."""

    def run(prepared: Any, folder: Path, on_event: Any = None) -> bool:
        study, ledger = study_of(prepared.spec, folder), Ledger(folder)
        for _ in range(prepared.spec.search.trials):
            ledger.write(blank_row(prepared.spec, study.ask()) | {"status": status})
        ledger.publish()
        return status != "running"

    monkeypatch.setattr("orchestrator.sweep.run.run", run)


def test_promoted_trials_that_failed_are_json_without_nan(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(monkeypatch, "failed")
    done = CliRunner().invoke(app, ["best", str(begun(colours, tmp_path)), "--promote", "2", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout, parse_constant=pytest.fail)
    assert [(f["val_before"], f["val_metric"], f["val_sd"], f["rank"]) for f in answer["ranks"]] == [
        (0.6, None, None, None),
        (0.5, None, None, None),
    ]


def test_a_run_that_ctrl_c_breaks_off_fails_and_names_what_continues_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune takes a Ctrl-C, stops its trials and comes back as after the last of them."""
    ends(monkeypatch, "running")
    folder = begun(colours, tmp_path)
    done = CliRunner().invoke(app, ["best", str(folder), "--promote", "2"])
    assert isinstance(done.exception, WorkError)
    assert str(done.exception) == (
        f"Stopped while 2 trials were running; continue with `orchestrator resume {folder}-promoted`."
    )
    with pytest.raises(WorkError, match="Stopped while"):
        Sweep(create(small_spec(colours, tmp_path, name="other"))).run(tell=None)


def test_the_best_trial_is_known_before_the_table_has_it(colours: Path, tmp_path: Path) -> None:
    folder = begun(colours, tmp_path)
    first = Ledger(folder).read("t0001")
    assert first is not None
    late = first | {"trial_id": "t0003", "number": 3, "val_metric": 0.9}
    Ledger(folder).write(late)  # its process ended, and the driver was killed
    test = {"value": 0.5, "images": 10, "standard_error": 0.1, "val_images": 10}
    (folder / "test.json").write_text(json.dumps({"t0003": test}))
    assert recommend(folder)["trial_id"] == "t0003"
    assert promoted_spec(folder, 1, 2).search.begin[0].method == late["method"]


def test_the_cost_says_what_no_trial_has_in_its_row(colours: Path, tmp_path: Path) -> None:
    folder = create(small_spec(colours, tmp_path))
    ended = {"val_metric": 0.5, "device_seconds": 10.0}
    recorded(folder, ({"lr": 0.1}, ended), ({"lr": 0.2}, {"status": "running"}))
    held = {name: {"seconds": seconds, "node_type": ""} for name, seconds in (("t0000", 12.0), ("t0001", 5.0))}
    (folder / "held.json").write_text(json.dumps({"device": "cpu", "trials": held}))
    told = " ".join(CliRunner().invoke(app, ["cost", str(folder)]).output.split())
    assert "7 in no trial's own: starts of processes, processes that died, trials that still run." in told


def test_a_warm_start_tells_the_search_what_its_space_allows_and_takes_no_number(colours: Path, tmp_path: Path) -> None:
    folder = begun(colours, tmp_path)
    narrower = {"finetune": {}, "kd": {"temperature": [1.0, 2.0]}, "wecolora": {"rank": [4, 8], "factor": 2}}
    spec = small_spec(colours, tmp_path, name="next", methods=narrower, search={"trials": 5, "warm_start": str(folder)})
    study = study_of(spec, tmp_path / "next")
    known = [t for t in study._study.get_trials(deepcopy=False) if "earlier" in t.user_attrs]
    assert [(t.params["method"], t.values) for t in known] == [("finetune", [0.4]), ("wecolora", [0.5])]  # kd: T is 4
    assert study.ask().number == 0
    again = study_of(spec, tmp_path / "next")
    assert len([t for t in again._study.get_trials(deepcopy=False) if "earlier" in t.user_attrs]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"steps": 7, "batch": 12, "views": 2}}, "train.steps"),
        ({"task": {"data": "packaged/clipart", "shots": 4}}, "task.data"),
        ({"objectives": ["val_metric", "flops"]}, "objectives"),
    ],
)
def test_an_earlier_sweep_that_does_not_compare_is_refused(
    colours: Path, tmp_path: Path, changes: dict[str, Section], words: str
) -> None:
    folder = begun(colours, tmp_path)
    spec = small_spec(colours, tmp_path, name="next", search={"trials": 5, "warm_start": str(folder)}, **changes)
    with pytest.raises(UserError, match=re.escape(words)):
        study_of(spec, tmp_path / "next")


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a sweep's folder"):
        Sweep(tmp_path)
