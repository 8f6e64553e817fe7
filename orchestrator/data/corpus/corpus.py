"""Reading a corpus folder: its manifest, its shards, and a shard as a set of images."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from torch import Tensor

from orchestrator.data.corpus.files import CHUNK, locate, stamp_of
from orchestrator.data.corpus.sources import Kind
from orchestrator.data.images import decode
from orchestrator.data.task import Split
from orchestrator.errors import UserError, listed, nearest
from orchestrator.store import key_of

VERSION = 1
MANIFEST = "corpus.json"
GROUPS_IN_MEMORY = 2
FOOTERS = 64  # of shards, that stay in memory; every reader is in a few shards at a time


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a corpus. Picklable.

    Attributes:
        address: of the corpus folder.
        file: its name there.
        rows, bytes: its size.
        hash: SHA-256 of the file, hex.
        row_groups: rows of each row group.
    """

    address: str
    file: str
    rows: int
    bytes: int
    hash: str
    row_groups: tuple[int, ...]

    def read(self, row_group: int, columns: Sequence[str]) -> pa.Table:
        """The columns of one row group, in the asked order. Threads may call it at the same time."""
        system, folder = locate(self.address)
        path = f"{folder}/{self.file}"
        with pq.ParquetFile(
            path, filesystem=system, metadata=_footer(self.address, self.file, self.hash), pre_buffer=True
        ) as file:
            return file.read_row_group(row_group, columns=list(columns)).select(list(columns))


@functools.lru_cache(maxsize=FOOTERS)
def _footer(address: str, file: str, contents: str) -> pq.FileMetaData:
    system, folder = locate(address)
    return pq.read_metadata(f"{folder}/{file}", filesystem=system)


@dataclass(frozen=True)
class Corpus:
    """A corpus folder.

    Attributes:
        address: of the folder.
        kind: `images` or `sentences`.
        shards: in order.
        manifest: `corpus.json`.
    """

    address: str
    kind: Kind
    shards: tuple[Shard, ...]
    manifest: dict[str, Any] = field(repr=False)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def identity(self) -> str:
        """Of the contents of all shards in their order; 20 hex digits."""
        return key_of([self.kind, *(shard.hash for shard in self.shards)])


def open_corpus(address: str, kind: Kind | None = None) -> Corpus:
    """The corpus at a local path or URI.

    Args:
        address: of the folder.
        kind: what it must hold; either if None.

    Raises:
        UserError: if it is no corpus folder, holds the other kind, was written by a newer version, or a shard is
            missing or has another size than it was written with.
    """
    corpus = read_manifest(address, kind)
    wrong = differing(corpus)
    if wrong:
        more = f" ({len(wrong) - 1} more shards too)" if len(wrong) > 1 else ""
        raise UserError(f"The corpus {address!r} is not whole: {next(iter(wrong.values()))}{more}.")
    return corpus


def is_there(address: str) -> bool:
    """Whether there is a manifest; False too where the address cannot be reached."""
    try:
        system, folder = locate(address)
        return bool(system.get_file_info(f"{folder}/{MANIFEST}").type == fs.FileType.File)
    except (UserError, OSError):
        return False


_opened: dict[tuple[str, Kind | None], tuple[str, Corpus]] = {}


def corpus_at(address: str, kind: Kind | None = None) -> Corpus:
    """As `open_corpus`, which looks at every shard once a process for one state of the manifest.

    What ends between two calls is noticed where it is read.
    """
    system, folder = locate(address)
    stamp = stamp_of(system.get_file_info(f"{folder}/{MANIFEST}"))
    known = _opened.get((address, kind))
    if known is None or known[0] != stamp:
        known = stamp, open_corpus(address, kind)
        _opened[address, kind] = known
    return known[1]


def read_manifest(address: str, kind: Kind | None = None) -> Corpus:
    """The corpus as its manifest tells it, without a look at the shards. Raises as `open_corpus`."""
    system, folder = locate(address)
    try:
        with system.open_input_file(f"{folder}/{MANIFEST}") as file:
            manifest = json.loads(file.read())
        if not isinstance(manifest, dict) or manifest.get("format") != "corpus":
            raise ValueError("it is the manifest of something else")
    except FileNotFoundError:
        near = ""
        if not address.count("://"):
            parent, _, name = folder.rpartition("/")
            infos = system.get_file_info(fs.FileSelector(parent or "/", allow_not_found=True))
            near = nearest(name, [i.base_name for i in infos if i.base_name != name])
        raise UserError(f"There is no corpus at {address!r}: it has no {MANIFEST}.{near}") from None
    except OSError as error:
        raise UserError(f"The corpus {address!r} cannot be opened: {error}.") from None
    except ValueError as error:
        raise UserError(f"{address}/{MANIFEST} cannot be understood: {error}.") from None
    version = manifest.get("version")
    if version != VERSION:
        raise UserError(
            f"The corpus {address!r} has the format version {version}, which this program does not know; it reads "
            f"version {VERSION}."
        )
    if manifest.get("kind") not in get_args(Kind):
        raise UserError(f"The corpus {address!r} holds {manifest.get('kind')!r}; allowed are {listed(get_args(Kind))}.")
    if kind is not None and manifest["kind"] != kind:
        raise UserError(f"The corpus {address!r} holds {manifest['kind']}; {kind} are needed here.")
    try:
        group = int(manifest["row_group"])
        shards = tuple(
            Shard(address, s["file"], s["rows"], s["bytes"], s["sha256"], group_rows(s["rows"], group))
            for s in manifest["shards"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{address}/{MANIFEST} cannot be understood: {error!r}.") from None
    return Corpus(address, manifest["kind"], shards, manifest)


def group_rows(rows: int, group: int) -> tuple[int, ...]:
    """Rows of each row group of a shard."""
    return tuple(min(group, rows - start) for start in range(0, rows, group))


def differing(corpus: Corpus) -> dict[str, str]:
    """By file, what is wrong with shards that are missing or have another size; one listing of the folder."""
    system, folder = locate(corpus.address)
    sizes = {i.base_name: i.size for i in system.get_file_info(fs.FileSelector(folder))}
    wrong = {}
    for shard in corpus.shards:
        if shard.file not in sizes:
            wrong[shard.file] = f"{shard.file} is missing"
        elif sizes[shard.file] != shard.bytes:
            wrong[shard.file] = f"{shard.file} has {sizes[shard.file]} bytes instead of {shard.bytes}"
    return wrong


def verify_corpus(address: str) -> dict[str, Any]:
    """Reads every shard and compares its SHA-256 with the manifest's.

    Returns:
        `shards` and `rows` (of the manifest), `damaged`: a sentence for each shard that is not what was written.
    """
    corpus = read_manifest(address)
    wrong = differing(corpus)
    for shard in corpus.shards:
        if shard.file not in wrong and file_hash(corpus.address, shard.file) != shard.hash:
            wrong[shard.file] = f"{shard.file} has other contents than were written"
    damaged = [wrong[shard.file] for shard in corpus.shards if shard.file in wrong]
    return {"shards": len(corpus.shards), "rows": corpus.rows, "damaged": damaged}


def file_hash(address: str, name: str) -> str:
    """SHA-256 of a file in a folder, hex."""
    system, folder = locate(address)
    digest = hashlib.sha256()
    with system.open_input_stream(f"{folder}/{name}", compression=None) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


class CorpusShard:
    """One shard of images, read by views, pixels and teacher outputs like a split of the user's data.

    The encoded images of the two row groups that were read last stay in memory, so read in order where you can.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        parts = [shard.read(i, ("id", "height", "width")) for i in range(len(shard.row_groups))]
        table = pa.concat_tables(parts)
        sizes = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
        where = tuple(str(i) for i in range(shard.rows))
        self.split = Split(tuple(table["id"].to_pylist()), where, (0,) * shard.rows, tuple(sizes))
        self._starts = [0, *accumulate(shard.row_groups)]
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, split: Split, row: int) -> Tensor:
        """uint8 [3, H, W]."""
        number = int(split.where[row])
        group = bisect_right(self._starts, number) - 1
        return decode(self._images(group)[number - self._starts[group]].as_py())

    def _images(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            if group in self._groups:
                self._groups.move_to_end(group)
            else:
                self._groups[group] = self.shard.read(group, ("image",))["image"]
                if len(self._groups) > GROUPS_IN_MEMORY:
                    self._groups.popitem(last=False)
            return self._groups[group]

    def identity(self) -> dict[str, Any]:
        """What finds these images again."""
        return {"corpus": self.shard.address, "shard": self.shard.file, "hash": self.shard.hash}


def shard_of(identity: dict[str, Any]) -> CorpusShard | None:
    """The shard that an `identity` names, or None if it is gone or another one now."""
    try:
        shards = open_corpus(identity["corpus"], "images").shards
    except UserError:
        return None
    found = next((s for s in shards if s.file == identity["shard"] and s.hash == identity["hash"]), None)
    return CorpusShard(found) if found else None
