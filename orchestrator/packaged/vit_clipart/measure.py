"""What the packaged ViT is worth: linear probes on the default task, beside its truncations and its own teacher."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from orchestrator.packaged.models import efficientnet_lite0, vit_clipart
from orchestrator.packaged.vit_clipart.pictures import DATA, normalise, stack


def with_stem(model: VisionTransformer) -> VisionTransformer:
    """The model with Lite0's ImageNet weights in its stem."""
    lite0 = efficientnet_lite0().state_dict()
    backbone = model.patch_embed.backbone
    backbone.load_state_dict({name: lite0[name] for name in backbone.state_dict()}, strict=True)
    return model


def task_images() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The default task: images (n, 3, 96, 96) in [-1, 1], topic numbers (n,), split names (n,)."""
    table = pq.read_table(DATA)
    pixels = stack(Image.open(io.BytesIO(data)) for data in table["image"].to_pylist())
    images = torch.from_numpy(normalise(pixels))
    labels = np.unique(np.array(table["label"].to_pylist()), return_inverse=True)[1]
    return images, labels, np.array(table["split"].to_pylist())


@torch.inference_mode()
def pooled(model: Any, images: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Pooled features (n, width) of any timm model."""
    model.eval()
    parts = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(batch)]
    return torch.cat(parts)


def probe(
    features: torch.Tensor,
    labels: np.ndarray,
    splits: np.ndarray,
    seed: int,
    per_class: int = 20,
    decay: float = 1.0,
) -> dict[str, float]:
    """Accuracy on val and test of logistic regression on standardised features, ``per_class`` labels a topic.

    ``decay`` is the L2 penalty on the weights, summed over samples: scikit-learn's 1 / C.
    """
    rng = np.random.default_rng(seed)
    train_ids = [np.flatnonzero((labels == k) & (splits == "train")) for k in range(labels.max() + 1)]
    chosen = np.concatenate([rng.choice(ids, per_class, replace=False) for ids in train_ids])
    mean, std = features[chosen].mean(0), features[chosen].std(0) + 1e-6
    x, y = (features - mean) / std, torch.from_numpy(labels)
    weight = torch.zeros(len(train_ids), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(train_ids), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x[chosen] @ weight.T + bias, y[chosen], reduction="sum")
        loss = (loss + 0.5 * decay * weight.square().sum()) / len(chosen)
        loss.backward()
        return loss

    optimizer.step(closure)
    right = ((x @ weight.T + bias).argmax(1) == y).numpy()
    return {split: float(right[splits == split].mean()) for split in ("val", "test")}


def report(name: str, features: torch.Tensor, labels: np.ndarray, splits: np.ndarray, seeds: int, decay: float) -> None:
    """Print one line: mean and standard deviation over the label draws."""
    runs = [probe(features, labels, splits, seed, decay=decay) for seed in range(seeds)]
    cells = []
    for split in ("val", "test"):
        accuracy = [run[split] for run in runs]
        cells.append(f"{split} {np.mean(accuracy):.3f} ± {np.std(accuracy, ddof=1):.3f}")
    print(f"{name}: {', '.join(cells)}", flush=True)


def truncated(model: VisionTransformer, keep: slice) -> VisionTransformer:
    """A shallower copy with every weight but the dropped blocks'."""
    kept = list(range(len(model.blocks)))[keep]
    small = vit_clipart(depth=len(kept), pretrained=False)
    small.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}, strict=False)
    for new, old in enumerate(kept):
        small.blocks[new].load_state_dict(model.blocks[old].state_dict())
    return small


def measure(model: VisionTransformer, seeds: int, decay: float) -> None:
    """Print the probes of the model, its truncations, its random initialisation and Lite0."""
    images, labels, splits = task_images()
    torch.manual_seed(0)
    models = {
        "Lite0 at 96 px": efficientnet_lite0(),
        "vit_clipart": model,
        "blocks [0::2]": truncated(model, slice(0, None, 2)),
        "blocks [0::3]": truncated(model, slice(0, None, 3)),
        "random stem and blocks": vit_clipart(pretrained=False),
        "Lite0's stem, random blocks": with_stem(vit_clipart(pretrained=False)),
    }
    for name, candidate in models.items():
        report(name, pooled(candidate, images), labels, splits, seeds, decay)
