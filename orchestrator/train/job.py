"""One training stage as a picklable job."""

from __future__ import annotations

from dataclasses import dataclass, field

from methods.contract import Feed, TrainStage
from orchestrator.data.views import Policy
from orchestrator.spec import SweepSpec, Train


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank needs to run one training stage; the data and the teacher's outputs are read from the store.

    Attributes:
        spec: the sweep file.
        store_root: the store that every rank can read.
        stage: what to train.
        teacher, student: positions in the sweep file, or None.
        outputs: store addresses of teacher outputs, by output key, one for each view (of a corpus, for each shard);
            empty for a live teacher.
        inputs: store addresses of earlier stages' results by stage name.
        of: store address of the tuned teacher whose outputs are read; None for the teacher itself.
        pool: store addresses of the shards of generated images that come along.
        pool_outputs: store addresses of teacher outputs on these, by output key, for each view one for each shard.
        captions: store addresses of the embeddings of its captions, one for each shard.
        texts: store addresses of the embeddings of the texts that come along, joined.
        tokens: store addresses of texts that are read instead of images, by name: of their embeddings, of their tokens.
        stream_here: decode in this process, where no Ray runs.
        steps, seed, device: for how long, from where, on what.
        scratch: folder of the checkpoint.
        policy: how views are drawn.
        listing: of the task's images, as in `load_task`.
    """

    spec: SweepSpec
    store_root: str
    stage: TrainStage
    teacher: int | None
    student: int | None
    outputs: dict[str, list[str]]
    inputs: dict[str, str]
    steps: int
    seed: int
    device: str
    scratch: str
    policy: Policy
    of: str | None = None
    pool: list[str] = field(default_factory=list)
    pool_outputs: dict[str, list[list[str]]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    stream_here: bool = True
    listing: str = ""


def pool_batch(train: Train, feed: Feed) -> int:
    """Generated images of a global batch: what the ratio asks for, or the nearest number that every rank can share."""
    shares = train.workers * train.accumulate
    return max(1, round(train.batch * feed.pool_ratio / shares)) * shares
