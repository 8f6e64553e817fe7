"""The rows of all processes of a worker group: for losses and for batch norms that relate the rows of a batch.

Rank r of W holds rows r, r + W, ... of the global batch, as many as every other rank. DDP takes the mean over ranks of
what each rank's loss gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


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

    A loss of the gathered rows is the same on all ranks, and under DDP its gradient is that of one process with the
    global batch. Rows in half precision come as float32, in which the ranks' gradients are then added up.
    """
    if world_size() == 1:
        return rows
    return _Gathered.apply(rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows)  # type: ignore[no-any-return]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.contiguous().clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()  # every rank's loss reads the sum
        dist.all_reduce(gradient)
        return gradient


def world_size() -> int:
    """Processes of the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def places(count: int) -> Tensor:
    """[count] int64 where this rank's rows stand in the global batch."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return rank + world_size() * torch.arange(count)


_even = False


@contextmanager
def even_labels(even: bool) -> Iterator[None]:
    """Where every rank is known to have as many rows with a label, `weight_of` does not ask the others."""
    global _even
    before, _even = _even, even
    try:
        yield
    finally:
        _even = before


def weight_of(count: Tensor) -> Tensor:
    """What a mean over `count` rows (a scalar) weighs, so that the mean over ranks is that over all ranks' rows.

    1 where every rank has as many; 0 where no rank has any. Every rank must ask.
    """
    if world_size() == 1 or _even:
        return torch.ones((), device=count.device)
    total = count.detach().float().clone()
    dist.all_reduce(total)
    return count * world_size() / total.clamp_min(1)


class GlobalBatchNorm(TorchFunctionMode):
    """While it is on, batch norm in training mode is over the rows of all ranks, on any device.

    It is the function that is replaced, whoever calls it: no module changes, and so no state dict and no subclass with
    an activation inside (torch's own conversion takes GPUs only and drops that activation).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(func, *args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    plain: Callable[..., Tensor],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return plain(input, running_mean, running_var, weight, bias, training, momentum, eps)
    values = input if input.dtype == torch.float64 else input.float()
    others = [d for d in range(values.ndim) if d != 1]
    shape = [1, -1] + [1] * (values.ndim - 2)
    count = values.new_full((1,), values.numel() / values.shape[1])
    total: Tensor = _Summed.apply(torch.cat([values.sum(others), count]))  # type: ignore[assignment]
    rows = total[-1].detach()
    mean = total[:-1] / rows
    centred = values - mean.view(shape)
    var: Tensor = _Summed.apply(centred.square().sum(others)) / rows  # type: ignore[operator]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (rows / (rows - 1).clamp_min(1))).to(running_var.dtype), momentum)
    result = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)
    return result.to(input.dtype)
