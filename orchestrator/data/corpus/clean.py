"""One raw image or sentence: what is kept of it, or why it is left out."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from orchestrator.data.images import CorruptError, open_rgb

LONGEST = 512
WEBP_SIDE = 16_383  # pixels: the format's limit


@dataclass(frozen=True)
class ImageRules:
    """What is done to images.

    Attributes:
        min_side: pixels; an image with a shorter side is left out.
        max_side: pixels; an image whose shorter side is longer is scaled down to it. None: never.
        quality: of the WebP files that converted and scaled images become, 1 to 100.
    """

    min_side: int = 16
    max_side: int | None = None
    quality: int = 90


class CleanImage(NamedTuple):
    """What is stored of an image.

    Attributes:
        data: its own bytes, or those of the WebP file (PNG beyond WebP's size) that it was converted to.
        height, width: pixels.
        converted: why it was converted, maybe several reasons; empty if it was not.
    """

    data: bytes
    height: int
    width: int
    converted: tuple[str, ...]


def clean_image(data: bytes, rules: ImageRules) -> CleanImage:
    """An image that decodes to plain 8-bit RGB or grey keeps its bytes; any other is converted and encoded anew.

    Raises:
        CorruptError: with the reason; see `open_rgb`.
    """
    image, reasons = open_rgb(data, rules.min_side)
    shorter = min(image.size)
    if rules.max_side is not None and shorter > rules.max_side:
        width, height = (max(1, round(side * rules.max_side / shorter)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        reasons = [*reasons, "scaled down"]
    if reasons:
        data = _encoded(image, rules.quality)
    return CleanImage(data, image.height, image.width, tuple(reasons))


def _encoded(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.info.clear()  # a colour profile or rotation of the old file would apply a second time
    if max(image.size) > WEBP_SIDE:
        image.save(file, "PNG")
    else:
        image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def clean_sentence(data: bytes, longest: int = LONGEST) -> str:
    """The text in Unicode's form NFC, with single spaces and none at its ends.

    Args:
        data: UTF-8.
        longest: characters that it may have after that.

    Raises:
        CorruptError: `not UTF-8`, `empty`, or `longer than N characters`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptError("not UTF-8") from None
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise CorruptError("empty")
    if len(text) > longest:
        raise CorruptError(f"longer than {longest} characters")
    return text
