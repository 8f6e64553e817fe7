"""Decoding: encoded bytes to uint8 RGB, or to the class indices of a mask; and the threads that do it."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

MAX_PIXELS = 64_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
READ_THREADS = 2  # that decode, at least
CONVERSIONS = (
    "CMYK colours",
    "palette",
    "other colours",
    "16-bit values",
    "floating-point values",
    "transparency",
    "more than one frame",
    "EXIF rotation",
)


A = TypeVar("A")
R = TypeVar("R")


def hide_warnings() -> None:
    """Hides Pillow's, of the whole process: to do so while an image is decoded would swap a list that threads share."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


hide_warnings()


class CorruptError(ValueError):
    """An image or sentence that cannot be used; the message is the reason it is counted under."""


def decode(data: bytes) -> Tensor:
    """uint8 [3, H, W]. Transparency is laid on white, EXIF rotation applied, of an animation the first frame taken.

    Raises:
        CorruptError: `empty file`, `cannot be decoded`, `more than 64 megapixels`, `smaller than 8 pixels`, or `values
            that are not finite`.
    """
    pixels = np.array(open_rgb(data)[0])
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def open_rgb(data: bytes, least: int = 8) -> tuple[Image.Image, list[str]]:
    """The image as upright RGB, and what of its file plain RGB does not have: `CONVERSIONS`, in their order.

    Args:
        data: an encoded image.
        least: pixels that each side must have.

    Raises:
        CorruptError: see `decode`.
    """
    if not data:
        raise CorruptError("empty file")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise CorruptError("more than 64 megapixels")
        found = _peculiar(image)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            found.add("transparency")
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        elif _is_wide(image.mode):
            image = _scaled(image)
        image = image.convert("RGB")
    except (CorruptError, MemoryError):  # memory is this machine's lack, not the file's
        raise
    except Image.DecompressionBombError:
        raise CorruptError("more than 64 megapixels") from None
    except Exception:  # decoders raise whatever they like on broken files
        raise CorruptError("cannot be decoded") from None
    if min(image.size) < least:
        raise CorruptError(f"smaller than {least} pixels")
    return image, [reason for reason in CONVERSIONS if reason in found]


def _is_wide(mode: str) -> bool:
    """Whether it is greyscale of more than 8 bits: whole numbers of 16 or 32, or floating-point numbers."""
    return mode.startswith("I") or mode == "F"


def _scaled(image: Image.Image) -> Image.Image:
    """Wide greyscale in 8 bits, from 0 or its least value below to its greatest; PIL's own conversion clips instead.

    Raises:
        CorruptError: `values that are not finite`.
    """
    wide: np.ndarray = np.asarray(image, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise CorruptError("values that are not finite")
    low = min(float(wide.min()), 0.0)
    span = float(wide.max()) - low or 1.0
    with np.errstate(all="ignore"):  # of values near the greatest there are, the span is infinite
        return Image.fromarray(((wide - low) / span * 255).astype(np.uint8))


def _peculiar(image: Image.Image) -> set[str]:
    """What an image that is not loaded yet will have to be converted from; transparency shows only later."""
    found = set()
    if image.mode == "CMYK":
        found.add("CMYK colours")
    elif image.mode in ("P", "PA"):
        found.add("palette")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA") and not _is_wide(image.mode):
        found.add("other colours")
    elif image.mode == "F":
        found.add("floating-point values")
    # PIL reduces colours of 16 bits as it loads; only the raw mode still tells.
    if image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        found.add("16-bit values")
    # Phones put a second picture behind a JPEG's first (MPO), which is not an animation.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        found.add("more than one frame")
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        found.add("EXIF rotation")
    return found


def decode_mask(data: bytes) -> Tensor:
    """uint8 [H, W]: the values of a palette, greyscale or bilevel image as they are (of a palette its indices).

    Raises:
        CorruptError: `empty mask file`, `mask cannot be decoded`, `mask of colours instead of class indices`, or `mask
            with values above 255`.
    """
    if not data:
        raise CorruptError("empty mask file")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        values = np.array(image)
    except MemoryError:  # this machine's, not the file's
        raise
    except Exception:  # decoders raise whatever they like on broken files
        raise CorruptError("mask cannot be decoded") from None
    if values.ndim != 2 or values.dtype.kind == "f":
        raise CorruptError("mask of colours instead of class indices")
    if values.max() > 255 or values.min() < 0:
        raise CorruptError("mask with values above 255")
    return torch.from_numpy(values.astype(np.uint8))


def decoders(cpus: float | None = None) -> int:
    """Threads that decode in a process that reserves so many CPUs; None: as many as torch may use in this one."""
    return max(READ_THREADS, int(torch.get_num_threads() if cpus is None else cpus))


def all_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_pool(threads: int) -> ThreadPoolExecutor:
    """Threads that decode and render images, each on one CPU; they end with whoever keeps it."""
    return ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=_on_one_cpu)


def _on_one_cpu() -> None:
    """Keeps torch's operations in this thread to it: threads that each open a team of their own hinder each other.

    Torch's own `set_num_threads` would say so for threads to come as well; OpenMP's holds for its caller alone.
    """
    torch.get_num_threads()  # torch tells OpenMP the process's number when a thread first asks for it, so before
    with contextlib.suppress(OSError, AttributeError):  # a torch without OpenMP
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)


def read_ahead(work: Callable[[A], R], items: Iterable[A], threads: int, ahead: int) -> Generator[R, None, None]:
    """What `work` gives for each item, in order; threads work on up to `ahead` items after the one that is read."""
    waiting: deque[Future[R]] = deque()
    with decoding_pool(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # whoever reads has had enough
                future.cancel()
