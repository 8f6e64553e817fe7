"""The common probe: what reads the classes off a network that its method left without a head, the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import Kind
from methods.dense import fit_conv_decoder, linear_decoder
from methods.heads import fit_dense_head, fit_linear_head_cv, head_output, load_head
from methods.outputs import Output, read_outputs
from methods.parts.dense import ConvDecoder, LinearDecoder, Segmenter
from orchestrator.data.labels import Labels
from orchestrator.data.pixels import Pixels
from orchestrator.evaluate.forward import forward, whole_float32
from orchestrator.models.load import Preprocessing

BATCH = 64
MAPS = 1024  # images whose maps a decoder is fitted on, at most


class _WithHead(nn.Module):
    """A network's pooled feature under a linear head; the network itself is left as it is."""

    def __init__(self, network: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.network = network
        self.weight, self.bias = weight, bias

    def forward(self, images: Tensor) -> Tensor:
        output = head_output("classification")
        pooled = read_outputs(self.network, images, [output])[output.key].float()
        return F.linear(pooled, self.weight.to(pooled.device), self.bias.to(pooled.device))


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        weight, bias: [C, D] and [C] of a head on the pooled feature; or
        decoder: of the network's map.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    decoder: LinearDecoder | ConvDecoder | None = None

    def over(self, network: nn.Module) -> nn.Module:
        """`network` under the probe: images to logits. The network is not changed."""
        if self.decoder is not None:
            return Segmenter(network, self.decoder)
        assert self.weight is not None
        assert self.bias is not None
        return _WithHead(network, self.weight, self.bias)

    def attached(self, network: nn.Module) -> nn.Module:
        """`network` with the probe in its classifier's place, to be deployed."""
        if self.decoder is not None:
            network.reset_classifier(0)  # type: ignore[operator]
            return Segmenter(network, self.decoder).eval()
        assert self.weight is not None
        assert self.bias is not None
        return load_head(network, self.weight, self.bias).eval()

    @property
    def parameters(self) -> int:
        """Scalars that were fitted."""
        if self.decoder is not None:
            return sum(p.numel() for p in self.decoder.parameters())
        assert self.weight is not None
        assert self.bias is not None
        return self.weight.numel() + self.bias.numel()


@torch.no_grad()
def read_images(
    network: nn.Module, preprocessing: Preprocessing, pixels: Pixels, rows: np.ndarray, output: Output
) -> Tensor:
    """[n, ...] float32 one output of a network in evaluation mode on the images `rows` (view 0)."""
    network.eval()
    device = next(network.parameters()).device
    results = []

    def read(images: Tensor) -> Tensor:
        return read_outputs(network, images, [output])[output.key].float()

    with whole_float32():
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            images = pixels.batch(chunk, np.zeros(len(chunk), dtype=np.int64))
            results.append(forward(read, preprocessing, images, device).cpu())
    return torch.cat(results)


def fit_probe(
    network: nn.Module,
    preprocessing: Preprocessing,
    pixels: Pixels,
    labels: Labels,
    rows: np.ndarray,
    kind: Kind,
    num_classes: int,
    decoder: Literal["linear", "conv"] = "linear",
) -> Probe:
    """Fits the probe on the labelled images `rows` as they are (view 0); deterministic.

    A logistic regression on the pooled feature. For segmentation one on the map, or a convolutional decoder that is
    trained on it for a fixed number of steps; on at most 1,024 of the images.

    Args:
        network: frozen, in the device where it is; with or without a head of its own.
        preprocessing: its own.
        pixels, labels: of the split that `rows` are of.
        rows: labelled.
        kind, num_classes: of the task.
        decoder: for segmentation.
    """
    if kind == "segmentation" and len(rows) > MAPS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MAPS])
    features = read_images(network, preprocessing, pixels, rows, head_output(kind))
    known = labels.batch(rows, np.zeros(len(rows), dtype=np.int64))
    device = next(network.parameters()).device
    if kind != "segmentation":
        weight, bias = fit_linear_head_cv(features, known, num_classes)
        return Probe(weight, bias)
    if decoder == "linear":
        fitted: LinearDecoder | ConvDecoder = linear_decoder(*fit_dense_head(features, known, num_classes))
    else:
        fitted = fit_conv_decoder(features.to(device), known.to(device), num_classes)
    return Probe(decoder=fitted.to(device))
