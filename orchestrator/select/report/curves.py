"""Learning curves, as training wrote them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

POINTS = 60  # of a curve that are shown


def history(folder: Path, trial_id: str, student_path: str) -> list[dict[str, float]]:
    """`step` and each part of the loss, by step, of the stage that trained the candidate; [] where none was recorded.

    A trial without a student (stopped, failed, running) has what was noted while it trained; a step that was trained
    again counts last.
    """
    if student_path:
        return _read(folder / student_path / "history.json", lambda text: json.loads(text)["history"])
    noted = _read(folder / "trials" / f"{trial_id}.loss.jsonl", lambda text: [json.loads(x) for x in _whole(text)])
    try:
        found = {float(point["step"]): point for point in noted}
    except (KeyError, TypeError, ValueError):
        return []
    return [found[step] for step in sorted(found)]


def losses(folder: Path, row: pd.Series) -> dict[str, list[float | None]]:
    """`step` and each part of the loss, by step, at most `POINTS` of them evenly spread; {} where none was recorded."""
    points = history(folder, str(row["trial_id"]), str(row["student_path"]))
    if not points:
        return {}
    kept = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, min(POINTS, len(points))).round().astype(int))]
    names = [name for name in kept[0] if all(isinstance(p.get(name), int | float) for p in kept)]
    return {name: [_short(p[name]) for p in kept] for name in names} if "step" in names else {}


def val_marks(folder: Path, trial_id: str) -> list[tuple[float, float]]:
    """(share of the budget, val metric) where a trial was scored on its way; a share that was repeated counts last."""
    lines = _read(folder / "trials" / f"{trial_id}.val.jsonl", lambda text: [json.loads(line) for line in _whole(text)])
    found = {float(line["share"]): float(line["val_metric"]) for line in lines}
    return [(share, found[share]) for share in sorted(found) if math.isfinite(found[share])]


def _whole(text: str) -> list[str]:
    """The lines that their writer finished."""
    return text.split("\n")[:-1]


def _read(path: Path, parse: Any) -> list[Any]:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a report is made without what cannot be read


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
