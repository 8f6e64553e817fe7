"""Side-tuning: a small network beside a frozen one, their features mixed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class SideNetwork(nn.Module):
    """[B, 3, S, S] → [B, features]: halving 3×3 convolutions, the mean over places, a linear map.

    Args:
        features: width of the result.
        width: channels of the first convolution; each further one has twice as many, at most 256.
        depth: how many convolutions.
    """

    def __init__(self, features: int, width: int, depth: int) -> None:
        super().__init__()
        channels = [3, *(min(width * 2**i, max(width, 256)) for i in range(depth))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.projection = nn.Linear(channels[-1], features)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.body(x).mean((2, 3)))


class SideTuned(nn.Module):
    """`R(x) = α · B(x) + (1 - α) · S(x)` of pooled features, then B's classifier; used like the timm network B.

    Intermediate maps and blocks are B's.

    Args:
        base: B, a timm network whose classifier is one linear map of its pooled feature.
        side: S.
        mix: the logit of α at the start.
    """

    def __init__(self, base: nn.Module, side: SideNetwork, mix: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.side = side
        self.mix = nn.Parameter(torch.tensor(float(mix)))

    @property
    def num_classes(self) -> int:
        return int(self.base.num_classes)  # type: ignore[arg-type]

    @property
    def num_features(self) -> int:
        return self.side.projection.out_features

    @property
    def feature_info(self) -> Any:
        return self.base.feature_info

    @property
    def blocks(self) -> Any:
        return self.base.blocks

    @property
    def norm(self) -> Any:
        return self.base.norm

    def get_classifier(self) -> nn.Module:
        return self.base.get_classifier()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int) -> None:
        """A new head of the base with random weights."""
        self.base.reset_classifier(num_classes)  # type: ignore[operator]

    def mixed(self, pooled: Tensor, x: Tensor) -> Tensor:
        """R of the base's pooled features [B, D] and the images."""
        alpha = torch.sigmoid(self.mix)
        return alpha * pooled + (1 - alpha) * self.side(x)

    def forward_features(self, x: Tensor) -> Tensor:
        features = self.base.forward_features(x)  # type: ignore[operator]
        return self.mixed(self.base.forward_head(features, pre_logits=True), x)  # type: ignore[operator]

    def forward_intermediates(self, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """R, and the base's intermediate maps as timm gives them."""
        final, maps = self.base.forward_intermediates(x, **options)  # type: ignore[operator]
        return self.mixed(self.base.forward_head(final, pre_logits=True), x), maps  # type: ignore[operator]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def side_tuned(network: nn.Module, features: int, width: int, depth: int) -> SideTuned:
    """The timm network `network` with a fresh side network beside it."""
    return SideTuned(network, SideNetwork(features, width, depth))
