"""Small data sets for the tests of segmentation and of several labels an image, written by the tests themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
INK = {"red": (210, 50, 40), "green": (50, 170, 60), "blue": (50, 70, 210)}


def scene(rng: np.random.Generator, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [72, 80, 3] of grey noise with a rectangle of each colour, and the mask: 0 background, then as in INK."""
    pixels = rng.normal(128, 25, (72, 80, 3))
    mask = np.zeros((72, 80), np.uint8)
    for name in classes:
        height, width = rng.integers(28, 44, 2)
        top, left = rng.integers(0, 72 - height), rng.integers(0, 80 - width)
        area = slice(top, top + height), slice(left, left + width)
        pixels[area] = rng.normal(0, 25, (height, width, 3)) + INK[name]
        mask[area] = 1 + list(INK).index(name)
    return pixels.clip(0, 255).astype(np.uint8), mask


def mask_folder(root: Path, count: int = 40, border: int = 255) -> Path:
    """`images/` and `masks/` of scenes with one or two colours; the mask's outermost pixels are `border`."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        names = tuple(rng.permutation(list(INK))[: 1 + i % 2])
        pixels, mask = scene(rng, names)
        mask[0], mask[-1], mask[:, 0], mask[:, -1] = border, border, border, border
        Image.fromarray(pixels).save(root / "images" / f"{i:02}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i:02}.png")
    (root / "classes.txt").write_text("\n".join(["background", *INK]) + "\n", encoding="utf-8")
    return root


def listed_folder(root: Path, count: int = 60) -> Path:
    """Images of no, one or several colours, and a `labels.csv`."""
    rng = np.random.default_rng(1)
    root.mkdir(parents=True)
    lines = ["file,labels"]
    for i in range(count):
        names = tuple(n for n in INK if rng.random() < 0.4)
        pixels, _ = scene(rng, names)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
        lines.append(f"{i:02}.png,{';'.join(names)}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
