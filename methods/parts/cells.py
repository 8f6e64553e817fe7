"""A small convolutional network of chosen blocks: what an architecture search deploys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

CHOICES = ("conv3x3", "dw5x5", "inverted", "skip")


def operation(choice: str, width: int) -> nn.Module:
    """One block [B, width, h, w] → [B, width, h, w], named as in `CHOICES`."""
    if choice == "conv3x3":
        return _conv(width, width, 3)
    if choice == "dw5x5":
        return nn.Sequential(_conv(width, width, 5, groups=width), _conv(width, width, 1))
    if choice == "inverted":
        return InvertedBottleneck(width)
    if choice == "skip":
        return nn.Identity()
    raise ValueError(f"There is no block {choice!r}; allowed: {', '.join(CHOICES)}.")


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class InvertedBottleneck(nn.Module):
    """x + a linear bottleneck: expanded threefold, 3×3 depthwise, projected."""

    def __init__(self, width: int, expansion: int = 3) -> None:
        super().__init__()
        hidden = expansion * width
        self.body = nn.Sequential(
            _conv(width, hidden, 1), _conv(hidden, hidden, 3, groups=hidden), _conv(hidden, width, 1, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class CellNetwork(nn.Module):
    """Stem, then stages of a halving convolution and equally wide blocks, then a linear head on the mean.

    Used like a timm network: `forward_features` [B, 3, S, S] → [B, D, S / 2^(stages + 1), …], `forward_head`,
    `get_classifier`, `reset_classifier`, `num_features` (D), `num_classes`.

    Args:
        choices: the blocks, first stage first; as many in each stage.
        stages: how often the map is halved after the stem.
        width: channels of the first stage; doubled in each further one.
        num_classes: of the head; 0 for none.
    """

    def __init__(self, choices: Sequence[str], stages: int, width: int, num_classes: int) -> None:
        super().__init__()
        if not choices or len(choices) % stages:
            raise ValueError(f"{len(choices)} blocks cannot be dealt out evenly to {stages} stages.")
        self.per_stage = len(choices) // stages
        self.widths = [width * 2 ** (i // self.per_stage) for i in range(len(choices))]
        self.stem = _conv(3, width, 3, stride=2)
        starts = [width, *self.widths[:: self.per_stage]]
        self.halvings = nn.ModuleList(_conv(a, b, 3, stride=2) for a, b in pairwise(starts))
        self.cells = nn.ModuleList(operation(c, w) for c, w in zip(choices, self.widths, strict=True))
        self.num_features = self.widths[-1]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head with random weights."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def cell(self, index: int, x: Tensor) -> Tensor:
        """The output of one block."""
        return self.cells[index](x)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in range(len(self.cells)):
            if index % self.per_stage == 0:
                x = self.halvings[index // self.per_stage](x)
            x = self.cell(index, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = torch.flatten(x.mean((2, 3)), 1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def cell_network(network: nn.Module, choices: Sequence[str], stages: int, width: int) -> CellNetwork:
    """A `CellNetwork` with as many classes as `network` has; nothing else of `network` is used."""
    return CellNetwork(choices, stages, width, int(network.num_classes))  # type: ignore[arg-type]
