"""What the dual encoder can do on the held-out designer: retrieval by name, and zero-shot classes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional as F

from orchestrator.packaged.clip_icons.classes import CLASSES
from orchestrator.packaged.clip_icons.data import LABELLED, RETRIEVAL
from orchestrator.packaged.clip_icons.sentences import TEMPLATES

BATCH = 256
Tokenizer = Callable[[list[str]], torch.Tensor]


def images_of(column: Sequence[bytes], side: int = 64) -> torch.Tensor:
    """Encoded pictures as (n, 3, side, side) in [-1, 1]: mean = std = 0.5, bicubic, as the model's own transform."""
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in column]
    pictures = [p if p.size == (side, side) else p.resize((side, side), Image.Resampling.BICUBIC) for p in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


@torch.inference_mode()
def image_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """(n, width), each of length 1."""
    return torch.cat([model.encode_image(part, normalize=True) for part in images.split(BATCH)])


@torch.inference_mode()
def text_features(model: Any, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """(n, width), each of length 1."""
    ids = tokenizer(texts)
    return torch.cat([model.encode_text(part, normalize=True) for part in ids.split(BATCH)])


def class_features(
    model: Any, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> torch.Tensor:
    """One vector for each class, (n, width): the normalised mean of its prompts' vectors."""
    prompts = [template.format(name) for name in names for template in templates]
    features = text_features(model, tokenizer, prompts)
    return F.normalize(features.view(len(names), len(templates), -1).mean(1), dim=-1)


def recall(images: torch.Tensor, texts: torch.Tensor, names: Sequence[str], k: int) -> float:
    """Share of images whose own name is among the k nearest; equal names count as one."""
    unique = list(dict.fromkeys(names))
    position = {name: i for i, name in enumerate(unique)}
    first = torch.tensor([names.index(name) for name in unique])
    own = torch.tensor([position[name] for name in names])
    nearest = (images @ texts[first].T).topk(k, dim=1).indices
    return (nearest == own[:, None]).any(1).float().mean().item()


def retrieval(model: Any, tokenizer: Tokenizer, split: str, path: Path = RETRIEVAL) -> dict[str, float]:
    """`names`, and image-to-name recall at 1 and 10 among the split's names."""
    rows = pq.read_table(path, filters=[("split", "=", split)]).to_pydict()
    images = image_features(model, images_of(rows["image"]))
    texts = text_features(model, tokenizer, rows["caption"])
    recalls = {f"R@{k}": round(recall(images, texts, rows["caption"], k), 4) for k in (1, 10)}
    return {"names": len(set(rows["caption"])), **recalls}


def zero_shot(model: Any, tokenizer: Tokenizer, split: str, path: Path = LABELLED) -> dict[str, float]:
    """`classes`, `images`, accuracy, and its mean over classes."""
    rows = pq.read_table(path, filters=[("split", "=", split)]).to_pydict()
    names = list(CLASSES)
    labels = torch.tensor([names.index(label) for label in rows["label"]])
    prototypes = class_features(model, tokenizer, names)
    right = (image_features(model, images_of(rows["image"])) @ prototypes.T).argmax(1) == labels
    per_class = [right[labels == k].float().mean().item() for k in range(len(names))]
    return {
        "classes": len(names),
        "images": len(labels),
        "accuracy": round(right.float().mean().item(), 4),
        "mean over classes": round(float(np.mean(per_class)), 4),
    }


def clipart_topics(model: Any, tokenizer: Tokenizer, split: str) -> dict[str, float]:
    """Zero-shot on the packaged clip art: drawings in colour, topics instead of things, so far from the training."""
    path = LABELLED.parents[1] / "clipart" / "images.parquet"
    rows = pq.read_table(path, filters=[("split", "=", split)]).to_pydict()
    names = sorted(set(rows["label"]))
    labels = torch.tensor([names.index(label) for label in rows["label"]])
    scores = image_features(model, images_of(rows["image"])) @ class_features(model, tokenizer, names).T
    return {
        "classes": len(names),
        "images": len(labels),
        "accuracy": round((scores.argmax(1) == labels).float().mean().item(), 4),
        "largest class": round(labels.bincount().max().item() / len(labels), 4),
    }


def everything(model: Any, tokenizer: Tokenizer) -> dict[str, dict[str, dict[str, float]]]:
    """All of the above on val and test."""
    tasks = {"retrieval": retrieval, "zero-shot": zero_shot, "clipart topics": clipart_topics}
    return {
        task: {split: measure(model, tokenizer, split) for split in ("val", "test")} for task, measure in tasks.items()
    }
