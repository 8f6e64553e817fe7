"""The contract between a method and whatever runs it: plain PyTorch, no Ray, no file system.

A method is a chain of stages. A stage is built from its own slice of the configuration and from the
results of earlier stages, and can read nothing else: `Given` refuses what the stage did not declare.
That is why a stage's key in the store can be computed from the declaration alone.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from methods.knobs import MethodConfig
from methods.outputs import Output
from methods.ranks import weight_of

Images = Literal["labelled", "all", "corpus", "none"]
Kind = Literal["classification", "multilabel", "segmentation"]
Source = Literal["teacher", "student", "labels", "vq", "diffusion", "pipeline", "sentences", "prompts", "captions"]
Texts = Literal["sentences", "prompts", "captions"]
TEACHER = "teacher"
IGNORE = 255  # a pixel that has no class


@dataclass(frozen=True)
class NetworkInfo:
    """What planning may know of a network; no weights.

    Attributes:
        name: as in the sweep file, e.g. `timm/vit_base_patch16_224`.
        kind: `vit` (uniform transformer blocks, class or pooled token), `cnn`, `clip` (an image tower with a text
            tower beside it), or `other`.
        width: channels of the pooled feature.
        blocks: number of transformer blocks; 0 where there are none.
        channels: of each intermediate map.
        image_size: side of the square input, in pixels.
        pretrained: whether its weights come from pre-training.
        embedding: width of the space that a `clip` network's images and texts share; 0 of any other kind.
        vocabulary, context: how many numbers its tokenizer knows, and how many a text takes; 0 of any other kind.
        skeleton: its modules, whatever their weights (on the meta device where that can be); never to be changed.
    """

    name: str
    kind: Literal["vit", "cnn", "clip", "other"]
    width: int
    blocks: int
    channels: tuple[int, ...]
    image_size: int
    pretrained: bool
    embedding: int = 0
    vocabulary: int = 0
    context: int = 0
    skeleton: nn.Module | None = field(default=None, compare=False, repr=False)

    @property
    def intermediates(self) -> int:
        """Number of places an intermediate map can be read (`Output(kind="map", layer=i)`)."""
        return len(self.channels)


@dataclass(frozen=True)
class TaskInfo:
    """What planning may know of the user's data: counts, never pixels or labels.

    Attributes:
        kind: one label an image, several, or one a pixel.
        num_classes: of the label space.
        labelled, unlabelled: training images.
        upstream: which upstream generators the sweep file brings: of `vq`, `diffusion`, `pipeline`.
        texts: which texts there are: of `prompts` (of the class names), `sentences`, `captions` (of the corpus).
        streamed: whether the corpus's images are streamed; else they are the training images.
        batch: images of a step, over all workers.
    """

    kind: Kind
    num_classes: int
    labelled: int
    unlabelled: int
    upstream: tuple[str, ...] = ()
    texts: tuple[Texts, ...] = ("prompts",)
    streamed: bool = False
    batch: int = 64


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
class Feed:
    """What a training stage reads in each step.

    Attributes:
        images: `labelled` for the few labelled images, `all` for every training image, `corpus` for the images of the
            sweep file's corpus (streamed), or every training image where it has none; `none` where only texts are read
            (`tokens`).
        labels: whether the batch carries labels. False makes the stage unsupervised: labels are not in its key.
        labelled_fraction: with `images="all"` and labels, the share of each batch drawn from labelled images.
        outputs: teacher outputs to attach to the images.
        plain: attach those of view 0, whatever view of an image the student sees. What is streamed is always so.
        of: whose outputs: the teacher's, or those of the network that the named earlier training stage made of it.
        teacher_images: attach the views as the teacher expects them, for a learner that runs the teacher itself.
        pool: an earlier `ImageStage` whose images come along in `Batch.generated`.
        pool_outputs: teacher outputs to attach to these; the same teacher's.
        pool_size: the first so many images of the pool are drawn from.
        pool_ratio: generated rows for each real one.
        texts: which texts come along, in an order of their own; "" for none.
        text_rows: an earlier `FitStage` whose tensor `rows` says which of these texts; "" for all of them.
        text_batch: how many texts a step; 0 for as many as images.
        captions: attach the embedding of each image's own caption. Only a corpus has captions.
        tokens: instead of images, these texts, all together in one order: as tokens, with the teacher's embeddings.
    """

    images: Images = "all"
    labels: bool = False
    labelled_fraction: float = 0.25
    outputs: tuple[Output, ...] = ()
    plain: bool = False
    of: str = TEACHER
    teacher_images: bool = False
    pool: str = ""
    pool_outputs: tuple[Output, ...] = ()
    pool_size: int = 0
    pool_ratio: float = 1.0
    texts: Texts | Literal[""] = ""
    text_rows: str = ""
    text_batch: int = 0
    captions: bool = False
    tokens: tuple[Texts, ...] = ()


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


class Table(Protocol):
    """Rows of numbers that need not fit into memory."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        ...

    def rows(self, indices: Any) -> Tensor:
        """[n, ...] the rows at these positions."""
        ...


class UndeclaredInputError(LookupError):
    """A stage asked for something that its declaration does not name."""


class Given:
    """What a stage may read: exactly what it declared.

    Args:
        values: `teacher`, `student` (fresh copies, safe to change), `labels` ([n] int64).
        results: tensors of earlier stages by stage name.
        outputs: for a `FitStage`, teacher outputs by `Output.key`, view 0, one row an image: [n, ...]; a `Table` of
            them where `images` is `corpus`.
        num_classes: of the task.
        kind: of the task.
    """

    def __init__(
        self,
        *,
        values: Mapping[str, Any],
        num_classes: int,
        results: Mapping[str, Mapping[str, Tensor]] | None = None,
        outputs: Mapping[str, Any] | None = None,
        kind: Kind = "classification",
    ) -> None:
        self._values = dict(values)
        self._results = dict(results or {})
        self._outputs = dict(outputs or {})
        self.num_classes = num_classes
        self.kind: Kind = kind

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
        """Labels of the labelled images, aligned with `output()`; shapes as in `Batch.labels`."""
        return self._value("labels")

    def upstream(self, name: Literal["vq", "diffusion", "pipeline"]) -> Any:
        """A generator that was trained upstream, as the sweep file names it under `upstream`."""
        return self._value(name)

    def output(self, output: Output) -> Tensor:
        """[n, ...] a teacher output on the images of a `FitStage`."""
        if output.key not in self._outputs:
            raise UndeclaredInputError(f"The stage reads the output {output.key!r} but does not declare it.")
        return self._outputs[output.key]

    def table(self, output: Output) -> Table:
        """[n, ...] a teacher output on the images of a `FitStage` over the corpus."""
        return self.output(output)  # type: ignore[return-value]

    def texts(self, name: Texts) -> Table:
        """[n, d] the teacher's embeddings of texts, not normalised; of `prompts` class by class, then templates."""
        return self._value(name)

    def result(self, stage: str) -> Mapping[str, Tensor]:
        """The tensors that an earlier stage published."""
        if stage not in self._results:
            raise UndeclaredInputError(f"The stage reads the result of {stage!r} but does not name it in `inputs`.")
        return self._results[stage]


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
        """Whether the recipe's weight decay acts on this parameter: on tensors of two or more dimensions."""
        return parameter.ndim >= 2

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
        of: whose outputs, as in `Feed.of`.
        images: on which images.
        pool: instead of the images themselves, what the named earlier `ImageStage` made of them, one of each.
        reads: `labels`, if it needs them (then `images` must be `labelled`).
        inputs: names of earlier stages whose results it reads.
    """

    name: str
    version: int
    fit: Callable[[Mapping[str, Any], Given], dict[str, Tensor]]
    params: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Output, ...] = ()
    of: str = TEACHER
    images: Images = "labelled"
    pool: str = ""
    reads: tuple[Source, ...] = ()
    inputs: tuple[str, ...] = ()


class Maker(ABC):
    """Makes images from images. Picklable or built anew in each process from `(params, given)`."""

    @abstractmethod
    def __init__(self, params: Mapping[str, Any], given: Given) -> None: ...

    @abstractmethod
    def __call__(self, sources: Tensor, seeds: Sequence[int]) -> Tensor:
        """One image for each source.

        Args:
            sources: [B, 3, S, S] float in [-1, 1].
            seeds: [B] what each image is drawn from; the same seed and source give the same image in any batch.

        Returns:
            [B, 3, S, S] float in [-1, 1].
        """


@dataclass(frozen=True, kw_only=True)
class ImageStage:
    """A stage whose result is a pool of images made from training images (view 0), without labels.

    Image i is made from source `i % n`, n the number of sources, with a seed drawn from the trial's seed and i. The
    pool is kept in shards, and `count` is in no key: a smaller pool is the beginning of a bigger one.

    Attributes:
        name: unique within the method.
        version: raise it whenever the code of the maker changes what it computes.
        maker: a module-level `Maker` class.
        params: its slice of the configuration; plain JSON values.
        count: images that are wanted; 0 for one of each source.
        size: side of sources and images, in pixels.
        images: which training images are the sources.
        seeded: False for a maker that draws nothing: the seed is then not in the key.
        reads: `vq`, `diffusion` or `pipeline`: the upstream generators that it is built from.
        inputs: names of earlier stages whose results it reads.
    """

    name: str
    version: int
    maker: type[Maker]
    params: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    size: int
    images: Images = "labelled"
    seeded: bool = True
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
        publishes: a `network` (`Learner.deployed`), `tensors` (`Learner.tensors`) for later stages only, or `texts`:
            the tensors of a `methods.parts.text_tower.TextTower` of `params["tower"]`, which embeds the class names in
            the teacher's place and is deployed beside the network.
        live_teacher: whether the learner runs the pre-trained teacher on every image it sees; its row counts these.
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
    publishes: Literal["network", "tensors", "texts"] = "network"
    live_teacher: bool = False


Stage = FitStage | ImageStage | TrainStage


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
        zero_shot: the deployed network embeds images into the teacher's space, and classes are told by the teacher's
            embeddings of their names. It needs no label.
        teacher_kinds: kinds of teacher that it can serve.
        tasks: kinds of task that it can serve.
        upstream: upstream generators without which it cannot run at all.
        deployed_size: whether what is deployed has the `base`'s own architecture (with the task's head), all of it and
            something more (`larger`), or one of its `own`. What is known to be too big is not trained.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    uses_teacher: ClassVar[bool] = True
    deploys: ClassVar[Literal["teacher", "student"]] = "student"
    needs_labels: ClassVar[bool] = True
    trains_head: ClassVar[bool] = True
    zero_shot: ClassVar[bool] = False
    teacher_kinds: ClassVar[tuple[str, ...]] = ("vit", "cnn", "other")
    tasks: ClassVar[tuple[Kind, ...]] = ("classification", "multilabel")
    upstream: ClassVar[tuple[str, ...]] = ()
    deployed_size: ClassVar[Literal["base", "larger", "own"]] = "own"

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        """Why this method cannot serve this task, teacher and student; None if it can."""
        task, teacher = setting.task, setting.teacher
        if task.kind not in cls.tasks:
            return f"{cls.name} serves {' and '.join(cls.tasks)}, and the task is {task.kind}"
        missing = [name for name in cls.upstream if name not in task.upstream]
        if missing:
            return f"{cls.name} needs an upstream generator, and the sweep file has no `upstream.{missing[0]}`"
        if cls.uses_teacher and teacher is not None and teacher.kind not in cls.teacher_kinds:
            kinds = " or ".join(cls.teacher_kinds)
            return f"{cls.name} needs a {kinds} teacher, and {teacher.name} is of kind {teacher.kind}"
        return None

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        """Why this configuration cannot run in this setting (e.g. more blocks kept than there are); None if it can."""
        return None

    @classmethod
    def smallest(cls, config: Any, setting: Setting) -> Structure | None:
        """Where training decides what is deployed: a network that it is not smaller than, whatever is decided; None if
        none is known. A trial for which that is too big is not trained.
        """
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


def supervised_loss(logits: Tensor, labels: Tensor, kind: Kind, label_smoothing: float = 0.0) -> Tensor:
    """The task's own loss of logits on the rows (pixels) that have a label; 0 with a graph where none has.

    Cross-entropy of logits [B, C], or [B, C, h, w] brought to the labels' size; for multi-label the mean binary
    cross-entropy over rows and classes. Labels as in `Batch.labels`. In a worker group, ranks weigh as many rows
    (pixels) as they have with a label: the mean over ranks is the mean over all of them.
    """
    logits = logits.float()
    known = labels[:, 0] >= 0 if kind == "multilabel" else labels != IGNORE if kind == "segmentation" else labels >= 0
    weight = weight_of(known.sum())
    if not bool(known.any()):
        return logits.sum() * 0.0
    if kind == "multilabel":
        target = labels[known] * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits[known], target)
    elif kind == "segmentation":
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=label_smoothing)
    else:
        loss = F.cross_entropy(logits[known], labels[known], label_smoothing=label_smoothing)
    return loss * weight
