"""Whether a difference of the val metric between two trials is more than noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.evaluate.outcomes import Difference, compare_outcomes
from orchestrator.select.results import image_error, repeat_spread
from orchestrator.spec import Kind

# Student's t, 97.5 %, for 1 to 19 degrees of freedom: a sweep has 20 repeats at most.
T: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)

Seeds = tuple[float, int]  # standard error of a difference by the seeds, and its degrees of freedom


@dataclass(frozen=True)
class Lead:
    """How far a trial is ahead of another one.

    Attributes:
        value: difference of the val metrics, means over repeats.
        low, high: its 95 % interval.
        paired: whether the same val images were compared one by one.
        images, repeats: that it rests on.
    """

    value: float
    low: float
    high: float
    paired: bool
    images: int
    repeats: int

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        names = ("value", "low", "high", "paired", "images", "repeats", "certain")
        return {name: getattr(self, name) for name in names}


def lead_of(folder: Path, first: pd.Series, second: pd.Series, images: int, kind: Kind) -> Lead:
    """The lead of one row over another.

    Noise of the images is that of a paired bootstrap over the val images of both first runs, where they were kept; else
    that of two independent accuracies. Where trials were repeated, their spread is the noise of the seeds: that of the
    differences, where both were repeated equally often, with the same seeds and draws.

    Args:
        folder: the sweep's.
        first, second: rows of its trials.
        images: of val.
        kind: of the task.
    """
    rows = (first, second)
    value = float(first["val_metric"]) - float(second["val_metric"])
    paths = [folder / str(row["student_path"]) for row in rows]
    found = compare_outcomes(kind, *paths) if all(row["student_path"] for row in rows) else None
    error = 0.0 if found is not None else math.hypot(*(image_error(row, images) for row in rows))
    seeds = seed_noise(paired_gains(first, second), [repeat_spread(row) for row in rows])
    return with_interval(value, found, error, images, seeds, min(int(row["repeats"]) for row in rows))


def with_interval(
    value: float, found: Difference | None, error: float, images: int, seeds: Seeds | None, repeats: int
) -> Lead:
    """A lead with its interval: 1.96 standard errors by the images and Student's t of those by the seeds, which are
    independent: the root of the sum of their squares.

    Args:
        value: the lead.
        found: what comparing the same images one by one found, in place of the next two; None: they were not.
        error: standard error by the images.
        images: how many there are.
        seeds: as `seed_noise` gives them.
        repeats: that the lead rests on.
    """
    if found is not None:
        if seeds is None and abs(found.value - value) < 1e-9:  # the bootstrap's own interval need not be symmetric
            return Lead(value, found.low, found.high, True, found.images, 1)
        error, images = found.error, found.images
    half = 1.96 * error
    if seeds is not None:
        spread, freedom = seeds
        half = math.hypot(half, (T[freedom - 1] if freedom <= len(T) else 1.96) * spread)
    return Lead(value, value - half, value + half, found is not None, images, repeats)


def seed_noise(gains: Sequence[float], spreads: Sequence[tuple[float | None, int]]) -> Seeds | None:
    """Noise of a difference by the seeds; None where no spread is known.

    Args:
        gains: differences of runs with equal seeds; with fewer than two of them, sides are taken as independent.
        spreads: of both sides, the variance of a single run (None: not known), and how many runs there are.
    """
    if len(gains) > 1:
        return statistics.stdev(gains) / math.sqrt(len(gains)), len(gains) - 1
    known = [(variance, runs) for variance, runs in spreads if variance is not None]
    if not known:
        return None
    # A side without a spread of its own is taken to have the other's.
    parts = [((known[0][0] if variance is None else variance) / runs, runs) for variance, runs in spreads]
    total = sum(part for part, _ in parts)
    ((_, runs),) = known if len(known) == 1 else ((0.0, 2),)
    if len(known) == 1 or not total:
        return math.sqrt(total), max(runs - 1, 1)
    return math.sqrt(total), max(1, math.floor(total**2 / sum(part**2 / (n - 1) for part, n in parts)))


def paired_gains(first: pd.Series, second: pd.Series) -> list[float]:
    """Differences repeat by repeat; empty where there are no such pairs."""
    texts = [row.get("val_values") for row in (first, second)]
    lists = [json.loads(t) if isinstance(t, str) and t else [] for t in texts]
    if len(lists[0]) != len(lists[1]) or len(lists[0]) < 2:
        return []
    return [a - b for a, b in zip(*lists, strict=True)]


def lead_sentence(first: pd.Series, second: pd.Series, lead: Lead) -> str:
    """The runner-up, and whether its place may be chance."""
    name = f"The runner-up, {second['trial_id']} ({second['method']}),"
    if lead.value == 0:
        name += " has the same val metric, and stands behind by its parameters, latency or number;"
    else:
        name += f" is {abs(lead.value):.3f} {'below' if lead.value > 0 else 'above'};"
    how = "image by image" if lead.paired else "taking the images as independent"
    over = f" and {lead.repeats} repeats" if lead.repeats > 1 else ""
    verdict = "the lead is more than noise" if lead.certain else "their order may be chance"
    interval = f"{lead.low:+.3f} to {lead.high:+.3f}"
    return f"{name} 95 % interval of the lead {interval} over {lead.images:,} val images{over}, {how}: {verdict}."
