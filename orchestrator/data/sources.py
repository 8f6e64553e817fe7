"""Where images come from: a folder, Parquet files, or the packaged default. Bytes and labels, nothing decoded."""

from __future__ import annotations

import csv
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import Kind

SPLITS = ("train", "val", "test")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
LISTING = "labels.csv"
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
        """The encoded bytes of one image."""

    def read_mask(self, where: str) -> bytes:
        """The encoded bytes of the mask of the image at `where`."""
        raise NotImplementedError

    def names(self) -> tuple[str, ...] | None:
        """Names of the class indices of masks, where the source brings them."""
        return None


class Folder(Source):
    """What the folder sources share: images below `root`, or below `root/{train,val,test}`.

    `valid` and `validation` count as val, `training` and `testing` as their short forms.
    """

    ALIASES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}  # noqa: RUF012

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise UserError(f"task.data: there is no folder {str(root)!r}.{nearest(root.name, near)}")

    def items(self) -> list[Item]:
        folders = _folders(self.root)
        splits = {p: self.ALIASES.get(p.name, p.name) for p in folders}
        ready = bool(folders) and all(s in SPLITS for s in splits.values())
        if not ready:
            return self.below(self.root, "")
        found = {folder: self.below(folder, splits[folder]) for folder in folders}
        for folder, items in found.items():
            if not items:
                raise UserError(
                    f"task.data: the folder {str(folder)!r} holds no images; without that folder, "
                    f"{splits[folder]} is drawn from the other images."
                )
        return [item for items in found.values() for item in items]

    @abstractmethod
    def below(self, root: Path, split: str) -> list[Item]:
        """The images below `root`, all of one split."""

    def within(self, folder: Path) -> str:
        """What the addresses of the files below a folder begin with."""
        return "" if folder == self.root else f"{folder.relative_to(self.root).as_posix()}/"

    def read(self, where: str) -> bytes:
        return (self.root / where).read_bytes()


def _folders(root: Path) -> list[Path]:
    """The folders in one, by name, without hidden ones and the one that file systems keep for themselves.

    Raises:
        UserError: if it cannot be listed.
    """
    try:
        found = sorted(root.iterdir())
    except OSError as error:
        raise _unreadable(error) from None
    return [p for p in found if not p.name.startswith(".") and p.name != "lost+found" and p.is_dir()]


def _unreadable(error: OSError) -> UserError:
    return UserError(f"task.data: {error.filename!r} cannot be read: {error.strerror}.")


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads nowhere, or to itself
        return False


def _files(folder: Path | str, suffixes: Collection[str], within: str = "") -> Iterator[tuple[str, str]]:
    """Every file below a folder with one of these endings: its path in the folder, and what changes when it does.

    By name, a folder's files where its name stands; of a link to a folder nothing. A task is listed once a trial, and
    may have millions of images: nothing is asked of the file system twice, and no path is taken apart.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, suffixes, f"{within}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in suffixes and _is_file(entry):
                stat = entry.stat()
                yield within + entry.name, f"{stat.st_size}.{stat.st_mtime_ns}"
    except OSError as error:
        raise _unreadable(error) from None


def _stem(where: str) -> str:
    return os.path.splitext(where)[0]


class FolderSource(Folder):
    """`ROOT/CLASS/*.jpg`, or `ROOT/{train,val,test}/CLASS/*.jpg`."""

    def below(self, root: Path, split: str) -> list[Item]:
        return [
            Item(f"{within}{path}", folder.name, split, "", stamp)
            for folder, within in ((folder, self.within(folder)) for folder in _folders(root))
            for path, stamp in _files(folder, SUFFIXES)
        ]


class ListedSource(Folder):
    """Images with a `labels.csv` beside them: `file,labels`, the class names separated by `;`, maybe none.

    `file` is relative to the table's folder, which is ROOT or each of ROOT/{train,val,test}. An image that the table
    does not name is left out and counted.
    """

    def below(self, root: Path, split: str) -> list[Item]:
        table = root / LISTING
        if not table.is_file():
            near = [p.name for p in root.iterdir() if p.is_file() and p.suffix == ".csv"]
            raise UserError(
                f"task.data: a multilabel folder needs {str(table)!r}, a table with the columns file and labels."
                f"{nearest(LISTING, near)}"
            )
        labels = self._table(table)
        found, within = [], self.within(root)
        for path, stamp in _files(root, SUFFIXES):
            known = labels.pop(path, None)
            problem = f"not in {LISTING}" if known is None else ""
            found.append(Item(f"{within}{path}", known or (), split, "", f"{stamp}.{','.join(known or ())}", problem))
        if labels:
            missing = next(iter(labels))
            names = [item.where for item in found]
            raise UserError(f"task.data: {str(table)!r} names {missing!r}, which is no image.{nearest(missing, names)}")
        return found

    @staticmethod
    def _table(path: Path) -> dict[str, tuple[str, ...]]:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns = reader.fieldnames or []
                for column in ("file", "labels"):
                    if column not in columns:
                        raise UserError(
                            f"task.data: {str(path)!r} has no column {column!r}; it has {listed(columns)}."
                            f"{nearest(column, columns)}"
                        )
                rows = [(row["file"].strip(), row["labels"]) for row in reader if row["file"]]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"task.data: {str(path)!r} cannot be read as a table: {error}.") from None
        result: dict[str, tuple[str, ...]] = {}
        for name, text in rows:
            if name in result:
                raise UserError(f"task.data: {str(path)!r} names {name!r} twice.")
            result[name] = class_names(text)
        return result


class MaskFolderSource(Folder):
    """`ROOT/images/*.jpg` with `ROOT/masks/*.png` of the same names, or both below `ROOT/{train,val,test}`.

    An optional `ROOT/classes.txt` names the class indices, one a line.
    """

    def below(self, root: Path, split: str) -> list[Item]:
        for name in ("images", "masks"):
            if not (root / name).is_dir():
                near = [p.name for p in root.iterdir() if p.is_dir()]
                raise UserError(
                    f"task.data: a segmentation folder needs {str(root / name)!r}; there is {listed(near)}."
                    f"{nearest(name, near)}"
                )
        masks = {_stem(path): stamp for path, stamp in _files(root / "masks", MASK_SUFFIXES)}
        found, within = [], self.within(root / "images")
        for path, stamp in _files(root / "images", SUFFIXES):
            where, stem = f"{within}{path}", _stem(path)
            if stem not in masks:
                raise UserError(
                    f"task.data: there is no mask for {where!r} in {str(root / 'masks')!r}.{nearest(stem, masks)}"
                )
            found.append(Item(where, "", split, "", f"{stamp}.{masks[stem]}"))
        return found

    def read_mask(self, where: str) -> bytes:
        split, _, image = where.partition("images/")
        stem = self.root / f"{split}masks" / _stem(image)
        for suffix in sorted(MASK_SUFFIXES, reverse=True):  # of several the last by name, as they are listed
            path = stem.with_name(f"{stem.name}{suffix}")
            if path.is_file():
                return path.read_bytes()
        odd = [p for p in stem.parent.iterdir() if p.stem == stem.name and p.suffix.lower() in MASK_SUFFIXES]
        if not odd:
            raise FileNotFoundError(f"There is no mask for {where!r} any more.")
        return max(odd).read_bytes()

    def names(self) -> tuple[str, ...] | None:
        return _read_names(self.root)


def _read_names(folder: Path) -> tuple[str, ...] | None:
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


def class_names(value: Any) -> tuple[str, ...]:
    """The names in a list, or in a text that separates them by `;`; sorted, each once."""
    if value is None:
        return ()
    parts = value.split(";") if isinstance(value, str) else [str(v) for v in value]
    return tuple(sorted({part.strip() for part in parts} - {""}))


class ParquetSource(Source):
    """Rows with `image` (encoded bytes, or Hugging Face's struct with `bytes`), labels, and maybe `split`, `stem`.

    Labels are a column `label`, a text or number; multi-label: a list of them, or a text that separates them by `;`;
    segmentation: a column `mask` like `image`, and maybe a `classes.txt` beside the files. Without a `split` column, a
    file name that begins with train, val or test (`train-00000.parquet`) decides.
    """

    def __init__(self, root: Path, kind: Kind = "classification") -> None:
        self.root = root
        self.kind = kind
        if root.is_dir():
            self.paths = sorted(root.glob("*.parquet"))
        else:
            self.paths = [root] if root.is_file() else []
        if not self.paths:
            near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
            raise UserError(f"task.data: there is no Parquet file at {str(root)!r}.{nearest(root.name, near)}")

    def items(self) -> list[Item]:
        found = []
        wanted = "mask" if self.kind == "segmentation" else "label"
        for number, path in enumerate(self.paths):
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"task.data: {str(path)!r} is not a readable Parquet file: {error}.") from None
            names = file.schema_arrow.names
            for column in ("image", wanted):
                if column not in names:
                    raise UserError(
                        f"task.data: {str(path)!r} has no column {column!r}; it has {listed(names)}."
                        f"{nearest(column, names)}"
                    )
            count = file.metadata.num_rows
            table = file.read(columns=[c for c in ("label", "split", "stem") if c in names and c != "mask"])
            labels = self._labels(table, path) if wanted == "label" else [""] * count
            named = next((s for s in SPLITS if path.name.startswith(s)), "")
            splits = [str(v) for v in table["split"].to_pylist()] if "split" in names else [named] * count
            stems = [str(v) for v in table["stem"].to_pylist()] if "stem" in names else [""] * count
            stat = path.stat()
            stamp = f"{stat.st_size}.{stat.st_mtime_ns}"
            for row, (label, split, stem) in enumerate(zip(labels, splits, stems, strict=True)):
                found.append(Item(f"{number}:{row}", label, split, stem, stamp))
        return found

    def _labels(self, table: pa.Table, path: Path) -> list[Any]:
        several = pa.types.is_list(table.schema.field("label").type) or pa.types.is_large_list(
            table.schema.field("label").type
        )
        if self.kind == "multilabel":
            return [class_names(v if several or v is None else str(v)) for v in table["label"].to_pylist()]
        if several:
            raise UserError(f"task.data: the labels in {str(path)!r} are lists; set task.kind to multilabel.")
        return [str(v) for v in table["label"].to_pylist()]

    def read(self, where: str) -> bytes:
        return self._cell(where, "image")

    def read_mask(self, where: str) -> bytes:
        return self._cell(where, "mask")

    def names(self) -> tuple[str, ...] | None:
        return _read_names(self.root if self.root.is_dir() else self.root.parent)

    def _cell(self, where: str, column: str) -> bytes:
        number, row = (int(part) for part in where.split(":"))
        group, offset = self._locate(number, row)
        value = self._column(number, group, column)[offset].as_py()
        return (value["bytes"] if isinstance(value, dict) else value) or b""

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a source lives as long as its process
    def _starts(self, number: int) -> list[int]:
        meta = pq.ParquetFile(self.paths[number]).metadata
        starts = [0]
        for group in range(meta.num_row_groups):
            starts.append(starts[-1] + meta.row_group(group).num_rows)
        return starts

    def _locate(self, number: int, row: int) -> tuple[int, int]:
        starts = self._starts(number)
        group = next(g for g in range(len(starts) - 1) if starts[g] <= row < starts[g + 1])
        return group, row - starts[group]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a source lives as long as its process
    def _column(self, number: int, group: int, column: str) -> pa.ChunkedArray:
        return pq.ParquetFile(self.paths[number]).read_row_group(group, columns=[column])[column]


FOLDERS: dict[Kind, type[Folder]] = {
    "classification": FolderSource,
    "multilabel": ListedSource,
    "segmentation": MaskFolderSource,
}


def open_source(data: str, kind: Kind = "classification") -> Source:
    """The source that `task.data` names.

    Raises:
        UserError: if there is no such folder, file or packaged set.
    """
    if data.startswith("packaged/"):
        name = data.removeprefix("packaged/")
        path = Path(str(files("orchestrator") / "packaged" / name / "images.parquet"))
        if not path.is_file():
            known = sorted(p.parent.name for p in path.parent.parent.glob("*/images.parquet"))
            raise UserError(
                f"task.data: there is no packaged data set {name!r}; there is {listed(known)}.{nearest(name, known)}"
            )
        return ParquetSource(path)
    where, _, path_text = data.partition(":")
    root = Path(path_text).expanduser()
    return FOLDERS[kind](root) if where == "folder" else ParquetSource(root, kind)


def check_splits(items: Sequence[Item]) -> None:
    """Refuses split names that are none of train, val, test."""
    for item in items:
        if item.split not in ("", *SPLITS):
            raise UserError(
                f"task.data: the split {item.split!r} of {item.where} is none of {listed(SPLITS)}."
                f"{nearest(item.split, SPLITS)}"
            )
