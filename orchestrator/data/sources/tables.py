"""Images in Parquet files."""

from __future__ import annotations

import functools
import warnings
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.data.sources.source import SPLITS, Item, Source, class_names, is_null, read_names
from orchestrator.errors import UserError, first_lines, listed, nearest
from orchestrator.spec import Kind

OPEN = 8  # row groups that stay in memory
LARGE = 64 * 2**20  # bytes of a row group's images, beyond which reading it for one of them is told


class ParquetSource(Source):
    """Rows with `image` (encoded bytes, or Hugging Face's struct with `bytes`), labels, and maybe `split`, `stem`.

    Labels are a column `label`, a text or number; multi-label: a list of them, or a text that separates them by `;`;
    segmentation: a column `mask` like `image`, and maybe a `classes.txt` beside the files. Without a `split` column, a
    file name that begins with train, val or test (`train-00000.parquet`) decides. A null is no split and no stem; a row
    whose label is null has no class (multi-label), or is left out and counted.
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
        groups: list[tuple[int, Path]] = []
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
            groups += [(size, path) for size in _group_bytes(file.metadata)]
            table = file.read(columns=[c for c in ("label", "split", "stem") if c in names and c != "mask"])
            labels = self._labels(table, path) if wanted == "label" else [""] * count
            named = next((s for s in SPLITS if path.name.startswith(s)), "")
            splits = _texts(table["split"]) if "split" in names else [named] * count
            stems = _texts(table["stem"]) if "stem" in names else [""] * count
            stat = path.stat()
            stamp = f"{stat.st_size}.{stat.st_mtime_ns}"
            for row, (label, split, stem) in enumerate(zip(labels, splits, stems, strict=True)):
                known, problem = ("", "no label") if label is None else (label, "")
                found.append(Item(f"{number}:{row}", known, split, stem, stamp, problem))
        largest, path = max(groups, default=(0, self.root))
        if len(groups) > OPEN and largest > LARGE:
            warnings.warn(
                f"task.data: a row group of {str(path)!r} holds {largest / 1e6:,.0f} MB of images. Images are read in "
                "the order of their content, so that much is read for nearly each of them: write the files again with "
                f"at most {LARGE / 1e6:.0f} MB in a row group (pyarrow's `row_group_size` is its rows).",
                stacklevel=2,
            )
        return found

    def _labels(self, table: pa.Table, path: Path) -> list[Any]:
        """The label of each row, multi-label a tuple of them; None where there is none and one is needed."""
        several = pa.types.is_list(table.schema.field("label").type) or pa.types.is_large_list(
            table.schema.field("label").type
        )
        if self.kind == "multilabel":
            return [class_names(v if several or is_null(v) else str(v)) for v in table["label"].to_pylist()]
        if several:
            raise UserError(f"task.data: the labels in {str(path)!r} are lists; set task.kind to multilabel.")
        return [None if is_null(v) else str(v) for v in table["label"].to_pylist()]

    def read(self, where: str) -> bytes:
        return self._cell(where, "image")

    def read_mask(self, where: str) -> bytes:
        return self._cell(where, "mask")

    def names(self) -> tuple[str, ...] | None:
        return read_names(self.root if self.root.is_dir() else self.root.parent)

    def _cell(self, where: str, column: str) -> bytes:
        number, row = (int(part) for part in where.split(":"))
        try:
            group, offset = self._locate(number, row)
            value = self._column(number, group, column)[offset].as_py()
        except (pa.ArrowInvalid, LookupError) as error:  # another file than was listed
            raise OSError(f"{str(self.paths[number])!r} has no row {row} of {column!r}: {error}") from None
        except OSError as error:  # Arrow's own may name no file, and take several lines
            raise OSError(f"{str(self.paths[number])!r}: {first_lines(error).removesuffix('.')}") from None
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
        group = bisect_right(starts, row) - 1
        if group == len(starts) - 1:
            raise IndexError(f"it has {starts[-1]} rows")
        return group, row - starts[group]

    @functools.lru_cache(maxsize=OPEN)  # noqa: B019 - a source lives as long as its process
    def _column(self, number: int, group: int, column: str) -> pa.ChunkedArray:
        return pq.ParquetFile(self.paths[number]).read_row_group(group, columns=[column])[column]


def _texts(column: pa.ChunkedArray) -> list[str]:
    return ["" if is_null(v) else str(v) for v in column.to_pylist()]


def _group_bytes(metadata: pq.FileMetaData) -> list[int]:
    """Of the images in each row group, as they are in memory."""
    columns = range(metadata.num_columns)
    return [
        sum(
            group.column(c).total_uncompressed_size
            for c in columns
            if group.column(c).path_in_schema.partition(".")[0] == "image"
        )
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    ]
