"""Shifts that need no data: what greyscale, blur, noise, JPEG, rotation and low contrast do to a user's own images."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as T
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from orchestrator.data.images import decode

VERSION = 1
SIDE = 224  # a shift is applied to a square of this side, or of the network's where that is larger
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Shift:
    """One of `NAMES` at a severity of 1 to 5; the same pixels whenever it is applied to the same image."""

    name: str
    severity: int

    def __call__(self, square: Tensor, image_id: str) -> Tensor:
        """uint8 [3, S, S] to the same.

        Args:
            square: the image; lengths (a blur's width) are shares of its side.
            image_id: what is drawn at random (noise, the sense of a rotation) depends on this alone.
        """
        apply, strengths = _SHIFTS[self.name]
        return apply(square, strengths[self.severity - 1], f"{image_id}|{self.name}")


def _random(seed: str) -> np.random.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _greyscale(square: Tensor, share: float, seed: str) -> Tensor:
    return T.adjust_saturation(square, 1 - share)


def _contrast(square: Tensor, factor: float, seed: str) -> Tensor:
    return T.adjust_contrast(square, factor)


def _blur(square: Tensor, pixels: float, seed: str) -> Tensor:
    sigma = pixels * square.shape[-1] / SIDE
    return T.gaussian_blur(square, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def _noise(square: Tensor, deviation: float, seed: str) -> Tensor:
    # The same draw at every severity, so that a stronger shift is further away for each image.
    drawn = torch.from_numpy(_random(seed).standard_normal(tuple(square.shape), dtype=np.float32))
    return (square.float() + drawn * (255 * deviation)).round().clamp(0, 255).to(torch.uint8)


def _jpeg(square: Tensor, quality: float, seed: str) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(square.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=int(quality))
    return decode(file.getvalue())


def _rotation(square: Tensor, degrees: float, seed: str) -> Tensor:
    side = square.shape[-1]
    angle = degrees if _random(seed).random() < 0.5 else -degrees
    # Mirrored at its border first: no corner is filled with a colour that is not the image's.
    wide = T.pad(square, [math.ceil(0.21 * side)] * 4, padding_mode="reflect")
    return T.center_crop(T.rotate(wide, angle, interpolation=InterpolationMode.BILINEAR), [side, side])


_SHIFTS: dict[str, tuple[Callable[[Tensor, float, str], Tensor], tuple[float, ...]]] = {
    "greyscale": (_greyscale, (0.2, 0.4, 0.6, 0.8, 1.0)),  # share of the colour that goes
    "contrast": (_contrast, (0.75, 0.5, 0.35, 0.2, 0.1)),  # factor about the mean grey
    "blur": (_blur, (1.0, 2.0, 3.0, 4.0, 6.0)),  # sigma of a Gaussian, in pixels of 224
    "noise": (_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),  # standard deviation, of the range of a value
    "jpeg": (_jpeg, (50, 25, 15, 10, 6)),  # quality
    "rotation": (_rotation, (5.0, 10.0, 20.0, 30.0, 45.0)),  # degrees, to either side
}
NAMES = tuple(_SHIFTS)
