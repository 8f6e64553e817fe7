"""A few-shot task: which images are train, val and test, and which of train are labelled."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from methods.contract import IGNORE, TaskInfo
from orchestrator.data.decoded import DECODED
from orchestrator.data.images import CorruptError, all_cpus, decode, decode_mask, decoders, read_ahead
from orchestrator.data.sources import SPLITS, Item, Source, check_splits, open_source, read_again, read_listed
from orchestrator.data.strata import assign, draw_shots
from orchestrator.errors import UserError, WorkError, listed
from orchestrator.spec import Task
from orchestrator.store import Store, key_of, store_at

CATALOGUE_VERSION = 1
AHEAD = 256  # images that are looked at before they are asked for
CONFLICTS = {
    "classification": "same image under two classes",
    "multilabel": "same image with other labels",
    "segmentation": "same image with another mask",
}


@dataclass(frozen=True)
class Split:
    """Images of one split, in the fixed order of their content hashes.

    Attributes:
        ids: content hash of each image (SHA-256, hex).
        where: address in the source.
        labels: class index; multi-label: the indices of its classes, ascending; segmentation: its mask's content hash.
        sizes: (height, width) in pixels.
    """

    ids: tuple[str, ...]
    where: tuple[str, ...]
    labels: tuple[Any, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
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
        listing: the state of the source in which it was split; changes when an image may have.
    """

    spec: Task
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    labelled: tuple[int, ...]
    skipped: dict[str, int]
    source: Source = field(repr=False)
    listing: str = ""

    @property
    def info(self) -> TaskInfo:
        return TaskInfo(self.spec.kind, len(self.classes), len(self.labelled), len(self.train) - len(self.labelled))

    @functools.cached_property
    def labels_hash(self) -> str:
        """Of which train images are labelled, and how."""
        labels: list[Any] = [[self.train.ids[i], self.train.labels[i]] for i in self.labelled]
        ignored = [self.spec.ignore_index] if self.spec.kind == "segmentation" else []
        return key_of([*labels, list(self.classes), *ignored])

    def split(self, name: str) -> Split:
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def image(self, split: Split, row: int) -> Tensor:
        """uint8 [3, H, W]; not to be changed, for the process may keep it."""
        where = split.where[row]
        content = split.ids[row]
        try:
            return DECODED.image(content, lambda: read_again(self.source.read, where, content, repr(where)))
        except CorruptError as reason:  # a catalogue of an earlier version may list it
            raise WorkError(f"task.data: {where!r} cannot be used: {reason}; take it away, and sweep again.") from None

    def mask(self, split: Split, row: int) -> Tensor:
        """uint8 [H, W]: the class of each pixel, 255 where it does not count."""
        where = split.where[row]
        mask = decode_mask(read_again(self.source.read_mask, where, split.labels[row], f"the mask of {where!r}"))
        return mask.masked_fill(mask == self.spec.ignore_index, IGNORE)

    def identity(self) -> dict[str, Any]:
        """What finds these images again."""
        return {"task": self.spec.model_dump(mode="json")}


def load_task(task: Task, store: Store, needed: tuple[str, ...] = SPLITS, listing: str = "") -> TaskData:
    """Reads, checks and splits the user's data. The scan for corrupt images is a stage: done once for one state of it.

    To know its state, every image is listed, which takes seconds where they are many; what is one trial's lists once.

    Args:
        task: what to read, and how to split it.
        store: where the scan lies.
        needed: splits that must have images.
        listing: of an earlier call, whose state is meant; "" for that of now.

    Raises:
        UserError: if there is nothing to learn from: no images, one class, or fewer images than shots.
        WorkError: if nothing is known of the state that is meant, and the images are in another.
    """
    return _load_task(task.model_dump_json(), store.address, listing or listing_of(task), needed)


def listing_of(task: Task) -> str:
    """The state of the images of now: it changes when one of them, its label or its mask may have.

    Raises:
        UserError: if there are none, or they cannot be listed.
    """
    source = open_source(task.data, task.kind)
    return _state(source, _items(source, task), task)


def _state(source: Source, found: list[Item], task: Task) -> str:
    items: list[Any] = [[i.where, i.label, i.split, i.group, i.stamp] for i in found]
    return key_of(items if task.kind == "classification" else [task.kind, source.names(), items])


@functools.lru_cache(maxsize=4)
def _load_task(task_json: str, root: str, listing: str, needed: tuple[str, ...]) -> TaskData:
    task = Task.model_validate_json(task_json)
    source = open_source(task.data, task.kind)

    def scan(folder: Path) -> dict[str, Any]:
        items = _items(source, task)
        if _state(source, items, task) != listing:
            raise WorkError(f"task.data: the images of {task.data!r} have changed since they were listed.")
        return _scan(source, items, task, folder)

    reads = {"listing": listing, "version": CATALOGUE_VERSION}
    entry = store_at(root).compute("catalogue", key_of(reads), scan, reads=reads)
    table = pq.ParquetFile(entry.path / "catalogue.parquet").read().to_pylist()
    about = entry.meta["about"]
    names = about["names"] if "names" in about else source.names()  # a catalogue of an earlier version has none
    return divide(task, source, table, dict(about["skipped"]), needed, names=names, listing=listing)


def _items(source: Source, task: Task) -> list[Item]:
    items = source.items()
    if not items:
        layout = {"classification": " (one subfolder a class is expected)"}.get(task.kind, "")
        raise UserError(f"task.data: there are no images below {task.data!r}{layout}.")
    check_splits(items)
    return items


def _scan(source: Source, items: list[Item], task: Task, folder: Path) -> dict[str, Any]:
    def look(item: Item) -> dict[str, Any]:
        if item.problem:
            return {"reason": item.problem}
        try:
            data = read_listed(source.read, item.where, repr(item.where))
            _, height, width = decode(data).shape
            seen = _mask_facts(source, item, (height, width)) if task.kind == "segmentation" else {}
        except CorruptError as reason:
            return {"reason": str(reason)}
        label = item.label if isinstance(item.label, str) else list(item.label)
        row = {"id": hashlib.sha256(data).hexdigest(), "where": item.where, "label": label, "split": item.split}
        return {**row, "group": item.group, "stamp": item.stamp, "height": height, "width": width, **seen}

    # Decoders and hashing release the interpreter lock, and nothing else runs before the images are known.
    rows = list(read_ahead(look, items, decoders(all_cpus()), AHEAD))
    skipped = Counter(row["reason"] for row in rows if "reason" in row)
    good = [row for row in rows if "reason" not in row]
    if not good:
        raise UserError(f"task.data: none of the {len(items)} images can be used: {_reasons(skipped)}.")
    pq.write_table(pa.Table.from_pylist(good), folder / "catalogue.parquet")
    return {"skipped": dict(skipped), "images": len(good), "names": source.names()}


def _mask_facts(source: Source, item: Item, size: tuple[int, int]) -> dict[str, Any]:
    """The mask's content hash, in the label's place, and the values that occur in it."""
    data = read_listed(source.read_mask, item.where, f"the mask of {item.where!r}")
    mask = decode_mask(data)
    if tuple(mask.shape) != size:
        raise CorruptError("mask of another size than its image")
    return {"label": hashlib.sha256(data).hexdigest(), "values": mask.unique().tolist()}


def _reasons(skipped: Counter[str] | dict[str, int]) -> str:
    return listed(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def divide(
    task: Task,
    source: Source,
    rows: list[dict[str, Any]],
    skipped: dict[str, int],
    needed: tuple[str, ...] = SPLITS,
    *,
    names: Sequence[str] | None = None,
    listing: str = "",
) -> TaskData:
    """Splits a catalogue: disjoint by content hash and by group, stratified by class, drawn by `task.seed`.

    Args:
        task, source: what was read.
        rows: its good images.
        skipped: how many others there are, by reason.
        needed: splits that must have images.
        names: of the class indices of masks, where the source brings them.
        listing: the source's state.
    """
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
        skipped[CONFLICTS[task.kind]] = len(conflicting)
    rows = [row for row in unique.values() if row["id"] not in conflicting]
    if task.kind == "segmentation":
        blank = {row["id"] for row in rows if set(row["values"]) <= {task.ignore_index}}
        if blank:
            skipped["mask of ignored pixels only"] = len(blank)
        rows = [row for row in rows if row["id"] not in blank]
    classes, sets = _label_space(task, names, rows)
    assigned = assign(task, rows, sets)
    splits = {}
    for name in SPLITS:
        chosen = sorted((r for r in rows if assigned[r["id"]] == name), key=lambda r: r["id"])
        splits[name] = Split(
            tuple(r["id"] for r in chosen),
            tuple(r["where"] for r in chosen),
            tuple(_label(task, r, sets) for r in chosen),
            tuple((int(r["height"]), int(r["width"])) for r in chosen),
        )
        if not chosen and name in needed:
            raise UserError(f"task.splits: no image is left for {name}; {len(rows)} images in {len(classes)} classes.")
    train = splits["train"]
    labelled = draw_shots(task, classes, train.ids, [sets[i] for i in train.ids])
    if task.kind == "multilabel":
        _check_both_values({n: splits[n] for n in ("val", "test") if n in needed}, sets, len(classes))
    if not task.unlabelled:
        train = train.take(labelled)
        labelled = list(range(len(labelled)))
    return TaskData(task, classes, train, splits["val"], splits["test"], tuple(labelled), skipped, source, listing)


def _label_space(
    task: Task, given: Sequence[str] | None, rows: list[dict[str, Any]]
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Names of the classes, and the classes of each image id.

    Raises:
        UserError: if there are too few, or a mask holds an index beyond the named ones.
    """
    few = "at least two are needed"
    if task.kind == "segmentation":
        sets = {row["id"]: tuple(v for v in row["values"] if v != task.ignore_index) for row in rows}
        found = sorted({c for one in sets.values() for c in one})
        names = tuple(given or ()) or tuple(str(c) for c in range(max(found, default=0) + 1))
        for row in rows:
            beyond = [c for c in sets[row["id"]] if c >= min(len(names), IGNORE)]
            if beyond:
                raise UserError(
                    f"task.data: the mask of {row['where']!r} holds the class index {beyond[0]}, which is outside the "
                    f"{len(names)} classes (0 to {len(names) - 1}) and is not task.ignore_index ({task.ignore_index})."
                )
        if len(found) < 2:
            one = listed(names[c] for c in found)
            raise UserError(f"task.data: the masks of {task.data!r} hold only one class ({one}); {few}.")
        return names, sets
    labels = {row["id"]: (row["label"],) if task.kind == "classification" else tuple(row["label"]) for row in rows}
    names = tuple(sorted({name for one in labels.values() for name in one}))
    if task.kind == "multilabel" and not names:
        raise UserError(f"task.data: no image of {task.data!r} has a label.")
    if task.kind == "classification" and len(names) < 2:
        raise UserError(f"task.data: {task.data!r} has only one class ({listed(names)}); {few}.")
    index = {name: i for i, name in enumerate(names)}
    return names, {image: tuple(sorted(index[name] for name in one)) for image, one in labels.items()}


def _label(task: Task, row: dict[str, Any], sets: dict[str, tuple[int, ...]]) -> Any:
    if task.kind == "segmentation":
        return row["label"]
    return sets[row["id"]][0] if task.kind == "classification" else sets[row["id"]]


def _check_both_values(splits: dict[str, Split], sets: dict[str, tuple[int, ...]], classes: int) -> None:
    """An area under the ROC curve needs images with and without a class."""
    for name, split in splits.items():
        ids = split.ids
        counts = Counter(c for i in ids for c in sets[i])
        if not any(0 < counts[c] < len(ids) for c in range(classes)):
            raise UserError(
                f"task.splits: no class has both images with it and images without it in {name} ({len(ids)} images)."
            )
