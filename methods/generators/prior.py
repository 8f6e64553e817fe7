"""The latent transformer: next-code prediction over raster-scanned indices, with a cache for sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]


class CausalBlock(nn.Module):
    """Pre-norm attention and MLP [B, m, D] → [B, m, D]; position i sees positions ≤ i, cached ones included."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The block's output, and its keys and values [B, h, m', d] of all positions so far."""
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        total = k.shape[2]
        # A single new position sees everything before it; several see a triangle that ends at the last one.
        mask = None
        if length > 1 and total > length:
            mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
        causal = length > 1 and total == length
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.proj(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), (k, v)


class LatentPrior(nn.Module):
    """A causal transformer over the codes of a `side` x `side` grid, row by row from the top left.

    The input is a start symbol (number `codes`) and the codes before the predicted one. Positions are the sum of a row
    and a column embedding: on a grid the code above matters as much as the one before, and few data do not suffice to
    learn that from `side²` unrelated embeddings (ours; taming's prior learns one embedding a position [secondary]).

    Args:
        codes: K, how many there are.
        side: of the grid.
        width, layers, heads: of the transformer.
    """

    def __init__(self, codes: int, side: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.codes, self.side = codes, side
        self.token = nn.Embedding(codes + 1, width)
        self.row = nn.Embedding(side, width)
        self.column = nn.Embedding(side, width)
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def length(self) -> int:
        """Number of codes in an image."""
        return self.side**2

    def shifted(self, indices: Tensor) -> Tensor:
        """[B, m] what predicts `indices` [B, m]: the start symbol, then all but the last."""
        start = indices.new_full((len(indices), 1), self.codes)
        return torch.cat([start, indices[:, :-1]], dim=1)

    def forward(self, inputs: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits [B, m, K] for the codes at the next m positions, and the cache to go on from.

        Args:
            inputs: [B, m] symbols (see `shifted`) that follow those already in the cache.
            cache: what the previous call returned; None at the start.
        """
        begin = cache[0][0].shape[2] if cache else 0
        place = torch.arange(begin, begin + inputs.shape[1], device=inputs.device)
        x = self.token(inputs) + self.row(place // self.side) + self.column(place % self.side)
        kept: Cache = []
        for i, block in enumerate(self.blocks):
            x, own = block(x, cache[i] if cache else None)
            kept.append(own)
        return self.head(self.norm(x)), kept

    @torch.no_grad()
    def complete(self, indices: Tensor, keep: Tensor, temperature: float, top_k: int, uniforms: Tensor) -> Tensor:
        """[B, n] the codes of `indices`, all but the first `keep[b]` of row b drawn anew, one after another.

        Args:
            indices: [B, n] int64.
            keep: [B] how many are kept; those are never drawn, whatever the model thinks of them.
            temperature: divides the logits.
            top_k: only this many most likely codes are drawn from; 0 for all.
            uniforms: [B, n] in [0, 1): the draw at each position, by the inverse of the cumulative probability.
        """
        out = indices.clone()
        start, end = int(keep.min()), indices.shape[1]
        if start == end:
            return out
        symbols = self.shifted(indices)[:, : start + 1]
        cache: Cache | None = None
        for i in range(start, end):
            logits, cache = self(symbols, cache)
            drawn = draw(logits[:, -1] / temperature, top_k, uniforms[:, i])
            out[:, i] = torch.where(keep > i, indices[:, i], drawn)
            symbols = out[:, i : i + 1]
        return out


def draw(logits: Tensor, top_k: int, uniforms: Tensor) -> Tensor:
    """[B] one code a row of logits [B, K]: the first whose cumulative probability exceeds the row's uniform number."""
    count = logits.shape[1]
    values, order = logits.topk(min(top_k or count, count), dim=1)
    cumulative = values.softmax(1).cumsum(1)
    chosen = (cumulative <= uniforms.to(cumulative)[:, None]).sum(1).clamp_max(values.shape[1] - 1)
    return order.gather(1, chosen[:, None])[:, 0]
