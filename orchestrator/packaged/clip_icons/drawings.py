"""Named icons from the fonts of the PyPI package qtawesome, drawn. One designer, Phosphor, is held out."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFont

SIDE = 64  # pixels
GLYPH = 56  # pixels: the longer side of every drawing
DRAWN = 160  # pixels: fonts are drawn larger, then shrunk, so that every designer gets the same smoothing
FONTS = {  # of the training designers; brands' fonts stay out
    "materialdesignicons6-webfont-6.9.96": "mdi",
    "remixicon-2.5.0": "remix",
    "fontawesome6-solid-webfont-6.7.2": "fa6-solid",
    "fontawesome6-regular-webfont-6.7.2": "fa6-regular",
    "fontawesome5-solid-webfont-5.15.4": "fa5-solid",
    "fontawesome5-regular-webfont-5.15.4": "fa5-regular",
    "codicon-0.0.36": "codicon",
}
HELD_OUT = "phosphor-1.3.0"
WEIGHTS = ("thin", "light", "regular", "bold", "fill")
STYLE_WORDS = {"outline", "variant", "fill", "line", "alt"}


@dataclass(frozen=True)
class Icon:
    """One glyph.

    Attributes:
        font: file name without its ending.
        designer: short name of the font's family and style.
        code: code point.
        names: its names in the font, style words included.
    """

    font: str
    designer: str
    code: int
    names: tuple[str, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """Its names in words, style words left out."""
        return tuple(dict.fromkeys(caption(name) for name in self.names))


def caption(name: str) -> str:
    """`alarm-light-outline` -> `alarm light`; `key-2-line` -> `key`."""
    words = name.split("-")
    if words[-1] in ("fill", "line"):  # Remix numbers its alternatives: arrow-left-2-line
        words = [word for word in words[:-1] if not re.fullmatch(r"[2-9]", word)] or words[:-1]
    kept = [word for word in words if word not in STYLE_WORDS]
    return " ".join(kept or words)


def fonts_folder() -> Path:
    """Where qtawesome keeps its fonts; the package is not imported, since that would need Qt."""
    from importlib.util import find_spec

    spec = find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The icons come with qtawesome: pip install --no-deps qtawesome==1.4.2")
    return Path(spec.submodule_search_locations[0]) / "fonts"


def charmap(fonts: Path, font: str) -> dict[str, int]:
    """Code point of each name."""
    family, _, version = font.rpartition("-")
    path = fonts / f"{family}-charmap-{version}.json"
    return {name: int(code, 16) for name, code in json.loads(path.read_text()).items()}


def training_icons(fonts: Path) -> list[Icon]:
    """Every glyph of the training designers."""
    icons = []
    for font, designer in FONTS.items():
        names = defaultdict(list)
        for name, code in charmap(fonts, font).items():
            names[code].append(name)
        icons += [Icon(font, designer, code, tuple(of_code)) for code, of_code in sorted(names.items())]
    return icons


def held_out_icons(fonts: Path) -> dict[str, list[Icon]]:
    """Phosphor by name: one icon for each of `WEIGHTS`. Companies' logos are left out."""
    codes = charmap(fonts, HELD_OUT)
    found: dict[str, list[Icon]] = {}
    for name in codes:
        if name.endswith(("-thin", "-light", "-bold", "-fill")) or name.endswith("-logo") or "-logo-" in name:
            continue
        of_name = [name if weight == "regular" else f"{name}-{weight}" for weight in WEIGHTS]
        found[name] = [
            Icon(HELD_OUT, f"phosphor-{weight}", codes[full], (name,))
            for weight, full in zip(WEIGHTS, of_name, strict=True)
        ]
    return found


def draw(fonts: Path, icons: Sequence[Icon]) -> np.ndarray:
    """(n, 64, 64) bytes: ink 255 on 0 in 16 levels, the drawing's longer side 56 px, centred."""
    faces: dict[str, Any] = {}
    pictures = np.zeros((len(icons), SIDE, SIDE), np.uint8)
    for row, icon in enumerate(icons):
        if icon.font not in faces:
            faces[icon.font] = ImageFont.truetype(str(fonts / f"{icon.font}.ttf"), DRAWN)
        mask = faces[icon.font].getmask(chr(icon.code), mode="L")
        if not all(mask.size):
            continue
        ink = Image.frombytes("L", mask.size, bytes(mask))
        ink = ink.crop(ink.getbbox())
        scale = GLYPH / max(ink.size)
        width, height = (max(1, round(length * scale)) for length in ink.size)
        small = np.asarray(ink.resize((width, height), Image.Resampling.BOX))
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        pictures[row, top : top + height, left : left + width] = (small.astype(np.uint16) + 8) // 17 * 17
    return pictures


def training_pictures(fonts: Path) -> tuple[list[Icon], np.ndarray]:
    """The training designers' icons and drawings (n, 64, 64), without blank ones and held-out ones."""
    held_out = [icon for of_name in held_out_icons(fonts).values() for icon in of_name]
    hidden = {picture.tobytes() for picture in draw(fonts, held_out)}  # plain squares and dots are everybody's
    icons = training_icons(fonts)
    pictures = draw(fonts, icons)
    kept = [i for i, picture in enumerate(pictures) if picture.any() and picture.tobytes() not in hidden]
    return [icons[i] for i in kept], pictures[kept]


def encoded(picture: np.ndarray) -> bytes:
    """Lossless WebP of (64, 64) bytes of ink, black on white."""
    buffer = io.BytesIO()
    Image.fromarray(255 - picture).save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()
