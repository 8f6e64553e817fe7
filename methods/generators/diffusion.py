"""A small unconditional diffusion model as upstream package: routes B (RePaint) and C (SDEdit) of serving OTA's DIGG.

Neither is in the paper, whose generator is `VQPackage`; they are stand-ins of the same use: variations of a downstream
image by a generator that knows the upstream images [inferred]. Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (the
cosine schedule), Song et al. 2021 (DDIM), Meng et al. 2022 (SDEdit), Lugmayr et al. 2022 (RePaint).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from methods.generators import generators, read_config, row_noise
from methods.knobs import MethodConfig, knob

TRAIN_STEPS = 1000


class DiffusionConfig(MethodConfig):
    """The shape of a `DiffusionPackage`; the defaults have 1.1 million parameters [measured]."""

    size: int = knob(32, "Side of the images, in pixels.", ge=8, le=1024)
    channels: tuple[int, ...] = knob((32, 64, 64), "Channels at each resolution.")
    attention: tuple[int, ...] = knob((1,), "Which resolutions have self-attention, 0 the highest.")
    layers: int = knob(1, "Residual layers at each resolution.", ge=1, le=4)
    groups: int = knob(8, "Groups of the group norms; divides all channels.", ge=1, le=64)

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if not self.channels or any(c < 1 or c % self.groups for c in self.channels):
            raise ValueError(f"channels = {list(self.channels)} must all be multiples of groups = {self.groups}")
        if self.size % 2 ** (len(self.channels) - 1):
            raise ValueError(f"size = {self.size} must be a multiple of {2 ** (len(self.channels) - 1)}")
        if any(not 0 <= level < len(self.channels) for level in self.attention):
            raise ValueError(f"attention = {list(self.attention)} must lie in 0 to {len(self.channels) - 1}")
        return self


class DiffusionPackage(nn.Module):
    """diffusers' `UNet2DModel` that predicts the noise, 1000 steps, cosine schedule.

    Images are [B, 3, size, size] in [-1, 1]. `unet` holds the weights that sample: a published package has the moving
    average there (`methods.generators.priming`). What other rows are in a batch moves a result by rounding only.
    """

    kind = "diffusion"
    kept: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DModel

        self.config = config
        levels = range(len(config.channels))
        self.unet: Any = UNet2DModel(
            sample_size=config.size,
            in_channels=3,
            out_channels=3,
            layers_per_block=config.layers,
            block_out_channels=config.channels,
            down_block_types=tuple("AttnDownBlock2D" if i in config.attention else "DownBlock2D" for i in levels),
            up_block_types=tuple("AttnUpBlock2D" if i in config.attention else "UpBlock2D" for i in reversed(levels)),
            norm_num_groups=config.groups,
        )
        schedule: Any = DDPMScheduler(TRAIN_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
        # kept[t]: share of the image's variance that is left after t + 1 steps.
        self.register_buffer("kept", schedule.alphas_cumprod.double(), persistent=False)

    @classmethod
    def build(cls, config: Mapping[str, Any] | DiffusionConfig) -> DiffusionPackage:
        """A package with fresh weights, in evaluation mode.

        Raises:
            ValueError: one sentence, if the configuration is wrong.
        """
        return cls(read_config(DiffusionConfig, config)).eval()

    @property
    def size(self) -> int:
        """Side of the images, in pixels."""
        return self.config.size

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared error of the predicted noise at a random step; draws from torch's own generator."""
        noise = torch.randn_like(images)
        steps = torch.randint(TRAIN_STEPS, (len(images),), device=images.device)
        kept = self.kept[steps].to(images.dtype).view(-1, 1, 1, 1)
        noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
        return F.mse_loss(self.unet(noisy, steps).sample.float(), noise)

    @torch.no_grad()
    def sdedit(self, images: Tensor, strength: float, steps: int, seeds: Sequence[int]) -> Tensor:
        """[B, 3, S, S] images that were noised up to `strength` of the schedule and denoised again (DDIM, η = 0).

        Args:
            images: what guides; strength 0 returns them unchanged, strength 1 keeps next to nothing of them.
            strength: 0 to 1; `round(steps · strength)` denoising steps are run.
            steps: of the whole schedule, 1 to 1000.
            seeds: [B] of the noise, one a row.
        """
        self._check(images, steps)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in 0 to 1, and is {strength:g}.")
        draws = generators(seeds, len(images))
        level = round(steps * strength)
        if level == 0:
            return images.clone()
        grid = _grid(steps)
        x = self._noised(images, grid[level], row_noise(draws, images))
        for i in range(level, 0, -1):
            x = self._denoised(x, grid[i], grid[i - 1])
        return x.clamp(-1, 1)

    @torch.no_grad()
    def repaint(
        self,
        images: Tensor,
        mask: Tensor,
        *,
        steps: int,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        seeds: Sequence[int],
    ) -> Tensor:
        """[B, 3, S, S] images of which the masked-out part is generated to fit the rest (RePaint).

        The known part is noised to each level, the unknown part denoised to it; now and then the whole goes back
        `jump_length` levels, so that both can agree. In the result the known part is the given one exactly.

        Args:
            images: [B, 3, S, S].
            mask: [B, 1, S, S] or [1, 1, S, S]; 1 (above 0.5) where a pixel is kept, 0 where it is generated.
            steps: of the whole schedule, 1 to 1000; jumps come on top.
            jump_length: levels that are gone back.
            jump_n_sample: how often a stretch is gone in all; 1 for no jumps.
            seeds: [B] of all noise of a row.
        """
        self._check(images, steps)
        if jump_length < 1 or jump_n_sample < 1:
            raise ValueError(
                f"jump_length and jump_n_sample must be at least 1; they are {jump_length} and {jump_n_sample}."
            )
        draws = generators(seeds, len(images))
        known = (mask > 0.5).to(images.device)
        grid = _grid(steps)
        x = row_noise(draws, images)
        path = jump_path(steps, jump_length, jump_n_sample)
        for now, then in itertools.pairwise(path):
            if then > now:  # back towards noise
                ratio = self._kept(grid[then]) / self._kept(grid[now])
                x = ratio.sqrt().to(x) * x + (1 - ratio).sqrt().to(x) * row_noise(draws, x)
                continue
            unknown = self._denoised(x, grid[now], grid[then], row_noise(draws, x) if then else None)
            x = torch.where(known, self._noised(images, grid[then], row_noise(draws, x)), unknown)
        return torch.where(known, images, x.clamp(-1, 1))

    def _kept(self, step: int) -> Tensor:
        return self.kept[step] if step >= 0 else torch.ones_like(self.kept[0])

    def _noised(self, images: Tensor, step: int, noise: Tensor) -> Tensor:
        kept = self._kept(step)
        return kept.sqrt().to(images) * images + (1 - kept).sqrt().to(images) * noise

    def _denoised(self, x: Tensor, step: int, to: int, noise: Tensor | None = None) -> Tensor:
        """From step `step` to the cleaner step `to` (-1: clean): DDIM without noise, DDPM's posterior with it."""
        here, there = self._kept(step), self._kept(to)
        predicted = self.unet(x, torch.full((len(x),), step, device=x.device)).sample
        image = ((x - (1 - here).sqrt().to(x) * predicted) / here.sqrt().to(x)).clamp(-1, 1)
        # The noise that fits the clipped image: at the first steps the network's own would be far off.
        predicted = (x - here.sqrt().to(x) * image) / (1 - here).sqrt().to(x)
        if noise is None:
            return there.sqrt().to(x) * image + (1 - there).sqrt().to(x) * predicted
        variance = (1 - there) / (1 - here) * (1 - here / there)
        return (
            there.sqrt().to(x) * image
            + (1 - there - variance).clamp_min(0).sqrt().to(x) * predicted
            + variance.sqrt().to(x) * noise
        )

    def _check(self, images: Tensor, steps: int) -> None:
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"This package has images [B, 3, {self.size}, {self.size}], and got {list(images.shape)}.")
        if not 1 <= steps <= TRAIN_STEPS:
            raise ValueError(f"steps must lie in 1 to {TRAIN_STEPS}, and is {steps}.")


def _grid(steps: int) -> list[int]:
    """The step of the trained schedule at each of `steps` + 1 levels; level 0 is the clean image (-1)."""
    return [-1, *(round((i + 1) * TRAIN_STEPS / steps) - 1 for i in range(steps))]


def jump_path(steps: int, length: int, repeats: int) -> list[int]:
    """The levels that RePaint visits, from `steps` down to 0: after each `length` levels, back and down again.

    Every stretch of `length` levels is gone `repeats` times; what is left over at the noisy end once.
    """
    left = dict.fromkeys(range(0, steps - length + 1, length), repeats - 1)
    path = [steps]
    while path[-1] > 0 or left.get(0, 0) > 0:
        level = path[-1]
        if left.get(level, 0) > 0:
            left[level] -= 1
            path.extend(range(level + 1, level + length + 1))
        else:
            path.append(level - 1)
    return path
