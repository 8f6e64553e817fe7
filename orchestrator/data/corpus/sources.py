"""Where a corpus comes from: raw images and raw sentences, read piece by piece in a fixed order."""

from __future__ import annotations

import functools
import gzip
import json
import posixpath
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from orchestrator.data.corpus.files import CHUNK, files_below, locate, stamp_of
from orchestrator.data.images import CorruptError
from orchestrator.data.sources import SUFFIXES
from orchestrator.errors import UserError, listed, nearest

Kind = Literal["images", "sentences"]

BLOCK = 1024  # files of a folder that are one piece
IMAGE_BATCH = 32  # rows of a Parquet file in memory
SENTENCE_BATCH = 4096
MAX_BYTES = 256 << 20
LARGE = f"file larger than {MAX_BYTES >> 20} MB"
TEXT_COLUMNS = ("text", "caption", "sentence")
ARCHIVES = (".tar", ".tar.gz", ".tgz")


class Piece(NamedTuple):
    """A part of a source that can be read by itself.

    Attributes:
        name: for people.
        stamp: changes when its contents may have changed.
        where: the source's own address of it.
    """

    name: str
    stamp: str
    where: Any


class Raw(NamedTuple):
    """An image or sentence as it was found.

    Attributes:
        load: its bytes; called on a worker's thread. May raise `CorruptError`.
        caption: of an image, UTF-8.
    """

    load: Callable[[], bytes]
    caption: bytes | None = None


class CorpusSource(ABC):
    """A collection of raw images or sentences. Nothing of it stays in memory but the item at hand."""

    kinds: ClassVar[tuple[Kind, ...]]

    def __init__(self, address: str, kind: Kind) -> None:
        self.address = address
        self.kind = kind

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Every piece, in a fixed order.

        Raises:
            UserError: if there is none, or a file is not what the address says.
        """

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[Raw]:
        """Its items, in a fixed order."""


def open_corpus_source(address: str, kind: Kind) -> CorpusSource:
    """The source at `folder:`, `parquet:`, `webdataset:`, `text:` or `datasets:` PATH, or `packaged/NAME`.

    Raises:
        UserError: if there is no such kind of source, or none that holds what is wanted.
    """
    if address.startswith("packaged/"):
        address = f"parquet:{Path(str(files('orchestrator'))) / address / 'images.parquet'}"
    name, _, path = address.partition(":")
    allowed = [n for n, source in SOURCES.items() if kind in source.kinds]
    if name not in allowed or not path:
        raise UserError(
            f"SOURCE: {address!r} is no source of {kind}; allowed are {listed(f'{n}:PATH' for n in allowed)}."
            f"{nearest(name, allowed)}"
        )
    return SOURCES[name](path, kind)


class FolderSource(CorpusSource):
    """Image files at any depth."""

    kinds = ("images",)

    def pieces(self) -> Iterator[Piece]:
        block: list[fs.FileInfo] = []
        for info in files_below(self.address, sorted(SUFFIXES)):
            block.append(info)
            if len(block) == BLOCK:
                yield self._piece(block)
                block = []
        if block:
            yield self._piece(block)

    @staticmethod
    def _piece(block: list[fs.FileInfo]) -> Piece:
        name = f"{block[0].path} to {posixpath.basename(block[-1].path)}"
        return Piece(name, "\n".join(stamp_of(i) for i in block), tuple((i.path, i.size) for i in block))

    def read(self, piece: Piece) -> Iterator[Raw]:
        system, _ = locate(self.address)
        for path, size in piece.where:
            yield Raw(functools.partial(_read_file, system, path, size))


def _read_file(system: fs.FileSystem, path: str, size: int) -> bytes:
    if size > MAX_BYTES:
        raise CorruptError(LARGE)
    try:
        with system.open_input_file(path) as file:
            return bytes(file.read())
    except (FileNotFoundError, PermissionError) as error:  # any other is the disk's or the network's, not the image's
        raise CorruptError(f"cannot be read ({type(error).__name__})") from None


class ParquetSource(CorpusSource):
    """Rows of Parquet files; a piece is a row group.

    Images: a column `image` of bytes, or Hugging Face's struct with `bytes`, and maybe `caption` or `text`. Sentences:
    a column `text`, else `caption`, else `sentence`.
    """

    kinds = ("images", "sentences")

    def pieces(self) -> Iterator[Piece]:
        system, _ = locate(self.address)
        for info in files_below(self.address, (".parquet",)):
            try:
                with pq.ParquetFile(info.path, filesystem=system) as file:
                    schema, groups = file.schema_arrow, file.metadata.num_row_groups
            except pa.ArrowInvalid as error:
                raise UserError(f"SOURCE: {info.path!r} is not a readable Parquet file: {error}.") from None
            columns = columns_of(schema, self.kind, info.path)
            for group in range(groups):
                where = (info.path, group, columns)
                yield Piece(f"{info.path}, row group {group}", f"{stamp_of(info)} {group}", where)

    def read(self, piece: Piece) -> Iterator[Raw]:
        system, _ = locate(self.address)
        path, group, columns = piece.where
        size = IMAGE_BATCH if self.kind == "images" else SENTENCE_BATCH
        with pq.ParquetFile(path, filesystem=system) as file:
            for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                yield from _rows(batch, columns, self.kind)


def columns_of(schema: pa.Schema, kind: Kind, path: str) -> list[str]:
    """The columns to read: of images the first and maybe their captions, of sentences one.

    Raises:
        UserError: if there is none of the wanted name and type.
    """
    texts = [f.name for f in schema if _is_text(f.type)]
    found = next((c for c in TEXT_COLUMNS if c in texts), None)
    if kind == "sentences":
        if found is None:
            raise UserError(
                f"SOURCE: {path!r} has no column of strings that is named {listed(TEXT_COLUMNS)}; its columns of "
                f"strings are {listed(texts)}."
            )
        return [found]
    if "image" not in schema.names or not _is_image(schema.field("image").type):
        raise UserError(
            f"SOURCE: {path!r} has no column 'image' of bytes; it has "
            f"{listed(f'{f.name} ({f.type})' for f in schema)}.{nearest('image', schema.names)}"
        )
    caption = next((c for c in ("caption", "text") if c in texts), None)
    return ["image", caption] if caption else ["image"]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _rows(batch: pa.RecordBatch, columns: list[str], kind: Kind) -> Iterator[Raw]:
    if kind == "sentences":
        for data in _bytes(batch[columns[0]]):
            yield Raw(functools.partial(_same, data or b""))
        return
    images = batch["image"]
    if pa.types.is_struct(images.type):
        images = images.field("bytes")
    captions = _bytes(batch[columns[1]]) if len(columns) > 1 else [None] * len(images)
    for image, caption in zip(images, captions, strict=True):
        yield Raw(functools.partial(_same, image.as_py() or b""), caption)


def _bytes(column: pa.Array) -> list[bytes | None]:
    """As bytes, so that one string that is not UTF-8 spoils no other."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    result: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return result


def _same(data: bytes) -> bytes:
    return data


class WebDatasetSource(CorpusSource):
    """Tar files; members that follow each other and share the name up to its first dot are one sample.

    A sample's image is its first member that ends in one of `SUFFIXES`; its caption is its `.txt`, or else `caption` or
    `text` of its `.json`.
    """

    kinds = ("images",)

    def pieces(self) -> Iterator[Piece]:
        for info in files_below(self.address, ARCHIVES):
            yield Piece(info.path, stamp_of(info), info.path)

    def read(self, piece: Piece) -> Iterator[Raw]:
        system, _ = locate(self.address)
        try:
            with (
                # Of a .tar.gz pyarrow would undo the compression by itself; tarfile tells its errors from the disk's.
                system.open_input_stream(piece.where, compression=None, buffer_size=CHUNK) as stream,
                tarfile.open(fileobj=stream, mode="r|*") as archive,
            ):
                yield from _samples(archive)
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile):
            yield Raw(functools.partial(_broken, f"rest of {posixpath.basename(piece.where)}, which is broken"))


def _broken(reason: str) -> bytes:
    raise CorruptError(reason)


def _samples(archive: tarfile.TarFile) -> Iterator[Raw]:
    stem: str | None = None
    parts: dict[str, Callable[[], bytes]] = {}
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would keep the header of every member
        folder, name = posixpath.split(member.name)
        if not member.isfile() or name.startswith("."):
            continue
        first, _, suffix = name.partition(".")
        if posixpath.join(folder, first) != stem:
            if stem is not None:
                yield _sample(parts)
            stem, parts = posixpath.join(folder, first), {}
        suffix = suffix.lower()
        if f".{suffix}" in SUFFIXES:
            suffix = "image"
        if suffix in ("image", "txt", "json") and suffix not in parts:
            if member.size > MAX_BYTES:
                parts[suffix] = functools.partial(_broken, LARGE)
                continue
            file = archive.extractfile(member)
            data = file.read() if file else b""
            if len(data) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            parts[suffix] = functools.partial(_same, data)
    if stem is not None:
        yield _sample(parts)


def _sample(parts: dict[str, Callable[[], bytes]]) -> Raw:
    if "image" not in parts:
        return Raw(functools.partial(_broken, "sample without an image"))
    try:
        if "txt" in parts:
            return Raw(parts["image"], parts["txt"]())
        about = json.loads(parts["json"]()) if "json" in parts else {}
    except (ValueError, CorruptError):
        about = {}
    texts = [about.get(name) for name in ("caption", "text")] if isinstance(about, dict) else []
    caption = next((t for t in texts if isinstance(t, str)), None)
    return Raw(parts["image"], caption.encode("utf-8", "surrogatepass") if caption is not None else None)


class TextSource(CorpusSource):
    """Text files, plain or gzip, with a sentence a line."""

    kinds = ("sentences",)

    def pieces(self) -> Iterator[Piece]:
        for info in files_below(self.address, (".txt", ".txt.gz")):
            yield Piece(info.path, stamp_of(info), info.path)

    def read(self, piece: Piece) -> Iterator[Raw]:
        system, _ = locate(self.address)
        with system.open_input_stream(piece.where, compression=None, buffer_size=CHUNK) as stream:
            packed = piece.where.lower().endswith(".gz")
            try:
                for line in _lines(gzip.GzipFile(fileobj=stream) if packed else stream):
                    whole = len(line) <= CHUNK
                    yield Raw(functools.partial(_same, line) if whole else functools.partial(_broken, "line over 1 MB"))
            except (EOFError, zlib.error, gzip.BadGzipFile):
                yield Raw(functools.partial(_broken, f"rest of {posixpath.basename(piece.where)}, which is broken"))


def _lines(file: Any) -> Iterator[bytes]:
    """Lines without their end. Of one that is longer than `CHUNK`, which no sentence is, only the beginning."""
    rest = b""
    mark = b"\xef\xbb\xbf"
    while data := file.read(CHUNK):
        first, *others = data.removeprefix(mark).split(b"\n")
        mark = b""
        rest = (rest + first)[: CHUNK + 1]
        for line in others:
            yield rest
            rest = line
    if rest:
        yield rest


class DatasetsSource(CorpusSource):
    """A folder that `datasets.save_to_disk` wrote: Arrow streams that its `state.json` names, in that order."""

    kinds = ("sentences",)

    def pieces(self) -> Iterator[Piece]:
        system, folder = locate(self.address)
        names = {
            posixpath.basename(i.path) for i in system.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        }
        if "state.json" not in names:
            inside = sorted(names - {"dataset_dict.json"})
            what = "splits of a set; name one of them" if "dataset_dict.json" in names else "its contents"
            raise UserError(
                f"SOURCE: {self.address!r} is no folder that datasets.save_to_disk wrote (it has no state.json); "
                f"{what}: {listed(inside)}."
            )
        try:
            with system.open_input_file(f"{folder}/state.json") as file:
                wanted = [str(entry["filename"]) for entry in json.loads(file.read())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"SOURCE: {self.address}/state.json cannot be understood: {error!r}.") from None
        for name in wanted:
            info = system.get_file_info(f"{folder}/{name}")
            if info.type != fs.FileType.File:
                raise UserError(f"SOURCE: {self.address}/state.json names {name!r}, which is not there.")
            try:
                with system.open_input_stream(info.path) as stream, pa.ipc.open_stream(stream) as reader:
                    columns = columns_of(reader.schema, self.kind, info.path)
            except pa.ArrowInvalid as error:
                raise UserError(f"SOURCE: {info.path!r} is not a readable Arrow stream: {error}.") from None
            yield Piece(info.path, stamp_of(info), (info.path, columns))

    def read(self, piece: Piece) -> Iterator[Raw]:
        system, _ = locate(self.address)
        path, columns = piece.where
        with system.open_input_stream(path, buffer_size=CHUNK) as stream, pa.ipc.open_stream(stream) as reader:
            for batch in reader:
                yield from _rows(batch, columns, self.kind)


SOURCES: dict[str, type[CorpusSource]] = {
    "folder": FolderSource,
    "parquet": ParquetSource,
    "webdataset": WebDatasetSource,
    "text": TextSource,
    "datasets": DatasetsSource,
}
