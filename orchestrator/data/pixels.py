"""Pixels of views at a network's size: stored where they fit, else rendered as they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.images import decoders, decoding_pool, read_ahead
from orchestrator.data.task import ImageSet, Split
from orchestrator.data.views import Policy, draw, render, stored_view, view_parameters
from orchestrator.models.load import Preprocessing
from orchestrator.store import JoinedRecords, Records, Store, in_turns, key_of, write_records

VERSION = 1
AHEAD = 4  # batches that are rendered before they are asked for, at most
AHEAD_BYTES = 256 * 2**20  # of these, at most


class Pixels(Protocol):
    """Pixels of views of a split. Several threads may ask at once."""

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """uint8 [B, 3, S, S] of the images `rows` [B] under the views `views` [B]."""
        ...


class RenderedPixels:
    """Rendered from the encoded images at each call, by threads that it keeps: as many as torch may use."""

    def __init__(self, images: ImageSet, split: Split, policy: Policy, preprocessing: Preprocessing) -> None:
        self.images = images
        self.split = split
        self.policy = policy
        self.preprocessing = preprocessing
        self._readers = decoding_pool(decoders())

    def _one(self, row: int, view: int) -> Tensor:
        parameters = draw(self.policy, self.split.ids[row], self.split.sizes[row], view)
        image = self.images.image(self.split, row)
        return render(image, parameters, self.preprocessing.size, self.preprocessing.interpolation)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        return torch.stack(list(self._readers.map(self._one, rows.tolist(), views.tolist())))


class StoredPixels:
    """Read from the store by memory map."""

    def __init__(self, tables: Sequence[Records | JoinedRecords]) -> None:
        self.tables = tables

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        record = self.tables[0].shape
        result = torch.empty((len(rows), *record), dtype=torch.uint8)
        for view in np.unique(views):
            where = np.flatnonzero(views == view)
            result[torch.from_numpy(where)] = self.tables[int(view)].rows(rows[where])
        return result


def rendered_view(
    images: ImageSet,
    split: Split,
    parameters: np.ndarray,
    preprocessing: Preprocessing,
    batch: int = 64,
    threads: int | None = None,
    rows: range | None = None,
) -> Iterator[Tensor]:
    """uint8 [b, 3, S, S] batches of one view of every image, in order; the next ones are rendered while one is used.

    Args:
        images, split, parameters, preprocessing: what is rendered, under which view, and how.
        batch: images at a time.
        threads: that render; None: as many as torch may use.
        rows: of these images of the split only.
    """
    wanted = range(len(split)) if rows is None else rows

    def one(row: int) -> Tensor:
        return render(images.image(split, row), parameters[row], preprocessing.size, preprocessing.interpolation)

    return stacked(one, wanted, batch, 3 * preprocessing.size**2, threads)


def stacked(
    work: Callable[[Any], Tensor], items: Sequence[Any], batch: int, item_bytes: int, threads: int | None = None
) -> Iterator[Tensor]:
    """[b, ...] what `work` gives for `batch` items at a time, in order, by threads that work ahead.

    Args:
        work: gives a tensor of one shape for an item.
        items, batch: what is worked on, and how many at a time.
        item_bytes: of one such tensor: what waits takes at most `AHEAD_BYTES`, or one batch.
        threads: that work; None: as many as torch may use.
    """
    ahead = max(batch, min(AHEAD * batch, AHEAD_BYTES // item_bytes))
    results = read_ahead(work, items, decoders() if threads is None else threads, ahead)
    with contextlib.closing(results):
        for start in range(0, len(items), batch):
            yield torch.stack([next(results) for _ in range(min(batch, len(items) - start))])


def stored_pixels(
    store: Store,
    images: ImageSet,
    split: Split,
    policy: Policy,
    view: int,
    preprocessing: Preprocessing,
    *,
    wait: bool = True,
) -> Records:
    """One view of every image at one size, from the store.

    Raises:
        BusyError: if another process is rendering it (only without `wait`).
    """
    parameters = stored_view(store, split, policy, view)
    reads: dict[str, Any] = {
        "parameters": parameters.key,
        "size": preprocessing.size,
        "interpolation": preprocessing.interpolation,
        "version": VERSION,
    }

    def write(folder: Path) -> dict[str, Any]:
        batches = rendered_view(images, split, view_parameters(parameters), preprocessing)
        store.check_room(2 * 3 * preprocessing.size**2 * len(split))
        write_records(folder / "pixels.arrow", len(split), batches, "uint8")
        return {}

    entry = store.compute("pixels", key_of(reads), write, reads=reads, wait=wait)
    return Records(entry.path / "pixels.arrow")


def open_pixels(
    store: Store,
    images: ImageSet,
    split: Split,
    policy: Policy,
    views: int | None,
    preprocessing: Preprocessing,
    limit_gb: float,
) -> Pixels:
    """Pixels of the first `views` views; None: any number of fresh ones. Stored where they take at most `limit_gb`."""
    if views is None or len(split) * views * 3 * preprocessing.size**2 > limit_gb * 1e9:
        return RenderedPixels(images, split, policy, preprocessing)

    def stored(view: int, wait: bool) -> Records:
        return stored_pixels(store, images, split, policy, view, preprocessing, wait=wait)

    tables = in_turns(range(views), stored)
    return StoredPixels([tables[view] for view in range(views)])
