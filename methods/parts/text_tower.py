"""A small transformer that embeds texts, given as a tokenizer's numbers. torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kept(tokens: Tensor) -> Tensor:
    """[n, L] bool, which of a row's numbers are text: of the last one's repetition up to the end, only the first.

    So no tokenizer needs to tell what it pads with: all repeat one number, be it 0, 1 or their end of text.
    """
    other = (tokens != tokens[:, -1:]).to(torch.int64)
    run = other.flip(1).cumsum(1).flip(1) == 0
    return ~run | (run.to(torch.int64).cumsum(1) == 1)


def trimmed(tokens: Tensor) -> Tensor:
    """The same texts [n, l] without the columns that only pad; embeddings do not change."""
    return tokens[:, : int(kept(tokens).sum(1).max())]


class Block(nn.Module):
    """Attention among the numbers of a text, then a perceptron; each behind a norm, each added."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, length, width)
        x = x + self.proj(seen)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextTower(nn.Module):
    """Numbers of a tokenizer [n, l], l up to `context`, to embeddings [n, embedding], not normalised.

    Each sees the whole text; what is embedded is the mean over the text. The table of the vocabulary, most of a text
    tower of this size, is a product of two: `vocabulary` x `rank` x `width`.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        embedding: int,
        width: int,
        layers: int,
        heads: int,
        rank: int,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, rank)
        self.widen = nn.Linear(rank, width, bias=False)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embedding, bias=False)
        nn.init.normal_(self.tokens.weight, std=rank**-0.5)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        text = kept(tokens)
        x = self.widen(self.tokens(tokens)) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, text[:, None, None, :])
        share = text.to(x.dtype) / text.sum(1, keepdim=True)
        return self.project((self.norm(x) * share[..., None]).sum(1))
