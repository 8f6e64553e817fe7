"""Pixels of views at a network's size: stored where they fit, else rendered as they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.task import ImageSet, Split
from orchestrator.data.views import Policy, draw, render, stored_view, view_parameters
from orchestrator.models.load import Preprocessing
from orchestrator.store import JoinedRecords, Records, Store, in_turns, key_of, write_records

VERSION = 1
READ_THREADS = 2


class Pixels(Protocol):
    """Pixels of views of a split."""

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """uint8 [B, 3, S, S] of the images `rows` [B] under the views `views` [B]."""
        ...


class RenderedPixels:
    """Rendered from the encoded images at each call."""

    def __init__(self, images: ImageSet, split: Split, policy: Policy, preprocessing: Preprocessing) -> None:
        self.images = images
        self.split = split
        self.policy = policy
        self.preprocessing = preprocessing

    def _one(self, row: int, view: int) -> Tensor:
        parameters = draw(self.policy, self.split.ids[row], self.split.sizes[row], view)
        image = self.images.image(self.split, row)
        return render(image, parameters, self.preprocessing.size, self.preprocessing.interpolation)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            return torch.stack(list(pool.map(self._one, rows.tolist(), views.tolist())))


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
    threads: int = READ_THREADS,
    rows: range | None = None,
) -> Iterator[Tensor]:
    """uint8 [b, 3, S, S] batches of one view of every image, in order; the next one is rendered while one is used.

    `rows`: of these images of the split only.
    """
    wanted = range(len(split)) if rows is None else rows

    def one(row: int) -> Tensor:
        return render(images.image(split, row), parameters[row], preprocessing.size, preprocessing.interpolation)

    waiting: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(wanted), batch):
            waiting.append([pool.submit(one, row) for row in wanted[start : start + batch]])
            if len(waiting) > 1:
                yield torch.stack([rendered.result() for rendered in waiting.popleft()])
        while waiting:
            yield torch.stack([rendered.result() for rendered in waiting.popleft()])


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
