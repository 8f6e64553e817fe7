"""The metric of each kind of task: accuracy, mean area under the ROC curve, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from methods.contract import IGNORE, Kind
from orchestrator.data.labels import Labels
from orchestrator.data.pixels import Pixels
from orchestrator.models.load import Preprocessing

BATCH = 128
PIXEL_BATCH = 16  # of dense logits
RESAMPLES = 200


@dataclass(frozen=True)
class Score:
    """A metric in [0, 1], larger is better.

    Attributes:
        value: of all images.
        error: its standard error over images: of an accuracy by its binomial, else by resampling images.
        images: how many.
    """

    value: float
    error: float
    images: int


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows of `logits` [n, C] whose largest one is the label [n]."""
    return float((logits.argmax(1) == labels).float().mean())


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative row that `scores` [n] order rightly; a tie counts half.

    NaN where `positive` [n] (bool) holds only one of both.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    p = int(positive.sum())
    n = len(positive) - p
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)) if p and n else math.nan


def mean_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """`auroc` of `scores` [n, C] under `labels` [n, C] of 0 and 1, averaged over the classes that have both values."""
    values = [auroc(scores[:, c], labels[:, c] > 0.5) for c in range(scores.shape[1])]
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def overlaps(predicted: Tensor, masks: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Pixels of each image and class in the intersection and in the union of prediction and mask, [n, C] int64 each.

    Args:
        predicted: [n, S, S] class indices.
        masks: [n, S, S]; pixels of 255 count in neither.
        num_classes: C.
    """
    images = torch.arange(len(masks), device=masks.device)[:, None, None].expand(masks.shape)
    counts = masks != IGNORE
    image, truth, guess = images[counts], masks[counts].long(), predicted[counts].long()
    cells = (image * num_classes + truth) * num_classes + guess
    confusion = torch.bincount(cells, minlength=len(masks) * num_classes**2).view(-1, num_classes, num_classes)
    both = confusion.diagonal(dim1=1, dim2=2)
    return both, confusion.sum(1) + confusion.sum(2) - both


def mean_iou(both: np.ndarray, either: np.ndarray) -> float:
    """Intersection over union, each added up over images ([n, C]), averaged over the classes with a union."""
    intersection, union = both.sum(0).astype(np.float64), either.sum(0)
    present = union > 0
    return float((intersection[present] / union[present]).mean()) if present.any() else math.nan


def score(
    network: nn.Module,
    preprocessing: Preprocessing,
    pixels: Pixels,
    labels: Labels,
    count: int,
    kind: Kind,
    num_classes: int,
    *,
    with_error: bool = False,
    hear: Callable[[np.ndarray, Tensor, Tensor, Tensor], None] | None = None,
) -> Score:
    """What a network's logits score on the first `count` images of a split, as they are (view 0).

    Masks are compared at the network's own input size, where each pixel is one of the full mask's pixels: a sample of
    the same image for any size.

    Args:
        network: normalised images to logits [B, C] or [B, C, S, S]; put in evaluation mode.
        preprocessing: its own.
        pixels, labels: of the split.
        count: of the split's images.
        kind, num_classes: of the task.
        with_error: also estimate the standard error; else it is NaN (an accuracy always has one).
        hear: is told each batch: rows [B], uint8 pixels [B, 3, S, S], logits and labels.
    """
    network.eval()
    device = next(network.parameters()).device
    step = PIXEL_BATCH if kind == "segmentation" else BATCH
    first: list[Tensor] = []
    second: list[Tensor] = []
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        plain = np.zeros(len(rows), dtype=np.int64)
        with torch.inference_mode():
            images = pixels.batch(rows, plain)
            logits = network(preprocessing.normalise(images.to(device)))
            truth = labels.batch(rows, plain)
            if hear is not None:
                hear(rows, images, logits, truth)
            if kind == "segmentation":
                pair = overlaps(logits.argmax(1), truth.to(device), num_classes)
            else:
                pair = (logits.float(), truth)
        first.append(pair[0].cpu())
        second.append(pair[1].cpu())
    one, other = torch.cat(first), torch.cat(second)
    if kind == "classification":
        value = accuracy(one, other)
        return Score(value, math.sqrt(value * (1 - value) / count), count)
    metric = mean_auroc if kind == "multilabel" else mean_iou
    a, b = one.numpy(), other.numpy()
    error = resampled_error(metric, a, b) if with_error else math.nan
    return Score(metric(a, b), error, count)


def resampled_error(metric: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviation of `metric` over draws of as many images with replacement."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(a), len(a)) for _ in range(RESAMPLES)]
    return float(np.nanstd([metric(a[rows], b[rows]) for rows in draws], ddof=1))
