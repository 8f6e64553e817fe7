"""Linear heads on frozen features: logistic regression, solved exactly rather than trained.

One class an image: multinomial. Several: one yes or no for each class. One a pixel: multinomial, on a sample of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import IGNORE, FitStage, Given, Kind
from methods.outputs import Output

POOLED = Output("pooled")
DENSE = Output("dense")
TEACHER_HEAD = "teacher_head"
PIXELS = 4096  # of all images together, that a head of pixels is fitted on
CHUNK_BYTES = 256 * 2**20  # of logits and what is made of them, at a time
L2 = 1e-2  # where none can be chosen
L2_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def fit_linear_head(features: Tensor, labels: Tensor, num_classes: int, l2: float = L2) -> tuple[Tensor, Tensor]:
    """Fits `softmax(W f + b)` to standardised features and folds the standardisation into the result.

    Minimises `mean cross-entropy + l2 / 2 · ||W||²` over the given rows, with `W` acting on features of zero mean and
    unit variance and `b` unpenalised (scikit-learn's `C` is `1 / (n · l2)`). Float64, deterministic. Where there are
    fewer rows than features it is solved in the space that the rows span, which holds the optimum of any L2 penalty.
    With several labels a row, the binary cross-entropies of the classes are added, so that each class is fitted as if
    it were alone.

    Args:
        features: [n, D].
        labels: [n] int64 in [0, num_classes), or [n, num_classes] float of 0 and 1.
        num_classes: C; a class without rows gets a low but finite bias.
        l2: strength of the penalty, greater than 0.

    Returns:
        weight [C, D] and bias [C], float32 on the features' device: `logits = f @ weight.T + bias`.
    """
    rows = _Rows(features, labels, num_classes)
    solution, bias = _solve(rows.coordinates, labels, num_classes, l2)
    return rows.fold(solution, bias)


def fit_linear_head_cv(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    grid: Sequence[float] = L2_GRID,
    folds: int = 3,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fit_linear_head` with the `l2` of `grid` that gives the lowest held-out cross-entropy.

    Args and returns as there. Stratified folds of the given rows, always the same ones; the larger `l2` wins a tie.
    With several labels a row each class gets its own `l2`, and folds are stratified by a row's rarest class. The
    features are standardised once, over all given rows, and the folds are scored in float32.

    A held-out row counts only where the other folds have its class: of a class that a head has not seen, the strongest
    penalty is always the least wrong. Where no row counts, as with one row a class or in a single fold, `l2` is 1e-2.
    With several labels a row this holds for each class by itself, of which both answers must be seen, yes and no.

    Args:
        groups: [n] int64; rows of one group share a fold, instead of stratified folds.
    """
    rows = _Rows(features, labels, num_classes)
    if groups is not None:
        fold = groups.to(labels.device) % min(folds, int(groups.max()) + 1)
    else:
        fold = stratified_folds(labels if labels.ndim == 1 else rarest_class(labels), folds)
    l2 = _choose_l2(rows.coordinates.float(), labels, num_classes, grid, fold)
    solution, bias = _solve(rows.coordinates, labels, num_classes, l2)
    return rows.fold(solution, bias)


def stratified_folds(labels: Tensor, folds: int) -> Tensor:
    """[n] the fold of each row: every class is dealt out evenly, in an order that depends on nothing but the labels.

    At most as many folds as rows, so a class may be missing from a fold where it has fewer rows than there are folds.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels.cpu()[shuffled], stable=True)]
    result = torch.empty(len(labels), dtype=torch.int64)
    result[by_class] = torch.arange(len(labels)) % min(folds, len(labels))
    return result.to(labels.device)


def rarest_class(labels: Tensor) -> Tensor:
    """[n] int64: of the classes of each row of `labels` [n, C], the one with the fewest rows; C where it has none."""
    counts = labels.sum(0).masked_fill(labels.sum(0) == 0, float("inf"))
    rarity = torch.where(labels > 0, counts, float("inf"))
    return torch.where(labels.any(1), rarity.argmin(1), labels.shape[1])


def pixel_rows(maps: Tensor, masks: Tensor, seed: int = 0, limit: int = PIXELS) -> tuple[Tensor, Tensor, Tensor]:
    """Features interpolated at randomly drawn pixels that count, about `limit` in all and as many of each image.

    Args:
        maps: [n, D, h, w].
        masks: [n, S, S], 255 where a pixel does not count.
        seed: of the draw.
        limit: pixels in all; at least 4 of an image.

    Returns:
        features [m, D], labels [m] int64, and the image of each row [m] int64.
    """
    generator = torch.Generator().manual_seed(seed)
    each = max(4, -(-limit // len(maps)))
    size = masks.shape[-1]
    features, labels, images = [], [], []
    for i, (one, mask) in enumerate(zip(maps, masks, strict=True)):
        flat = mask.flatten().cpu()
        known = torch.nonzero(flat != IGNORE).flatten()
        drawn = known[torch.randperm(len(known), generator=generator)[:each]]
        if not len(drawn):
            continue
        x, y = (2 * (drawn % size) + 1) / size - 1, (2 * (drawn // size) + 1) / size - 1
        points = torch.stack([x, y], dim=-1).to(one.device, one.dtype)[None, None]
        values = F.grid_sample(one[None], points, mode="bilinear", padding_mode="border", align_corners=False)
        features.append(values[0, :, 0].T)
        labels.append(flat[drawn].long().to(one.device))
        images.append(torch.full((len(drawn),), i, device=one.device))
    return torch.cat(features), torch.cat(labels), torch.cat(images)


def fit_dense_head(maps: Tensor, masks: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """weight [C, D] and bias [C] of a head on maps [n, D, h, w] under masks [n, S, S]; deterministic.

    The head's logits are interpolated to the mask's size. Interpolating is linear and its weights add up to 1, so that
    is logistic regression on interpolated features: solved exactly on a sample of the pixels, with the strength of the
    penalty chosen on held-out images [inferred].
    """
    features, labels, images = pixel_rows(maps, masks)
    return fit_linear_head_cv(features, labels, num_classes, groups=images)


class _Rows:
    """Standardised features: [n, D], or in the space that they span, [n, r] with r < n, where there are fewer rows."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        shapes = (features.shape[:1], (*features.shape[:1], num_classes))
        if features.ndim != 2 or tuple(labels.shape) not in shapes or len(labels) == 0:
            raise ValueError(
                f"Features {list(features.shape)} and labels {list(labels.shape)} are not [n, D] and [n] or [n, C]."
            )
        if int(labels.min()) < 0 or int(labels.max()) >= (num_classes if labels.ndim == 1 else 2):
            raise ValueError(f"Labels lie outside 0 to {num_classes - 1}; a head is fitted on labelled rows only.")
        raw = features.detach().double()
        self.mean = raw.mean(0)
        spread = raw.std(0, correction=0)
        # A feature that hardly moves must not be blown up to unit variance; it is noise, or it is dead.
        floor = 1e-3 * spread.square().mean().sqrt()
        self.std = spread.clamp_min(max(float(floor), 1e-12))
        standard = (raw - self.mean) / self.std
        self.axes: Tensor | None = None
        self.coordinates = standard
        if len(standard) < standard.shape[1]:
            values, vectors = torch.linalg.eigh(standard @ standard.T)
            present = values > values[-1].clamp_min(1e-12) * 1e-12
            lengths = values[present].sqrt()
            self.axes = standard.T @ (vectors[:, present] / lengths)
            self.coordinates = vectors[:, present] * lengths

    def fold(self, solution: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """From weights on `coordinates` to weights on the features as they come."""
        weight = (solution if self.axes is None else solution @ self.axes.T) / self.std
        return weight.float(), (bias - weight @ self.mean).float()


def _solve(
    rows: Tensor, labels: Tensor, num_classes: int, l2: float | Tensor, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """weight [C, r] and bias [C] for `rows` [n, r]; `l2` may be one for each class."""
    if isinstance(l2, float) and l2 <= 0:
        raise ValueError(f"l2 is {l2:g}; it must be greater than 0, or separable classes have no solution.")
    exact = rows.dtype == torch.float64
    if start is None:
        start = rows.new_zeros(num_classes, rows.shape[1]), rows.new_zeros(num_classes)
    free = torch.cat([start[0], start[1][:, None]], dim=1)
    strength = torch.as_tensor(l2, dtype=rows.dtype, device=rows.device).reshape(-1, 1)
    # torch's LBFGS forgets every curvature pair below an absolute 1e-10 and would stall far from the optimum.
    unit = 1e6
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=1000 if exact else 100,
        history_size=20,
        tolerance_grad=unit * (1e-9 if exact else 3e-4),
        tolerance_change=1e-12 if exact else 1e-5,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        """The loss, and by hand its gradient: on problems of this size autograd takes as long as the arithmetic."""
        weight = free[:, :-1]
        by_weight, by_bias, total = strength * weight, torch.zeros_like(free[:, -1]), rows.new_zeros(())
        for part in _chunks(rows, num_classes):
            some, known = rows[part], labels[part]
            logits = torch.addmm(free[:, -1], some, weight.T)
            total += _rowwise(logits, known).sum()
            slope = _slope(logits, known) / len(rows)
            by_weight = torch.addmm(by_weight, slope.T, some)
            by_bias += slope.sum(0)
        free.grad = unit * torch.cat([by_weight, by_bias[:, None]], dim=1)
        return unit * (total / len(rows) + 0.5 * (strength * weight.square()).sum())

    optimizer.step(objective)  # type: ignore[no-untyped-call, arg-type]
    return free[:, :-1], free[:, -1]


def _chunks(rows: Tensor, num_classes: int) -> Iterator[slice]:
    """Parts of the rows, such that the logits of one, with what is made of them, take at most `CHUNK_BYTES`."""
    copies = 4  # logits, their logarithms or labels, what each is wrong by
    step = max(1, CHUNK_BYTES // (copies * num_classes * rows.element_size()))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _slope(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, C] the gradient of the sum of `_rowwise`."""
    if labels.ndim == 1:
        slope = logits.softmax(1)
        slope[torch.arange(len(labels), device=labels.device), labels] -= 1
        return slope
    return logits.sigmoid() - labels.to(logits.dtype)


def _rowwise(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row [n], or of each row and class [n, C] where a row has several labels."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")


def _choose_l2(rows: Tensor, labels: Tensor, num_classes: int, grid: Sequence[float], fold: Tensor) -> float | Tensor:
    """One of `grid`; with several labels a row, [C] float64 on the rows' device, one for each class.

    `L2` where the grid leaves a choice and no held-out row counts.
    """
    ordered = sorted(grid, reverse=True)
    if len(ordered) == 1:
        return ordered[0]
    counts = _counting(labels, num_classes, fold)
    if not bool(counts.any()):
        return L2
    held_out = torch.zeros(len(ordered), 1 if labels.ndim == 1 else num_classes, dtype=torch.float64)
    for i in range(int(fold.max()) + 1):
        seen, unseen = fold != i, fold == i
        start = None
        fitted, known = rows[seen], labels[seen]
        held, truth, scored = rows[unseen], labels[unseen], counts[unseen]
        for j, l2 in enumerate(ordered):  # from the smoothest solution on, each starts where the last one ended
            start = _solve(fitted, known, num_classes, l2, start)
            for part in _chunks(held, num_classes):
                losses = _rowwise(held[part] @ start[0].T + start[1], truth[part])
                held_out[j] += losses.where(scored[part], 0).sum(0).double().cpu()
    best = held_out.argmin(0)
    if labels.ndim == 1:
        return ordered[int(best)]
    chosen = torch.tensor(ordered, dtype=torch.float64)[best].to(rows.device)
    return chosen.where(counts.any(0), L2)


def _counting(labels: Tensor, num_classes: int, fold: Tensor) -> Tensor:
    """[n] which rows are scored while their fold is held out; with several labels a row [n, C], of which classes.

    With several labels a row, a class of which yes or no is never scored counts nowhere.
    """
    counts = torch.zeros_like(labels, dtype=torch.bool)
    for i in range(int(fold.max()) + 1):
        seen, unseen = labels[fold != i], fold == i
        if labels.ndim == 1:
            counts[unseen] = (torch.bincount(seen, minlength=num_classes) > 0)[labels[unseen]]
        else:
            counts[unseen] = (seen > 0).any(0) & (seen == 0).any(0)
    if labels.ndim == 1:
        return counts
    yes = labels > 0
    return counts & (counts & yes).any(0) & (counts & ~yes).any(0)


def head_output(kind: Kind) -> Output:
    """What a head reads: the pooled feature, or the map where each pixel has a class."""
    return DENSE if kind == "segmentation" else POOLED


def fit_teacher_head(params: Mapping[str, Any], given: Given) -> dict[str, Tensor]:
    """`weight` [C, D] and `bias` [C] of a head on the teacher's pooled features (maps) of the labelled images."""
    features = given.output(head_output(given.kind)).float()
    if given.kind == "segmentation":
        weight, bias = fit_dense_head(features, given.labels, given.num_classes)
    else:
        weight, bias = fit_linear_head_cv(features, given.labels, given.num_classes)
    return {"weight": weight, "bias": bias}


def teacher_head_stage(kind: Kind = "classification") -> FitStage:
    """The stage that gives a teacher the task's classes. It has no knobs, so every method and trial shares it.

    Args:
        kind: of the task.
    """
    return FitStage(
        name=TEACHER_HEAD,
        version=2,
        fit=fit_teacher_head,
        outputs=(head_output(kind),),
        images="labelled",
        reads=("labels",),
    )


def load_head(network: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Gives a timm network a new classifier with these weights ([C, D], [C]) and returns the network.

    Raises:
        ValueError: if its classifier is not one linear layer on the pooled feature.
    """
    network.reset_classifier(len(weight))  # type: ignore[operator]
    head = network.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.weight.shape != weight.shape:
        raise ValueError(f"The network's classifier is not one linear layer of shape {list(weight.shape)}: {head}.")
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return network


def zero_head(network: nn.Module, num_classes: int) -> nn.Module:
    """Gives a timm network a new classifier of zeros and returns the network.

    Raises:
        ValueError: if its classifier is not one linear layer.
    """
    network.reset_classifier(num_classes)  # type: ignore[operator]
    head = network.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ValueError(f"The network's classifier is not one linear layer: {head}.")
    for tensor in head.parameters():
        nn.init.zeros_(tensor)
    return network
