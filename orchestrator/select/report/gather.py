"""What a report says, before it is a page: numbers of `trials.parquet`, sums of them, and what lies beside students."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.evaluate.details import FILE, error_tiles
from orchestrator.select.leaderboard import footnotes
from orchestrator.select.report.curves import losses, val_marks
from orchestrator.select.results import latencies, leaderboard, numbers, pareto, tally
from orchestrator.spec import LATENCY, METRIC_NAMES, Objective, SweepSpec

AXES = {
    "params_total": "parameters",
    "latency_ms": "latency, ms",
    "flops": "FLOPs of an image",
    "memory_mb": "peak memory, MB",
    "model_mb": "file, MB",
    "device_seconds": "device-seconds",
}


def axis_title(metric: str) -> str:
    """Of a measured metric, for people."""
    return AXES.get(metric) or f"latency, ms: {metric.removeprefix(f'{LATENCY}_')}"


DETAILED = 24  # trials whose results by class are shown
PICTURED = 6  # trials whose worst errors are shown
CLASSES = 60  # classes of a trial that are shown, the worst ones
CONFUSED = 30  # classes up to which the confusion matrix is shown


@dataclass(frozen=True)
class Importance:
    """How much of the val metric's differences a choice explains.

    Attributes:
        among: the method whose trials were compared, or `all methods`.
        trials: how many were.
        shares: by knob, largest first; they sum to 1.
        reason: why there are none.
    """

    among: str
    trials: int
    shares: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Study:
    """What the search knows and the trials' table does not.

    Attributes:
        recommended: the trial to take; None: there is none.
        sentences: the recommendation, or why there is none.
        importances: of all methods' choices first, then of each method's knobs.
        seconds: that the sweep has run, in all its lives.
        commands: what reproduces it and goes on from it.
        yaml: the sweep file as it was resolved.
    """

    recommended: str | None
    sentences: Sequence[str]
    importances: Sequence[Importance]
    seconds: float
    commands: Sequence[tuple[str, str]]
    yaml: str


@dataclass(frozen=True)
class Gathered:
    """Everything that a report shows.

    Attributes:
        folder: the sweep's.
        board: all rows in the leaderboard's order with `rank` and `pareto`.
        fronts: by measured metric of `AXES`, the trials on the front of the val metric and it, best first.
        best: the best complete trial of each method, best first.
        costs: by what became of the trials, by method, and in all.
        curves: by trial, parts of the loss and marks of the val metric.
        details: of some trials, results by class and worst errors.
    """

    folder: Path
    spec: SweepSpec
    study: Study
    made: str
    metric: str
    board: pd.DataFrame
    fronts: dict[str, list[str]]
    best: pd.DataFrame
    costs: dict[str, list[dict[str, Any]]]
    curves: dict[str, dict[str, Any]]
    details: list[dict[str, Any]]
    notes: list[str]
    counts: str
    running: bool


def gather(folder: Path, spec: SweepSpec, frame: pd.DataFrame, study: Study, made: str, images: bool) -> Gathered:
    """Everything that a report shows.

    Args:
        folder: the sweep's.
        spec: its file.
        frame: as `read_trials` gives it.
        study: what the search knows.
        made: when the report is made, as a person reads it.
        images: whether worst errors are shown as pictures.
    """
    board = leaderboard(frame, spec.objectives)
    complete = board[board["status"] == "complete"]
    best = complete.drop_duplicates("method") if len(complete) else complete
    axes = list(dict.fromkeys([m for name in AXES for m in (latencies(board) if name == LATENCY else [name])]))
    measured = [m for m in axes if len(complete) and not np.isnan(numbers(complete, m)).all()] or ["params_total"]
    fronts = {m: pareto(frame, [Objective(), Objective(metric=m)]) if len(complete) else [] for m in measured}
    curves = {}
    for _, row in board.iterrows():
        curve = {"losses": losses(folder, row), "val": val_marks(folder, str(row["trial_id"]))}
        if curve["losses"] or curve["val"]:
            curves[str(row["trial_id"])] = curve
    shown = dict.fromkeys([*([study.recommended] if study.recommended else []), *best["trial_id"]])
    shown |= dict.fromkeys(trial for front in fronts.values() for trial in front)
    details: list[dict[str, Any]] = []
    for trial in list(shown)[:DETAILED]:
        row = complete[complete["trial_id"] == trial].iloc[0]
        found = _details(folder, row, images and len(details) < PICTURED)
        if found is not None:
            details.append(found)
    return Gathered(
        folder=folder,
        spec=spec,
        study=study,
        made=made,
        metric=METRIC_NAMES[spec.task.kind],
        board=board,
        fronts=fronts,
        best=best,
        costs=costs(frame),
        curves=curves,
        details=details,
        notes=footnotes(complete, spec.objectives, spec.task.kind) if len(complete) else [],
        counts=tally(frame) if len(frame) else "no trial yet",
        running=bool((frame["status"] == "running").any()),
    )


def knobs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a trial's configuration; {} where it cannot be read."""
    try:
        knobs = json.loads(row["config"])["knobs"]
    except (ValueError, KeyError, TypeError):
        return {}
    return knobs if isinstance(knobs, dict) else {}


def costs(frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Sums over trials: device-seconds spent, store-seconds paid and saved, teacher forwards paid and shared.

    Keys are `status`, `method` and `all`; each sum has `name`, `trials` and the sums; one that no row knows is NaN.
    """
    groups = {"status": [s for s, _ in frame.groupby("status")], "method": sorted(frame["method"].unique())}
    found = {key: [_sums(str(name), frame[frame[key] == name]) for name in names] for key, names in groups.items()} | {
        "all": [_sums("all", frame)]
    }
    for rows in found.values():
        rows.sort(key=lambda r: -r["device_seconds"])
    return found


SUMS = ("device_seconds", "store_seconds_paid", "store_seconds_saved", "teacher_forwards", "teacher_forwards_shared")


def _sums(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    sums: dict[str, Any] = {"name": name, "trials": len(rows)}
    for column in SUMS:
        values = numbers(rows, column) if column in rows.columns else np.array([math.nan])
        sums[column] = math.nan if len(values) and np.isnan(values).all() else float(np.nansum(values))
    return sums


def _details(folder: Path, row: pd.Series, pictures: bool) -> dict[str, Any] | None:
    """Results by class of one trial, worst class first; None where none were recorded or they cannot be read."""
    place = folder / str(row["student_path"])
    try:
        found = json.loads((place / FILE).read_text(encoding="utf-8"))
        names = [c["name"] for c in found["classes"]]
        classes = sorted(found["classes"], key=lambda c: (c["value"] is None, c["value"]))
        tiles = error_tiles(place) if pictures else []
        worst = [
            {
                "row": error["row"],
                "truth": [names[c] for c in error["truth"]],
                "said": [names[c] for c in error["said"]],
                "value": error["value"],
                "picture": _data_uri(tiles[at]) if at < len(tiles) else None,
            }
            for at, error in enumerate(found["worst"])
        ]
        return {
            "trial_id": str(row["trial_id"]),
            "method": str(row["method"]),
            "images": found["images"],
            "names": names,
            "classes": classes[:CLASSES],
            "left_out": max(0, len(classes) - CLASSES),
            "confusion": found["confusion"] if found["confusion"] and len(names) <= CONFUSED else None,
            "confused": _confused(found["confusion"], names) if found["confusion"] else [],
            "worst": worst,
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _confused(confusion: list[list[int]], names: list[str], most: int = 8) -> list[tuple[str, str, int]]:
    """The pairs (true class, said class, images) that are confused most often."""
    pairs = [(n, t, s) for t, row in enumerate(confusion) for s, n in enumerate(row) if n and t != s]
    return [(names[t], names[s], n) for n, t, s in sorted(pairs, key=lambda p: (-p[0], p[1], p[2]))[:most]]


def _data_uri(tile: Any) -> str:
    stream = io.BytesIO()
    tile.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
