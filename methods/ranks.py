"""Rows of all processes of a worker group, for losses that relate the rows of a batch to each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world = dist.get_world_size()
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss reads these rows. The sum over ranks meets the mean that DDP takes of the parameters'
        # gradients: together they are the gradient of the one global loss.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() :: dist.get_world_size()]


def gathered(rows: Tensor) -> Tensor:
    """[W·B, ...] the rows [B, ...] of all W ranks in the order of the global batch; `rows` itself in one process.

    Rank r of W holds rows r, r + W, ... of the global batch, as many as every other rank. A loss of the gathered rows
    is the same on all ranks, and under DDP its gradient is that of one process with the global batch.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gathered.apply(rows)  # type: ignore[no-any-return]
