"""Reading a sweep's trials, ranking them, choosing one, and printing the leaderboard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import METRIC_NAMES, METRICS, Kind, Objective

TEXTS = ("method", "teacher", "student", "status", "reason", "config", "latency_setup", "student_path")
COUNTS = (
    "number",
    "seed",
    "params_total",
    "params_trained",
    "flops",
    "optimizer_steps",
    "images_seen",
    "teacher_forwards",
    "teacher_forwards_shared",
)
REALS = ("val_metric", "latency_ms", "latency_iqr_ms", "device_seconds", "store_seconds_saved")
COLUMNS = ("trial_id", *TEXTS, *COUNTS, *REALS)
STATUSES = ("complete", "running", "pruned", "failed")
Direction = Literal["max", "min"]


def read_trials(sweep_dir: str | Path) -> pd.DataFrame:
    """One row a trial, in the order they were proposed; no rows where no trial has been recorded yet.

    Counts are nullable integers, `teacher` and `student` None where there is none, other missing texts empty.

    Raises:
        UserError: if the folder is missing, is not a sweep's, or its table cannot be read.
    """
    folder = Path(sweep_dir)
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"There is no sweep folder {str(folder)!r}.{nearest(folder.name, near)}")
    if not (folder / "sweep.yaml").is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/sweep.yaml"))
        hint = f" The sweeps below it are {listed(inside)}." if inside else ""
        raise UserError(f"The folder {str(folder)!r} is not a sweep: it has no sweep.yaml.{hint}")
    path = folder / "trials.parquet"
    if not path.is_file():
        return _typed(pd.DataFrame(columns=list(COLUMNS)))
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"The table {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    missing = [c for c in COLUMNS if c not in frame.columns]
    if missing:
        raise UserError(f"The table {str(path)!r} is not a table of trials: it has no column {listed(missing)}.")
    return _typed(frame).sort_values("number", kind="stable", ignore_index=True)


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.copy()
    for column in ("trial_id", *TEXTS):
        missing = None if column in ("teacher", "student") else ""
        values = [str(v) if isinstance(v, str) else missing for v in frame[column]]
        frame[column] = pd.Series(values, index=frame.index, dtype=object)
    for column in COUNTS:
        frame[column] = pd.to_numeric(frame[column], errors="coerce").astype("Int64")
    for column in REALS:
        frame[column] = pd.to_numeric(frame[column], errors="coerce").astype("float64")
    return frame


def _values(frame: pd.DataFrame, column: str) -> np.ndarray:
    """[rows] float64, NaN where the value is missing or not finite."""
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype="float64", na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise UserError(f"Unknown metric {metric!r}; allowed: {listed(METRICS)}.{nearest(metric, METRICS)}")
    return metric


def _ranked(frame: pd.DataFrame, metric: str, direction: Direction) -> pd.DataFrame:
    """The rows, best first; ties go to fewer parameters, then lower latency, then the earlier trial."""
    sign = -1.0 if direction == "max" else 1.0
    keys = pd.DataFrame(
        {
            "value": sign * _values(frame, _known(metric)),
            "params": _values(frame, "params_total"),
            "latency": _values(frame, "latency_ms"),
            "id": frame["trial_id"].to_numpy(),
        }
    )
    return frame.iloc[keys.sort_values(["value", "params", "latency", "id"], na_position="last").index.to_numpy()]


def leaderboard(frame: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """All rows in the leaderboard's order with two more columns: `rank` (complete rows) and `pareto`.

    The first objective ranks; rows that are not complete follow by status.

    Raises:
        UserError: for an unknown metric.
    """
    first = objectives[0]
    rest = [s for s in dict.fromkeys([*STATUSES, *frame["status"]]) if s != "complete"]
    best = _ranked(frame[frame["status"] == "complete"], first.metric, first.direction)
    board = pd.concat([best, *(frame[frame["status"] == s] for s in rest)], ignore_index=True)
    ranked = (board["status"] == "complete").to_numpy() & ~np.isnan(_values(board, first.metric))
    board["rank"] = pd.array([i + 1 if ok else pd.NA for i, ok in enumerate(ranked)], dtype="Int64")
    board["pareto"] = board["trial_id"].isin(pareto(frame, objectives))
    return board


def pareto(frame: pd.DataFrame, objectives: Sequence[Objective]) -> list[str]:
    """Trials that no other complete trial matches in every objective and beats in one; best first.

    A row with a missing value in any objective does not take part. Of equal rows, all are kept.

    Raises:
        UserError: for an unknown metric.
    """
    complete = _ranked(frame[frame["status"] == "complete"], objectives[0].metric, objectives[0].direction)
    signs = [1.0 if o.direction == "min" else -1.0 for o in objectives]
    points = np.stack([s * _values(complete, _known(o.metric)) for s, o in zip(signs, objectives, strict=True)], axis=1)
    keep = []
    for trial, point in zip(complete["trial_id"], points, strict=True):
        dominated = ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
        if not np.isnan(point).any() and not dominated:
            keep.append(str(trial))
    return keep


def choose(
    frame: pd.DataFrame,
    metric: str,
    direction: Direction,
    max_params: int | None = None,
    max_latency_ms: float | None = None,
) -> pd.Series:
    """The best complete trial that has a student and keeps the limits.

    Ties go to fewer parameters, then lower latency, then the earlier trial.

    Raises:
        UserError: if no trial fits, with what comes nearest; or for an unknown metric.
    """
    _known(metric)
    candidates = _candidates(frame)
    fits = _within(candidates, max_params, max_latency_ms)
    if fits.empty:
        raise UserError(_nearest_miss(candidates, max_params, max_latency_ms))
    fits = fits[~np.isnan(_values(fits, metric))]
    if fits.empty:
        raise UserError(f"No complete trial that fits has a value of {metric}.")
    return _ranked(fits, metric, direction).iloc[0]


def _candidates(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        raise UserError("The sweep has no trials yet.")
    complete = frame[frame["status"] == "complete"]
    if complete.empty:
        raise UserError(f"No trial is complete: {_tally(frame)}.")
    kept = complete[[isinstance(p, str) and bool(p) for p in complete["student_path"]]]
    if kept.empty:
        raise UserError("No complete trial has kept its student.")
    return kept


def _within(frame: pd.DataFrame, max_params: int | None, max_latency_ms: float | None) -> pd.DataFrame:
    ok = np.ones(len(frame), dtype=bool)
    if max_params is not None:
        ok &= _values(frame, "params_total") <= max_params
    if max_latency_ms is not None:
        ok &= _values(frame, "latency_ms") <= max_latency_ms
    return frame[ok]


def _nearest_miss(frame: pd.DataFrame, max_params: int | None, max_latency_ms: float | None) -> str:
    small = None if max_params is None else f"at most {max_params:,} parameters"
    fast = None if max_latency_ms is None else f"a latency of at most {max_latency_ms:g} ms"
    if small and _within(frame, max_params, None).empty:
        return f"No complete trial has {small}; {_extreme(frame, 'params_total')}."
    if fast and _within(frame, None, max_latency_ms).empty:
        return f"No complete trial has {fast}; {_extreme(frame, 'latency_ms')}."
    among_small = _extreme(_within(frame, max_params, None), "latency_ms")
    among_fast = _extreme(_within(frame, None, max_latency_ms), "params_total")
    return (
        f"No complete trial has both {small} and {fast}: of those that are small enough, {among_small}; "
        f"of those that are fast enough, {among_fast}."
    )


def _extreme(frame: pd.DataFrame, metric: Literal["params_total", "latency_ms"]) -> str:
    word, unit = ("smallest has", "") if metric == "params_total" else ("fastest takes", " ms")
    known = frame[~np.isnan(_values(frame, metric))]
    if known.empty:
        return "none has a measured latency" if metric == "latency_ms" else "none has a parameter count"
    row = _ranked(known, metric, "min").iloc[0]
    value = f"{int(row[metric]):,}" if metric == "params_total" else f"{float(row[metric]):.4g}"
    return f"the {word} {value}{unit} ({row['trial_id']})"


def margin_note(
    frame: pd.DataFrame,
    row: pd.Series,
    metric: str,
    images: int,
    max_params: int | None = None,
    max_latency_ms: float | None = None,
    kind: Kind = "classification",
) -> str | None:
    """A sentence where the choice is within the noise of the val images, else None.

    It is where the best trial of another method is less than one standard error of an accuracy over `images`
    images away: sqrt(p (1 - p) / images), the larger one of the two.

    Args:
        frame: all trials.
        row: the chosen one.
        metric: what it was chosen by; only `val_metric` has this noise.
        images: number of val images.
        max_params: limit that the other trial must keep too.
        max_latency_ms: limit that the other trial must keep too.
        kind: of the task; the metric of another kind has no such simple error, and is treated as an accuracy.
    """
    if _known(metric) != "val_metric" or images < 1:
        return None
    others = _within(_candidates(frame), max_params, max_latency_ms)
    others = others[(others["method"] != row["method"]).to_numpy() & ~np.isnan(_values(others, metric))]
    if others.empty:
        return None
    second = _ranked(others, metric, "max").iloc[0]
    best, other = float(row[metric]), float(second[metric])
    error = max(math.sqrt(max(p * (1 - p), 0.0) / images) for p in (best, other))
    difference = abs(best - other)
    if difference > 0 and difference >= error:
        return None
    return (
        f"The best trial of another method, {second['trial_id']} ({second['method']}), is {difference:.3f} away: less "
        f"than one standard error ({error:.3f}{as_accuracy(kind)} on {images:,} val images), so their order may be "
        "chance."
    )


def as_accuracy(kind: Kind) -> str:
    """A remark beside a standard error that was computed as if a metric were an accuracy."""
    return "" if kind == "classification" else ", as if it were an accuracy,"


def short_name(model: str | None) -> str:
    """`vit_tiny_patch16_224` of `timm/vit_tiny_patch16_224.augreg`; the file's stem of `local:PATH`."""
    if not isinstance(model, str) or not model:
        return ""
    if model.startswith("local:"):
        return Path(model.removeprefix("local:")).stem
    return model.rpartition("/")[2].partition(".")[0]


def _pair(row: Any) -> str:
    teacher, student = short_name(row["teacher"]), short_name(row["student"])
    if teacher and student:
        return f"{teacher} → {student}"
    return f"{teacher} → itself" if teacher else student or "-"


def _tally(frame: pd.DataFrame) -> str:
    counts = frame["status"].value_counts()
    order = [s for s in dict.fromkeys([*STATUSES, *counts.index]) if counts.get(s, 0)]
    return listed(f"{counts[s]:,} {s}" for s in order)


def _count(value: Any) -> str:
    """`987`, `12.3k`, `4.65M`; `-` where missing."""
    if pd.isna(value):
        return "-"
    value = float(value)
    for above, scale, unit in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= above:
            return f"{_significant(value / scale)}{unit}"
    return f"{value:.0f}"


def _real(value: Any, digits: int) -> str:
    return "-" if pd.isna(value) else f"{float(value):,.{digits}f}"


def _significant(value: float, like: float | None = None) -> str:
    """Three significant digits without an exponent: `0.0123`, `4.56`, `12,346`; or as many decimals as `like` gets."""
    if pd.isna(value):
        return "-"
    measure = abs(float(value if like is None or pd.isna(like) else like))
    digits = max(0, 2 - math.floor(math.log10(measure))) if measure else 0
    return f"{float(value):,.{min(digits, 4)}f}"


def print_leaderboard(
    console: Console,
    frame: pd.DataFrame,
    objectives: Sequence[Objective] = (Objective(),),
    *,
    title: str = "",
    limit: int | None = None,
    kind: Kind = "classification",
) -> None:
    """Prints complete trials by rank, the others below with their reasons, and the units.

    Args:
        console: where to; made for 100 columns or more.
        frame: as `read_trials` gives it.
        objectives: the sweep's.
        title: a line above.
        limit: show only the best so many complete trials.
        kind: of the task: what the val metric is.
    """
    if title:
        console.print(Text(title, style="bold"))
    if frame.empty:
        console.print("The sweep has no trials yet.")
        return
    board = leaderboard(frame, objectives)
    complete = board[board["status"] == "complete"]
    shown = complete if limit is None else complete.head(limit)
    if len(shown):
        console.print(_complete_table(shown, objectives, console.width))
    if len(shown) < len(complete):
        console.print(f"... and {len(complete) - len(shown):,} more complete trials.")
    others = board[board["status"] != "complete"]
    if len(others):
        console.print()
        console.print(_others_table(others, console.width))
    console.print()
    for line in [f"Trials: {_tally(frame)}.", *(_footnotes(shown, objectives, kind) if len(shown) else [])]:
        console.print(Text(line, style="dim"))


def _table(width: int) -> Table:
    padding = (0, 1 if width >= 120 else 0, 0, 0)
    return Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False, header_style="bold")


def _complete_table(rows: pd.DataFrame, objectives: Sequence[Objective], width: int) -> Table:
    several = len(objectives) > 1
    trained = any(o.metric == "params_trained" for o in objectives)
    table = _table(width)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("trial", no_wrap=True)
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("teacher →\nstudent", overflow="fold", min_width=12)
    table.add_column("val", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    if trained:
        table.add_column("trained", justify="right", no_wrap=True)
    for name in ("MFLOPs", "latency\nms (IQR)", "steps", "device\ns", "teacher fw\npaid/shared"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        rank = "" if pd.isna(row["rank"]) else f"{row['rank']}{'*' if several and row['pareto'] else ''}"
        cells = [rank, row["trial_id"], row["method"], _pair(row), _real(row["val_metric"], 4)]
        cells.append(_count(row["params_total"]))
        if trained:
            cells.append(_count(row["params_trained"]))
        cells += [
            "-" if pd.isna(row["flops"]) else _significant(row["flops"] / 1e6),
            f"{_significant(row['latency_ms'])} ({_significant(row['latency_iqr_ms'], row['latency_ms'])})",
            _count(row["optimizer_steps"]),
            _real(row["device_seconds"], 1),
            f"{_count(row['teacher_forwards'])}/{_count(row['teacher_forwards_shared'])}",
        ]
        table.add_row(*(Text(str(cell)) for cell in cells), style="bold" if row["rank"] == 1 else "")
    return table


def _others_table(rows: pd.DataFrame, width: int) -> Table:
    table = _table(width)
    for name in ("trial", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("teacher → student", overflow="fold", min_width=12)
    table.add_column("device s", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold", min_width=20)
    styles = {"failed": "red", "pruned": "yellow"}
    for row in rows.to_dict("records"):
        cells = (row["method"], _pair(row), _real(row["device_seconds"], 1), row["reason"] or "-")
        status = Text(str(row["status"]), style=styles.get(row["status"], ""))
        table.add_row(Text(str(row["trial_id"])), status, *(Text(str(cell)) for cell in cells))
    return table


def _footnotes(rows: pd.DataFrame, objectives: Sequence[Objective], kind: Kind) -> list[str]:
    first = objectives[0]
    word = "largest" if first.direction == "max" else "smallest"
    notes = [f"Ranked by {first.metric}, {word} first; ties by parameters, then latency."]
    notes.append(f"val: the {METRIC_NAMES[kind]} on val.")
    if len(objectives) > 1:
        notes.append(f"* on the Pareto front of {listed(o.metric for o in objectives)}.")
    notes.append("MFLOPs: 2 per multiply-add, for one image.")
    setups = sorted({s for s in rows["latency_setup"] if isinstance(s, str) and s})
    if len(setups) == 1:
        notes.append(f"Latency: median and interquartile range; {setups[0]}.")
    elif setups:
        notes.append(
            f"Latency: median and interquartile range; the setups differ and do not compare: {'; '.join(setups)}."
        )
    saved = float(np.nansum(_values(rows, "store_seconds_saved")))
    notes.append(
        "Device s and teacher forwards paid: this trial's own; shared: forwards that it read from the store"
        + (f" (which saved these trials {saved:,.1f} s)." if saved > 0 else ".")
    )
    return notes
