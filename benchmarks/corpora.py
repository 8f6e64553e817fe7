"""Corpora of any number of small, different images: random crops of the packaged clip art, encoded anew."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrator.data.corpus.corpus import MANIFEST, VERSION, file_hash
from orchestrator.data.corpus.shards import SCHEMAS

PACKAGED = Path(__file__).parents[1] / "orchestrator" / "packaged" / "clipart" / "images.parquet"


def image_corpus(folder: Path, count: int, side: int, *, rows_per_shard: int = 1024, row_group: int = 256) -> Path:
    """A corpus of `count` JPEG images of `side` pixels, as `corpus build` lays it out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(side)
    sources = [
        Image.open(io.BytesIO(data)).convert("RGB")
        for data in pq.read_table(PACKAGED, columns=["image"])["image"].to_pylist()
    ]
    shards = []
    for number, start in enumerate(range(0, count, rows_per_shard)):
        rows = [_row(sources, rng, side) for _ in range(min(rows_per_shard, count - start))]
        path = folder / f"part-{number:05}.parquet"
        table = pa.Table.from_pylist(rows, schema=SCHEMAS["images"])
        pq.write_table(table, path, row_group_size=row_group, compression="none", use_dictionary=False)
        shards.append(_facts(folder, path, len(rows)))
    return _finish(folder, "images", row_group, shards)


def _row(sources: list[Image.Image], rng: np.random.Generator, side: int) -> dict[str, Any]:
    source = sources[int(rng.integers(len(sources)))]
    edge = int(rng.integers(source.width // 2, source.width + 1))
    left, top = (int(v) for v in rng.integers(0, source.width - edge + 1, 2))
    sink = io.BytesIO()
    source.resize((side, side), box=(left, top, left + edge, top + edge)).save(sink, "JPEG", quality=90)
    data = sink.getvalue()
    return {"id": hashlib.sha256(data).hexdigest(), "image": data, "height": side, "width": side, "caption": None}


def sentence_corpus(folder: Path, count: int, *, rows_per_shard: int = 1000) -> Path:
    """A corpus of `count` sentences."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, count, rows_per_shard)):
        texts = [f"a picture of thing {i}" for i in range(start, min(start + rows_per_shard, count))]
        rows = [{"id": hashlib.sha256(text.encode()).hexdigest(), "text": text} for text in texts]
        path = folder / f"part-{number:05}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS["sentences"]), path, row_group_size=rows_per_shard)
        shards.append(_facts(folder, path, len(rows)))
    return _finish(folder, "sentences", rows_per_shard, shards)


def beginning(corpus: Path, folder: Path, shards: int) -> Path:
    """A corpus of the first shards of another one, by hard links."""
    folder.mkdir(parents=True)
    manifest = json.loads((corpus / MANIFEST).read_text(encoding="utf-8"))
    for shard in manifest["shards"][:shards]:
        os.link(corpus / shard["file"], folder / shard["file"])
    return _finish(folder, manifest["kind"], manifest["row_group"], manifest["shards"][:shards])


def _facts(folder: Path, path: Path, rows: int) -> dict[str, Any]:
    return {
        "file": path.name,
        "rows": rows,
        "bytes": path.stat().st_size,
        "sha256": file_hash(str(folder), path.name),
    }


def _finish(folder: Path, kind: str, row_group: int, shards: list[dict[str, Any]]) -> Path:
    rows = sum(s["rows"] for s in shards)
    counts: dict[str, Any] = {"seen": rows, "kept": rows, "duplicates": 0}
    manifest = {
        "format": "corpus",
        "version": VERSION,
        "kind": kind,
        "rows": rows,
        "bytes": sum(s["bytes"] for s in shards),
        "row_group": row_group,
        "counts": counts | {"skipped": {}, "converted": {}, "captions": {}},
        "settings": {"source": "benchmarks/corpora.py"},
        "shards": shards,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder
