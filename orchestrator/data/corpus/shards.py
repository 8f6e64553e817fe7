"""The files of a corpus: their columns, and what writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.data.corpus.corpus import file_hash
from orchestrator.data.corpus.settings import Settings
from orchestrator.data.corpus.sources import Kind

CHUNK_ROWS = 4  # images of one Arrow array: its offsets end at 2 GB
SCHEMAS: dict[Kind, pa.Schema] = {
    "images": pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("caption", pa.string()),
        ]
    ),
    "sentences": pa.schema(
        [pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)]
    ),
}


class ShardWriter:
    """Writes rows into shards; holds one row group.

    Args:
        folder: of the build.
        settings: of the corpus.
        first: number of the first shard that is written.
    """

    def __init__(self, folder: Path, settings: Settings, first: int) -> None:
        self._folder, self._settings, self._number = folder, settings, first
        self._schema = SCHEMAS[settings.kind]
        self._waiting: list[dict[str, Any]] = []
        self._written = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any] | None) -> dict[str, Any] | None:
        """Facts of a shard, when this row makes it full."""
        assert row is not None
        self._waiting.append(row)
        if self._written + len(self._waiting) == self._settings.rows_per_shard:
            return self.finish()
        if len(self._waiting) == self._settings.row_group:
            self._flush()
        return None

    def finish(self) -> dict[str, Any] | None:
        """Facts of the shard that ends here; None if it has no row."""
        if self._waiting:
            self._flush()
        if self._file is None:
            return None
        self.close()
        path = self._path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        facts = {"file": path.name, "rows": self._written, "bytes": path.stat().st_size}
        facts["sha256"] = file_hash(str(self._folder), path.name)
        self._number, self._written = self._number + 1, 0
        return facts

    def close(self) -> None:
        """Closes the file that is open; a shard that is not finished is of no use."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return self._folder / f"part-{self._number:05}.parquet"

    def _flush(self) -> None:
        if self._file is None:
            texts = [name for name in ("caption", "text") if name in self._schema.names]
            numbers = [name for name in ("height", "width") if name in self._schema.names]
            self._file = pq.ParquetWriter(
                self._path,
                self._schema,
                compression={n: "zstd" if n in texts else "none" for n in self._schema.names},
                use_dictionary=False,
                write_statistics=numbers,  # those of other columns would put whole images into the footer
            )
        columns = [
            pa.chunked_array(
                [
                    pa.array([row[f.name] for row in self._waiting[i : i + CHUNK_ROWS]], f.type)
                    for i in range(0, len(self._waiting), CHUNK_ROWS)
                ]
            )
            if f.name == "image"
            else pa.array([row[f.name] for row in self._waiting], f.type)
            for f in self._schema
        ]
        self._file.write_table(pa.table(columns, schema=self._schema), row_group_size=self._settings.row_group)
        self._written += len(self._waiting)
        self._waiting = []
