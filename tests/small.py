"""A sweep of seconds, for the tests of the orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.sweep.run import prepare
from orchestrator.sweep.study import Study


def small_spec(data: Path, storage: Path, **changes: Any) -> SweepSpec:
    """A sweep of seconds: a tiny transformer as teacher, a tiny network without batch norm as student."""
    raw: dict[str, Any] = {
        "name": "small",
        "task": {"data": f"folder:{data}", "shots": 4},
        "teachers": [{"model": "timm/test_vit", "image_size": 32, "pretrained": False}],
        "students": [{"model": "timm/test_convnext", "image_size": 32}],
        "methods": {"finetune": {}, "kd": {}, "wecolora": {"rank": [4, 8], "factor": 2}},
        "search": {"trials": 5},
        "train": {"steps": 6, "batch": 12, "views": 2},
        "storage": str(storage),
    }
    return parse_spec(raw | changes)


def study_of(spec: SweepSpec, folder: Path) -> Study:
    """The study of a checked sweep; the folder is made, or its study continued."""
    prepared = prepare(spec)
    folder.mkdir(parents=True, exist_ok=True)
    return Study(spec, folder, prepared.cells, prepared.spaces, prepared.task.info)
