"""The metric of each kind of task: accuracy, mean area under the ROC curve, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from methods.contract import IGNORE, Kind
from orchestrator.data.labels import Labels
from orchestrator.data.pixels import Pixels
from orchestrator.evaluate.forward import forward, whole_float32
from orchestrator.models.load import Preprocessing

BATCH = 128
PIXEL_BATCH = 16  # of dense logits
RESAMPLES = 200
CELLS = 2**22  # scores that are ranked at a time


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


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative row that `scores` [n] order rightly; a tie counts half.

    NaN where `positive` [n] (bool) holds only one of both.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    p = int(positive.sum())
    n = len(positive) - p
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)) if p and n else math.nan


def aurocs(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """[k, C] `auroc` of each class of `scores` [n, C] under `positive` [n, C] (bool).

    The rows are put in order once: what changes is only how often each one counts.

    Args:
        counts: [k, n] how often; None: once (k = 1).
    """
    counts = np.ones((1, len(scores)), dtype=np.int64) if counts is None else counts
    step = max(1, CELLS // max(1, len(scores)))
    parts = [
        _aurocs(scores[:, c : c + step], positive[:, c : c + step], counts) for c in range(0, scores.shape[1], step)
    ]
    return np.concatenate(parts, axis=1) if parts else np.empty((len(counts), 0))


def _aurocs(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, axis=0, kind="stable")
    ordered, yes = np.take_along_axis(scores, order, 0), np.take_along_axis(positive, order, 0)
    rises = (ordered[1:] != ordered[:-1]) & ~(np.isnan(ordered[1:]) & np.isnan(ordered[:-1]))
    place = np.arange(len(scores))[:, None]
    edge = np.ones((1, scores.shape[1]), dtype=bool)
    # Of each row, where those of its score begin and end.
    first = np.maximum.accumulate(np.where(np.concatenate([edge, rises]), place, 0), axis=0)
    after = np.minimum.accumulate(np.where(np.concatenate([rises, edge]), place + 1, len(scores))[::-1], axis=0)[::-1]
    below = np.zeros((len(scores) + 1, scores.shape[1]), dtype=np.int64)
    values = np.full((len(counts), scores.shape[1]), math.nan)
    for value, count in zip(values, counts, strict=True):
        often = count[order]
        right = np.where(yes, often, 0)
        np.cumsum(often - right, axis=0, out=below[1:])
        # Twice the pairs, so that a tie's half is a whole number: exact, in whatever order they are added.
        pairs = (right * (np.take_along_axis(below, first, 0) + np.take_along_axis(below, after, 0))).sum(0)
        p, n = right.sum(0), below[-1]
        known = (p > 0) & (n > 0)
        value[known] = pairs[known] / 2 / (p[known] * n[known])
    return values


def mean_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """`auroc` of `scores` [n, C] under `labels` [n, C] of 0 and 1, averaged over the classes that have both values."""
    return _mean_of_known(aurocs(scores, labels > 0.5)[0])


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)].tolist()
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
        network: normalised images to logits [B, C] or [B, C, S, S]; put in evaluation mode, and run where it is.
        preprocessing: its own.
        pixels, labels: of the split.
        count: of the split's images.
        kind, num_classes: of the task.
        with_error: also estimate the standard error; else it is NaN (an accuracy always has one).
        hear: is told each batch: rows [B], uint8 pixels [B, 3, S, S], logits and labels.

    Of one label an image no more is kept than which class has the largest logit.
    """
    network.eval()
    device = next(network.parameters()).device
    step = PIXEL_BATCH if kind == "segmentation" else BATCH
    first: list[Tensor] = []
    second: list[Tensor] = []
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        plain = np.zeros(len(rows), dtype=np.int64)
        with torch.inference_mode(), whole_float32():
            images = pixels.batch(rows, plain)
            logits = forward(network, preprocessing, images, device)
            truth = labels.batch(rows, plain)
            if hear is not None:
                hear(rows, images, logits, truth)
            if kind == "segmentation":
                pair = overlaps(logits.argmax(1), truth.to(device), num_classes)
            elif kind == "classification":
                pair = (logits.float().cpu().argmax(1), truth)
            else:
                pair = (logits.float(), truth)
        first.append(pair[0].cpu())
        second.append(pair[1].cpu())
    one, other = torch.cat(first), torch.cat(second)
    if kind == "classification":
        value = float((one == other).float().mean())
        return Score(value, math.sqrt(value * (1 - value) / count), count)
    metric = mean_auroc if kind == "multilabel" else mean_iou
    a, b = one.numpy(), other.numpy()
    error = resampled_error(metric, a, b) if with_error else math.nan
    return Score(metric(a, b), error, count)


def resampled_error(metric: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> float:
    """Standard deviation of `metric` over draws of as many images with replacement."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(a), len(a)) for _ in range(RESAMPLES)]
    return float(np.nanstd(resampled(metric, a, b, draws), ddof=1))


def resampled(
    metric: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray, draws: Sequence[np.ndarray]
) -> np.ndarray:
    """[k] `metric` of the rows of each of k draws [n]."""
    if metric is mean_auroc:
        counts = np.stack([np.bincount(rows, minlength=len(a)) for rows in draws])
        return np.array([_mean_of_known(values) for values in aurocs(a, b > 0.5, counts)])
    return np.array([metric(a[rows], b[rows]) for rows in draws])
