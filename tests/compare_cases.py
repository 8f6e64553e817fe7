"""Sweeps made by hand, for tests of comparing them: each image of val is right or wrong as the test says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report_cases import made_up
from small import small_spec

from orchestrator.evaluate.outcomes import write_outcomes
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger

IMAGES = 400


def outcomes(accuracy: float, seed: int = 0, like: Sequence[bool] | None = None) -> np.ndarray:
    """[IMAGES] of right and wrong; `like` another student's, with as few changes as the accuracy takes."""
    rng = np.random.default_rng(seed)
    right = rng.permutation(IMAGES) < round(accuracy * IMAGES) if like is None else np.array(like)
    missing = round(accuracy * IMAGES) - int(right.sum())
    change = rng.permutation(np.flatnonzero(right == (missing < 0)))[: abs(missing)]
    right[change] = missing > 0
    return right


def hand_made(
    data: Path,
    storage: Path,
    name: str,
    trials: Sequence[tuple[str, Sequence[bool]]],
    val: str = "v",
    kept: bool = True,
    **changes: Any,
) -> Path:
    """A sweep whose trials are (method, right or wrong by image); without `kept` its outcomes are gone."""
    spec = small_spec(data, storage, name=name, **changes)
    folder = create(spec)
    ledger = Ledger(folder)
    for number, (method, right) in enumerate(trials):
        student = folder / "students" / f"t{number:04d}"
        student.mkdir(parents=True)
        (student / "student.json").write_text(json.dumps({"val": val}))
        halves = {"even": np.asarray(right)[::2], "odd": np.asarray(right)[1::2]}
        classes = [
            {"name": k, "images": len(v), "value": float(v.mean()), "precision": None} for k, v in halves.items()
        ]
        details = {"images": IMAGES, "classes": classes, "confusion": [], "worst": []}
        (student / "details.json").write_text(json.dumps(details))
        if kept:
            logits = torch.tensor(np.stack([~np.asarray(right), right], 1), dtype=torch.float32)
            write_outcomes(student, "classification", logits, torch.ones(IMAGES, dtype=torch.long))
        values = {"val_metric": float(np.mean(right)), "params_total": 1000 + number, "flops": 10**6, "latency_ms": 2.0}
        values |= {
            "latency_setup": "cpu, 1 thread, batch 1",
            "device_seconds": 3.0 + number,
            "store_seconds_saved": 1.5,
        }
        ledger.write(made_up(spec, number, method, status="complete", student_path=f"students/t{number:04d}", **values))
    ledger.write(made_up(spec, len(trials), "kd", status="failed", reason="it broke", device_seconds=1.0))
    ledger.publish()
    return folder
