"""Where images come from: a folder, Parquet files, or the packaged default. Bytes and labels, nothing decoded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from orchestrator.data.sources.folders import (
    SUFFIXES,
    Folder,
    FolderSource,
    ListedSource,
    MaskFolderSource,
    files_below,
)
from orchestrator.data.sources.source import SPLITS, Item, Source, read_again, read_listed
from orchestrator.data.sources.tables import ParquetSource
from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import Kind

__all__ = [
    "SPLITS",
    "SUFFIXES",
    "FolderSource",
    "Item",
    "MaskFolderSource",
    "ParquetSource",
    "Source",
    "check_splits",
    "files_below",
    "open_source",
    "read_again",
    "read_listed",
]

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
