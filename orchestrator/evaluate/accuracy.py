"""What the deployed student scores: one protocol, whatever the method."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from methods.heads import fit_linear_head_cv
from methods.outputs import Output, read_outputs
from orchestrator.data.pixels import Pixels
from orchestrator.data.task import Split
from orchestrator.models.load import Preprocessing

BATCH = 128
POOLED = Output("pooled")


@torch.inference_mode()
def _over(network: nn.Module, preprocessing: Preprocessing, pixels: Pixels, rows: np.ndarray, pooled: bool) -> Tensor:
    network.eval()
    device = next(network.parameters()).device
    results = []
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        images = preprocessing.normalise(pixels.batch(chunk, np.zeros(len(chunk), dtype=np.int64)).to(device))
        results.append(
            (read_outputs(network, images, [POOLED])[POOLED.key] if pooled else network(images)).float().cpu()
        )
    return torch.cat(results)


def pooled_features(network: nn.Module, preprocessing: Preprocessing, pixels: Pixels, rows: np.ndarray) -> Tensor:
    """[n, D] pooled features of the images `rows` (view 0)."""
    return _over(network, preprocessing, pixels, rows, pooled=True)


def accuracy(network: nn.Module, preprocessing: Preprocessing, pixels: Pixels, split: Split) -> float:
    """Share of `split` (view 0) whose largest logit is its label."""
    logits = _over(network, preprocessing, pixels, np.arange(len(split)), pooled=False)
    return float((logits.argmax(1) == torch.tensor(split.labels)).float().mean())


def probe_head(
    network: nn.Module, preprocessing: Preprocessing, pixels: Pixels, rows: np.ndarray, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """The common probe: (weight [C, D], bias [C]) of a logistic regression on the frozen pooled features of `rows`."""
    features = pooled_features(network, preprocessing, pixels, rows)
    return fit_linear_head_cv(features, labels, classes)
