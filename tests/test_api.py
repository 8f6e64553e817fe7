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

from methods import discover, method_names
from orchestrator import Sweep
from orchestrator.errors import UserError
from orchestrator.spec import Section
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.promote import promoted_spec
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
    """A sweep of three trials by hand, the second of which is the best."""
    spec = small_spec(colours, tmp_path, **changes)
    folder = create(spec)
    study, ledger = study_of(spec, folder), Ledger(folder)
    for number, value in enumerate((0.4, 0.6, 0.5)):
        config = study.ask()
        ended = row("complete", val_metric=value, params_total=1000.0, student_path="students/x")
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
