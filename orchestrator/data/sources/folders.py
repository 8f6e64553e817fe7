"""Image folders: a folder a class, a table of labels, or masks beside the images."""

from __future__ import annotations

import csv
import errno
import os
from abc import abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from orchestrator.data.sources.source import SPLITS, Item, Source, class_names, read_names
from orchestrator.errors import UserError, listed, nearest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
LISTING = "labels.csv"


class Folder(Source):
    """What the folder sources share: images below `root`, or below `root/{train,val,test}`.

    `valid` and `validation` count as val, `training` and `testing` as their short forms, in capitals or not. Beside the
    folder of train and one of another split, folders without images are passed over.
    """

    ALIASES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}  # noqa: RUF012

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            near = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise UserError(f"task.data: there is no folder {str(root)!r}.{nearest(root.name, near)}")

    def items(self) -> list[Item]:
        splits = self._splits()
        if not splits:
            return self.below(self.root, "")
        found = {folder: self.below(folder, split) for folder, split in splits.items()}
        for folder, items in found.items():
            if not items:
                raise UserError(
                    f"task.data: the folder {str(folder)!r} holds no images; without that folder, "
                    f"{splits[folder]} is drawn from the other images."
                )
        return [item for items in found.values() for item in items]

    def _splits(self) -> dict[Path, str]:
        """The split that each folder below the root stands for; nothing where the folders are no splits.

        Raises:
            UserError: if a folder beside those of splits holds images.
        """
        folders = _folders(self.root)
        short = {p: self.ALIASES.get(p.name.lower(), p.name.lower()) for p in folders}
        splits = {p: name for p, name in short.items() if name in SPLITS}
        others = [p for p in folders if p not in splits]
        found = [name for name in SPLITS if name in splits.values()]
        if others and (len(found) < 2 or "train" not in found):  # a class may be called train, or test
            return {}
        for folder in others:
            if next(_files(folder, SUFFIXES), None) is not None:
                allowed = [*SPLITS, *self.ALIASES]
                raise UserError(
                    f"task.data: the folder {str(folder)!r} holds images, beside folders of {listed(found)}; allowed "
                    f"there are {listed(allowed)}, and folders without images.{nearest(folder.name.lower(), allowed)}"
                )
        return splits

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


def files_below(folder: Path | str, suffixes: Collection[str], within: str = "") -> Iterator[tuple[str, str]]:
    """Every file below a folder with one of these endings: its path in the folder, and what changes when it does.

    By name, a folder's files where its name stands; of a link to a folder nothing. A task is listed once a trial, and
    may have millions of images: nothing is asked of the file system twice, and no path is taken apart.

    Raises:
        OSError: if a folder cannot be read.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path, suffixes, f"{within}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in suffixes and _is_file(entry):
            stat = entry.stat()
            yield within + entry.name, f"{stat.st_size}.{stat.st_mtime_ns}"


def _files(folder: Path, suffixes: Collection[str]) -> Iterator[tuple[str, str]]:
    try:
        yield from files_below(folder, suffixes)
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

    def _splits(self) -> dict[Path, str]:
        return (
            {} if (self.root / LISTING).is_file() else super()._splits()
        )  # a table of all images: its folders are no splits

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
                rows = list(_rows(file, path))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"task.data: {str(path)!r} cannot be read as a table: {error}.") from None
        result: dict[str, tuple[str, ...]] = {}
        for name, text in rows:
            if name in result:
                raise UserError(f"task.data: {str(path)!r} names {name!r} twice.")
            result[name] = class_names(text)
        return result


def _rows(file: TextIO, path: Path) -> Iterator[tuple[str, str]]:
    """The name and the labels in each line of a `labels.csv`.

    Raises:
        UserError: if a column is missing, or a line has fields beyond the header's or ends before those two.
    """
    reader = csv.reader(file)
    columns = next(reader, [])
    for column in ("file", "labels"):
        if column not in columns:
            raise UserError(
                f"task.data: {str(path)!r} has no column {column!r}; it has {listed(columns)}."
                f"{nearest(column, columns)}"
            )
    name, labels = columns.index("file"), columns.index("labels")
    for row in filter(None, reader):
        if not max(name, labels) < len(row) <= len(columns):
            raise UserError(
                f"task.data: line {reader.line_num} of {str(path)!r} has {len(row)} field{'s' if len(row) > 1 else ''} "
                f"({','.join(row)[:60]!r}) and the header has {len(columns)} ({listed(columns)}); several names are "
                f"separated by ';', and an image of no class has an empty field of labels."
            )
        if row[name]:
            yield row[name].strip(), row[labels]


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
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return max(odd).read_bytes()

    def names(self) -> tuple[str, ...] | None:
        return read_names(self.root)
