"""Asking a student about images: its classes with their probabilities, or a mask for each image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from orchestrator.data.images import CorruptError, decode
from orchestrator.data.sources import SUFFIXES, files_below
from orchestrator.errors import UserError, nearest
from orchestrator.select.deployed import Deployed, deployed

BATCH = 32
OUTSIDE = 255  # of a mask: what the network did not see


@dataclass(frozen=True)
class Asked:
    """An image to ask about.

    Attributes:
        path: its file.
        name: of its mask, without a suffix; below the folder that was named, its place there.
    """

    path: Path
    name: str


def ask(
    address: str,
    paths: Sequence[Path],
    trial: str | None = None,
    top: int = 5,
    masks: Path | None = None,
    onnx: bool = False,
    classes: Sequence[str] = (),
    prompts: Sequence[str] = (),
    texts: str | None = None,
) -> dict[str, Any]:
    """`predict` of what `address` names, see `deployed`, about files and folders of images.

    Args:
        classes: of a vision-language student: others than its own, told by their names.
        prompts: sentences that a name is put into; none: those of its task.

    Raises:
        UserError: if there is no such student or image, or an option does not fit the student.
    """
    for option, given in (("--prompt", bool(prompts)), ("--texts", texts is not None)):
        if given and not classes:
            raise UserError(f"{option} needs --class NAME, once for each class that the texts are about.")
    if len(set(classes)) != len(classes) or len(classes) == 1 or not all(name.strip() for name in classes):
        raise UserError(f"--class: at least two different names are needed, not {', '.join(map(repr, classes))}.")
    for prompt in prompts:
        if prompt.count("{}") != 1 or prompt.count("{") != 1 or prompt.count("}") != 1:
            raise UserError(f"--prompt: {prompt!r} needs {{}} once, where a name goes, as in 'a photo of a {{}}'.")
    images = find_images(paths)
    model = deployed(address, trial, onnx, texts)
    return predict(model.renamed(classes, prompts) if classes else model, images, top, masks)


def find_images(paths: Sequence[Path]) -> list[Asked]:
    """Files as they are, and every image below folders, in order.

    Raises:
        UserError: if there is no such path, it cannot be looked at, or a folder holds no image.
    """
    try:
        return [asked for path in paths for asked in _images_at(path)]
    except OSError as error:
        raise UserError(f"IMAGES: {error.filename!r} cannot be read: {error.strerror}.") from None


def _images_at(path: Path) -> list[Asked]:
    if path.is_dir():
        below = [where for where, _ in files_below(path, SUFFIXES)]
        if not below:
            raise UserError(
                f"IMAGES: there is no image below {str(path)!r} (looked for {', '.join(sorted(SUFFIXES))})."
            )
        return [Asked(path / where, os.path.splitext(where)[0]) for where in below]
    if path.is_file():
        return [Asked(path, path.stem)]
    near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"IMAGES: there is no file or folder {str(path)!r}.{nearest(path.name, near)}")


def predict(model: Deployed, images: Sequence[Asked], top: int = 5, masks: Path | None = None) -> dict[str, Any]:
    """What `model` says of images; one that cannot be used is passed over.

    Args:
        model: whom to ask.
        images: at least one.
        top: classes told of each image, the most probable ones first.
        masks: of a segmentation: a folder that does not exist yet, or is empty, for a mask of each image's size with
            the index of the class at each pixel, and 255 outside the central square, which is all the network sees.

    Returns:
        As plain JSON: `model`, `runtime`, `kind`; `images`, each with `image`, `classes` (each with `label`, and its
        `probability`, or of a segmentation its `share` of the pixels seen) and `mask`; `skipped`, each with `image`
        and `reason`.

    Raises:
        UserError: if masks are asked of another kind of student, or their folder is taken or cannot be written.
    """
    if masks is not None:
        _check_place(masks, model)
    told: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    names: set[str] = set()
    for batch in _batches(model, images, skipped):
        logits = model.logits([pixels for _, _, pixels in batch])
        for (asked, size, _), one in zip(batch, logits, strict=True):
            entry: dict[str, Any] = {"image": str(asked.path)}
            if model.kind == "segmentation":
                square = square_mask(one, min(size))
                entry["classes"] = _shares(model, square, top)
                if masks is not None:
                    entry["mask"] = str(_write_mask(masks, asked, full_mask(square, size), names))
            else:
                entry["classes"] = _probabilities(model, one, top)
            told.append(entry)
    return {
        "model": model.name,
        "runtime": model.runtime,
        "kind": model.kind,
        "images": told,
        "skipped": skipped,
    }


def _batches(
    model: Deployed, images: Sequence[Asked], skipped: list[dict[str, str]]
) -> Iterator[list[tuple[Asked, tuple[int, int], Tensor]]]:
    """Images with their size and pixels [3, S, S]; decoded by threads, a batch at a time."""

    def read(asked: Asked) -> tuple[tuple[int, int], Tensor] | str:
        try:
            image = decode(asked.path.read_bytes())
        except CorruptError as reason:
            return str(reason)
        except OSError as error:
            return f"cannot be read ({error.strerror or type(error).__name__})"
        return (image.shape[1], image.shape[2]), model.pixels(image)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            batch = []
            for asked, found in zip(part, pool.map(read, part), strict=True):
                if isinstance(found, str):
                    skipped.append({"image": str(asked.path), "reason": found})
                else:
                    batch.append((asked, *found))
            if batch:
                yield batch


def _probabilities(model: Deployed, logits: Tensor, top: int) -> list[dict[str, Any]]:
    values = logits.sigmoid() if model.kind == "multilabel" else logits.softmax(0)
    return _largest(model, values, "probability", top)


def _shares(model: Deployed, square: Tensor, top: int) -> list[dict[str, Any]]:
    counts = torch.bincount(square.flatten(), minlength=len(model.classes))
    return [told for told in _largest(model, counts.double() / square.numel(), "share", top) if told["share"] > 0]


def _largest(model: Deployed, values: Tensor, word: str, top: int) -> list[dict[str, Any]]:
    order = values.argsort(descending=True, stable=True)[:top].tolist()
    return [{"label": model.classes[i], word: float(values[i])} for i in order]


def square_mask(logits: Tensor, side: int) -> Tensor:
    """Logits [C, S, S] of a square to uint8 [side, side]: the class at each pixel, the first one of equals.

    One class after the other is enlarged, and kept where it exceeds all before it: the enlarged logits of all classes
    take gigabytes for a photo. Each is enlarged by the function that would enlarge all, so that the mask is the same
    (but for ties in the last bit: of three channels, or of channels last in memory, torch adds in another order).
    """
    mask = torch.zeros(side, side, dtype=torch.uint8)
    best = _enlarged(logits[0], side)
    for index in range(1, len(logits)):
        one = _enlarged(logits[index], side)
        mask.masked_fill_(one > best, index)
        torch.maximum(best, one, out=best)
    return mask


def _enlarged(plane: Tensor, side: int) -> Tensor:
    return F.interpolate(plane[None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]


def full_mask(square: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The mask of an image's central square to uint8 [H, W]: class indices, 255 outside the square."""
    height, width = size
    side = min(size)
    top, left = (height - side) // 2, (width - side) // 2
    mask = np.full((height, width), OUTSIDE, dtype=np.uint8)
    mask[top : top + side, left : left + side] = square.numpy()
    return mask


def _check_place(folder: Path, model: Deployed) -> None:
    if model.kind != "segmentation":
        raise UserError(f"--out: masks are what a segmentation student gives; {model.name!r} is for {model.kind}.")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out: {str(folder)!r} is not empty; name a folder that does not exist yet.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {str(folder)!r} cannot be written ({error.strerror}).") from error


def _write_mask(folder: Path, asked: Asked, mask: np.ndarray, taken: set[str]) -> Path:
    name, number = asked.name, 1
    while name in taken:
        number += 1
        name = f"{asked.name}-{number}"
    taken.add(name)
    path = folder / f"{name}.png"
    picture = Image.fromarray(mask, "P")
    picture.putpalette(_palette())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"--out: {str(path)!r} cannot be written ({error.strerror or error}).") from error
    return path


def _palette() -> list[int]:
    """Colours by index, those of VOC's masks: the bits of an index dealt to red, green and blue, highest first."""
    colours = []
    for index in range(256):
        channels, bits = [0, 0, 0], index
        for place in range(7, -1, -1):
            for channel in range(3):
                channels[channel] |= (bits >> channel & 1) << place
            bits >>= 3
        colours += channels
    return colours
