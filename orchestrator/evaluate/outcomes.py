"""How each val image came out, kept beside a student, so that two students can be compared image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save_file

from orchestrator.spec import Kind

if TYPE_CHECKING:  # comparing two students needs no torch
    from torch import Tensor

FILE = "outcomes.safetensors"
DRAWS = 1000


@dataclass(frozen=True)
class Difference:
    """Of a metric between two students on the same images: 95 % of the draws lie between `low` and `high`."""

    value: float
    low: float
    high: float
    images: int

    @property
    def error(self) -> float:
        """Its standard error, as of a normal distribution with that interval."""
        return (self.high - self.low) / (2 * 1.96)


def write_outcomes(folder: Path, kind: Kind, one: Tensor, other: Tensor) -> None:
    """Writes `outcomes.safetensors`: whether each image was right [n]; or logits and labels [n, C] (multi-label); or
    pixels in intersection and union by class [n, C] (segmentation).

    Args:
        one, other: logits and labels of all images, or both counts; of one label an image also the classes said [n].
    """
    if kind == "classification":
        said = one if one.ndim == 1 else one.argmax(1)
        tensors = {"right": (said == other).numpy().astype(np.uint8)}
    else:
        small = np.float16 if kind == "multilabel" else np.int32
        tensors = {"one": one.numpy().astype(small), "other": other.numpy().astype(small)}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / FILE)


def compare_outcomes(kind: Kind, first: Path, second: Path) -> Difference | None:
    """How much better the first student's folder does than the second's, by a paired bootstrap over val images.

    Returns:
        None where an outcome is missing (a sweep from an older version) or they are not of the same images.
    """
    return compare_groups(kind, [first], [second])


def compare_groups(kind: Kind, firsts: Sequence[Path], seconds: Sequence[Path]) -> Difference | None:
    """How much better students of `firsts` do in the mean than those of `seconds`; as `compare_outcomes` of one each.

    Noise is that of the images alone: every draw is the same for all students.
    """
    folders = [*firsts, *seconds]
    if not all((folder / FILE).is_file() for folder in folders):
        return None
    found = [load_file(folder / FILE) for folder in folders]
    if any({k: v.shape for k, v in f.items()} != {k: v.shape for k, v in found[0].items()} for f in found):
        return None
    weights = [1 / len(firsts)] * len(firsts) + [-1 / len(seconds)] * len(seconds)
    rng = np.random.default_rng(0)
    if kind == "classification":
        gains = np.asarray(sum(w * f["right"].astype(np.float64) for w, f in zip(weights, found, strict=True)))
        count = len(gains)
        drawn = np.array([gains[rng.integers(0, count, count)].mean() for _ in range(DRAWS)])
        value = float(gains.mean())
    else:
        from orchestrator.evaluate.metrics import mean_auroc, mean_iou, resampled

        metric = mean_auroc if kind == "multilabel" else mean_iou
        count = len(found[0]["one"])
        draws = [rng.integers(0, count, count) for _ in range(DRAWS // 5)]
        parts = [w * resampled(metric, f["one"], f["other"], draws) for w, f in zip(weights, found, strict=True)]
        drawn = np.asarray(sum(parts))
        value = sum(w * metric(f["one"], f["other"]) for w, f in zip(weights, found, strict=True))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Difference(value, float(low), float(high), count)
