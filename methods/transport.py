"""Entropic optimal transport between two sets of equally heavy vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 0.05
ITERATIONS = 50


@torch.no_grad()
def sinkhorn(cost: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """The plan [B, B] that moves weight 1/B a row to weight 1/B a column at low `cost` [B, B], with entropy ε.

    Sinkhorn's scaling of rows and columns in the log domain, in float64. What the last iteration leaves of the
    marginals is then rounded away (Altschuler et al., 2017, Algorithm 2 [memory]), so rows and columns sum to 1/B
    whatever ε is.
    """
    size = len(cost)
    log_kernel = cost.double() / -epsilon
    log_weight = -math.log(size)
    columns = log_kernel.new_zeros(size)
    for _ in range(iterations):
        rows = log_weight - torch.logsumexp(log_kernel + columns, dim=1)
        columns = log_weight - torch.logsumexp(log_kernel + rows[:, None], dim=0)
    plan = (log_kernel + rows[:, None] + columns).exp()
    weight = 1 / size
    plan = plan * (weight / plan.sum(1, keepdim=True)).clamp_max(1)
    plan = plan * (weight / plan.sum(0)).clamp_max(1)
    short_rows, short_columns = ((weight - plan.sum(axis)).clamp_min(0) for axis in (1, 0))
    missing = short_rows.sum().clamp_min(torch.finfo(plan.dtype).tiny)
    return plan + short_rows[:, None] * short_columns / missing


def transport_cost(own: Tensor, target: Tensor) -> Tensor:
    """`Σ Π_ij (1 - cos(own_i, target_j))` of rows [B, d], Π the Sinkhorn plan of that cost; its graph leaves Π out."""
    with torch.autocast(own.device.type, enabled=False):  # a step of bfloat16 is a twelfth of ε
        own, target = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (own, target))
        cost = 1 - own @ target.T
        return (sinkhorn(cost.detach()).to(cost.dtype) * cost).sum()
