"""A dual encoder of kilobytes and a corpus of a hundred images, for the tests of what needs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from orchestrator.data.corpus import build_corpus

CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"},
}


def clip_folder(folder: Path) -> Path:
    """An untrained dual encoder as open_clip reads it from a folder."""
    import open_clip

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def image_corpus(folder: Path, count: int = 100, rows_per_shard: int = 40) -> Path:
    """Random pictures with captions, in three uneven shards."""
    source = folder / "pictures"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        path = source / f"{i:03}.png"
        pixels = rng.integers(0, 255, (6, 6, 3)).repeat(6, 0).repeat(7, 1).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append({"image": path.read_bytes(), "caption": f"picture number {i}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "pictures.parquet")
    source_file, made = f"parquet:{folder / 'pictures.parquet'}", folder / "images"
    build_corpus(source_file, made, "images", rows_per_shard=rows_per_shard, row_group=16, workers=2)
    return made


def sentence_corpus(folder: Path, count: int = 60) -> Path:
    """Sentences, each once."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n".join(f"a sentence about thing {i}" for i in range(count)))
    build_corpus(f"text:{folder / 'text.txt'}", folder / "sentences", "sentences", rows_per_shard=25, workers=2)
    return folder / "sentences"
