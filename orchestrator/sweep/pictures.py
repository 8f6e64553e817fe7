"""Pictures for TensorBoard: who is taken for whom, the worst errors, and contact sheets of generated images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from orchestrator.evaluate.details import FILE, PICTURES, TILE

CELL = 30  # pixels
NAMED = 12  # characters of a class's name that are shown


def pictures_of(student: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and uint8 [H, W, 3] of what a student's folder shows; nothing where nothing was recorded."""
    try:
        details = json.loads((student / FILE).read_text(encoding="utf-8"))
        if details["confusion"]:
            names = [c["name"] for c in details["classes"]]
            yield "val/confusion_matrix", confusion_picture(details["confusion"], names)
        if (student / PICTURES).is_file():
            captions = [_caption(error, [c["name"] for c in details["classes"]]) for error in details["worst"]]
            yield "val/worst_errors", _captioned(student / PICTURES, captions)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return


def confusion_picture(counts: list[list[int]], names: list[str]) -> np.ndarray:
    """Counts [truth, said] as squares, darker for a larger share of the row, with numbers and names."""
    font = ImageFont.load_default(11)
    names = [name if len(name) <= NAMED else name[: NAMED - 1] + "…" for name in names]
    margin = int(max(font.getlength(name) for name in names)) + 10
    side = margin + CELL * len(names)
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    upright = Image.new("L", (side, margin), 0)
    for at, name in enumerate(names):
        pen.text((4, margin + CELL * at + 8), name, fill="black", font=font)
        label = Image.new("L", (margin, CELL), 0)
        ImageDraw.Draw(label).text((4, 8), name, fill=255, font=font)
        upright.paste(label.rotate(90, expand=True), (margin + CELL * at, 0))
    picture.paste(Image.new("RGB", upright.size, "black"), (0, 0), upright)
    for truth, row in enumerate(counts):
        for said, count in enumerate(row):
            share = count / max(1, sum(row))
            left, top = margin + CELL * said, margin + CELL * truth
            shade = round(255 * (1 - share))
            pen.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=(shade, shade, 255 - (255 - shade) // 4))
            if count:
                ink = "white" if share > 0.55 else "black"
                pen.text((left + CELL / 2, top + CELL / 2), str(count), fill=ink, font=font, anchor="mm")
    return np.asarray(picture)


def _caption(error: dict[str, list[int]], names: list[str]) -> tuple[str, str]:
    return ", ".join(names[c] for c in error["truth"]), ", ".join(names[c] for c in error["said"])


def _captioned(path: Path, captions: list[tuple[str, str]]) -> np.ndarray:
    with Image.open(path) as sheet:
        picture = Image.new("RGB", (sheet.width, sheet.height + 32), "white")
        picture.paste(sheet, (0, 0))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for at, lines in enumerate(captions):
        for line, text in enumerate(lines):
            pen.text((at * TILE + 2, TILE + 2 + 14 * line), text[:16], fill="black", font=font)
    return np.asarray(picture)


def contact_sheets(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and uint8 [H, W, 3] of the sweep's sheets of sources and what was generated of them."""
    for path in sorted((folder / "pictures").glob("*.png")):
        try:
            with Image.open(path) as sheet:
                yield f"generated/{path.stem}", np.asarray(sheet.convert("RGB"))
        except OSError:
            continue
