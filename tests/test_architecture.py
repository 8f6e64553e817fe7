"""What the documentation promises of the structure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small import small_spec

import methods
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

ROOT = Path(__file__).parent.parent
ONLY = {
    "ray.tune|ray import tune": "orchestrator/sweep/",
    "optuna": "orchestrator/sweep/study",  # study.py, study_storage.py
    "ray.train": "orchestrator/train/group.py",
}
FLOORS = ["models", "store", "data", "train", "evaluate", "trial", "select", "sweep"]


def test_the_documented_method_runs_as_one_new_file(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    (tmp_path / "match.py").write_text(block)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    methods.discover.cache_clear()
    try:
        spec = small_spec(colours, tmp_path / "runs", methods={"match": {}})
        assert prepare(spec).cells == [Cell("match", 0, 0)]
        context = SweepContext(spec, str(tmp_path / "runs" / "small"))
        row = run_trial(context, TrialConfig("t0000", 0, Cell("match", 0, 0), {}, 0))
        assert row["status"] == "complete", row["reason"]
    finally:
        methods.discover.cache_clear()


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_methods_import_neither_ray_nor_the_orchestrator() -> None:
    for path in sources("methods"):
        assert not re.search(r"^\s*(from|import)\s+(ray|orchestrator|optuna)\b", path.read_text(), re.MULTILINE), path


def test_each_framework_is_known_in_one_place_only() -> None:
    for words, place in ONLY.items():
        for path in sources("orchestrator"):
            relative = path.relative_to(ROOT).as_posix()
            if re.search(rf"^\s*(from|import)\s+({words})\b", path.read_text(), re.MULTILINE):
                assert relative.startswith(place), relative


def test_imports_go_down_the_floors() -> None:
    for level, floor in enumerate(FLOORS):
        for path in sources(f"orchestrator/{floor}"):
            for upper in FLOORS[level + 1 :]:
                found = re.search(rf"^\s*(from|import)\s+orchestrator\.{upper}\b", path.read_text(), re.MULTILINE)
                # A worker group runs inside a trial and is handed the trial's context.
                allowed = path.name == "group.py" and upper == "trial"
                assert not found or allowed, f"{path.relative_to(ROOT)} imports {upper}"
