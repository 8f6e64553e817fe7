"""`torch.compile` of what repeats in a network: its blocks, of which each kind is compiled once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from orchestrator.errors import WorkError

LISTS = ("blocks", "stages", "layers", "layer1", "layer2", "layer3", "layer4")  # as timm and open_clip name them


class CompileError(WorkError):
    """A network could not be compiled on this machine."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The innermost modules that stand in lists of blocks or stages, in order; none in a network without any."""
    found: list[nn.Module] = []
    for module in network.modules():
        for name in LISTS:
            held = getattr(module, name, None)
            if isinstance(held, nn.Sequential | nn.ModuleList):
                for child in held:
                    found += list(child) if isinstance(child, nn.Sequential) else [child]
    outer = {id(m) for one in found for m in found if m is not one and any(one is part for part in m.modules())}
    return [one for one in dict.fromkeys(found) if id(one) not in outer]


def _while_training(network: nn.Module, block: nn.Module) -> Callable[..., Any]:
    """Calls a compiled block of the network as compiled only while the whole network trains."""
    fast = block._compiled_call_impl
    assert fast is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        return fast(*args, **kwargs) if network.training else block._call_impl(*args, **kwargs)

    return call


@contextlib.contextmanager
def compiled(network: nn.Module, on: bool) -> Iterator[None]:
    """Compiles the blocks of a network for as long as it lasts, if `on`; names, weights and hooks stay as they are.

    Only while the network is in training mode: in evaluation mode its blocks run as they were written, since each other
    size of a batch would be compiled anew in the middle of training.

    Raises:
        CompileError: inside, at the first step, where the machine has no compiler for it.
    """
    blocks = blocks_of(network) if on else []
    for block in blocks:
        block.compile(dynamic=False)  # of one kind in several sizes, inductor cannot compile some for all sizes at once
        block._compiled_call_impl = _while_training(network, block)
    try:
        yield
    except Exception as error:
        # torch._dynamo is imported by whoever has compiled something; its errors have no base of their own.
        if blocks and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            first = str(error).strip().splitlines()[0]
            raise CompileError(f"train.compile: true, and torch.compile has failed: {first}") from error
        raise
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        if blocks:
            torch.compiler.reset()
