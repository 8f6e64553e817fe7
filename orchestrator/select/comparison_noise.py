"""Whether what sweeps differ by is more than noise: of the val images, and of the seeds."""

from __future__ import annotations

import math
import statistics

import pandas as pd

from orchestrator.evaluate.outcomes import compare_groups
from orchestrator.select.members import Member
from orchestrator.select.uncertainty import Lead, T, paired_gains

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
    seeds, freedom = _seed_noise(mine, reference)
    if found is not None:
        if seeds is None and abs(found.value - value) < 1e-9:  # the bootstrap's own interval need not be symmetric
            return Lead(value, found.low, found.high, True, found.images, 1)
        error = found.error
    elif images:
        sides = [_image_noise(side, images, same) for side in (mine, reference)]
        error = math.hypot(*sides)
        if not same and min(len(mine), len(reference)) > 1:
            error = 0.0  # each seed has its own images: the spread over seeds holds their noise
    else:
        return Lead(value, math.nan, math.nan, False, 0, 1)
    quantile = T[freedom - 1] if freedom <= len(T) else 1.96
    half = math.hypot(1.96 * error, quantile * seeds) if seeds is not None else 1.96 * error
    count = found.images if found is not None else images
    return Lead(value, value - half, value + half, found is not None, count, min(len(mine), len(reference)))


def _mean(runs: list[Run]) -> float:
    return statistics.fmean(float(row["val_metric"]) for _, row in runs)


def _image_noise(runs: list[Run], images: int, same: bool) -> float:
    errors = [math.sqrt(max(p * (1 - p), 0.0) / images) for _, row in runs if (p := float(row["val_metric"])) >= 0]
    return statistics.fmean(errors) if same else math.hypot(*errors) / len(errors)


def _seed_noise(mine: list[Run], reference: list[Run]) -> tuple[float | None, int]:
    """Standard error of the difference by the seeds, with its degrees of freedom; None where no spread is known."""
    by_seed = [{m.seed: float(row["val_metric"]) for m, row in side} for side in (mine, reference)]
    pairs = by_seed[0].keys() == by_seed[1].keys() and len(by_seed[0]) == len(mine) == len(reference)
    paired = [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]] if pairs else []
    if len(paired) == 1:
        paired = paired_gains(mine[0][1], reference[0][1])
    if len(paired) > 1:
        return statistics.stdev(paired) / math.sqrt(len(paired)), len(paired) - 1
    spreads = [_spread(side) for side in (mine, reference)]
    known = [(variance, runs) for variance, runs in spreads if variance is not None]
    if not known:
        return None, 1
    # A side without a spread of its own is taken to have the other's.
    parts = [((known[0][0] if variance is None else variance) / runs, runs) for variance, runs in spreads]
    total = sum(part for part, _ in parts)
    ((_, runs),) = known if len(known) == 1 else ((0.0, 2),)
    if len(known) == 1 or not total:
        return math.sqrt(total), max(runs - 1, 1)
    return math.sqrt(total), max(1, math.floor(total**2 / sum(part**2 / (n - 1) for part, n in parts)))


def _spread(runs: list[Run]) -> tuple[float | None, int]:
    """Variance of a single run, and how many there are: over the sweeps, or of a lone one over its repeats."""
    values = [float(row["val_metric"]) for _, row in runs]
    if len(values) > 1:
        return statistics.variance(values), len(values)
    row = runs[0][1]
    repeats, sd = int(row["repeats"]), float(row["val_sd"])
    return (sd**2, repeats) if repeats > 1 and math.isfinite(sd) else (None, 1)
