"""A network that embeds images, with the embeddings of class names as its classifier. torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 100.0  # CLIP's logit scale


class Prototypes(nn.Module):
    """Embeddings [B, d] to `scale · cos` with one vector a class, [B, C]."""

    vectors: Tensor

    def __init__(self, classes: int, width: int, scale: float = SCALE) -> None:
        super().__init__()
        self.out_features, self.scale = classes, scale
        self.register_buffer("vectors", torch.zeros(classes, width))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.scale * F.normalize(embeddings.float(), dim=-1) @ F.normalize(self.vectors.float(), dim=-1).T


class ZeroShot(nn.Module):
    """Images [B, 3, S, S] to class scores [B, C]; `embed` gives the embeddings [B, d] that they come from."""

    def __init__(self, backbone: nn.Module, prototypes: Prototypes) -> None:
        super().__init__()
        self.backbone, self.prototypes = backbone, prototypes

    def embed(self, images: Tensor) -> Tensor:
        """[B, d], not normalised."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.prototypes(self.embed(images))

    def get_classifier(self) -> nn.Module:
        return self.prototypes


def attach(network: nn.Module, width: int, classes: int, scale: float = SCALE) -> ZeroShot:
    """A timm network with a new head of `width` outputs, under `classes` prototypes that are still 0."""
    network.reset_classifier(width)  # type: ignore[operator]
    return ZeroShot(network, Prototypes(classes, width, scale))
