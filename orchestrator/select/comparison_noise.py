"""Whether what sweeps differ by is more than noise: of the val images, and of the seeds."""

from __future__ import annotations

import math
import statistics

import pandas as pd

from orchestrator.evaluate.outcomes import compare_groups
from orchestrator.select.members import Member
from orchestrator.select.results import image_error, repeat_spread
from orchestrator.select.uncertainty import (
    Lead,
    Seeds,
    paired_gains,
    seed_noise,
    with_interval,
)

Run = tuple[Member, pd.Series]  # a sweep with its best trial


def difference(mine: list[Run], reference: list[Run], same: bool) -> Lead | None:
    """How far the mean of some sweeps' bests is above that of others, with a 95 % interval; None where either is empty.

    Noise of the images is that of a paired bootstrap over the val images where each student's outcomes were kept, else
    of independent accuracies. Noise of the seeds is that of the sweeps of each group (paired where both groups have the
    same seeds), or of a lone sweep's repeats. With one sweep and one run on both sides it is not known, and left out.

    Args:
        mine, reference: sweeps with their best rows.
        same: whether all were scored on the same val images.
    """
    if not mine or not reference:
        return None
    value = _mean(mine) - _mean(reference)
    kind = mine[0][0].spec.task.kind
    images = min(m.images for m, _ in (*mine, *reference))
    found = None
    if same:
        found = compare_groups(
            kind, *([m.folder / str(r["student_path"]) for m, r in side] for side in (mine, reference))
        )
    if found is None and not images:
        return Lead(value, math.nan, math.nan, False, 0, 1)
    runs = min(len(mine), len(reference))
    error = 0.0  # where each seed has its own images: the spread over seeds holds their noise
    if found is None and (same or runs == 1):
        error = math.hypot(*(_image_noise(side, images, same) for side in (mine, reference)))
    return with_interval(value, found, error, images, _seed_noise(mine, reference), runs)


def _mean(runs: list[Run]) -> float:
    return statistics.fmean(float(row["val_metric"]) for _, row in runs)


def _image_noise(runs: list[Run], images: int, same: bool) -> float:
    errors = [image_error(row, images) for _, row in runs if float(row["val_metric"]) >= 0]
    return statistics.fmean(errors) if same else math.hypot(*errors) / len(errors)


def _seed_noise(mine: list[Run], reference: list[Run]) -> Seeds | None:
    """That of the difference, over pairs of equal seeds where both sides have the same ones."""
    by_seed = [{m.seed: float(row["val_metric"]) for m, row in side} for side in (mine, reference)]
    pairs = by_seed[0].keys() == by_seed[1].keys() and len(by_seed[0]) == len(mine) == len(reference)
    paired = [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]] if pairs else []
    if len(paired) == 1:
        paired = paired_gains(mine[0][1], reference[0][1])
    return seed_noise(paired, [_spread(side) for side in (mine, reference)])


def _spread(runs: list[Run]) -> tuple[float | None, int]:
    """Variance of a single run, and how many there are: over the sweeps, or of a lone one over its repeats."""
    values = [float(row["val_metric"]) for _, row in runs]
    if len(values) > 1:
        return statistics.variance(values), len(values)
    return repeat_spread(runs[0][1])
