"""The best trials of a sweep once more, with the whole budget and several seeds: whether their order was luck."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.errors import UserError
from orchestrator.select.results import Direction, leaderboard, read_trials, top
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.sweep.choice import chosen_by
from orchestrator.sweep.ledger import open_sweep
from orchestrator.trial.plan import Cell, TrialConfig, same_key

SUFFIX = "-promoted"


def promoted_spec(
    folder: Path, count: int, seeds: int, metric: str | None = None, limits: Mapping[str, float] | None = None
) -> SweepSpec:
    """A sweep of the best trials of another one, beside it: as many runs of each, with seeds and draws of the labelled
    images that the first sweep did not have, so that what was chosen for its luck has none here. Nothing is stopped.

    Of trials of one configuration, which a small space has, the best one stands for all. What trials are chosen by is
    the first objective of the new sweep.

    Raises:
        UserError: if no trial can be chosen, or the metric is unknown.
    """
    spec = open_sweep(folder)
    name, direction = chosen_by(spec, metric)
    best = _distinct(read_trials(folder), name, direction, spec.limits.given | dict(limits or {})).head(count)
    begin = []
    for text in best["config"]:
        config = TrialConfig.from_json(text)
        cell = config.cell
        begin.append({"method": cell.method, "teacher": cell.teacher, "student": cell.student, "knobs": config.knobs})
    raw = spec.model_dump(mode="json")
    raw["name"] = f"{Path(folder).absolute().name[: 64 - len(SUFFIX)]}{SUFFIX}"
    first = {"metric": name, "mode": direction}
    raw["objectives"] = [first, *(other for other in raw["objectives"] if other["metric"] != name)]
    raw["search"] |= {
        "begin": begin,
        "trials": len(begin),
        "repeats": seeds,
        "seed": spec.search.seed + spec.search.repeats,
        "scheduler": "none",
        "sampler": "random",
        "warm_start": None,
        "time_budget_s": None,
        "device_hours": None,
        "budget": None,
    }
    raw["limits"] |= dict(limits or {})
    raw["task"]["draw"] += spec.search.repeats
    return parse_spec(raw, "the promoted sweep")


def check_promoted(spec: SweepSpec, folder: Path) -> bool:
    """Whether that sweep has begun already, so that it is continued.

    Raises:
        UserError: if another one of that name has.
    """
    if not (folder / "sweep.yaml").is_file():
        return False
    there = open_sweep(folder)
    if there.search != spec.search or there.objectives[0].metric != spec.objectives[0].metric:
        raise UserError(
            f"{str(folder)!r} has promoted other trials or seeds, or by another metric; remove it, or look at it with "
            f"`orchestrator best {folder}`."
        )
    return True


def ranks(folder: Path, promoted: Path) -> list[dict[str, Any]]:
    """Each promoted trial: its place, trial and val metric before, and after; in the order of after.

    Both places are by the metric that the trials were promoted by. Those that did not complete again have no new place,
    and stand last. What has no number is None.
    """
    spec = open_sweep(promoted)
    first = spec.objectives[0]
    before = _distinct(read_trials(folder), first.metric, first.direction, spec.limits.given)
    origins = {_key(text): row for text, (_, row) in zip(before["config"], before.iterrows(), strict=True)}
    places: dict[str, int] = {}
    for place, start in enumerate(spec.search.begin, 1):
        places.setdefault(same_key(Cell(start.method, start.teacher, start.student), start.knobs), place)
    again = read_trials(promoted)
    keys = again["config"].map(_key)
    again = again[keys.isin(places) & ~keys.duplicated()]  # a sweep that was continued for longer has others, too
    found = []
    for _, row in leaderboard(again, spec.objectives).iterrows():
        key = _key(row["config"])
        found.append(_change(origins[key], row, places[key]))
    return sorted(found, key=lambda f: (f["rank"] is None, f["rank"] or f["rank_before"]))


def _change(old: pd.Series, new: pd.Series, before: int) -> dict[str, Any]:
    """A trial as it was, at that place, and as it is now."""
    return {
        "trial_id": str(old["trial_id"]),
        "promoted_as": str(new["trial_id"]),
        "method": str(new["method"]),
        "rank_before": before,
        "val_before": _number(old["val_metric"]),
        "rank": None if pd.isna(new["rank"]) else int(new["rank"]),
        "val_metric": _number(new["val_metric"]),
        "val_sd": _number(new["val_sd"]),
        "repeats": int(new["repeats"]),
        "status": str(new["status"]),
        "reason": str(new["reason"]),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _distinct(frame: pd.DataFrame, metric: str, direction: Direction, limits: Mapping[str, float]) -> pd.DataFrame:
    """The trials that can be chosen, best first; of equal configurations the best one.

    Raises:
        UserError: if there is none.
    """
    best = top(frame, metric, direction, limits)
    return best[~best["config"].map(_key).duplicated()]


def _key(text: str) -> str:
    config = TrialConfig.from_json(text)
    return same_key(config.cell, config.knobs)


def rank_sentences(found: list[dict[str, Any]]) -> list[str]:
    """How the ranks changed, and by how much the first values were lucky."""
    done = [f for f in found if f["rank"] is not None]
    if not done:
        return []
    moved = [f for f in done if f["rank"] != f["rank_before"]]
    fall = sum(f["val_before"] - f["val_metric"] for f in done) / len(done)
    seeds = done[0]["repeats"]
    if moved:
        which = "; ".join(f"{f['trial_id']} ({f['method']}) {f['rank_before']} -> {f['rank']}" for f in moved)
        first = f"With {seeds} new seeds and draws of the labels the order changed: {which}."
    else:
        first = f"With {seeds} new seeds and draws of the labels the order stayed."
    word = "lower" if fall >= 0 else "higher"
    return [first, f"Their val metrics are {abs(fall):.3f} {word} on average than in the first sweep."]
