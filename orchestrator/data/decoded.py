"""Decoded images that a process keeps: each is decoded once, whatever views and sizes are made of it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from orchestrator.data.images import decode

LIMIT = 256 * 2**20  # bytes of a process


class Decoded:
    """Images by the hash of their content, up to a number of bytes in all; the first ones stay.

    Passes over the images go from the first to the last, so to let the oldest go would keep none for the next pass.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._images: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def image(self, image_id: str, read: Callable[[], bytes]) -> Tensor:
        """uint8 [3, H, W]; not to be changed. `read` gives the encoded bytes, if they are needed.

        Raises:
            CorruptError: as `decode`.
        """
        found = self._images.get(image_id)
        if found is not None:
            return found
        found = decode(read())
        with self._lock:
            if image_id not in self._images and self.held + found.nbytes <= self.limit:
                self._images[image_id] = found
                self.held += found.nbytes
        return found


DECODED = Decoded(LIMIT)
