"""The best trials of a sweep once more, with the whole budget and several seeds: whether their order was luck."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.select.results import read_trials, top
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.sweep.ledger import open_sweep
from orchestrator.trial.plan import TrialConfig

SUFFIX = "-promoted"


def promoted_spec(
    folder: Path, count: int, seeds: int, metric: str | None = None, limits: Mapping[str, float] | None = None
) -> SweepSpec:
    """A sweep of the best trials of another one, beside it: as many runs of each, with seeds and draws of the labelled
    images that the first sweep did not have, so that what was chosen for its luck has none here. Nothing is stopped.

    Raises:
        UserError: if no trial can be chosen.
    """
    spec = open_sweep(folder)
    first = spec.objectives[0]
    name, direction = metric or first.metric, first.direction
    best = top(read_trials(folder), name, direction, spec.limits.given | dict(limits or {})).head(count)
    begin = []
    for text in best["config"]:
        config = TrialConfig.from_json(text)
        cell = config.cell
        begin.append({"method": cell.method, "teacher": cell.teacher, "student": cell.student, "knobs": config.knobs})
    raw = spec.model_dump(mode="json")
    raw["name"] = f"{Path(folder).absolute().name[: 64 - len(SUFFIX)]}{SUFFIX}"
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
    if open_sweep(folder).search != spec.search:
        raise UserError(
            f"{str(folder)!r} has promoted other trials or seeds; remove it, or look at it with "
            f"`orchestrator best {folder}`."
        )
    return True


def ranks(folder: Path, promoted: Path) -> list[dict[str, Any]]:
    """Each promoted trial: its place, trial and val metric before, and after; in the order of after.

    Those that did not complete again have no new place, and stand last.
    """
    spec, again = open_sweep(promoted), read_trials(promoted)
    before = read_trials(folder)
    by_config = {_key(text): row for text, (_, row) in zip(before["config"], before.iterrows(), strict=True)}
    first = spec.objectives[0]
    found = []
    order = top(again, first.metric, first.direction, spec.limits.given)["trial_id"].tolist()
    for _, row in again.iterrows():
        old = by_config[_key(row["config"])]
        place = order.index(row["trial_id"]) + 1 if row["trial_id"] in order else None
        facts = {
            "trial_id": str(old["trial_id"]),
            "promoted_as": str(row["trial_id"]),
            "method": str(row["method"]),
            "rank_before": int(row["number"]) + 1,
            "val_before": float(old["val_metric"]),
            "rank": place,
            "val_metric": float(row["val_metric"]),
            "val_sd": float(row["val_sd"]),
            "repeats": int(row["repeats"]),
            "status": str(row["status"]),
            "reason": str(row["reason"]),
        }
        found.append(facts)
    return sorted(found, key=lambda f: (f["rank"] is None, f["rank"] or f["rank_before"]))


def _key(text: str) -> str:
    config = TrialConfig.from_json(text)
    return json.dumps([config.cell.method, config.cell.teacher, config.cell.student, config.knobs], sort_keys=True)


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
    return [first, f"Their val metrics are {abs(fall):.3f} {word} on average than those they were chosen by."]
