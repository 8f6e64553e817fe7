"""What planning may know before anything is loaded: the networks and the task, without weights, pixels and labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Kind = Literal["classification", "multilabel", "segmentation"]
Texts = Literal["sentences", "prompts", "captions"]


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
        classes: of the head that its weights came with; 0 where they came with none, or none were asked for.
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
    classes: int = 0
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
        batch: images whose rows one loss relates: of a micro batch, over all workers.
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
