"""Learned tokens in a transformer: every block sees its own (deep), or the first one's travel on (shallow)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def insert(tokens: Tensor, prompts: Tensor, at: int) -> Tensor:
    """[B, N, D] tokens of any kind and [B, p, D] prompts → [B, N + p, D], the prompts from position `at` on."""
    return torch.cat([tokens[:, :at], prompts, tokens[:, at:]], dim=1)


def remove(tokens: Tensor, count: int, at: int) -> Tensor:
    """The inverse of `insert`: [B, N, D] without the `count` tokens from position `at` on."""
    return torch.cat([tokens[:, :at], tokens[:, at + count :]], dim=1)


class Prompted(nn.Module):
    """A transformer block that puts prompts into its input, removes some from its output, or both.

    Args:
        block: [B, N, D] → [B, N, D].
        at: position of the first prompt.
        width: D.
        enter: prompts of its own; they have no positional embedding.
        leave: prompts that are gone after this block.
        dropout: of its own prompts.
    """

    prompts: nn.Parameter | None

    def __init__(self, block: nn.Module, at: int, width: int, enter: int, leave: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = block
        self.at = at
        self.leave = leave
        self.prompts = nn.Parameter(torch.zeros(1, enter, width)) if enter else None
        # No module at all without dropout: torch's counter of operations takes no parameter for a module's input.
        self.drop = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        if self.prompts is not None:
            prompts = self.prompts.expand(x.shape[0], -1, -1)  # len(x) would fix the batch in an export
            x = insert(x, prompts if self.drop is None else self.drop(prompts), self.at)
        x = self.block(x)
        return remove(x, self.leave, self.at) if self.leave else x


def add_prompts(network: nn.Module, prompts: int, deep: bool, dropout: float = 0.0) -> nn.Module:
    """Puts prompts into a timm vision transformer, in place, after its class (and register) tokens.

    What follows the last block has the tokens that it has without prompts; with `deep`, so has what follows any block.

    Args:
        network: a timm `VisionTransformer`.
        prompts: how many, at each block that has some.
        deep: every block gets its own and discards them, or the first one's are discarded after the last.
        dropout: of the prompts.
    """
    blocks = network.blocks
    assert isinstance(blocks, nn.Sequential)
    last = len(blocks) - 1
    for i in range(len(blocks)):
        enter = prompts if deep or i == 0 else 0
        leave = prompts if deep or i == last else 0
        if enter or leave:
            blocks[i] = Prompted(blocks[i], network.num_prefix_tokens, network.embed_dim, enter, leave, dropout)  # type: ignore[arg-type]
    bound = float(6 / (_fan_in(network) + network.embed_dim)) ** 0.5  # type: ignore[operator]
    for block in blocks:
        if isinstance(block, Prompted) and block.prompts is not None:
            nn.init.uniform_(block.prompts, -bound, bound)
    return network


def _fan_in(network: nn.Module) -> int:
    """Inputs of the patch embedding's map: 3 · patch² on pixels."""
    weight = getattr(getattr(network.patch_embed, "proj", None), "weight", None)
    return weight[0].numel() if isinstance(weight, Tensor) else network.embed_dim  # type: ignore[return-value]
