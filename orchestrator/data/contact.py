"""Contact sheets: a picture for people of images and of what was made of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 96  # pixels
GAP = 6
TITLE = 18


def contact_sheet(columns: Mapping[str, Tensor], path: Path) -> None:
    """Writes a PNG with one titled column for each entry; rows are aligned.

    Args:
        columns: title -> uint8 [rows, 3, S, S]; sizes may differ between columns.
        path: the file; it appears whole or not at all.
    """
    rows = max(len(images) for images in columns.values())
    width, height = len(columns) * (CELL + GAP) + GAP, TITLE + rows * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for column, (title, images) in enumerate(columns.items()):
        left = GAP + column * (CELL + GAP)
        pen.text((left, 3), title, fill="black", font=font)
        for row, pixels in enumerate(images.to(torch.uint8).permute(0, 2, 3, 1).numpy()):
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, TITLE + row * (CELL + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    sheet.save(temporary, "PNG")
    os.replace(temporary, path)
