"""What every trial of a sweep shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from methods.outputs import Output
from orchestrator.spec import SweepSpec
from orchestrator.store import Store, store_at


@dataclass(frozen=True)
class SweepContext:
    """What every trial of a sweep shares. Picklable.

    Attributes:
        spec: the sweep file.
        folder: `<storage>/<sweep>`.
        device: `cpu` or `cuda`.
        prefetch: by teacher position, the outputs that some trial of the sweep may want: computed in one pass.
        listing: of the images when the sweep began, as in `load_task`; "" for those of now.
    """

    spec: SweepSpec
    folder: str
    device: str = "cpu"
    prefetch: dict[int, tuple[Output, ...]] = field(default_factory=dict)
    listing: str = ""

    @property
    def devices(self) -> float:
        """What a trial holds while it runs: GPUs, or CPUs where it has none."""
        train = self.spec.train
        return train.workers * (train.gpus_per_worker if self.device == "cuda" else float(train.threads))

    @property
    def store(self) -> Store:
        return store_at(self.spec.store_address, min_free_gb=self.spec.store.min_free_gb)
