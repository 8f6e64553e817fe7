"""What every source of labelled images has: its images, before decoding, and the names of their classes."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, WorkError

SPLITS = ("train", "val", "test")
NAMES = "classes.txt"


@dataclass(frozen=True)
class Item:
    """One image before decoding.

    Attributes:
        where: its address within the source.
        label: class name; of a multi-label source the names of its classes; of one with masks nothing.
        split: `train`, `val`, `test`, or `` where the data brings none.
        group: images of one group land in one split; `` for none.
        stamp: changes when the bytes (or the mask's) may have changed.
        problem: why it is left out, where that is known already.
    """

    where: str
    label: str | tuple[str, ...]
    split: str
    group: str
    stamp: str
    problem: str = ""


class Source(ABC):
    """A collection of labelled images."""

    @abstractmethod
    def items(self) -> list[Item]:
        """Every image, in a stable order."""

    @abstractmethod
    def read(self, where: str) -> bytes:
        """The encoded bytes of one image.

        Raises:
            OSError: if it is not there any more, or cannot be read.
        """

    def read_mask(self, where: str) -> bytes:
        """The encoded bytes of the mask of the image at `where`; raises as `read`."""
        raise NotImplementedError

    def names(self) -> tuple[str, ...] | None:
        """Names of the class indices of masks, where the source brings them."""
        return None


def read_listed(read: Callable[[str], bytes], where: str, what: str, key: str = "task.data") -> bytes:
    """Bytes that were listed just now. Where they cannot be read, nothing is known of them, and nothing may be stored.

    Args:
        read, where, what, key: as of `read_again`.

    Raises:
        WorkError: if they cannot be read.
    """
    try:
        return read(where)
    except OSError as error:
        raise WorkError(f"{key}: {what} cannot be read ({error.strerror or error}).") from None


def read_again(read: Callable[[str], bytes], where: str, known: str, what: str, key: str = "task.data") -> bytes:
    """Bytes that were read before: what is stored under a content's hash must be made of that content.

    Args:
        read: of a source, `read` or `read_mask`.
        where: the address.
        known: the hash of its content then.
        what, key: how messages call it, and where the source was named.

    Raises:
        WorkError: if it cannot be read any more, or is another one.
    """
    try:
        data = read(where)
    except OSError as error:
        raise WorkError(
            f"{key}: {what} cannot be read any more ({error.strerror or error}); restore it, or begin again."
        ) from None
    if hashlib.sha256(data).hexdigest() != known:
        raise WorkError(f"{key}: {what} has changed since it was listed; begin again.")
    return data


def read_names(folder: Path) -> tuple[str, ...] | None:
    """The names in a folder's `classes.txt`, one a line; None without one.

    Raises:
        UserError: if it cannot be read, or a line is empty or a repetition.
    """
    path = folder / NAMES
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.data: {str(path)!r} cannot be read: {error}.") from None
    while names and not names[-1]:
        names.pop()
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            raise UserError(
                f"task.data: line {index + 1} of {str(path)!r} is {'empty' if not name else 'a repetition'}."
            )
    return tuple(names)


def is_null(value: Any) -> bool:
    """Whether a table's cell holds nothing: a null, or the NaN that pandas makes of one."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def class_names(value: Any) -> tuple[str, ...]:
    """The names in a list, or in a text that separates them by `;`; sorted, each once."""
    if is_null(value):
        return ()
    parts = value.split(";") if isinstance(value, str) else [str(v) for v in value if not is_null(v)]
    return tuple(sorted({part.strip() for part in parts} - {""}))
