"""The stages that a method is a chain of, and what each declares that it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from methods.contract.given import Given
from methods.contract.learner import Learner
from methods.contract.setting import Texts
from methods.outputs import Output

Images = Literal["labelled", "all", "corpus", "none"]
Source = Literal["teacher", "student", "labels", "vq", "diffusion", "pipeline", "sentences", "prompts", "captions"]
TEACHER = "teacher"


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
