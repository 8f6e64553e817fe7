"""The suite's linear probe, after ELEVATER (Li et al., NeurIPS 2022): SGD on a head that starts at the zero-shot one.

Adapted to features that are computed once. What ELEVATER does and this does not: its batch norm uses running averages,
this the statistics of all training images, which is what those tend to. Its head starts from the class embeddings as
they are, this from the head that gives exactly the zero-shot scores through that batch norm. Runs that differ in
learning rate and weight decay alone see the same batches, so they are trained side by side in one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.parts.zero_shot import SCALE
from orchestrator.evaluate.suite.measure import Metric, value_of

LEARNING_RATES = tuple(float(v) for v in np.logspace(-6, -1, 6))
WEIGHT_DECAYS = tuple(float(v) for v in np.logspace(-6, 6, 97))
COARSE = range(0, 97, 16)  # seven of the weight decays; then steps of 8, 4, 2 and 1 to either side of the best
REFINEMENT = (8, 4, 2, 1)
EPOCHS = 10  # of the search
FINAL_EPOCHS = 50  # of the final run
MOMENTUM = 0.9
BATCH = 64
EPSILON = 1e-5
SCALARS = 50_000_000  # weights that are trained side by side


@dataclass(frozen=True)
class LinearProbe:
    """A fitted head on raw features, the batch norm folded in.

    Attributes:
        weight, bias: [C, D] and [C].
        lr, weight_decay: what the search chose.
        val: the metric on the held-out part that chose them.
    """

    weight: Tensor
    bias: Tensor
    lr: float
    weight_decay: float
    val: float

    def __call__(self, features: Tensor) -> Tensor:
        """[n, D] to scores [n, C]."""
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True)
class Labelled:
    """Features [n, D] with labels [n] int64 (one class an image) or [n, C] float32 of 0 and 1 (several)."""

    features: Tensor
    labels: Tensor

    def take(self, rows: Sequence[int]) -> Labelled:
        """The images at `rows`."""
        return Labelled(self.features[rows], self.labels[rows])

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


def fit_probe(
    train: Labelled, val: Labelled, num_classes: int, metric: Metric, vectors: Tensor | None = None, seed: int = 0
) -> LinearProbe:
    """Chooses learning rate and weight decay on `val`, then trains on both parts; deterministic.

    Equal metrics are told apart by the loss on `val`, then by the smaller learning rate.

    Args:
        train, val: disjoint, at least one image each.
        num_classes: C.
        metric: that chooses.
        vectors: [C, d] class embeddings at length 1 where features are such embeddings too; the head starts there.
        seed: draws the batches.
    """
    scored: dict[tuple[int, int], tuple[float, float]] = {}

    def look(runs: Sequence[tuple[int, int]]) -> None:
        new = [run for run in runs if run not in scored]
        most = max(1, SCALARS // (num_classes * train.features.shape[1]))
        for start in range(0, len(new), most):
            some = new[start : start + most]
            settings = [(LEARNING_RATES[i], WEIGHT_DECAYS[j]) for i, j in some]
            for run, (weight, bias) in zip(
                some, _train(train, num_classes, settings, EPOCHS, vectors, seed), strict=True
            ):
                scored[run] = _judged(F.linear(val.features, weight, bias), val.labels, metric)

    rates = range(len(LEARNING_RATES))
    look([(i, j) for i in rates for j in COARSE])
    for step in REFINEMENT:
        best = [max((run for run in scored if run[0] == i), key=lambda run: scored[run]) for i in rates]
        look([(i, k) for i, j in best for k in (j - step, j + step) if 0 <= k < len(WEIGHT_DECAYS)])
    i, j = max(sorted(scored), key=lambda run: scored[run])
    chosen = (LEARNING_RATES[i], WEIGHT_DECAYS[j])
    ((weight, bias),) = _train(train + val, num_classes, [chosen], FINAL_EPOCHS, vectors, seed)
    return LinearProbe(weight, bias, *chosen, scored[i, j][0])


def _judged(scores: Tensor, labels: Tensor, metric: Metric) -> tuple[float, float]:
    """(metric, minus loss); the worst there is where a run diverged."""
    if not bool(torch.isfinite(scores).all()):
        return -math.inf, -math.inf
    loss = F.cross_entropy(scores, labels) if labels.dim() == 1 else F.binary_cross_entropy_with_logits(scores, labels)
    value = value_of(scores, labels, metric)
    return (-math.inf if math.isnan(value) else value), -float(loss)


def _train(
    data: Labelled,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    epochs: int,
    vectors: Tensor | None,
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """(weight [C, D], bias [C]) on raw features after SGD under each (learning rate, weight decay).

    Weight decay leaves the bias alone.
    """
    mean = data.features.mean(0)
    deviation = (data.features.var(0, correction=0) + EPSILON).sqrt()
    inputs = (data.features - mean) / deviation
    targets = F.one_hot(data.labels, num_classes).float() if data.labels.dim() == 1 else data.labels
    count, width, runs = len(inputs), inputs.shape[1], len(settings)
    if vectors is None:
        weight, bias = torch.zeros(num_classes, width), torch.zeros(num_classes)
    else:
        weight, bias = SCALE * vectors * deviation, SCALE * (vectors @ mean)
    weight, bias = weight.repeat(runs, 1), bias.repeat(runs)
    rates = torch.tensor([lr for lr, _ in settings]).repeat_interleave(num_classes)
    decays = torch.tensor([wd for _, wd in settings]).repeat_interleave(num_classes)
    past_weight, past_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            x = inputs[rows]
            logits = torch.addmm(bias, x, weight.T).view(len(rows), runs, num_classes)
            guess = logits.softmax(-1) if data.labels.dim() == 1 else logits.sigmoid() / num_classes
            truth = targets[rows] if data.labels.dim() == 1 else targets[rows] / num_classes
            slope = ((guess - truth[:, None]) / len(rows)).view(len(rows), -1)
            past_weight.mul_(MOMENTUM).addmm_(slope.T, x).addcmul_(weight, decays[:, None])
            past_bias.mul_(MOMENTUM).add_(slope.sum(0))
            weight.addcmul_(past_weight, rates[:, None], value=-1)
            bias.addcmul_(past_bias, rates, value=-1)
    raw = weight / deviation
    raw_bias = bias - raw @ mean
    return list(zip(raw.split(num_classes), raw_bias.split(num_classes), strict=True))
