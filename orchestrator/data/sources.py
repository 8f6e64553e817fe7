"""Where images come from: a folder, Parquet files, or the packaged default. Bytes and labels, nothing decoded."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.errors import UserError, listed, nearest

SPLITS = ("train", "val", "test")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Item:
    """One image before decoding.

    Attributes:
        where: its address within the source.
        label: class name.
        split: `train`, `val`, `test`, or `` where the data brings none.
        group: images of one group land in one split; `` for none.
        stamp: changes when the bytes may have changed.
    """

    where: str
    label: str
    split: str
    group: str
    stamp: str


class Source(ABC):
    """A collection of labelled images."""

    @abstractmethod
    def items(self) -> list[Item]:
        """Every image, in a stable order."""

    @abstractmethod
    def read(self, where: str) -> bytes:
        """The encoded bytes of one image."""


class FolderSource(Source):
    """`ROOT/CLASS/*.jpg`, or `ROOT/{train,val,test}/CLASS/*.jpg` (`valid` and `validation` count as val)."""

    ALIASES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}  # noqa: RUF012

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise UserError(f"task.data: there is no folder {str(root)!r}.{nearest(root.name, near)}")

    def items(self) -> list[Item]:
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and not p.name.startswith("."))
        splits = {p: self.ALIASES.get(p.name, p.name) for p in folders}
        ready = bool(folders) and all(s in SPLITS for s in splits.values())
        if not ready:
            return self._classes(self.root, "")
        return [item for folder in folders for item in self._classes(folder, splits[folder])]

    def _classes(self, root: Path, split: str) -> list[Item]:
        found = []
        for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    stat = path.stat()
                    where = path.relative_to(self.root).as_posix()
                    found.append(Item(where, folder.name, split, "", f"{stat.st_size}.{stat.st_mtime_ns}"))
        return found

    def read(self, where: str) -> bytes:
        return (self.root / where).read_bytes()


class ParquetSource(Source):
    """Rows with `image` (encoded bytes, or Hugging Face's struct with `bytes`), `label`, and maybe `split`, `stem`.

    Without a `split` column, a file name that begins with train, val or test (`train-00000.parquet`) decides.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if root.is_dir():
            self.paths = sorted(root.glob("*.parquet"))
        else:
            self.paths = [root] if root.is_file() else []
        if not self.paths:
            near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
            raise UserError(f"task.data: there is no Parquet file at {str(root)!r}.{nearest(root.name, near)}")

    def items(self) -> list[Item]:
        found = []
        for number, path in enumerate(self.paths):
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"task.data: {str(path)!r} is not a readable Parquet file: {error}.") from None
            names = file.schema_arrow.names
            for column in ("image", "label"):
                if column not in names:
                    raise UserError(
                        f"task.data: {str(path)!r} has no column {column!r}; it has {listed(names)}."
                        f"{nearest(column, names)}"
                    )
            table = file.read(columns=[c for c in ("label", "split", "stem") if c in names])
            labels = [str(v) for v in table["label"].to_pylist()]
            named = next((s for s in SPLITS if path.name.startswith(s)), "")
            splits = [str(v) for v in table["split"].to_pylist()] if "split" in names else [named] * len(labels)
            stems = [str(v) for v in table["stem"].to_pylist()] if "stem" in names else [""] * len(labels)
            stat = path.stat()
            stamp = f"{stat.st_size}.{stat.st_mtime_ns}"
            for row, (label, split, stem) in enumerate(zip(labels, splits, stems, strict=True)):
                found.append(Item(f"{number}:{row}", label, split, stem, stamp))
        return found

    def read(self, where: str) -> bytes:
        number, row = (int(part) for part in where.split(":"))
        group, offset = self._locate(number, row)
        value = self._images(number, group)[offset].as_py()
        return value["bytes"] if isinstance(value, dict) else value

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
    def _images(self, number: int, group: int) -> pa.ChunkedArray:
        return pq.ParquetFile(self.paths[number]).read_row_group(group, columns=["image"])["image"]


def open_source(data: str) -> Source:
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
    kind, _, path_text = data.partition(":")
    root = Path(path_text).expanduser()
    return FolderSource(root) if kind == "folder" else ParquetSource(root)


def check_splits(items: Sequence[Item]) -> None:
    """Refuses split names that are none of train, val, test."""
    for item in items:
        if item.split not in ("", *SPLITS):
            raise UserError(
                f"task.data: the split {item.split!r} of {item.where} is none of {listed(SPLITS)}."
                f"{nearest(item.split, SPLITS)}"
            )
