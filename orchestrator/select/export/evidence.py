"""The task's own images, on which an export is compared, calibrated and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.data.labels import open_labels
from orchestrator.data.pixels import RenderedPixels
from orchestrator.data.task import Split, TaskData
from orchestrator.data.views import Policy
from orchestrator.evaluate.details import Details
from orchestrator.evaluate.metrics import score
from orchestrator.evaluate.outcomes import write_outcomes
from orchestrator.models.load import Preprocessing
from orchestrator.store import Store

PLAIN = Policy(1.0, 0.0)  # view 0: as the student was evaluated


class _Run(nn.Module):
    """Anything that gives logits, where a module is asked for."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.here = run, nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


@dataclass(frozen=True)
class Evidence:
    """Images of a task, under one network's preprocessing; those of test are never read.

    Attributes:
        task, store: the data, and where labels of masks lie.
        preprocessing: the network's.
    """

    task: TaskData
    store: Store
    preprocessing: Preprocessing

    def whole(self, count: int) -> list[Tensor]:
        """Images of val as they were decoded, uint8 [3, H, W]; at most `count`."""
        return [self.task.image(self.task.val, row) for row in range(min(count, len(self.task.val)))]

    def val(self, count: int) -> Tensor:
        """[n, 3, S, S] normalised images of val, at most `count`."""
        return self._images(self.task.val, np.arange(min(count, len(self.task.val))))

    def train(self, count: int) -> Tensor:
        """[n, 3, S, S] normalised images of train, at most `count`, drawn from all of it; no label is read."""
        split = self.task.train
        rows = np.random.default_rng(0).permutation(len(split))[:count]
        return self._images(split, rows)

    def _images(self, split: Split, rows: np.ndarray) -> Tensor:
        pixels = RenderedPixels(self.task, split, PLAIN, self.preprocessing)
        return self.preprocessing.normalise(pixels.batch(rows, np.zeros(len(rows), dtype=np.int64)))

    def score(self, run: Callable[[Tensor], Tensor], outcomes: Path) -> float:
        """What logits score on val; how each image came out is written into the folder `outcomes`."""
        kind, classes, count = self.task.spec.kind, len(self.task.classes), len(self.task.val)
        pixels = RenderedPixels(self.task, self.task.val, PLAIN, self.preprocessing)
        labels = open_labels(
            self.store, self.task, self.task.val, range(count), PLAIN, 1, self.preprocessing.size, limit_gb=0
        )
        details = Details(kind, classes)
        found = score(_Run(run), self.preprocessing, pixels, labels, count, kind, classes, hear=details.hear)
        outcomes.mkdir(parents=True, exist_ok=True)
        write_outcomes(outcomes, kind, torch.cat(details.one), torch.cat(details.other))
        return found.value
