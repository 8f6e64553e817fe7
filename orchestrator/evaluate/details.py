"""What stands behind a val metric: each class's part of it, who is taken for whom, and the worst errors with pictures.

It is gathered in the pass that scores a network, and kept beside the network: a report is made from it alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from methods.contract import Kind
from orchestrator.evaluate.metrics import aurocs, overlaps

FILE = "details.json"
PICTURES = "errors.jpg"
WORST = 12  # errors that are kept
TILE = 96  # pixels; a multiple of 8, so that JPEG blocks do not mix neighbours
CONFUSION = 100  # classes up to which the confusion matrix is kept


@dataclass
class Details:
    """Hears every batch that `score` sees.

    Args:
        kind, num_classes: of the task.

    Attributes:
        rows: of each batch.
        one, other: of each batch the classes said and true, both [B]; logits and labels [B, C] (several labels an
            image); or pixels in intersection and union by class [B, C] (segmentation).
        worst: badness, row, uint8 pixels [3, S, S], and the share of the class said (one label an image).
    """

    kind: Kind
    num_classes: int
    rows: list[np.ndarray] = field(default_factory=list)
    one: list[Tensor] = field(default_factory=list)
    other: list[Tensor] = field(default_factory=list)
    worst: list[tuple[float, int, Tensor, float]] = field(default_factory=list)

    def hear(self, rows: np.ndarray, pixels: Tensor, logits: Tensor, truth: Tensor) -> None:
        """One batch: row numbers [B], uint8 pixels [B, 3, S, S], logits and labels as `score` has them."""
        logits, truth = logits.float().cpu(), truth.cpu()
        if self.kind == "segmentation":
            both, either = overlaps(logits.argmax(1), truth, self.num_classes)
            self.one.append(both)
            self.other.append(either)
            share, there = both.double() / either.clamp(min=1), either > 0
            badness = 1 - (share * there).sum(1) / there.sum(1).clamp(min=1)
            badness *= there.any(1)  # where no pixel counts nothing can be wrong
        elif self.kind == "multilabel":
            self.one.append(logits)
            self.other.append(truth)
            known = truth >= 0
            loss = F.binary_cross_entropy_with_logits(logits, truth.clamp(min=0), reduction="none")
            wrong = (((logits > 0) != (truth > 0.5)) & known).any(1)
            badness = (loss * known).mean(1) * wrong
        else:
            said = logits.argmax(1)
            self.one.append(said)
            self.other.append(truth)
            badness = F.cross_entropy(logits, truth, reduction="none") * (said != truth)
        self.rows.append(rows)
        for at in badness.argsort(descending=True)[:WORST].tolist():
            value = float(badness[at])
            if value > 0:
                sure = float(logits[at].softmax(0)[said[at]]) if self.kind == "classification" else math.nan
                self.worst.append((value, int(rows[at]), pixels[at].cpu(), sure))
        self.worst = sorted(self.worst, key=lambda w: (-w[0], w[1]))[:WORST]

    def joined(self) -> tuple[Tensor, Tensor]:
        """`one` and `other` of all images; put together once."""
        if len(self.one) > 1:
            self.one, self.other = [torch.cat(self.one)], [torch.cat(self.other)]
        return self.one[0], self.other[0]

    def write(self, folder: Path, classes: tuple[str, ...]) -> None:
        """Writes `details.json`, and `errors.jpg` with the tiles of the worst errors from left to right."""
        one, other = self.joined()
        content: dict[str, Any] = {"kind": self.kind, "images": len(one), "confusion": None}
        if self.kind == "segmentation":
            content["classes"] = _overlap_classes(one, other)
        elif self.kind == "multilabel":
            content["classes"] = _ranked_classes(one.numpy(), other.numpy())
        else:
            content["classes"] = _counted_classes(one, other, self.num_classes)
            if self.num_classes <= CONFUSION:  # of thousands of classes the counts alone would take gigabytes
                cells = torch.bincount(other * self.num_classes + one, minlength=self.num_classes**2)
                content["confusion"] = cells.view(self.num_classes, self.num_classes).tolist()
        for fact, name in zip(content["classes"], classes, strict=True):
            fact["name"] = name
        where = {int(row): at for at, row in enumerate(np.concatenate(self.rows))}
        content["worst"] = [
            self._error(share if self.kind == "classification" else value, row, one, other, where[row])
            for value, row, _, share in self.worst
        ]
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")
        if self.worst:
            sheet = Image.new("RGB", (TILE * len(self.worst), TILE))
            for at, (_, _, pixels, _) in enumerate(self.worst):
                tile = Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())
                sheet.paste(tile.resize((TILE, TILE), Image.Resampling.BICUBIC), (at * TILE, 0))
            sheet.save(folder / PICTURES, "JPEG", quality=85)

    def _error(self, value: float, row: int, one: Tensor, other: Tensor, at: int) -> dict[str, Any]:
        """One error: which image of val, what is true, what was said, and how sure of it or how bad."""
        if self.kind == "segmentation":
            return {"row": row, "truth": [], "said": [], "value": 1 - value}
        if self.kind == "multilabel":
            truth, above = (other[at] > 0.5).nonzero().flatten(), (one[at] > 0).nonzero().flatten()
            return {"row": row, "truth": truth.tolist(), "said": above.tolist(), "value": value}
        return {"row": row, "truth": [int(other[at])], "said": [int(one[at])], "value": value}


def _counted_classes(said: Tensor, truth: Tensor, num_classes: int) -> list[dict[str, Any]]:
    """Recall (`value`) and precision by class of classes said and true [n]; None where nothing was to count."""
    counts = [torch.bincount(c, minlength=num_classes).tolist() for c in (truth[said == truth], truth, said)]
    return [{"images": n, "value": _share(r, n), "precision": _share(r, s)} for r, n, s in zip(*counts, strict=True)]


def _ranked_classes(scores: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """Area under the ROC curve (`value`) by class; None where a class has no positive or no negative image."""
    positive = labels > 0.5
    values = aurocs(scores, positive)[0].tolist()
    return [
        {"images": n, "value": None if math.isnan(value) else value}
        for n, value in zip(positive.sum(0).tolist(), values, strict=True)
    ]


def _overlap_classes(both: Tensor, either: Tensor) -> list[dict[str, Any]]:
    """Intersection over union (`value`) by class, added up over images; None where a class is nowhere."""
    facts = []
    for c in range(both.shape[1]):
        union = int(either[:, c].sum())
        facts.append({"images": int((either[:, c] > 0).sum()), "value": _share(int(both[:, c].sum()), union)})
    return facts


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def error_tiles(folder: Path) -> list[Image.Image]:
    """The pictures of `details.json`'s worst errors, in its order; none where none are kept."""
    if not (folder / PICTURES).is_file():
        return []
    with Image.open(folder / PICTURES) as sheet:
        sheet.load()
        return [sheet.crop((left, 0, left + TILE, TILE)) for left in range(0, sheet.width, TILE)]
