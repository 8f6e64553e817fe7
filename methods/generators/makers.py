"""Makers on the generators that a provider trains upstream: re-representation, completion, SDEdit and RePaint.

An upstream generator works at a size of its own; a pool has another. Sources are brought to the generator's size and
what it made back to the pool's, in [-1, 1] throughout: a teacher's normalisation comes later, and from its checkpoint.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract import Given, Maker

Upstream = Literal["vq", "diffusion", "pipeline"]


def resized(images: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] in [-1, 1] to [B, 3, size, size]; the same tensor where the size is right already."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(-1, 1)


def kept_rows(keep: float | Literal["random"], rows: int, seeds: Sequence[int]) -> list[int]:
    """For each seed how many of `rows` rows, from the top, a masked image keeps.

    A share keeps as many whole rows as come nearest to it. `random` draws a cut with at least one row on either side
    (where there are two), all equally likely. DIGG masks at random [fig]; a raster prior can only keep what comes
    first, so random means a random cut row [inferred].
    """
    if keep != "random":
        return [round(keep * rows)] * len(seeds)
    # A stream of its own for each seed: the cut must not be tied to what is then sampled from the same seed.
    return [random.Random(f"kept rows {seed}").randint(1, max(1, rows - 1)) for seed in seeds]


def top_mask(rows: Sequence[int], size: int) -> Tensor:
    """[B, 1, size, size] float, 1 where a pixel is kept: the first `rows[b]` rows of image b."""
    position = torch.arange(size)[None, :, None]
    return (position < torch.tensor(list(rows))[:, None, None]).float().expand(-1, size, size)[:, None]


class UpstreamMaker(Maker):
    """A maker on one upstream generator, which has a `size`.

    Class attributes:
        upstream: which one: the stage must name it in `reads`.
    """

    upstream: ClassVar[Upstream]

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        self.params = params
        self.package = given.upstream(self.upstream)

    @torch.no_grad()
    def __call__(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        made = self.make(resized(sources, self.package.size), seeds)
        return resized(made.clamp(-1, 1), sources.shape[-1])

    @abstractmethod
    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        """As `__call__`, at the generator's own size."""


class Rerepresentation(UpstreamMaker):
    """Stage 2 of IRF, "assembling": `x' = G(Q(E(x)))`, an image spelt in upstream codes. Draws nothing, no parameters.

    Sources the same, the same image: seeds are ignored.
    """

    upstream = "vq"

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.package.rerepresent(sources)


class Completion(UpstreamMaker):
    """DIGG: the codes of an image below a cut row are sampled anew from the latent prior, and decoded.

    Params:
        keep: share of the rows that stay, in [0, 1], or `random`; 0 is a sample without guidance, 1 is x'.
        sample_temperature: divides the prior's logits; above 0.
        top_k: share of the codebook that is sampled from, in (0, 1]; at least one code.
    """

    upstream = "vq"

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.package.decode(self.codes(sources, seeds))

    def codes(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        """[B, n] int64, the completed codes of sources at the package's size, in raster order."""
        indices = self.package.indices(sources)
        side = self.package.side
        keep = torch.tensor([rows * side for rows in kept_rows(self.params["keep"], side, seeds)])
        top_k = max(1, round(self.params["top_k"] * self.package.codes))
        return self.package.complete(
            indices,
            keep=keep.to(indices.device),
            temperature=self.params["sample_temperature"],
            top_k=top_k,
            seeds=list(seeds),
        )


class SDEdit(UpstreamMaker):
    """Image-guided variation without a mask: noise is added up to `strength`, then removed again.

    Params:
        strength: share of the noise schedule that is gone through, in [0, 1]; 0 returns the source.
        steps: of a whole denoising; about `steps · strength` are made.
    """

    upstream = "diffusion"

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        return self.package.sdedit(
            sources, strength=self.params["strength"], steps=self.params["steps"], seeds=list(seeds)
        )


class RePaint(UpstreamMaker):
    """A diffusion model fills in what the mask hides; what it keeps comes back exactly.

    The same rows are kept as by `Completion`, so that the two can be compared; the model could complete any mask.

    Params:
        keep: as in `Completion`.
        steps: of the denoising.
        jump_length: steps that are taken back at a time.
        resamples: how often each stretch is gone through.
    """

    upstream = "diffusion"

    def make(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        size = sources.shape[-1]
        mask = top_mask(kept_rows(self.params["keep"], size, seeds), size).to(sources.device)
        return self.package.repaint(
            sources,
            mask=mask,
            steps=self.params["steps"],
            jump_length=self.params["jump_length"],
            jump_n_sample=self.params["resamples"],
            seeds=list(seeds),
        )
