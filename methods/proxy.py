"""TDMR's proxy space: a projection of a frozen teacher's pooled features that the task's labels have shaped.

All of the inside is our reading [inferred]: of the paper only the abstract could be read (see `methods.tdmr`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from methods.contract import FitStage, Given, Kind, supervised_loss
from methods.heads import POOLED, stratified_folds

PROXY = "proxy"
BATCH = 256  # rows of a step of the fit [inferred]
FOLDS = 5  # one of which is held out to choose the epoch [inferred]


class Standardise(nn.Module):
    """Features [B, D] at mean 0 and about unit variance: of the batch while training, else those of training.

    A hundredth of the mean variance is added to each: a feature that is dead in the labelled images is not blown up
    where it lives in others. So the result does not depend on the scale of the features.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.momentum = 0.1
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = features.mean(0), features.var(0)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        spread = variance + 1e-2 * variance.mean() + torch.finfo(variance.dtype).tiny
        return (features - mean) * spread.rsqrt()


class Proxy(nn.Module):
    """Projector P and proxy head W: features f [B, D] to z = P(f) [B, d] and p = W z [B, C].

    P is linear, or Linear-BN-GELU-Linear with 2·d hidden units, on features that are first standardised by the
    statistics of the labelled images, so that one learning rate suits every teacher [inferred].

    Args:
        width: D.
        dim: d.
        classes: C.
        projector: `linear` or `mlp`.
        normalise: whether z has length 1.
    """

    def __init__(self, width: int, dim: int, classes: int, projector: str, normalise: bool) -> None:
        super().__init__()
        self.standardise = Standardise(width)
        hidden = 2 * dim
        self.projector: nn.Module = (
            nn.Linear(width, dim)
            if projector == "linear"
            else nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, dim))
        )
        self.head = nn.Linear(dim, classes)
        self.normalise = normalise
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.zeros(classes, dim))

    def forward(self, features: Tensor) -> Tensor:
        """z [B, d] of features [B, D]."""
        projected = self.projector(self.standardise(features.float()))
        return nn.functional.normalize(projected, dim=-1) if self.normalise else projected

    def prototype(self, scores: Tensor, labels: Tensor, kind: Kind) -> Tensor:
        """[B, d] the mean z of each row's class; of its classes, for multi-label.

        Rows without labels take the mean of all class means, weighted by the proxy's own class probabilities of
        `scores` [B, C]; so do multi-label rows without any class [inferred].
        """
        chance = scores.sigmoid() if kind == "multilabel" else scores.softmax(-1)
        if kind == "multilabel":
            share, known = labels.clamp_min(0).to(chance.dtype), labels.amax(1) > 0
        else:
            known = labels >= 0
            share = nn.functional.one_hot(labels.clamp_min(0), chance.shape[1]).to(chance.dtype)
        share = torch.where(known[:, None], share, chance)
        return share / share.sum(1, keepdim=True).clamp_min(1e-12) @ self.prototypes


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of rows [B, p] and [B, q]: a scalar in [0, 1], 0 where either is constant.

    `|X'Y|² / (|X'X| |Y'Y|)` of the centred matrices, Frobenius norms (Kornblith et al., 2019 [memory]).
    """
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
    with torch.autocast(x.device.type, enabled=False):  # and fourth powers of large ones would overflow
        x, y = x - x.mean(0), y - y.mean(0)
        tiny = torch.finfo(x.dtype).tiny
        scale_x, scale_y = x.detach().abs().amax().clamp_min(tiny), y.detach().abs().amax().clamp_min(tiny)
        x, y = x / scale_x, y / scale_y  # fourth powers of small features would underflow
        if len(x) < min(x.shape[1], y.shape[1]):  # the same numbers from [B, B] matrices, where these are smaller
            gram_x, gram_y = x @ x.T, y @ y.T
            cross, own_x, own_y = (gram_x * gram_y).sum(), gram_x.square().sum(), gram_y.square().sum()
        else:
            cross, own_x, own_y = (x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum()
        return cross / (own_x * own_y).clamp_min(tiny).sqrt()


def proxy_loss(proxy: Proxy, features: Tensor, labels: Tensor, kind: Kind, alpha: float) -> dict[str, Tensor]:
    """`L_A = CE(W P(f), y) + α · (1 - CKA(P(f), f))`; for multi-label the task's binary cross-entropy [inferred]."""
    z = proxy(features)
    ce = supervised_loss(proxy.head(z), labels, kind)
    if alpha == 0:
        return {"loss": ce, "ce": ce}
    shape = 1 - cka(z, features.float())
    return {"loss": ce + alpha * shape, "ce": ce, "shape": shape}


def proxy_stage(params: Mapping[str, Any], of: str) -> FitStage:
    """The stage that fits the proxy; one for all trials with the same `params` (those of `fit_proxy`).

    Args:
        of: whose features: the teacher's, or those of the network of an earlier stage that tunes it.
    """
    return FitStage(
        name=PROXY,
        version=1,
        fit=fit_proxy,
        params=params,
        outputs=(POOLED,),
        of=of,
        images="labelled",
        reads=("labels",),
    )


def fit_proxy(params: Mapping[str, Any], given: Given) -> dict[str, Tensor]:
    """Stage A: P and W on the teacher's pooled features of the labelled images (view 0, never val or test).

    The number of epochs is the one, up to `epochs`, after which `W P(f)` is best on a held-out fifth of these images:
    most accurate, then of lowest loss; multi-label: of lowest loss. Then all of them are fitted for as many epochs
    [inferred]. Where a class has too few images to hold one out, the last epoch counts.

    Args:
        params: `dim`, `projector`, `normalise`, `alpha`, `lr`, `weight_decay`, `epochs`, `snapshots`.

    Returns:
        `<i>.<name>`: the state of a `Proxy` at `snapshots` evenly spaced epochs; the last is the chosen one.
        `epochs`: [snapshots] those epochs.
        `held_out`: [epochs, 3] accuracy (0 for multi-label), loss and CKA(z, f) on the held-out images; empty where
        none were held out.
    """
    features, labels = given.output(POOLED).float(), given.labels
    with torch.enable_grad():
        curve = _held_out_curve(params, given, features, labels)
        chosen = params["epochs"]
        if len(curve):
            best = max(range(len(curve)), key=lambda i: (curve[i][0], -curve[i][1]))
            chosen = best + 1
        count = params["snapshots"]
        marks = [max(1, math.ceil(chosen * (i + 1) / count)) for i in range(count)]
        result: dict[str, Tensor] = {}
        for epoch, proxy in enumerate(_epochs(params, given, features, labels, chosen), start=1):
            if epoch in marks:
                state = proxy_tensors(proxy)
                for i in (i for i, mark in enumerate(marks) if mark == epoch):
                    result |= {f"{i}.{name}": tensor.clone() for name, tensor in state.items()}
    result["epochs"] = torch.tensor(marks)
    result["held_out"] = torch.tensor(curve, dtype=torch.float32).reshape(-1, 3)
    return result


def proxy_tensors(proxy: Proxy) -> dict[str, Tensor]:
    """Copies of everything that makes a proxy."""
    return {name: tensor.detach().clone() for name, tensor in proxy.state_dict().items()}


def load_proxy(params: Mapping[str, Any], tensors: Mapping[str, Tensor], snapshot: int) -> Proxy:
    """The proxy of a snapshot (from the end where negative), frozen and in evaluation mode.

    Args:
        params: `dim`, `projector`, `normalise`.
        tensors: what the stage of the proxy left.
    """
    count = len(tensors["epochs"])
    prefix = f"{snapshot % count}."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    classes, width = len(state["head.weight"]), len(state["standardise.mean"])
    proxy = Proxy(width, params["dim"], classes, params["projector"], params["normalise"])
    proxy.load_state_dict(state)
    return proxy.requires_grad_(False).eval()


def _held_out_curve(
    params: Mapping[str, Any], given: Given, features: Tensor, labels: Tensor
) -> list[tuple[float, float, float]]:
    """After each epoch without the held-out rows: accuracy, loss and CKA on these."""
    out = _held_out(labels, given.kind)
    if not bool(out.any()) or int((~out).sum()) < 2:
        return []
    curve = []
    for proxy in _epochs(params, given, features[~out], labels[~out], params["epochs"]):
        with torch.no_grad():
            z = proxy(features[out])
            scores = proxy.head(z)
            loss = supervised_loss(scores, labels[out], given.kind).item()
            right = 0.0 if given.kind == "multilabel" else (scores.argmax(1) == labels[out]).float().mean().item()
            curve.append((right, loss, cka(z, features[out]).item()))
    return curve


def _held_out(labels: Tensor, kind: Kind) -> Tensor:
    """[n] which rows choose the epoch: a fold, without rows of classes that would be left without any."""
    if kind == "multilabel":  # rows with several classes cannot be stratified by one; they are dealt out
        return stratified_folds(torch.zeros(len(labels), dtype=torch.int64), FOLDS).to(labels.device) == 0
    out = stratified_folds(labels, FOLDS) == 0
    seen = torch.bincount(labels[~out], minlength=int(labels.max()) + 1) > 0
    return out & seen[labels]


def _epochs(params: Mapping[str, Any], given: Given, features: Tensor, labels: Tensor, epochs: int) -> Iterator[Proxy]:
    """The proxy after each epoch of AdamW at a constant rate, in evaluation mode; always the same numbers.

    Batch statistics are not the running averages of training: they are taken anew from all rows after each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        proxy = Proxy(features.shape[1], params["dim"], given.num_classes, params["projector"], params["normalise"]).to(
            features.device
        )
    decayed = [p for p in proxy.parameters() if p.ndim >= 2]
    others = [p for p in proxy.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": params["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=params["lr"],
        fused=True,
    )
    generator = torch.Generator().manual_seed(0)
    parts = math.ceil(len(features) / BATCH)  # of almost equal size, so that none is a single row
    for _ in range(epochs):
        proxy.train()
        for rows in torch.randperm(len(features), generator=generator).to(features.device).tensor_split(parts):
            optimizer.zero_grad()
            proxy_loss(proxy, features[rows], labels[rows], given.kind, params["alpha"])["loss"].backward()
            optimizer.step()
        _settle(proxy, features, labels, given.kind)
        yield proxy


@torch.no_grad()
def _settle(proxy: Proxy, features: Tensor, labels: Tensor, kind: Kind) -> None:
    """Batch statistics and class means of all rows; leaves the proxy in evaluation mode."""
    norms = [m for m in proxy.train().modules() if isinstance(m, Standardise | nn.BatchNorm1d)]
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0  # this batch alone
    proxy(features)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    z = proxy.eval()(features)
    share = labels.float() if kind == "multilabel" else nn.functional.one_hot(labels, len(proxy.prototypes)).float()
    proxy.prototypes.copy_(share.T @ z / share.sum(0).clamp_min(1)[:, None])
