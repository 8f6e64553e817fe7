"""The task's own loss, which methods share."""

from __future__ import annotations

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
    if not bool(known.any()):
        return logits.sum() * 0.0
    if kind == "multilabel":
        target = labels[known] * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits[known], target)
    elif kind == "segmentation":
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=label_smoothing)
    else:
        loss = F.cross_entropy(logits[known], labels[known], label_smoothing=label_smoothing)
    return loss * weight
