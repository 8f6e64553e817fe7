"""Relational knowledge distillation: the student keeps the distances and angles among the teacher's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract import Batch, Given, Setting, Stage, TrainStage
from methods.heads import POOLED
from methods.kd import KD, KDConfig, KDLearner
from methods.knobs import Choice, Range, knob
from methods.outputs import read_outputs
from methods.ranks import gathered
from methods.tuning import LOGITS

MOST = 1024  # images of which every three are related: each of several tables of them takes 4 GB


class RKDConfig(KDConfig):
    """Knobs of relational distillation: those of the class scores are logit distillation's."""

    weight: float = knob(
        0.5,
        "λ: share of the teacher's class scores against the labels; 0 leaves labels and relations.",
        search=Choice(values=(0.0, 0.5, 0.9)),
        ge=0,
        le=1,
    )
    distance: float = knob(25.0, "Weight of the distances.", search=Range(low=1, high=100, log=True), ge=0, le=1000)
    angle: float = knob(50.0, "Weight of the angles.", search=Range(low=1, high=200, log=True), ge=0, le=1000)


def relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """How the rows of features [B, D] lie to each other.

    Takes B³ numbers, whatever D: the product of two sides is that of four products of rows.

    Returns:
        distances: [B, B] Euclidean, in units of their mean over different rows (Eq. 4, 5 [memory]).
        angles: [B, B, B]: entry (j, i, k) is the cosine of the angle at j between i and k (Eq. 8 [memory]); 0 where one
            of the sides has no length.
    """
    with torch.autocast(features.device.type, enabled=False):  # differences of products lose digits as it is
        rows = features.float()
        lengths = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = len(rows) * (len(rows) - 1)
        distances = lengths / (lengths.sum() / max(pairs, 1)).clamp_min(1e-12)
        rows = rows - rows.detach().mean(0)  # which no angle sees, and the products then lose fewer digits
        products = rows @ rows.T
        # A side that is all but 0 has no direction: without a floor its gradient would be without bounds.
        floor = (1e-3 * lengths.detach().mean()).clamp_min(1e-12)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        inverse = (1 / torch.maximum(lengths, floor)).masked_fill(itself, 0)
        half = 0.5 * products.diagonal()[:, None] - products
        sides = products + half[:, :, None] + half[:, None, :]
        return distances, sides * (inverse[:, :, None] * inverse[:, None, :])


def relation_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Mean Huber distance (δ = 1) of the two networks' distances, and of their angles.

    Over pairs, and triples, of different rows.

    Args:
        student, teacher: [B, D] and [B, E]; 0 with a graph where there are too few rows.
    """
    count = len(student)
    distances, angles = relations(student)
    wanted, targets = relations(teacher.detach())
    for of_network in (angles, targets):
        of_network.diagonal(dim1=1, dim2=2).zero_()  # a side with itself; at its own end a side is 0 already
    distance = F.smooth_l1_loss(distances, wanted, reduction="sum")
    angle = F.smooth_l1_loss(angles, targets, reduction="sum")
    return distance / max(count * (count - 1), 1), angle / max(count * (count - 1) * (count - 2), 1)


class RKDLearner(KDLearner):
    """Logit distillation + `distance` · L_D + `angle` · L_A of the pooled features [B, D] of the global batch."""

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.distance: float = params["distance"]
        self.angle: float = params["angle"]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        own = read_outputs(self.student, batch.images, [POOLED, LOGITS])
        parts = self.distillation(own[LOGITS.key], batch)
        mine, theirs = gathered(own[POOLED.key]), gathered(batch.outputs[POOLED.key])
        distance, angle = relation_losses(mine, theirs)
        total = parts["loss"] + self.distance * distance + self.angle * angle
        return {**parts, "loss": total, "distance": distance, "angle": angle}


class RKD(KD):
    """Relations among the pooled features of a batch: distances of pairs and angles of triples, beside class scores.

    Features of any two widths compare, so there is no regressor. The paper adds the relations to the task's loss with
    weights 25 and 50 for classification, penultimate features, Huber distance with δ = 1 [memory]; means are over
    different rows only (the diagonal is 0 in both networks) [inferred], and the teacher's class scores come along
    as in logit distillation [inferred]: `weight: 0` is the paper's. Relations need no label.
    """

    name = "rkd"
    paper = "Park et al., Relational Knowledge Distillation, CVPR 2019"
    Config = RKDConfig

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        batch = setting.task.batch
        if batch > MOST:
            return (
                f"{cls.name} relates every three images of a micro batch, in several tables of "
                f"{4e-9 * batch**3:.0f} GB for train.batch / train.accumulate = {batch}; allowed is {MOST} at most"
            )
        return super().refuses(setting)

    @classmethod
    def stages(cls, config: KDConfig, setting: Setting) -> list[Stage]:
        assert isinstance(config, RKDConfig)
        *earlier, distil = super().stages(config, setting)
        assert isinstance(distil, TrainStage)
        outputs = tuple(dict.fromkeys((*distil.feed.outputs, POOLED)))
        params = {**distil.params, "distance": config.distance, "angle": config.angle}
        return [
            *earlier,
            replace(distil, version=3, learner=RKDLearner, params=params, feed=replace(distil.feed, outputs=outputs)),
        ]
