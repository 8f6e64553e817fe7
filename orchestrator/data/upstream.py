"""Upstream images: all of a collection at one size, without labels and splits, in the order of their content."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from methods.contract import Batch
from orchestrator.data.images import CorruptError, decode, decoders, read_ahead
from orchestrator.data.pixels import stacked
from orchestrator.data.sources import (
    SUFFIXES,
    FolderSource,
    ParquetSource,
    Source,
    files_below,
    open_source,
    read_again,
    read_listed,
)
from orchestrator.data.views import Policy, draw, render
from orchestrator.errors import UserError, listed
from orchestrator.store import Entry, Records, Store, key_of, write_records

VERSION = 1
LEAST = 8
AHEAD = 256  # images that are looked at before they are asked for


def upstream_pixels(store: Store, data: str, size: int) -> Entry:
    """The store entry with the pixels [N, 3, size, size] uint8 of every distinct image, its central square.

    Args:
        store: keeps which images there are (for one state of the files) and their pixels (for one content of them).
        data: `folder:PATH` (images at any depth), `parquet:PATH` (a column `image`), or `packaged/NAME`.
        size: in pixels.

    Raises:
        UserError: if there is no such data, or fewer than 8 images in it can be used.
        WorkError: if one cannot be read, or has changed since it was listed.
    """
    source, listing = _listing(data)
    reads: dict[str, Any] = {"listing": key_of(listing), "version": VERSION}
    catalogue = store.compute("upstream_catalogue", key_of(reads), lambda f: _scan(source, listing, f), reads=reads)
    table = pq.ParquetFile(catalogue.path / "catalogue.parquet").read().to_pylist()
    if len(table) < LEAST:
        skipped = catalogue.meta["about"]["skipped"]
        left_out = f" ({listed(f'{n} {why}' for why, n in sorted(skipped.items()))})" if skipped else ""
        raise UserError(f"--data: {data!r} has {len(table)} usable images{left_out}; at least {LEAST} are needed.")
    content = {"images": key_of([row["id"] for row in table]), "size": size, "version": VERSION}

    def write(folder: Path) -> dict[str, Any]:
        write_records(folder / "pixels.arrow", len(table), _rendered(source, table, size), "uint8")
        return {"images": len(table), "skipped": catalogue.meta["about"]["skipped"]}

    return store.compute("upstream_pixels", key_of(content), write, reads=content)


def _listing(data: str) -> tuple[Source, list[list[str]]]:
    """The source, and [where, stamp] of each image."""
    kind, _, rest = data.partition(":")
    if not data.startswith("packaged/") and not (kind in ("folder", "parquet") and rest):
        raise UserError(f"--data: {data!r} is not a data source; allowed: packaged/clipart, folder:PATH, parquet:PATH.")
    try:
        source = open_source(data)
        if isinstance(source, FolderSource):
            return source, [[where, stamp] for where, stamp in files_below(source.root, SUFFIXES)]
        assert isinstance(source, ParquetSource)
        return source, [entry for number, path in enumerate(source.paths) for entry in _rows(number, path)]
    except OSError as error:
        raise UserError(f"--data: {error.filename!r} cannot be read: {error.strerror}.") from None
    except UserError as error:  # the sources speak of the sweep file's key
        raise UserError(str(error).replace("task.data:", "--data:")) from None


def _rows(number: int, path: Path) -> list[list[str]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"--data: {str(path)!r} is not a readable Parquet file: {error}.") from None
    names = file.schema_arrow.names
    if "image" not in names:
        raise UserError(f"--data: {str(path)!r} has no column 'image'; it has {listed(names)}.")
    stat = path.stat()
    return [[f"{number}:{row}", f"{stat.st_size}.{stat.st_mtime_ns}"] for row in range(file.metadata.num_rows)]


def _scan(source: Source, listing: list[list[str]], folder: Path) -> dict[str, Any]:
    def look(entry: list[str]) -> dict[str, Any]:
        try:
            data = read_listed(source.read, entry[0], repr(entry[0]), "--data")
            _, height, width = decode(data).shape
        except CorruptError as reason:
            return {"reason": str(reason)}
        return {"id": hashlib.sha256(data).hexdigest(), "where": entry[0], "height": height, "width": width}

    rows = list(read_ahead(look, listing, decoders(), AHEAD))
    skipped = Counter(row["reason"] for row in rows if "reason" in row)
    unique = {row["id"]: row for row in reversed(rows) if "reason" not in row}
    copies = len(rows) - sum(skipped.values()) - len(unique)
    if copies:
        skipped["exact duplicate"] = copies
    schema = pa.schema([("id", pa.string()), ("where", pa.string()), ("height", pa.int64()), ("width", pa.int64())])
    ordered = sorted(unique.values(), key=lambda row: row["id"])
    pq.write_table(pa.Table.from_pylist(ordered, schema=schema), folder / "catalogue.parquet")
    return {"skipped": dict(skipped), "images": len(unique)}


def _rendered(source: Source, table: list[dict[str, Any]], size: int, batch: int = 64) -> Iterator[Tensor]:
    policy = Policy(1.0, 0.0)

    def one(row: dict[str, Any]) -> Tensor:
        view = draw(policy, row["id"], (row["height"], row["width"]), 0)
        data = read_again(source.read, row["where"], row["id"], repr(row["where"]), "--data")
        return render(decode(data), view, size, "bicubic")

    return stacked(one, table, batch, 3 * size**2)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], which is what generators see."""
    return pixels.float() / 127.5 - 1


class UpstreamFeeder:
    """Batches of stored records, without labels: every epoch a new order, any step without the steps before it.

    Args:
        table: pixels [N, 3, S, S] uint8, or codes [N, n] int64.
        rows: which of them.
        batch: rows a step; with fewer rows in all, some come twice.
        seed: of the order and the flips.
        flip: mirror half of the images.
    """

    def __init__(self, table: Records, rows: np.ndarray, batch: int, seed: int, flip: bool) -> None:
        self.table, self.rows, self.batch, self.seed, self.flip = table, rows, batch, seed, flip

    def _order(self, epoch: int) -> np.ndarray:
        return self.rows[np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.rows))]

    def __call__(self, step: int, device: str) -> Batch:
        """The batch of one step; `images` as in `methods.generators.priming`."""
        first = step * self.batch
        epochs = range(first // len(self.rows), (first + self.batch - 1) // len(self.rows) + 1)
        order = np.concatenate([self._order(epoch) for epoch in epochs])
        start = first - epochs[0] * len(self.rows)
        images = self.table.rows(order[start : start + self.batch])
        if images.dtype == torch.uint8:
            images = to_unit(images)
        if self.flip:
            turned = np.random.default_rng([self.seed, 1, step]).random(self.batch) < 0.5
            images[torch.from_numpy(turned)] = images[torch.from_numpy(turned)].flip(-1)
        return Batch(images.to(device))

    def close(self) -> None:
        """Nothing is open."""
