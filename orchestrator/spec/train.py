"""The budget of a trial, and what trains and generates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.spec.section import Section


class Train(Section):
    """The budget that all methods share."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps of a trial's budget; or give `epochs`.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Instead of steps: passes over the training images, or over the corpus that is streamed.",
    )
    batch: int = Field(default=64, ge=2, description="Global batch size, over all workers.")
    views: int = Field(
        default=4, ge=1, le=1000, description="Stored augmented views an image; view 0 is the plain image."
    )
    fresh: bool = Field(
        default=False,
        description="Draw a new view every epoch instead: the teacher runs live, and its row shows the cost.",
    )
    crop_scale: float = Field(default=0.35, gt=0, le=1, description="Smallest share of the image that a view may crop.")
    color: float = Field(default=0.0, ge=0, le=1, description="Strength of brightness, contrast and saturation jitter.")
    workers: int = Field(default=1, ge=1, description="Processes a trial; more than one trains under DDP (Ray Train).")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Elastic workers: where there is no room for `workers`, at the start or after a node was lost, a "
        "trial trains on the most that divide `workers`, and not on fewer than these. The global batch stays.",
    )
    wait_s: float = Field(
        default=60.0, gt=0, description="With min_workers: seconds to wait for workers before fewer are tried."
    )
    idle_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that a trial process keeps its workers, and their devices, for the next stage or trial.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where the cluster has one.")
    gpus_per_worker: float = Field(default=1.0, gt=0, description="A fraction below 1 puts several trials on one GPU.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="Autocast precision of training.")
    compile: bool = Field(
        default=False,
        description="Compile the blocks of what is trained with torch.compile: a pause at the first step of each "
        "training stage, then shorter steps, most of all on a GPU. With several workers sync_batchnorm must be false.",
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="Torch threads of each trial process, and those that decode; also the CPUs it reserves.",
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro batches that a worker's part of a batch is cut into: less memory, more time. Losses that "
        "relate rows, and batch norm, see those of a micro batch (of all workers).",
    )
    oom_retry: bool = Field(
        default=False,
        description="Try a training stage that runs out of device memory once more, with micro batches half as large.",
    )
    checkpoint_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds between checkpoints of a training stage; more where one takes over a second to save.",
    )
    checkpoint_steps: int | None = Field(default=None, ge=1, description="Also after every so many optimizer steps.")
    sync_batchnorm: bool = Field(default=True, description="With several workers: batch norm over the global batch.")

    def never_on_gpus(self) -> str | None:
        """Why trials of this shape cannot run on GPUs; None if they can."""
        gpus = self.gpus_per_worker
        if gpus > 1 and gpus != int(gpus):
            return f"gpus_per_worker: {gpus:g} is no whole number; only a fraction below 1 shares a GPU"
        if gpus < 1 and self.workers > 1:
            return (
                f"gpus_per_worker: {gpus:g} and workers: {self.workers}: two workers of one group cannot share a GPU; "
                "use gpus_per_worker: 1, or workers: 1, or device: cpu"
            )
        return None

    @model_validator(mode="after")
    def _one_budget(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps: {self.steps} and epochs: {self.epochs:g} are both given; give one of them")
        if self.batch % self.workers:
            raise ValueError(f"batch: {self.batch} is not divisible by workers: {self.workers}")
        if self.batch % (self.workers * self.accumulate):
            parts = f"workers: {self.workers} x accumulate: {self.accumulate}"
            raise ValueError(f"batch: {self.batch} is not divisible by {parts}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers: {self.workers}")
        if self.device == "cuda" and (reason := self.never_on_gpus()):
            raise ValueError(reason)
        if self.compile and self.workers > 1 and self.sync_batchnorm:
            raise ValueError(
                f"compile: true and workers: {self.workers}: batch norm over the global batch is not compiled; set "
                "sync_batchnorm: false, or leave compile out"
            )
        if self.fewest < self.workers and not self.sync_batchnorm:
            raise ValueError(
                f"min_workers: {self.min_workers} and sync_batchnorm: false: batch norm over each worker's own rows "
                "would depend on their number"
            )
        return self

    @property
    def fewest(self) -> int:
        """Workers that a trial must have."""
        return self.min_workers or self.workers

    def total_steps(self, images: int) -> int:
        """Optimizer steps of a whole budget, for `images` training images."""
        if self.epochs is not None:
            return max(1, round(self.epochs * images / self.batch))
        return self.steps if self.steps is not None else 1000


class Generate(Section):
    """The actors that generate images (Ray Data)."""

    actors: int = Field(default=1, ge=1, le=1024, description="At most this many generate at the same time.")
    cpus: float = Field(default=0.0, ge=0, description="CPUs that each reserves; 0 shares those of its trial.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs that each reserves, which are kept free of trials; 0: a trial that has a GPU generates on "
        "it, without actors.",
    )
