"""Labels of images under views: one class, several, or a mask that goes through the same crop and flip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from methods.contract import IGNORE
from orchestrator.data.images import decoders, decoding_pool
from orchestrator.data.pixels import stacked
from orchestrator.data.task import Split, TaskData
from orchestrator.data.views import Policy, draw, render_mask, stored_view, view_parameters
from orchestrator.store import Records, Store, key_of, write_records

VERSION = 1


class Labels(Protocol):
    """Labels of a split, by row and view; what has no label is marked as `methods.contract.Batch` says."""

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """[B] int64, [B, C] float32, or [B, S, S] uint8 of the images `rows` [B] under the views `views` [B]."""
        ...


class ImageLabels:
    """Labels that no view changes.

    Args:
        values: [N] int64, or [N, C] int8 (which a batch makes float32), of every row of the split.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        chosen = self.values[torch.from_numpy(np.asarray(rows, dtype=np.int64))]
        return chosen.float() if chosen.dtype == torch.int8 else chosen


class _Masks:
    """Masks of the rows `known` of a split; every other row is ignored pixels only."""

    def __init__(self, split: Split, known: Sequence[int], size: int) -> None:
        self.size = size
        self.position = np.full(len(split), -1, dtype=np.int64)
        self.position[np.asarray(known, dtype=np.int64)] = np.arange(len(known))

    def read(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """[b, S, S] of rows that all have a mask, by their position among these."""
        raise NotImplementedError

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        result = torch.full((len(rows), self.size, self.size), IGNORE, dtype=torch.uint8)
        where = np.flatnonzero(self.position[rows] >= 0)
        if len(where):
            result[torch.from_numpy(where)] = self.read(self.position[rows[where]], np.asarray(views)[where])
        return result


class RenderedMasks(_Masks):
    """Rendered from the encoded masks at each call, by threads that it keeps: as many as torch may use."""

    def __init__(self, task: TaskData, split: Split, known: Sequence[int], policy: Policy, size: int) -> None:
        super().__init__(split, known, size)
        self.task, self.policy = task, policy
        self.labelled = split.take(known)
        self._readers = decoding_pool(decoders())

    def _one(self, row: int, view: int) -> Tensor:
        parameters = draw(self.policy, self.labelled.ids[row], self.labelled.sizes[row], view)
        return render_mask(self.task.mask(self.labelled, row), parameters, self.size)

    def read(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        return torch.stack(list(self._readers.map(self._one, rows.tolist(), views.tolist())))


class StoredMasks(_Masks):
    """Read from the store by memory map; one table for each view."""

    def __init__(self, split: Split, known: Sequence[int], size: int, tables: Sequence[Records]) -> None:
        super().__init__(split, known, size)
        self.tables = tables

    def read(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        result = torch.empty((len(rows), self.size, self.size), dtype=torch.uint8)
        for view in np.unique(views):
            where = np.flatnonzero(views == view)
            result[torch.from_numpy(where)] = self.tables[int(view)].rows(rows[where])
        return result


def stored_masks(store: Store, task: TaskData, split: Split, policy: Policy, view: int, size: int) -> Records:
    """One view of the mask of every image of `split`, from the store."""
    parameters = stored_view(store, split, policy, view)
    reads: dict[str, Any] = {
        "parameters": parameters.key,
        "masks": list(split.labels),
        "ignore": task.spec.ignore_index,
        "size": size,
        "version": VERSION,
    }

    def write(folder: Path) -> dict[str, Any]:
        drawn = view_parameters(parameters)

        def one(row: int) -> Tensor:
            return render_mask(task.mask(split, row), drawn[row], size)

        write_records(folder / "masks.arrow", len(split), stacked(one, range(len(split)), 64, size**2), "uint8")
        return {}

    entry = store.compute("masks", key_of(reads), write, reads=reads)
    return Records(entry.path / "masks.arrow")


def open_labels(
    store: Store,
    task: TaskData,
    split: Split,
    known: Sequence[int],
    policy: Policy,
    views: int | None,
    size: int,
    limit_gb: float,
) -> Labels:
    """Labels of the rows `known` of `split` under the first `views` views; the other rows are without.

    Args:
        store, task, split: what is read.
        known: rows whose labels may be seen.
        policy, views: how views are drawn, and how many; None: any number of fresh ones.
        size: side of a mask, in pixels.
        limit_gb: masks are stored where they take at most this much.
    """
    if task.spec.kind == "segmentation":
        if views is None or len(known) * views * size**2 > limit_gb * 1e9:
            return RenderedMasks(task, split, known, policy, size)
        labelled = split.take(known)
        tables = [stored_masks(store, task, labelled, policy, view, size) for view in range(views)]
        return StoredMasks(split, known, size, tables)
    rows = torch.as_tensor(list(known), dtype=torch.int64)
    if task.spec.kind == "multilabel":
        values = torch.full((len(split), len(task.classes)), -1, dtype=torch.int8)  # a byte each, until they are read
        values[rows] = 0
        counts = [len(split.labels[row]) for row in known]
        theirs = np.fromiter((c for row in known for c in split.labels[row]), dtype=np.int64, count=sum(counts))
        values[rows.repeat_interleave(torch.tensor(counts, dtype=torch.int64)), torch.from_numpy(theirs)] = 1
        return ImageLabels(values)
    classes = torch.full((len(split),), -1, dtype=torch.int64)
    classes[rows] = torch.tensor([split.labels[i] for i in known], dtype=torch.int64)
    return ImageLabels(classes)


def plain_labels(store: Store, task: TaskData, split: Split, rows: Sequence[int], size: int) -> Tensor:
    """Labels of the images `rows` as they are (view 0): [n] int64, [n, C] float32, or [n, S, S] uint8."""
    labels = open_labels(store, task, split, rows, Policy(1.0, 0.0), 1, size, 4.0)
    return labels.batch(np.asarray(rows, dtype=np.int64), np.zeros(len(rows), dtype=np.int64))
