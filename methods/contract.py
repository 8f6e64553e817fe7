"""The contract between a method and whatever runs it: plain PyTorch, no Ray, no file system.

A method is a chain of stages. A stage is built from its own slice of the configuration and from the
results of earlier stages, and can read nothing else: `Given` refuses what the stage did not declare.
That is why a stage's key in the store can be computed from the declaration alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.knobs import MethodConfig
from methods.outputs import Output

Images = Literal["labelled", "all"]
Source = Literal["teacher", "student", "labels"]


@dataclass(frozen=True)
class NetworkInfo:
    """What planning may know of a network; no weights.

    Attributes:
        name: as in the sweep file, e.g. `timm/vit_base_patch16_224`.
        kind: `vit` (uniform transformer blocks, class or pooled token), `cnn`, or `other`.
        width: channels of the pooled feature.
        blocks: number of transformer blocks; 0 where there are none.
        channels: of each intermediate map.
        image_size: side of the square input, in pixels.
        pretrained: whether its weights come from pre-training.
    """

    name: str
    kind: Literal["vit", "cnn", "other"]
    width: int
    blocks: int
    channels: tuple[int, ...]
    image_size: int
    pretrained: bool

    @property
    def intermediates(self) -> int:
        """Number of places an intermediate map can be read (`Output(kind="map", layer=i)`)."""
        return len(self.channels)


@dataclass(frozen=True)
class TaskInfo:
    """What planning may know of the user's data: counts, never pixels or labels."""

    kind: Literal["classification"]
    num_classes: int
    labelled: int
    unlabelled: int


@dataclass(frozen=True)
class Setting:
    """One cell of the search: the task with one teacher and one student (None where the method has none)."""

    task: TaskInfo
    teacher: NetworkInfo | None
    student: NetworkInfo | None


@dataclass
class Batch:
    """What `Learner.loss` sees.

    Attributes:
        images: [B, 3, S, S] float, normalised as the trained network expects.
        labels: [B] int64, -1 where the image has none; None if the stage did not ask for labels.
        outputs: teacher outputs by `Output.key`, rows aligned with `images` (same image, same view). Whether they
            were stored or computed just now cannot be told.
    """

    images: Tensor
    labels: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Feed:
    """What a training stage reads in each step.

    Attributes:
        images: `labelled` for the few labelled images, `all` for every training image.
        labels: whether the batch carries labels. False makes the stage unsupervised: labels are not in its key.
        labelled_fraction: with `images="all"` and labels, the share of each batch drawn from labelled images.
        outputs: teacher outputs to attach.
    """

    images: Images = "all"
    labels: bool = False
    labelled_fraction: float = 0.25
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How a training stage is optimised.

    Attributes:
        lr: peak learning rate.
        weight_decay: applied to tensors of two or more dimensions only.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        betas: AdamW's betas.
        warmup: share of the steps with a linear rise, before half a cosine to 0.
        budget: share of the sweep's `train.steps` that this stage takes.
        clip: largest gradient norm; None for no clipping.
    """

    lr: float
    weight_decay: float = 0.05
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.1
    budget: float = 1.0
    clip: float | None = None


@dataclass(frozen=True)
class Deployed:
    """A plain network to deploy.

    Attributes:
        network: adapters merged, wrappers gone; loads without this package.
        base: which network's architecture it has.
        changes: constructor arguments that differ from the base's, e.g. `{"depth": 6}`; never `num_classes`.
    """

    network: nn.Module
    base: Literal["teacher", "student"]
    changes: Mapping[str, Any] = field(default_factory=dict)


class UndeclaredInputError(LookupError):
    """A stage asked for something that its declaration does not name."""


class Given:
    """What a stage may read: exactly what it declared.

    Args:
        values: `teacher`, `student` (fresh copies, safe to change), `labels` ([n] int64).
        results: tensors of earlier stages by stage name.
        outputs: for a `FitStage`, teacher outputs by `Output.key`, view 0, one row an image: [n, ...].
        num_classes: of the task.
    """

    def __init__(
        self,
        *,
        values: Mapping[str, Any],
        num_classes: int,
        results: Mapping[str, Mapping[str, Tensor]] | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._values = dict(values)
        self._results = dict(results or {})
        self._outputs = dict(outputs or {})
        self.num_classes = num_classes

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise UndeclaredInputError(f"The stage reads {name!r} but does not declare it in `reads`.")
        return self._values[name]

    @property
    def teacher(self) -> nn.Module:
        """A fresh copy of the teacher with its pre-trained weights."""
        return self._value("teacher")

    @property
    def student(self) -> nn.Module:
        """A fresh student with `num_classes` outputs."""
        return self._value("student")

    @property
    def labels(self) -> Tensor:
        """[n] int64 labels of the labelled images, aligned with `output()`."""
        return self._value("labels")

    def output(self, output: Output) -> Tensor:
        """[n, ...] a teacher output on the images of a `FitStage`."""
        if output.key not in self._outputs:
            raise UndeclaredInputError(f"The stage reads the output {output.key!r} but does not declare it.")
        return self._outputs[output.key]

    def result(self, stage: str) -> Mapping[str, Tensor]:
        """The tensors that an earlier stage published."""
        if stage not in self._results:
            raise UndeclaredInputError(f"The stage reads the result of {stage!r} but does not name it in `inputs`.")
        return self._results[stage]


class Learner(nn.Module, ABC):
    """What a training stage trains; the loop calls it as `learner(batch, progress)`.

    Subclasses take `(params, given)`, set `self.student`, and freeze what must not move with
    `requires_grad_(False)`. Whatever is frozen stays in evaluation mode: see `frozen`.
    """

    student: nn.Module

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


@dataclass(frozen=True, kw_only=True)
class FitStage:
    """A small solve on stored teacher outputs (view 0), without a training loop.

    Attributes:
        name: unique within the method.
        version: raise it whenever the code of `fit` changes what it computes.
        fit: module-level function `(params, given) -> {name: tensor}`; deterministic.
        params: its slice of the configuration; plain JSON values.
        outputs: teacher outputs that it reads.
        images: on which images.
        reads: `labels`, if it needs them (then `images` must be `labelled`).
        inputs: names of earlier stages whose results it reads.
    """

    name: str
    version: int
    fit: Callable[[Mapping[str, Any], Given], dict[str, Tensor]]
    params: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    images: Images = "labelled"
    reads: tuple[Source, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """A stage that trains weights with the one training loop.

    Attributes:
        name: unique within the method.
        version: raise it whenever the code of the learner changes what it computes.
        learner: a module-level `Learner` class.
        params: its slice of the configuration; plain JSON values.
        feed: what each step reads.
        recipe: how it is optimised.
        trains: whose preprocessing and size the batch's images follow.
        reads: `teacher` and/or `student`, if the learner is built from them.
        inputs: names of earlier stages whose results it reads.
    """

    name: str
    version: int
    learner: type[Learner]
    params: Mapping[str, Any] = field(default_factory=dict)
    feed: Feed
    recipe: Recipe
    trains: Literal["teacher", "student"]
    reads: tuple[Source, ...] = ()
    inputs: tuple[str, ...] = ()


Stage = FitStage | TrainStage


class Method(ABC):
    """One way to move knowledge from a teacher to a student. One file in `methods/`, found by itself.

    Class attributes:
        name: as in the sweep file.
        family: one of the survey's families (`fine-tuning`, `prompt`, `adapter`, `parameter`, `remapping`).
        paper: the reference in one line.
        Config: its knobs.
        uses_teacher: whether it reads a teacher.
        deploys: which architecture is deployed: a `student` of the sweep file, or one derived from the `teacher`.
        needs_labels: whether a stage of its own trains on labels.
        trains_head: False if the deployed network's head is not trained by a stage: the common probe then fits it.
        teacher_kinds: kinds of teacher that it can serve.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    uses_teacher: ClassVar[bool] = True
    deploys: ClassVar[Literal["teacher", "student"]] = "student"
    needs_labels: ClassVar[bool] = True
    trains_head: ClassVar[bool] = True
    teacher_kinds: ClassVar[tuple[str, ...]] = ("vit", "cnn", "other")

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        """Why this method cannot serve this task, teacher and student; None if it can."""
        teacher = setting.teacher
        if cls.uses_teacher and teacher is not None and teacher.kind not in cls.teacher_kinds:
            kinds = " or ".join(cls.teacher_kinds)
            return f"{cls.name} needs a {kinds} teacher, and {teacher.name} is of kind {teacher.kind}"
        return None

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        """Why this configuration cannot run in this setting (e.g. more blocks kept than there are); None if it can."""
        return None

    @classmethod
    @abstractmethod
    def stages(cls, config: Any, setting: Setting) -> list[Stage]:
        """The stages in order. The last `TrainStage` delivers the network; none delivers the base as it is."""


def trainable_parameters(module: nn.Module) -> int:
    """Number of scalars that an optimiser may move."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def freeze(module: nn.Module) -> nn.Module:
    """Takes every parameter out of training and puts the module in evaluation mode; returns it."""
    module.requires_grad_(False)
    return module.eval()


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the rows that have a label (label >= 0); 0 with a graph where no row has one."""
    known = labels >= 0
    if not bool(known.any()):
        return logits.sum() * 0.0
    return torch.nn.functional.cross_entropy(logits[known], labels[known])
