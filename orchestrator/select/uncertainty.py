"""Whether a difference of the val metric between two trials is more than noise."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.evaluate.outcomes import compare_outcomes
from orchestrator.select.results import standard_error
from orchestrator.spec import Kind

# Student's t, 97.5 %, for 1 to 19 degrees of freedom: a sweep has 20 repeats at most.
T: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


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
    that of two independent accuracies. Where both were repeated equally often, with the same seeds and draws, the
    differences of the repeats add their own, with Student's t.

    Args:
        folder: the sweep's.
        first, second: rows of its trials.
        images: of val.
        kind: of the task.
    """
    value = float(first["val_metric"]) - float(second["val_metric"])
    paths = [folder / str(row["student_path"]) for row in (first, second)]
    found = compare_outcomes(kind, *paths) if all(row["student_path"] for row in (first, second)) else None
    gains = paired_gains(first, second)
    quantile = 1.96
    if found is not None:
        error = found.error
        if gains:
            mean = sum(gains) / len(gains)
            variance = sum((g - mean) ** 2 for g in gains) / (len(gains) - 1)
            error = math.sqrt(error**2 + variance / len(gains))
            quantile = T[len(gains) - 2]
        elif abs(found.value - value) < 1e-9:  # one run each: the bootstrap's own interval, which need not be symmetric
            return Lead(value, found.low, found.high, True, found.images, 1)
    else:
        error = math.hypot(standard_error(first, images), standard_error(second, images))
    return Lead(
        value, value - quantile * error, value + quantile * error, found is not None, images, max(len(gains), 1)
    )


def paired_gains(first: pd.Series, second: pd.Series) -> list[float]:
    """Differences repeat by repeat; empty where there are no such pairs."""
    texts = [row.get("val_values") for row in (first, second)]
    lists = [json.loads(t) if isinstance(t, str) and t else [] for t in texts]
    if len(lists[0]) != len(lists[1]) or not 2 <= len(lists[0]) <= len(T) + 1:
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
