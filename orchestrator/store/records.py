"""Records of one fixed size in an Arrow file, read by memory map without a copy.

One file holds one record batch with one column of fixed-size binary: record `i` lies at a constant offset, so a lookup
is a seek, and the whole column is one tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}
MOST_OPEN = 512  # files; embeddings of 28 million sentences are 284, and a window of images lies in 16 of 9766
_CARRIED = {"bfloat16": "int16"}  # numpy has no such type: its bits travel as another one


def write_records(path: Path, count: int, batches: Iterable[Tensor], dtype: str) -> None:
    """Writes `count` records that come in order, in batches [b, ...] of one shape. Meanwhile they lie there twice.

    Raises:
        ValueError: if there are fewer or more records than `count`.
    """
    raw = path.with_suffix(".raw")
    shape: tuple[int, ...] | None = None
    written = 0
    with raw.open("wb") as file:
        for batch in batches:
            batch = batch.detach().cpu().to(TYPES[dtype]).contiguous()
            shape = shape or tuple(batch.shape[1:])
            if tuple(batch.shape[1:]) != shape:
                raise ValueError(f"Records of shape {tuple(batch.shape[1:])} after records of shape {shape}.")
            written += len(batch)
            file.write(batch.flatten().view(torch.uint8).numpy().tobytes())
    if written != count or shape is None:
        raise ValueError(f"{written} records were given where {count} were expected.")
    width = int(np.prod(shape, dtype=np.int64)) * TYPES[dtype].itemsize
    source = np.memmap(raw, dtype=np.uint8, mode="r")
    column = pa.Array.from_buffers(pa.binary(width), count, [None, pa.py_buffer(source)])
    schema = _schema(shape, dtype)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    del column, source
    raw.unlink()


class Records:
    """A file of records as a read-only tensor [N, ...] over the memory map.

    Args:
        path: an Arrow file that `write_records` wrote.
    """

    def __init__(self, path: Path) -> None:
        self._map = pa.memory_map(str(path), "r")
        reader = pa.ipc.open_file(self._map)
        metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
        self._batch = reader.get_batch(0)
        column = self._batch.column(0)
        shape = tuple(int(n) for n in metadata["shape"].split(",") if n)
        self._dtype = TYPES[metadata["dtype"]]
        carried = _CARRIED.get(metadata["dtype"], metadata["dtype"])
        values = np.frombuffer(column.buffers()[1], dtype=carried, count=len(column) * _size(shape))
        # Torch warns that the map is read-only; nothing here writes to it.
        values.flags.writeable = False
        self._values = values.reshape(len(column), *shape)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one record."""
        return self._values.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._dtype

    def rows(self, indices: Tensor | np.ndarray | list[int]) -> Tensor:
        """[n, ...] the records at `indices`, copied out of the map."""
        return torch.from_numpy(self._values[np.asarray(indices, dtype=np.int64)]).view(self._dtype)

    def all(self) -> Tensor:
        """[N, ...] every record, copied out of the map."""
        return torch.from_numpy(self._values.copy()).view(self._dtype)


class OpenFiles(Sequence[Records]):
    """Files of records that are opened when they are read, and stay open while they are among the last ones.

    Each open one costs a file descriptor and a memory map, and a corpus has thousands of shards.
    """

    def __init__(self, paths: Sequence[Path], most: int = MOST_OPEN) -> None:
        self._paths = [str(path) for path in paths]
        self._open = functools.lru_cache(maxsize=most)(Records)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> Any:
        return self._open(Path(self._paths[number]))


class JoinedRecords:
    """Several files of records of one shape, read as one.

    Args:
        tables: in order.
        counts: records of each, where they are known without opening it.
    """

    def __init__(self, tables: Sequence[Records], counts: Sequence[int] | None = None) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *(counts if counts is not None else map(len, tables))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one record."""
        return self._tables[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._tables[0].dtype

    def rows(self, indices: Tensor | np.ndarray | list[int]) -> Tensor:
        """[n, ...] the records at `indices`, copied out of the maps."""
        wanted = np.asarray(indices, dtype=np.int64)
        owners = np.searchsorted(self._starts, wanted, side="right") - 1
        result = torch.empty((len(wanted), *self.shape), dtype=self.dtype)
        for owner in np.unique(owners).tolist():
            where = np.flatnonzero(owners == owner)
            result[torch.from_numpy(where)] = self._tables[owner].rows(wanted[where] - self._starts[owner])
        return result


def records_bytes(count: int, shape: tuple[int, ...], dtype: str) -> int:
    """Size of the file that `write_records` writes."""
    width = _size(shape) * TYPES[dtype].itemsize
    sink = pa.BufferOutputStream()
    schema = _schema(shape, dtype)
    # Not by pa.array, which imports pandas first.
    one = pa.Array.from_buffers(pa.binary(width), 1, [None, pa.py_buffer(bytes(width))])
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([one], schema=schema))
    return int(sink.tell()) + _padded(count * width) - _padded(width)


def _padded(size: int) -> int:
    """A buffer's size in an Arrow file."""
    return -(-size // 8) * 8


def _schema(shape: tuple[int, ...], dtype: str) -> pa.Schema:
    width = _size(shape) * TYPES[dtype].itemsize
    metadata = {"dtype": dtype, "shape": ",".join(str(n) for n in shape)}
    return pa.schema([pa.field("record", pa.binary(width))], metadata=metadata)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
