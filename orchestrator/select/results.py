"""Reading a sweep's trials, ranking them, and choosing one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from orchestrator.errors import UserError, WorkError, listed, nearest
from orchestrator.files import read_facts
from orchestrator.spec import LATENCY, METRICS, Kind, Objective, better, shown

TEXTS = ("method", "teacher", "student", "status", "reason", "config", "latency_setup", "student_path")
COUNTS = (
    "number",
    "repeats",
    "seed",
    "params_total",
    "params_trained",
    "flops",
    "optimizer_steps",
    "images_seen",
    "teacher_forwards",
    "teacher_forwards_shared",
)
REALS = (
    "val_metric",
    "val_sd",
    "latency_ms",
    "latency_iqr_ms",
    "latency_low_ms",
    "latency_high_ms",
    "memory_mb",
    "model_mb",
    "device_seconds",
    "store_seconds_saved",
)
COLUMNS = ("trial_id", *TEXTS, *COUNTS, *REALS)
LATER = {
    "repeats": 1,
    "val_sd": math.nan,
    "latency_low_ms": math.nan,
    "latency_high_ms": math.nan,
    "memory_mb": math.nan,
    "model_mb": math.nan,
}  # columns that older tables lack
STATUSES = ("complete", "infeasible", "running", "pruned", "failed")
Direction = Literal["max", "min"]


def read_trials(sweep_dir: str | Path) -> pd.DataFrame:
    """One row a trial, in the order they were proposed; no rows where no trial has been recorded yet.

    The table is written now and then: rows that it does not have yet, as while a sweep runs or after its driver was
    killed, are read from their own files. Counts are nullable integers, `teacher` and `student` None where there is
    none, other missing texts empty.

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
    frame = _table(folder / "trials.parquet")
    rows = _rows_beside(folder, list(frame.loc[frame["status"] != "running", "trial_id"]))
    if rows:
        kept = frame[~frame["trial_id"].isin([row["trial_id"] for row in rows])].to_dict("records")
        columns = list(dict.fromkeys([*frame.columns, *(name for row in rows for name in row)]))
        frame = pd.DataFrame([*kept, *rows], columns=columns)
    return _typed(frame).sort_values("number", kind="stable", ignore_index=True)


def _table(path: Path) -> pd.DataFrame:
    """The table of trials; one without rows where there is none.

    Raises:
        UserError: if it cannot be read.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(COLUMNS))
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"The table {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    frame = frame.assign(**{name: value for name, value in LATER.items() if name not in frame.columns})
    missing = [c for c in COLUMNS if c not in frame.columns]
    if missing:
        raise UserError(f"The table {str(path)!r} is not a table of trials: it has no column {listed(missing)}.")
    return frame


def _rows_beside(folder: Path, ended: Collection[str]) -> list[dict[str, Any]]:
    """The rows in files of their own, without those of `ended` trials, which never change again."""
    places = (folder / "trials", folder / "trials" / "running")
    names = {path.stem for place in places for path in place.glob("t*.json")} - set(ended)
    found = []
    for name in sorted(names):
        # A trial may end between the look at where rows of ended ones lie and that at where it ran.
        looks = (read_facts(place / f"{name}.json") for place in (*places, places[0]))
        row = next((facts for facts in looks if facts.get("trial_id") == name), None)
        found += [LATER | row] if row is not None else []
    return found


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


def check_ended(folder: Path, frame: pd.DataFrame, whole: bool) -> None:
    """Refuses to take a sweep for done that was broken off.

    Args:
        folder: the sweep's.
        frame: its trials, once nothing runs them.
        whole: whether it came to its end.

    Raises:
        WorkError: with the command that continues it.
    """
    running = int((frame["status"] == "running").sum())
    if whole and not running:
        return
    trials = f"{running} trials were" if running > 1 else "a trial was"
    when = f"while {trials} running" if running else "when trials were still to come"
    raise WorkError(f"Stopped {when}; continue with `orchestrator resume {folder}`.")


def numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    """[rows] float64, NaN where the value is missing or not finite."""
    values = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype="float64", na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def latencies(frame: pd.DataFrame) -> list[str]:
    """The latencies that a sweep's trials have, `latency_ms` first."""
    return [LATENCY, *(c for c in frame.columns if str(c).startswith(f"{LATENCY}_"))]


def known_metric(metric: str, frame: pd.DataFrame) -> str:
    """The metric, if trials of the frame can have it.

    Raises:
        UserError: for one that is unknown.
    """
    if metric not in METRICS and metric not in latencies(frame):
        known = list(dict.fromkeys([*METRICS, *latencies(frame)]))
        raise UserError(f"Unknown metric {metric!r}; allowed: {listed(known)}.{nearest(metric, known)}")
    return metric


def ranked(frame: pd.DataFrame, metric: str, direction: Direction) -> pd.DataFrame:
    """The rows, best first; ties go to fewer parameters, then lower latency, then the earlier trial."""
    sign = -1.0 if direction == "max" else 1.0
    keys = pd.DataFrame(
        {
            "value": sign * numbers(frame, known_metric(metric, frame)),
            "params": numbers(frame, "params_total"),
            "latency": numbers(frame, "latency_ms"),
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
    best = ranked(frame[frame["status"] == "complete"], first.metric, first.direction)
    board = pd.concat([best, *(frame[frame["status"] == s] for s in rest)], ignore_index=True)
    counted = (board["status"] == "complete").to_numpy() & ~np.isnan(numbers(board, first.metric))
    board["rank"] = pd.array([i + 1 if ok else pd.NA for i, ok in enumerate(counted)], dtype="Int64")
    board["pareto"] = board["trial_id"].isin(pareto(frame, objectives))
    return board


def pareto(frame: pd.DataFrame, objectives: Sequence[Objective]) -> list[str]:
    """Trials that no other complete trial matches in every objective and beats in one; best first.

    A row with a missing value in any objective does not take part. Of equal rows, all are kept.

    Raises:
        UserError: for an unknown metric.
    """
    complete = ranked(frame[frame["status"] == "complete"], objectives[0].metric, objectives[0].direction)
    signs = [1.0 if o.direction == "min" else -1.0 for o in objectives]
    points = np.stack(
        [s * numbers(complete, known_metric(o.metric, frame)) for s, o in zip(signs, objectives, strict=True)], axis=1
    )
    keep = []
    for trial, point in zip(complete["trial_id"], points, strict=True):
        dominated = ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
        if not np.isnan(point).any() and not dominated:
            keep.append(str(trial))
    return keep


def choose(
    frame: pd.DataFrame, metric: str, direction: Direction, limits: Mapping[str, float] | None = None
) -> pd.Series:
    """The best trial that has a student and keeps the limits.

    Ties go to fewer parameters, then lower latency, then the earlier trial.

    Args:
        frame: all trials.
        metric: what to choose by.
        direction: what is better.
        limits: the most of each metric, or of one that is better when larger the least. Given, they take the place of
            the sweep's: a trial that was infeasible under those is a candidate again.

    Raises:
        UserError: if no trial fits, with what comes nearest; or for an unknown metric.
    """
    return top(frame, metric, direction, limits).iloc[0]


def top(
    frame: pd.DataFrame, metric: str, direction: Direction, limits: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """The trials that `choose` chooses from, best first; at least one.

    Raises:
        UserError: as `choose`.
    """
    known_metric(metric, frame)
    limits = {known_metric(name, frame): value for name, value in (limits or {}).items()}
    candidates = candidates_of(frame, bool(limits))
    fits = within(candidates, limits)
    if fits.empty:
        raise UserError(nearest_miss(candidates, limits))
    fits = fits[~np.isnan(numbers(fits, metric))]
    if fits.empty:
        raise UserError(f"No complete trial that fits has a value of {metric}.")
    return ranked(fits, metric, direction)


def candidates_of(frame: pd.DataFrame, infeasible: bool = False) -> pd.DataFrame:
    """The trials that can be chosen.

    Args:
        frame: all trials.
        infeasible: also those that exceeded a limit after training, for whoever sets other limits.

    Raises:
        UserError: if there are none.
    """
    if frame.empty:
        raise UserError("The sweep has no trials yet.")
    complete = frame[frame["status"].isin(["complete", *(["infeasible"] if infeasible else [])])]
    if complete.empty:
        raise UserError(f"No trial is complete: {tally(frame)}.{_first_reason(frame)}")
    kept = complete[[isinstance(p, str) and bool(p) for p in complete["student_path"]]]
    if kept.empty and (frame["status"] != "complete").all():
        raise UserError(f"No trial is complete: {tally(frame)}.{_first_reason(frame)}")
    if kept.empty:
        raise UserError("No complete trial has kept its student.")
    return kept


def _first_reason(frame: pd.DataFrame) -> str:
    """Why the first infeasible trial is so, where no other is complete."""
    reasons = frame.loc[frame["status"] == "infeasible", "reason"]
    return "" if reasons.empty else f" The first: {reasons.iloc[0]}."


def within(frame: pd.DataFrame, limits: Mapping[str, float]) -> pd.DataFrame:
    """The rows that keep every limit; what was not measured keeps none."""
    ok = np.ones(len(frame), dtype=bool)
    for metric, limit in limits.items():
        values = numbers(frame, metric)
        ok &= values >= limit if better(metric) == "max" else values <= limit
    return frame[ok]


def nearest_miss(frame: pd.DataFrame, limits: Mapping[str, float]) -> str:
    """Why no row keeps the limits, with what comes nearest."""
    for metric, limit in limits.items():
        if within(frame, {metric: limit}).empty:
            return f"No complete trial has {clause_of(metric, limit)}; {_extreme(frame, metric)}."
    ends = [
        f"of those that keep the others, {_extreme(others, metric)}"
        for metric in limits
        if not (others := within(frame, {m: v for m, v in limits.items() if m != metric})).empty
    ]
    clauses = listed(clause_of(m, v) for m, v in limits.items())
    both = "both " if len(limits) == 2 else ""
    return f"No complete trial has {both}{clauses}{': ' if ends else ''}{'; '.join(ends)}."


def clause_of(metric: str, limit: float) -> str:
    """`a latency of at most 5 ms`."""
    most = "at least" if better(metric) == "max" else "at most"
    if metric == "params_total":
        return f"{most} {limit:,.0f} parameters"
    return f"{'a latency of' if metric == 'latency_ms' else metric + ' of'} {most} {shown(metric, float(limit))}"


def _extreme(frame: pd.DataFrame, metric: str) -> str:
    known = frame[~np.isnan(numbers(frame, metric))]
    words = {"params_total": "the smallest has", "latency_ms": "the fastest takes"}
    if known.empty:
        missing = {"latency_ms": "measured latency", "params_total": "parameter count"}.get(
            metric, f"value of {metric}"
        )
        return f"none has a {missing}"
    row = ranked(known, metric, better(metric)).iloc[0]
    return f"{words.get(metric, 'the nearest has')} {shown(metric, float(row[metric]))} ({row['trial_id']})"


def margin_note(
    frame: pd.DataFrame,
    row: pd.Series,
    metric: str,
    images: int,
    limits: Mapping[str, float] | None = None,
    kind: Kind = "classification",
) -> str | None:
    """A sentence where the choice is within the noise of the val images, else None.

    It is where the best trial of another method is less than one standard error away, the larger one of the two: see
    `standard_error`.

    Args:
        frame: all trials.
        row: the chosen one.
        metric: what it was chosen by; only `val_metric` has this noise.
        images: number of val images.
        limits: that the other trial must keep too.
        kind: of the task; the metric of another kind has no such simple error, and is treated as an accuracy.
    """
    if known_metric(metric, frame) != "val_metric" or images < 1:
        return None
    others = within(candidates_of(frame, bool(limits)), limits or {})
    others = others[(others["method"] != row["method"]).to_numpy() & ~np.isnan(numbers(others, metric))]
    if others.empty:
        return None
    second = ranked(others, metric, "max").iloc[0]
    best, other = float(row[metric]), float(second[metric])
    error = max(standard_error(r, images) for r in (row, second))
    difference = abs(best - other)
    if difference > 0 and difference >= error:
        return None
    return (
        f"The best trial of another method, {second['trial_id']} ({second['method']}), is {difference:.3f} away: less "
        f"than one standard error ({error:.3f}{as_accuracy(kind)} on {images:,} val images{over_repeats(row)}), so "
        "their order may be chance."
    )


def standard_error(row: pd.Series, images: int) -> float:
    """Of a val metric p as an accuracy over `images` images, and where a trial was repeated, of the mean over its r
    repeats as well, which differ in seed and labelled images: sqrt(p (1 - p) / images + sd^2 / r).
    """
    spread, repeats = repeat_spread(row)
    return math.sqrt(image_error(row, images) ** 2 + (spread or 0.0) / repeats)


def image_error(row: pd.Series, images: int) -> float:
    """Standard error of a val metric as an accuracy over `images` images, of the images alone."""
    p = float(row["val_metric"])
    return math.sqrt(max(p * (1 - p), 0.0) / images)


def repeat_spread(row: pd.Series) -> tuple[float | None, int]:
    """Variance of a single run of a trial, and how many there are; None where it was not repeated."""
    repeats, sd = int(row["repeats"]), float(row["val_sd"])
    return (sd**2, repeats) if repeats > 1 and math.isfinite(sd) else (None, 1)


def over_repeats(row: pd.Series) -> str:
    """` and over 3 repeats`, where there are several."""
    return f" and over {int(row['repeats'])} repeats" if int(row["repeats"]) > 1 else ""


def tally(frame: pd.DataFrame) -> str:
    """`3 complete and 1 failed`."""
    counts = frame["status"].value_counts()
    order = [s for s in dict.fromkeys([*STATUSES, *counts.index]) if counts.get(s, 0)]
    return listed(f"{counts[s]:,} {s}" for s in order)


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
