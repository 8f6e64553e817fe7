"""A few-shot task: which images are train, val and test, and which of train are labelled."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from methods.contract import TaskInfo
from orchestrator.data.images import CorruptError, decode
from orchestrator.data.sources import SPLITS, Item, Source, check_splits, open_source
from orchestrator.errors import UserError, listed
from orchestrator.spec import Task
from orchestrator.store import Store, key_of

CATALOGUE_VERSION = 1


@dataclass(frozen=True)
class Split:
    """Images of one split, in the fixed order of their content hashes.

    Attributes:
        ids: content hash of each image (SHA-256, hex).
        where: address in the source.
        labels: class index.
        sizes: (height, width) in pixels.
    """

    ids: tuple[str, ...]
    where: tuple[str, ...]
    labels: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def images_hash(self) -> str:
        """Of the images alone: independent of labels."""
        return key_of(list(self.ids))

    def take(self, rows: Sequence[int]) -> Split:
        """The images at `rows`."""
        return Split(
            tuple(self.ids[i] for i in rows),
            tuple(self.where[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            tuple(self.sizes[i] for i in rows),
        )


class ImageSet(Protocol):
    """Images of a split, wherever they come from."""

    def image(self, split: Split, row: int) -> Tensor:
        """uint8 [3, H, W]."""
        ...

    def identity(self) -> dict[str, Any]:
        """What finds these images again; plain JSON."""
        ...


@dataclass
class TaskData:
    """The user's data, split.

    Attributes:
        spec: as in the sweep file.
        classes: names; a label is an index into them.
        train, val, test: disjoint by content.
        labelled: rows of `train` that are labelled, ascending.
        skipped: how many images were left out, by reason.
        source: where the bytes come from.
    """

    spec: Task
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    labelled: tuple[int, ...]
    skipped: dict[str, int]
    source: Source = field(repr=False)

    @property
    def info(self) -> TaskInfo:
        return TaskInfo("classification", len(self.classes), len(self.labelled), len(self.train) - len(self.labelled))

    @property
    def labels_hash(self) -> str:
        """Of which train images are labelled, and how."""
        return key_of([[self.train.ids[i], self.train.labels[i]] for i in self.labelled] + [list(self.classes)])

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        labels = np.full(len(self.train), -1, dtype=np.int64)
        known = np.asarray(self.labelled, dtype=np.int64)
        labels[known] = np.asarray(self.train.labels, dtype=np.int64)[known]
        return labels

    def label_rows(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Labels of the train images `rows` [B] under the views `views` [B], as `Batch.labels` has them."""
        return torch.from_numpy(self._labels[rows])

    def split(self, name: str) -> Split:
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def image(self, split: Split, row: int) -> Tensor:
        """uint8 [3, H, W]."""
        return decode(self.source.read(split.where[row]))

    def identity(self) -> dict[str, Any]:
        """What finds these images again."""
        return {"task": self.spec.model_dump(mode="json")}


def load_task(task: Task, store: Store) -> TaskData:
    """Reads, checks and splits the user's data. The scan for corrupt images is a stage: done once for one state of it.

    Raises:
        UserError: if there is nothing to learn from: no images, one class, or fewer images than shots.
    """
    return _load_task(task.model_dump_json(), str(store.root), _stamp(task))


def _stamp(task: Task) -> str:
    return key_of([[i.where, i.label, i.split, i.group, i.stamp] for i in _items(open_source(task.data), task.data)])


@functools.lru_cache(maxsize=4)
def _load_task(task_json: str, root: str, stamp: str) -> TaskData:
    task = Task.model_validate_json(task_json)
    source = open_source(task.data)
    items = _items(source, task.data)
    reads = {"listing": stamp, "version": CATALOGUE_VERSION}
    entry = Store(root).compute("catalogue", key_of(reads), lambda f: _scan(source, items, f), reads=reads)
    table = pq.read_table(entry.path / "catalogue.parquet").to_pylist()
    return divide(task, source, table, dict(entry.meta["about"]["skipped"]))


def _items(source: Source, data: str) -> list[Item]:
    items = source.items()
    if not items:
        raise UserError(f"task.data: there are no images below {data!r} (one subfolder a class is expected).")
    check_splits(items)
    return items


def _scan(source: Source, items: list[Item], folder: Path) -> dict[str, Any]:
    def look(item: Item) -> dict[str, Any]:
        try:
            data = source.read(item.where)
            _, height, width = decode(data).shape
        except CorruptError as reason:
            return {"reason": str(reason)}
        except OSError as error:
            return {"reason": f"cannot be read ({type(error).__name__})"}
        content = hashlib.sha256(data).hexdigest()
        return {"id": content, **item.__dict__, "height": height, "width": width}

    with ThreadPoolExecutor(max_workers=4) as pool:  # decoders and hashing release the interpreter lock
        rows = list(pool.map(look, items))
    skipped = Counter(row["reason"] for row in rows if "reason" in row)
    good = [row for row in rows if "reason" not in row]
    if not good:
        raise UserError(f"task.data: none of the {len(items)} images can be used: {_reasons(skipped)}.")
    pq.write_table(pa.Table.from_pylist(good), folder / "catalogue.parquet")
    return {"skipped": dict(skipped), "images": len(good)}


def _reasons(skipped: Counter[str] | dict[str, int]) -> str:
    return listed(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _rank(*parts: Any) -> str:
    """A pseudo-random order that depends on nothing but its parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def divide(task: Task, source: Source, rows: list[dict[str, Any]], skipped: dict[str, int]) -> TaskData:
    """Splits a catalogue: disjoint by content hash and by group, stratified by class, drawn by `task.seed`."""
    rows = sorted(rows, key=lambda r: (r["id"], SPLITS[::-1].index(r["split"]) if r["split"] else 9, r["where"]))
    unique: dict[str, dict[str, Any]] = {}
    conflicting: set[str] = set()
    duplicates = 0
    for row in rows:  # of equal images the one in test stays, then val, then train
        kept = unique.setdefault(row["id"], row)
        if kept is not row:
            duplicates += 1
            if kept["label"] != row["label"]:
                conflicting.add(row["id"])
    skipped = dict(skipped)
    if duplicates:
        skipped["exact duplicate"] = duplicates
    if conflicting:
        skipped["same image under two classes"] = len(conflicting)
    rows = [row for row in unique.values() if row["id"] not in conflicting]
    classes = tuple(sorted({row["label"] for row in rows}))
    if len(classes) < 2:
        raise UserError(f"task.data: {task.data!r} has only one class ({listed(classes)}); at least two are needed.")
    assigned = _assign(task, rows)
    splits = {}
    for name in SPLITS:
        chosen = sorted((r for r in rows if assigned[r["id"]] == name), key=lambda r: r["id"])
        splits[name] = Split(
            tuple(r["id"] for r in chosen),
            tuple(r["where"] for r in chosen),
            tuple(classes.index(r["label"]) for r in chosen),
            tuple((int(r["height"]), int(r["width"])) for r in chosen),
        )
        if not chosen:
            raise UserError(f"task.splits: no image is left for {name}; {len(rows)} images in {len(classes)} classes.")
    labelled = _draw_shots(task, classes, splits["train"])
    train = splits["train"]
    if not task.unlabelled:
        train = train.take(labelled)
        labelled = list(range(len(labelled)))
    return TaskData(task, classes, train, splits["val"], splits["test"], tuple(labelled), skipped, source)


def _assign(task: Task, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Split of each image id. What the data leaves open is drawn per class, whole groups at a time."""
    ready = {row["split"] for row in rows} - {""}
    assigned = {row["id"]: row["split"] for row in rows if row["split"] in ("val", "test")}
    open_rows = [row for row in rows if row["id"] not in assigned]
    shares = {name: getattr(task.splits, name) for name in ("test", "val") if name not in ready}
    groups: dict[tuple[str, str], list[str]] = {}
    first_label: dict[str, str] = {}
    for row in open_rows:
        group = row["group"] or row["id"]
        label = first_label.setdefault(group, row["label"])
        groups.setdefault((label, group), []).append(row["id"])
    by_class: dict[str, list[tuple[str, list[str]]]] = {}
    for (label, group), ids in groups.items():
        by_class.setdefault(label, []).append((group, ids))
    for members in by_class.values():
        members.sort(key=lambda m: _rank("split", task.seed, m[0]))
        total = sum(len(ids) for _, ids in members)
        queue = list(members)
        for name, share in shares.items():
            wanted = round(total * share)
            taken = 0
            while queue and taken < wanted:
                _, ids = queue.pop(0)
                taken += len(ids)
                assigned.update(dict.fromkeys(ids, name))
        for _, ids in queue:
            assigned.update(dict.fromkeys(ids, "train"))
    return assigned


def _draw_shots(task: Task, classes: tuple[str, ...], train: Split) -> list[int]:
    """Rows of `train` that are labelled; a smaller number of shots is a subset of a larger one."""
    if task.shots is None:
        return list(range(len(train)))
    chosen: list[int] = []
    for label, name in enumerate(classes):
        rows = [i for i, y in enumerate(train.labels) if y == label]
        if len(rows) < task.shots:
            raise UserError(
                f"task.shots: {task.shots} labelled images a class are asked for, and the class {name!r} has only "
                f"{len(rows)} in train; use at most {len(rows)}, or null for all."
            )
        rows.sort(key=lambda i: _rank("shots", task.seed, train.ids[i]))
        chosen += rows[: task.shots]
    return sorted(chosen)
