"""Features of the images of a task under the network, plain or shifted; each computed once, through the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.images import all_cpus, decoders
from orchestrator.data.pixels import stacked
from orchestrator.data.task import ImageSet, Split
from orchestrator.data.views import Policy, draw, render
from orchestrator.evaluate.suite import shifts
from orchestrator.evaluate.suite.shifts import Shift
from orchestrator.evaluate.suite.subject import Subject
from orchestrator.models.load import Preprocessing, describe
from orchestrator.store import Records, Store, key_of, write_records

VERSION = 1
BATCH = 64
PLAIN = Policy(1.0, 0.0)


@dataclass(frozen=True)
class Reader:
    """A network that reads images.

    Attributes:
        subject: the network; on `device`.
        store: where features are kept. Pixels of test images are not.
        device: `cpu` or `cuda`.
    """

    subject: Subject
    store: Store
    device: str

    def pixels(self, pixels: Tensor) -> Tensor:
        """[B, D] on the CPU, of uint8 [B, 3, S, S]."""
        return self.subject.read(self.subject.preprocessing.normalise(pixels.to(self.device))).cpu()

    def split(self, images: ImageSet, split: Split, shift: Shift | None = None) -> Tensor:
        """[N, D] of every image of a split, as it is (view 0) or shifted."""
        if not len(split):
            return torch.empty(0, 0)
        reads: dict[str, Any] = {
            "network": self.subject.identity,
            "preprocessing": describe(self.subject.preprocessing),
            "head": bool(self.subject.classes),
            "images": split.images_hash,
            "shift": asdict(shift) | {"version": shifts.VERSION} if shift else None,
            "version": VERSION,
        }

        def batches() -> Iterator[Tensor]:
            def one(row: int) -> Tensor:
                return square(images.image(split, row), split.ids[row], self.subject.preprocessing, shift)

            item_bytes = 3 * self.subject.preprocessing.size**2
            for squares in stacked(one, range(len(split)), BATCH, item_bytes, decoders(all_cpus())):
                yield self.pixels(squares)

        def write(folder: Path) -> dict[str, Any]:
            write_records(folder / "features.arrow", len(split), batches(), "float32")
            return {"model": self.subject.name}

        entry = self.store.compute("suite_features", key_of(reads), write, reads=reads)
        return Records(entry.path / "features.arrow").all().clone()


def square(image: Tensor, image_id: str, preprocessing: Preprocessing, shift: Shift | None = None) -> Tensor:
    """uint8 [3, H, W] to the network's uint8 [3, S, S].

    A shift is applied to a square of 224 pixels, or of S where that is larger, so that networks of any input size see
    the same shifted picture.
    """
    view = draw(PLAIN, image_id, (image.shape[-2], image.shape[-1]), 0)
    size, interpolation = preprocessing.size, preprocessing.interpolation
    if shift is None:
        return render(image, view, size, interpolation)
    side = max(shifts.SIDE, size)
    shifted = shift(render(image, view, side, "bicubic"), image_id)
    if side == size:
        return shifted
    whole = np.array([0, 0, side, side, 0, 1, 1, 1], dtype=np.float32)
    return render(shifted, whole, size, interpolation)
