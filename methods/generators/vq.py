"""OTA's upstream package: discrete codes of images, and a transformer that knows how codes follow each other.

Wang et al., One to Transfer All, arXiv 2111.12386: the provider of a foundation model publishes a VQGAN and a latent
transformer that were trained on the upstream images, and no image [paper abstract, fig]. The paper's losses and sizes
were not found; what is used here are those of VQGAN's authors where tagged [secondary], else our choice [inferred].
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from methods.generators import generators, read_config
from methods.generators.prior import LatentPrior
from methods.knobs import MethodConfig, knob

BETA = 0.25
CHANNELS = (24, 48, 64, 96, 128)


class VQConfig(MethodConfig):
    """The shape of a `VQPackage`. The paper's was not found; VQGAN's own is f 16, K 1024, dim 256 [secondary]."""

    size: int = knob(64, "Side of the images, in pixels.", ge=8, le=1024)
    f: Literal[2, 4, 8, 16] = knob(8, "One code stands for a square of this side, in pixels.")
    codes: int = knob(512, "K, the number of codes.", ge=2, le=65536)
    dim: int = knob(32, "Length of a code.", ge=1, le=1024)
    channels: tuple[int, ...] = knob(CHANNELS[:4], "Channels at each resolution; by default as many as f needs.")
    layers: int = knob(1, "Residual layers at each resolution.", ge=1, le=4)
    groups: int = knob(8, "Groups of the group norms; divides all channels.", ge=1, le=64)
    attention: bool = knob(False, "Self-attention at the lowest resolution.")
    prior_width: int = knob(128, "Width of the latent transformer.", ge=8, le=4096)
    prior_layers: int = knob(4, "Its blocks.", ge=1, le=48)
    prior_heads: int = knob(4, "Its heads; divides the width.", ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _default_channels(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        channels = values.get("channels")
        if channels is None and values.get("f") in (2, 4, 8, 16):
            channels = CHANNELS[: values["f"].bit_length()]
        return values if channels is None else {**values, "channels": _as_tuple(channels)}

    @model_validator(mode="after")
    def _fits(self) -> VQConfig:
        if len(self.channels) != self.f.bit_length():
            raise ValueError(f"f = {self.f} needs {self.f.bit_length()} channels, and channels = {list(self.channels)}")
        if any(c < 1 or c % self.groups for c in self.channels):
            raise ValueError(f"channels = {list(self.channels)} must all be multiples of groups = {self.groups}")
        if self.size % self.f:
            raise ValueError(f"size = {self.size} must be a multiple of f = {self.f}")
        if self.prior_width % self.prior_heads:
            raise ValueError(f"prior_width = {self.prior_width} must be a multiple of prior_heads = {self.prior_heads}")
        return self


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class VQPackage(nn.Module):
    """Encoder, codebook and decoder (diffusers' `VQModel`), and the prior of the codes.

    Images are [B, 3, size, size] in [-1, 1]; codes are [B, n] int64, n = side², row by row from the top left.
    `indices` and `decode` go through the network one image at a time: then an image's codes cannot depend on what else
    is in its batch, which the last bits of a batched convolution do. On a CPU that costs a third more.
    """

    kind = "vq"

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        from diffusers import VQModel

        self.config = config
        levels = len(config.channels)
        self.vq: Any = VQModel(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            latent_channels=config.dim,
            sample_size=config.size,
            num_vq_embeddings=config.codes,
            vq_embed_dim=config.dim,
            norm_num_groups=config.groups,
            mid_block_add_attention=config.attention,
        )
        self.prior = LatentPrior(config.codes, self.side, config.prior_width, config.prior_layers, config.prior_heads)

    @classmethod
    def build(cls, config: Mapping[str, Any] | VQConfig) -> VQPackage:
        """A package with fresh weights, in evaluation mode.

        Raises:
            ValueError: one sentence, if the configuration is wrong.
        """
        return cls(read_config(VQConfig, config)).eval()

    @property
    def size(self) -> int:
        """Side of the images, in pixels."""
        return self.config.size

    @property
    def side(self) -> int:
        """Codes in a row; an image has `side²`."""
        return self.config.size // self.config.f

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.config.codes

    @property
    def codebook(self) -> Tensor:
        """[K, dim]."""
        return self.vq.quantize.embedding.weight

    def nearest(self, latents: Tensor) -> Tensor:
        """[B, n] the code that is nearest to each latent [B, dim, side, side]."""
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        return torch.cdist(flat, self.codebook).argmin(1).view(len(latents), self.side**2)

    def entries(self, indices: Tensor) -> Tensor:
        """[B, dim, side, side] the codebook's vectors."""
        return self.codebook[indices].view(len(indices), self.side, self.side, self.config.dim).permute(0, 3, 1, 2)

    @torch.no_grad()
    def indices(self, images: Tensor) -> Tensor:
        """[B, n] int64 the codes of images."""
        self._check(images)
        return torch.cat([self.nearest(self.vq.encode(row).latents) for row in images.split(1)])

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """[B, 3, size, size] in [-1, 1] what codes [B, n] stand for."""
        rows = [self.vq.decode(self.entries(row), force_not_quantize=True).sample for row in indices.split(1)]
        return torch.cat(rows).clamp(-1, 1)

    def rerepresent(self, images: Tensor) -> Tensor:
        """The images in the upstream's codes, decoded: the paper's transferred images [fig]."""
        return self.decode(self.indices(images))

    @torch.no_grad()
    def complete(
        self,
        indices: Tensor,
        keep: Sequence[int] | Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        seeds: Sequence[int],
    ) -> Tensor:
        """[B, n] codes of which the first `keep[b]` are those given and the others are drawn from the prior.

        The prior runs in double precision: what other rows are in a batch then moves its logits by 1e-15, not by 1e-6,
        and no draw falls to another code for that.

        Args:
            indices: [B, n] int64, e.g. of `indices`. Only the kept ones are looked at.
            keep: [B] how many codes are kept, 0 to n. A prefix in raster order is all that such a prior can keep, so a
                "random mask" of the paper [fig] means a random cut row here [inferred].
            temperature: above 0; divides the logits.
            top_k: 1 to K, the most likely codes that are drawn from; 0 for all.
            seeds: [B] one a row; a row's draws depend on nothing else.

        Raises:
            ValueError: if a number is out of its range or there is not one of each a row.
        """
        rows, length = len(indices), self.side**2
        kept = torch.as_tensor(keep, dtype=torch.int64, device=indices.device)
        if indices.shape != (rows, length) or kept.shape != (rows,):
            raise ValueError(
                f"complete needs indices [B, {length}] and keep [B], and got {list(indices.shape)} and "
                f"{list(kept.shape)}."
            )
        if rows and not 0 <= int(kept.min()) <= int(kept.max()) <= length:
            raise ValueError(f"keep must lie in 0 to {length}, and is {kept.tolist()}.")
        if temperature <= 0 or not 0 <= top_k <= self.codes:
            raise ValueError(
                f"temperature must be above 0 and top_k in 0 to {self.codes}; they are {temperature:g} and {top_k}."
            )
        uniforms = [torch.rand(length, generator=draw, dtype=torch.float64) for draw in generators(seeds, rows)]
        if not uniforms:
            return indices.clone()
        prior = copy.deepcopy(self.prior).double().eval()
        return prior.complete(indices, kept, temperature, top_k, torch.stack(uniforms).to(indices.device))

    def vq_loss(self, images: Tensor, beta: float = BETA) -> dict[str, Tensor]:
        """L1 and the codebook loss of images, as `loss`, `l1`, `codebook`; also `reconstruction`, `latents`, `indices`.

        `codebook` = ||sg[z] - z_q||² + β ||z - sg[z_q]||², β 0.25: β on the encoder's term, as VQ-VAE defines it.
        diffusers and taming put it on the other one unless told (`legacy=True` [code]); diffusers' `VQModel` cannot be
        told, so the loss is computed here. The gradient passes the quantiser straight through. LPIPS and the
        adversarial term of VQGAN are not in here: see `methods.generators.priming`.
        """
        latents = self.vq.encode(images).latents.float()
        indices = self.nearest(latents.detach())
        entries = self.entries(indices)
        codebook = F.mse_loss(entries, latents.detach()) + beta * F.mse_loss(latents, entries.detach())
        passed = latents + (entries - latents).detach()
        reconstruction = self.vq.decode(passed, force_not_quantize=True).sample.float()
        l1 = F.l1_loss(reconstruction, images)
        return {
            "loss": l1 + codebook,
            "l1": l1,
            "codebook": codebook,
            "reconstruction": reconstruction,
            "latents": latents,
            "indices": indices,
        }

    def prior_loss(self, indices: Tensor, pkeep: float = 1.0) -> Tensor:
        """Mean negative log-likelihood a code, in nats: `-log p(s_i | s_<i)` [secondary: taming]. Uniform is `log K`.

        Args:
            indices: [B, n] int64.
            pkeep: share of the symbols before the predicted one that stay; the others become random codes, a
                regulariser for few data [secondary]. Drawn from torch's own generator.
        """
        inputs = indices
        if pkeep < 1:
            random = torch.randint_like(indices, self.codes)
            inputs = torch.where(torch.rand(indices.shape, device=indices.device) < pkeep, indices, random)
        logits, _ = self.prior(self.prior.shifted(inputs))
        return F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten())

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"This package has images [B, 3, {self.size}, {self.size}], and got {list(images.shape)}.")
