"""Addresses of files: a local path, what is packaged, or a URI that pyarrow knows (s3://, gs://, file://)."""

from __future__ import annotations

import fnmatch
import functools
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from orchestrator.errors import UserError, listed, nearest

PACKAGED = Path(__file__).parents[2] / "packaged"
CHUNK = 1 << 20  # bytes that are read at a time


@functools.lru_cache(maxsize=64)
def locate(address: str) -> tuple[fs.FileSystem, str]:
    """The file system of an address, and the path in it.

    Raises:
        UserError: if no file system knows such an address.
    """
    if address.startswith("packaged/"):
        return fs.LocalFileSystem(), str(PACKAGED / address.removeprefix("packaged/"))
    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
    try:
        system, path = fs.FileSystem.from_uri(address)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{address!r} cannot be opened: {error}. Allowed are local paths and s3://, gs:// and file:// addresses."
        ) from None
    return system, path.rstrip("/")


def files_below(address: str, suffixes: Sequence[str]) -> Iterator[fs.FileInfo]:
    """The file at an address, those that its last part matches (`*`, `?`), or those with a suffix below the folder.

    Depth first, each folder in the order of its names; names that begin with a dot are passed over. One folder's
    listing is in memory at a time.

    Raises:
        UserError: if there is nothing.
    """
    system, path = locate(address)
    parent, name = posixpath.split(path)
    info = system.get_file_info(path)
    if info.type == fs.FileType.File:
        yield info
        return
    if info.type == fs.FileType.Directory:
        found = _walk(system, path, tuple(suffixes))
    elif any(c in name for c in "*?["):
        matching = _children(system, parent) if system.get_file_info(parent).type == fs.FileType.Directory else []
        found = (i for i in matching if i.type == fs.FileType.File and fnmatch.fnmatchcase(i.base_name, name))
    else:
        here = system.get_file_info(parent).type == fs.FileType.Directory
        near = nearest(name, [i.base_name for i in _children(system, parent)]) if here else ""
        raise UserError(f"There is no file or folder {address!r}.{near}")
    first = next(found, None)
    if first is None:
        raise UserError(f"There is no {listed(suffixes)} file at {address!r}.")
    yield first
    yield from found


def _walk(system: fs.FileSystem, folder: str, suffixes: tuple[str, ...]) -> Iterator[fs.FileInfo]:
    for info in _children(system, folder):
        if info.type == fs.FileType.Directory:
            yield from _walk(system, info.path, suffixes)
        elif info.base_name.lower().endswith(suffixes):
            yield info


def _children(system: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    infos = system.get_file_info(fs.FileSelector(folder))
    return sorted((i for i in infos if not i.base_name.startswith(".")), key=lambda i: i.base_name)


def stamp_of(info: fs.FileInfo) -> str:
    """Changes when the file's bytes may have changed."""
    return f"{info.path} {info.size} {info.mtime_ns}"
