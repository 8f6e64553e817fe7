"""What scores are worth under a task's metric, with standard errors; and means over several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from orchestrator.evaluate.metrics import Score, mean_auroc, resampled_error

Metric = Literal["accuracy", "mean_per_class", "auroc"]
TITLES: dict[Metric, str] = {
    "accuracy": "accuracy",
    "mean_per_class": "mean per-class accuracy",
    "auroc": "mean AUROC",
}


def value_of(scores: Tensor, labels: Tensor, metric: Metric) -> float:
    """In [0, 1], larger is better.

    Args:
        scores: [n, C], larger for likelier classes.
        labels: [n] int64; for `auroc` [n, C] of 0 and 1.
        metric: `mean_per_class` is over the classes that have images.
    """
    if metric == "auroc":
        return mean_auroc(scores.numpy(), labels.numpy())
    right = (scores.argmax(1) == labels).double()
    if metric == "accuracy":
        return float(right.mean())
    return float(torch.stack([right[labels == c].mean() for c in labels.unique()]).mean())


def measure(scores: Tensor, labels: Tensor, metric: Metric) -> Score:
    """`value_of`, with its standard error over images: binomial (in each class), of an AUROC by resampling images."""
    value, count = value_of(scores, labels, metric), len(labels)
    if metric == "auroc":
        return Score(value, resampled_error(mean_auroc, scores.numpy(), labels.numpy()), count)
    if metric == "accuracy":
        return Score(value, math.sqrt(value * (1 - value) / count), count)
    right = (scores.argmax(1) == labels).double()
    shares = [(float(right[labels == c].mean()), int((labels == c).sum())) for c in labels.unique()]
    return Score(value, math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(shares), count)


def mean_score(scores: Sequence[Score], *, same_images: bool = False) -> Score:
    """The mean of several scores, and its standard error.

    Args:
        scores: at least one.
        same_images: they are of the same images, so their errors do not average out: the error is the mean of theirs,
            which is its upper bound. Else they are independent.
    """
    count = len(scores)
    value = sum(s.value for s in scores) / count
    if same_images:
        return Score(value, sum(s.error for s in scores) / count, scores[0].images)
    error = math.sqrt(sum(s.error**2 for s in scores)) / count
    return Score(value, error, sum(s.images for s in scores))
