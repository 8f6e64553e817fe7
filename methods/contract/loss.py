"""The task's own loss, which methods share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract.setting import Kind
from methods.ranks import weight_of

IGNORE = 255  # a pixel that has no class


def supervised_loss(logits: Tensor, labels: Tensor, kind: Kind, label_smoothing: float = 0.0) -> Tensor:
    """The task's own loss of logits on the rows (pixels) that have a label; 0 with a graph where none has.

    Cross-entropy of logits [B, C], or [B, C, h, w] brought to the labels' size; for multi-label the mean binary
    cross-entropy over rows and classes. Labels as in `Batch.labels`. In a worker group, ranks weigh as many rows
    (pixels) as they have with a label: the mean over ranks is the mean over all of them.
    """
    logits = logits.float()
    known = labels[:, 0] >= 0 if kind == "multilabel" else labels != IGNORE if kind == "segmentation" else labels >= 0
    weight = weight_of(known.sum())
    if not len(logits):
        return logits.sum() * 0.0
    # Rows without a label are weighed by 0, never left out: a GPU would first have to say how many those are.
    if kind == "multilabel":
        target = labels * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, target, weight=known[:, None].to(logits.dtype))
        return loss * (weight * len(known) / known.sum().clamp_min(1))
    if kind == "segmentation" and logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    some = known.any()
    labels = torch.where(some, labels, 0)  # of no rows there is no mean; these labels then count nothing
    ignored = IGNORE if kind == "segmentation" else -1
    loss = F.cross_entropy(logits, labels, ignore_index=ignored, label_smoothing=label_smoothing)
    return loss * (weight * some)
