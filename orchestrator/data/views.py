"""Views: replayable augmentations. Their parameters are stored, so that any later run sees the same pixels.

View 0 of an image is its central square. View v > 0 is a random resized crop, a flip and a colour change whose
parameters depend on the image's content, v, and the policy alone. They are drawn once and stored as numbers, not as a
seed: a library update cannot change them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.draws import draw_many
from orchestrator.data.task import Split
from orchestrator.store import Entry, Records, Store, key_of, write_records

VERSION = 1
COLUMNS = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation")


@dataclass(frozen=True)
class Policy:
    """How views are drawn.

    Attributes:
        crop_scale: smallest share of the image's area that a crop keeps; aspect ratio 3/4 to 4/3.
        color: brightness, contrast and saturation factors are uniform in [1 - color, 1 + color].
    """

    crop_scale: float
    color: float


def draw(policy: Policy, image_id: str, size: tuple[int, int], view: int) -> np.ndarray:
    """[8] float32, see `COLUMNS`: the crop in pixels of the original, flip 0 or 1, colour factors."""
    height, width = size
    side = min(height, width)
    if view == 0:
        return np.array([(height - side) // 2, (width - side) // 2, side, side, 0, 1, 1, 1], dtype=np.float32)
    seed = hashlib.sha256(_drawn_from(policy, image_id, view).encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))

    def uniform(
        low: float, high: float
    ) -> float:  # the values of the generator's own `uniform`, in a third of its time
        return low + (high - low) * rng.random()

    h = w = side
    for _ in range(10):  # as torchvision's RandomResizedCrop: ten tries, then the central square
        area = height * width * uniform(policy.crop_scale, 1.0)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            break
    else:
        h = w = side
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    flip = float(rng.random() < 0.5)
    colour = [uniform(1 - policy.color, 1 + policy.color) for _ in range(3)] if policy.color else (1, 1, 1)
    return np.array([top, left, h, w, flip, *colour], dtype=np.float32)


def _drawn_from(policy: Policy, image_id: str, view: int) -> str:
    return f"{image_id}|{view}|{policy.crop_scale:.6f}|{policy.color:.6f}"


def draw_all(policy: Policy, ids: Sequence[str], sizes: Sequence[tuple[int, int]], view: int) -> np.ndarray:
    """[n, 8]: the same as `draw` of each, sooner."""
    found = np.empty((len(ids), len(COLUMNS)), dtype=np.float32)
    rest: Sequence[int] = range(len(ids))
    if view and ids:
        texts = [_drawn_from(policy, one, view) for one in ids]
        found, rest = draw_many(texts, np.array(sizes), policy.crop_scale, policy.color)
    for row in rest:
        found[row] = draw(policy, ids[row], sizes[row], view)
    return found


def _transforms() -> Any:
    """torchvision's, which import torch's compiler: commands that only check do not wait for it."""
    import torchvision.transforms.v2.functional as T

    return T


def render(image: Tensor, parameters: np.ndarray, size: int, interpolation: str) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, size, size] under one view."""
    T = _transforms()
    top, left, height, width = (int(v) for v in parameters[:4])
    name = interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"
    mode = T.InterpolationMode(name)
    pixels = T.resized_crop(image, top, left, height, width, [size, size], interpolation=mode, antialias=True)
    if parameters[4]:
        pixels = T.horizontal_flip(pixels)
    for factor, change in zip(
        parameters[5:], (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation), strict=True
    ):
        if factor != 1:
            pixels = change(pixels, float(factor))
    return pixels


def render_mask(mask: Tensor, parameters: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W] to uint8 [size, size] under one view: at each pixel's centre the class that lies there.

    That is a sample of the mask's own pixels on the raster of `render`'s: nothing is blended, and no class grows.
    """
    T = _transforms()
    top, left, height, width = (int(v) for v in parameters[:4])
    mode = T.InterpolationMode.NEAREST_EXACT  # the plain one is off by half a pixel
    values = T.resized_crop(mask[None], top, left, height, width, [size, size], interpolation=mode)[0]
    return values.flip(-1) if parameters[4] else values


def stored_view(store: Store, split: Split, policy: Policy, view: int) -> Entry:
    """The store entry with the parameters [N, 8] of one view of every image of `split`."""
    # View 0 is the same under every policy, so its address leaves the policy out.
    reads: dict[str, Any] = {
        "images": split.images_hash,
        "view": view,
        "policy": asdict(policy) if view else None,
        "version": VERSION,
    }

    def write(folder: Path) -> dict[str, Any]:
        rows = draw_all(policy, split.ids, split.sizes, view)
        write_records(folder / "parameters.arrow", len(split), [torch.from_numpy(rows)], "float32")
        return {}

    return store.compute("views", key_of(reads), write, reads=reads)


def view_parameters(entry: Entry) -> np.ndarray:
    """[N, 8] of a `views` entry."""
    return Records(entry.path / "parameters.arrow").all().numpy()
