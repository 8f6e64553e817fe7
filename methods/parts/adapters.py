"""Bottleneck adapters in the blocks of a timm vision transformer: after its branches, or parallel to its MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn


class Adapter(nn.Module):
    """`W_up σ(W_down x + b_down) + b_up`, [..., D] → [..., D]; W_up and both biases start at 0, so it gives 0 at first.

    2 · D · bottleneck weights, and bottleneck + D biases.
    """

    def __init__(self, width: int, bottleneck: int, activation: Literal["gelu", "relu"]) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.act = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.up = nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))


class After(nn.Module):
    """`h + adapter(h)` of what a branch adds to the residual stream, h = scale(x); it takes the layer scale's place."""

    def __init__(self, scale: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.scale = scale
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale(x)
        return h + self.adapter(h)


class ParallelMLP(nn.Module):
    """A block's whole second branch with an adapter beside it: `ls2(mlp(norm2(x))) + s · adapter(x)`."""

    def __init__(self, block: nn.Module, adapter: Adapter, s: float) -> None:
        super().__init__()
        self.norm, self.mlp, self.scale = block.norm2, block.mlp, block.ls2
        self.adapter = adapter
        self.s = s

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.mlp(self.norm(x))) + self.s * self.adapter(x)  # type: ignore[operator]


def add_adapters(network: nn.Module, bottleneck: int, branches: Sequence[Literal["attn", "mlp"]]) -> nn.Module:
    """Puts an adapter after each of the named branches of every block, before the residual sum; in place.

    Args:
        network: a timm `VisionTransformer` of pre-norm blocks.
        bottleneck: of each adapter.
        branches: of a block.
    """
    for block in network.blocks:  # type: ignore[union-attr]
        for branch in branches:
            slot = "ls1" if branch == "attn" else "ls2"
            setattr(block, slot, After(getattr(block, slot), Adapter(network.embed_dim, bottleneck, "gelu")))  # type: ignore[arg-type]
    return network


def add_parallel_adapters(network: nn.Module, bottleneck: int, s: float) -> nn.Module:
    """Puts an adapter of scale `s` beside the MLP of every block; it sees the block's tokens before `norm2`; in place.

    Args:
        network: a timm `VisionTransformer` of pre-norm blocks.
        bottleneck: of each adapter.
        s: its fixed scale.
    """
    for block in network.blocks:  # type: ignore[union-attr]
        block.mlp = ParallelMLP(block, Adapter(network.embed_dim, bottleneck, "relu"), s)  # type: ignore[arg-type]
        block.norm2, block.ls2 = nn.Identity(), nn.Identity()
    return network
