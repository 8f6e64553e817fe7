"""Retrieval between images and captions: recall at k in both directions, by blocks of bounded memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.data.images import CorruptError, all_cpus, decode, decoders, decoding_pool
from orchestrator.errors import UserError, listed, nearest
from orchestrator.evaluate.metrics import Score

KS = (1, 5, 10)
CELLS = 16_000_000  # similarities that are held at a time


@dataclass
class Captioned:
    """Pictures and sentences that belong together, each once, filled while the pictures are read.

    Attributes:
        captions: every sentence.
        pairs: (image, caption) by position, each once.
        skipped: how many rows were left out, by reason.
    """

    captions: list[str] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def caption_files(data: str) -> list[Path]:
    """The Parquet files that `parquet:PATH` names.

    Raises:
        UserError: if there are none, or one lacks the column `image` or `caption`.
    """
    kind, _, text = data.partition(":")
    root = Path(text).expanduser()
    if kind != "parquet":
        raise UserError(f"data: {data!r} cannot be retrieved from; captions are read from `parquet:PATH`.")
    paths = sorted(root.glob("*.parquet")) if root.is_dir() else [root] if root.is_file() else []
    if not paths:
        near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"data: there is no Parquet file at {str(root)!r}.{nearest(root.name, near)}")
    for path in paths:
        names = parquet_columns(path)
        for column in ("image", "caption"):
            if column not in names:
                raise UserError(
                    f"data: {str(path)!r} has no column {column!r}; it has {listed(names)}.{nearest(column, names)}"
                )
    return paths


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file.

    Raises:
        UserError: if it is none.
    """
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"data: {str(path)!r} is not a readable Parquet file: {error}.") from None


def read_captioned(paths: Sequence[Path], known: Captioned, batch: int = 64) -> Iterator[list[tuple[str, Tensor]]]:
    """(content hash, uint8 [3, H, W]) of every image, in batches; fills `known` as it goes.

    Equal images count as one, with the captions of all of them; equal captions as one, with all of their images. Only
    what is decoded at a time is held in memory.

    Args:
        paths: files with `image` (bytes, or a struct with `bytes`) and `caption` (a text, or a list of texts).
        known: is filled.
        batch: images at a time.
    """
    images: dict[str, int | None] = {}
    kept = 0
    texts: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()

    def skip(reason: str) -> None:
        known.skipped[reason] = known.skipped.get(reason, 0) + 1

    def look(data: bytes) -> Tensor | str:
        try:
            return decode(data)
        except CorruptError as reason:
            return str(reason)

    for path in paths:
        for rows in pq.ParquetFile(path).iter_batches(batch, columns=["image", "caption"]):
            batch_rows = []
            for row in rows.to_pylist():
                value = row["image"]
                data = (value["bytes"] if isinstance(value, dict) else value) or b""
                captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
                words = [" ".join(str(c).split()) for c in captions if c is not None and str(c).strip()]
                if words:
                    batch_rows.append((hashlib.sha256(data).hexdigest(), data, words))
                else:
                    skip("without a caption")
            fresh = {name: data for name, data, _ in batch_rows if name not in images}
            with decoding_pool(decoders(all_cpus())) as pool:
                decoded = dict(zip(fresh, pool.map(look, fresh.values()), strict=True))
            found = []
            for name, _, words in batch_rows:
                if name not in images:
                    pixels = decoded[name]
                    images[name] = None if isinstance(pixels, str) else kept
                    if isinstance(pixels, Tensor):
                        kept += 1
                        found.append((name, pixels))
                position = images[name]
                if position is None:
                    skip(str(decoded.get(name, "copy of an image that was left out")))
                    continue
                for text in words:
                    pair = (position, texts.setdefault(text, len(texts)))
                    if pair not in seen:
                        seen.add(pair)
                        known.pairs.append(pair)
            if found:
                yield found
    known.captions[:] = list(texts)


def recalls(
    queries: Tensor, answers: Tensor, pairs: Tensor, ks: Sequence[int] = KS, cells: int = CELLS
) -> dict[int, Score]:
    """Share of the queries that have a right answer among the k nearest by cosine.

    A wrong answer that is as near as the best right one counts as nearer: what embeds everything to one point finds
    nothing.

    Args:
        queries: [Q, d], not necessarily normalised.
        answers: [A, d].
        pairs: [P, 2] int64, (query, right answer); every query has at least one.
        ks: how many answers may be looked at.
        cells: similarities that are computed at a time.
    """
    queries, answers = F.normalize(queries.float(), dim=-1), F.normalize(answers.float(), dim=-1)
    pairs = pairs[pairs[:, 0].argsort(stable=True)]
    first = torch.searchsorted(pairs[:, 0].contiguous(), torch.arange(len(queries) + 1))
    ranks = []
    step = max(1, cells // len(answers))
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        similar = queries[start:stop] @ answers.T
        own = pairs[first[start] : first[stop]]
        right = torch.zeros_like(similar, dtype=torch.bool)
        right[own[:, 0] - start, own[:, 1]] = True
        best = similar.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        ranks.append(((similar >= best) & ~right).sum(1))
    rank = torch.cat(ranks)
    result = {}
    for k in ks:
        share = float((rank < k).double().mean())
        result[k] = Score(share, math.sqrt(share * (1 - share) / len(rank)), len(rank))
    return result
