"""Images and sentences beyond the task's own, and what a sweep over them is reckoned for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.spec.section import Section


class Expect(Section):
    """A corpus that is not on this machine yet, as it is expected to be."""

    images: int = Field(default=0, ge=0, description="Images; 0: must be here.")
    image_bytes: int = Field(
        default=20_000,
        ge=1,
        description="Mean size of an encoded image; 20 kB is 224 to 256 px at quality 90, roughly.",
    )
    captions: int = Field(default=0, ge=0, description="How many of the images have a caption.")
    sentences: int = Field(default=0, ge=0, description="Sentences; 0: must be here.")
    sentence_bytes: int = Field(default=80, ge=1, description="Mean size of a stored sentence with its id.")


class Corpus(Section):
    """Images and sentences beyond the task's own, for the methods that learn from unpaired ones."""

    images: str | None = Field(
        default=None,
        description="A folder or address that `corpus build` wrote, or `packaged/icons/images`; null: the training "
        "images of the task.",
    )
    sentences: str | None = Field(
        default=None, description="The same of sentences, or `packaged/icons/sentences`; null: none."
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="Type in which the teacher's embeddings of the corpus are stored."
    )
    actors: int = Field(default=1, ge=1, le=4096, description="At most this many actors embed at the same time.")
    min_actors: int = Field(default=1, ge=1, le=4096, description="At least this many are kept while there is work.")
    cpus: float = Field(default=0.0, ge=0, description="CPUs that each actor reserves; 0 shares those of its trial.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs that each actor reserves, which are kept free of trials; 0: a trial that has a GPU embeds on "
        "it, without actors.",
    )
    window: int = Field(
        default=4096,
        ge=1,
        description="Images among which the stream is shuffled; each worker holds so many in memory, decoded.",
    )
    memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="What each worker's stream may take, GB: the window, batches, and blocks that are decoded ahead. "
        "Null: a quarter of its machine's memory, divided by the workers that its CPUs allow (`train.threads` each).",
    )
    readers: int = Field(
        default=2, ge=0, le=1024, description="Ray Data tasks that decode ahead for each worker; 0: its own threads."
    )

    expect: Expect = Field(
        default_factory=Expect,
        description="What the folders will hold, where they are not here: `check` reckons with it and says so. A sweep "
        "refuses a folder that is not here.",
    )

    def streams(self, images: str) -> bool:
        """Whether a feed's `images` come from here; without a corpus they are the training images."""
        return images == "corpus" and self.images is not None

    @model_validator(mode="after")
    def _ordered(self) -> Corpus:
        if self.min_actors > self.actors:
            raise ValueError(f"min_actors: {self.min_actors} is more than actors: {self.actors}")
        return self


class Estimate(Section):
    """The machines for which `check` reckons a sweep with a corpus; nothing else reads this."""

    nodes: int = Field(default=1, ge=1, description="Nodes that embed and train.")
    gpus: int = Field(default=8, ge=1, description="GPUs of a node.")
    tflops: float = Field(
        default=312.0, gt=0, description="Peak of a GPU, TFLOP/s in 16 bits, as its maker states it; 312 is an A100's."
    )
    utilisation: float = Field(
        default=0.35, gt=0, le=1, description="Share of the peak that is reached; 0.35 is assumed, not measured."
    )
    cores: int = Field(default=96, ge=1, description="CPU cores of a node, for decoding.")
    decode: float = Field(
        default=150.0,
        gt=0,
        description="Images that a core decodes and renders in a second; 150 is assumed, low for images of 256 px.",
    )
    read_gb_s: float = Field(
        default=1.0, gt=0, description="GB that a node reads from the shared storage in a second; assumed."
    )
    memory_gb: float = Field(default=512.0, gt=0, description="Memory of a node.")
