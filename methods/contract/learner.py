"""What a training stage trains, the batch that it sees, and the network that it leaves to be deployed."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from methods.contract.given import Given

MAGNITUDE = "lora_magnitude_vector"  # peft's name of a vector that has four dimensions where a convolution is adapted


@dataclass
class Batch:
    """What `Learner.loss` sees.

    Attributes:
        images: [B, 3, S, S] float, normalised as the trained network expects.
        labels: None if the stage did not ask for labels. Classification: [B] int64, -1 where the image has none.
            Multi-label: [B, C] float32 of 0 and 1, -1 in rows without labels. Segmentation: [B, S, S] int64, 255
            where a pixel does not count (everywhere in an image without a mask).
        outputs: teacher outputs by `Output.key`, rows aligned with `images` (same image, same view). Whether they
            were stored or computed just now cannot be told.
        teacher_images: [B, 3, T, T] the same views as the teacher expects them, if the stage's feed asks for them.
        generated: rows of a generated pool, without labels, if the stage's feed names one.
        texts: [M, d] float32 teacher embeddings of texts, not normalised, if the stage's feed asks for them. They are
            of no image in particular, and the same ones on all ranks.
        captions: [B, d] float32 the same of each image's own caption, if the stage's feed asks for them.
    """

    images: Tensor
    labels: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    teacher_images: Tensor | None = None
    generated: Batch | None = None
    texts: Tensor | None = None
    captions: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Structure:
    """How to get a network's modules from its base's, where constructor arguments do not suffice.

    Attributes:
        build: `module:function`, called as `function(base_network, **arguments)`; returns the network with fresh
            weights of the right shapes. The module lies in `methods/parts/` (or in a package of the method's author)
            and imports torch and timm only: an export carries a copy of it.
        arguments: plain JSON values.
    """

    build: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, network: nn.Module) -> nn.Module:
        """The network with its new modules; `network` itself may be changed."""
        module, _, function = self.build.partition(":")
        return getattr(importlib.import_module(module), function)(network, **self.arguments)


@dataclass(frozen=True)
class Deployed:
    """A plain network to deploy.

    Attributes:
        network: adapters merged, wrappers gone; loads without this package.
        base: which network's architecture it has.
        changes: constructor arguments that differ from the base's, e.g. `{"depth": 6}`; never `num_classes`.
        structure: what is then done to the base to get the network's modules; None where nothing is.
    """

    network: nn.Module
    base: Literal["teacher", "student"]
    changes: Mapping[str, Any] = field(default_factory=dict)
    structure: Structure | None = None


class Learner(nn.Module, ABC):
    """What a training stage trains; the loop calls it as `learner(batch, progress)`.

    Subclasses take `(params, given)`, set `self.student`, and freeze what must not move with
    `requires_grad_(False)`. Whatever is frozen stays in evaluation mode: see `frozen`.

    Attributes:
        student: the network that is deployed.
        steady: whether every loss reaches the same parameters, whatever the batch, its labels and the progress; then
            the workers of a group need not look for those that a step has left out.
    """

    student: nn.Module
    steady: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__()

    @abstractmethod
    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The loss of one batch: `"loss"` (required, a scalar with a graph) and named parts to log.

        Args:
            batch: see `Batch`.
            progress: share of the stage that is done, in [0, 1).
        """

    @abstractmethod
    def deployed(self) -> Deployed:
        """The network to deploy, as a plain module. Called once, after training."""

    def tensors(self) -> dict[str, Tensor]:
        """What a stage that publishes tensors leaves for later stages. Called once, after training."""
        return {}

    def facts(self) -> dict[str, float]:
        """Numbers that the stage found and that belong into the trial's row. Called once, after training."""
        return {}

    def lr_scale(self, name: str) -> float:
        """Factor on the recipe's learning rate for the parameter `name`."""
        return 1.0

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the recipe's weight decay acts on this parameter: on tensors of two or more dimensions.

        But not on those that a network exempts in its own `no_weight_decay()`, as timm's transformers do their class
        token, positional embedding and relative position bias; and not on DoRA's magnitudes.
        """
        return parameter.ndim >= 2 and MAGNITUDE not in name and not self._exempts(name)

    def _exempts(self, name: str) -> bool:
        """Whether a module that holds the parameter `name` lists it, by its name there, in `no_weight_decay()`."""
        parts = name.split(".")
        for i in range(1, len(parts)):
            listed = getattr(self.get_submodule(".".join(parts[:i])), "no_weight_decay", None)
            if listed is not None and ".".join(parts[i:]) in listed():
                return True
        return False

    def frozen(self) -> list[nn.Module]:
        """Modules that stay in evaluation mode while training (batch norm, dropout, drop path)."""
        return []

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.loss(batch, progress)

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        for module in self.frozen():
            module.eval()
        return self


def trainable_parameters(module: nn.Module) -> int:
    """Number of scalars that an optimiser may move."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def freeze(module: nn.Module) -> nn.Module:
    """Takes every parameter out of training and puts the module in evaluation mode; returns it."""
    module.requires_grad_(False)
    return module.eval()
