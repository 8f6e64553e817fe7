"""Contrastive training on image-caption pairs against a kept text tower: what DIME-FM does without pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import Batch, Feed, Given, Recipe, Setting, Stage, TrainStage
from methods.knobs import MethodConfig, knob
from methods.ranks import gathered
from methods.vision_language import ByDualEncoder, EmbeddingLearner, decay_knob, rate_knob, similarities

LARGEST = math.log(100)  # as in CLIP


class PairedContrastiveConfig(MethodConfig):
    """Knobs of contrastive training."""

    temperature: float = knob(0.07, "Where the learned temperature starts; it is never below 0.01.", gt=0, le=1)
    lr: float = rate_knob()
    weight_decay: float = decay_knob()
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


class PairedContrastiveLearner(EmbeddingLearner):
    """InfoNCE of the student's embeddings [B, d] and the teacher's embeddings of their captions, over all ranks.

    Both directions, the mean of the two; the scale is learned, at most 100 [code of CLIP]. Equal captions within a
    batch count as different, as there.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.log_scale = nn.Parameter(torch.tensor(min(-math.log(params["temperature"]), LARGEST)))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.captions is not None
        images, texts = gathered(self.student(batch.images)), gathered(batch.captions)
        with torch.no_grad():  # the parameter itself, as in CLIP: a clamp with a graph has no gradient beyond the limit
            self.log_scale.clamp_(max=LARGEST)
        scores = similarities(images, texts, 1.0) * self.log_scale.exp()
        target = torch.arange(len(scores), device=scores.device)
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        return {"loss": loss, "contrastive": loss}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return name != "log_scale" and super().decays(name, parameter)

    def facts(self) -> dict[str, float]:
        return {"temperature": math.exp(-min(self.log_scale.item(), LARGEST))}


class PairedContrastive(ByDualEncoder):
    """The student's image tower trained on captioned images; the text tower is the teacher's, frozen.

    Training on pairs is what users do without a distillation. CLIP trains both towers; with the teacher's text tower
    kept (as locked-image tuning keeps the image tower) this is the stronger baseline [inferred].
    """

    name = "paired_contrastive"
    family = "fine-tuning"
    paper = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
    Config = PairedContrastiveConfig

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        reason = super().refuses(setting)
        if reason is None and "captions" not in setting.task.texts:
            return f"{cls.name} needs captioned images, and the sweep file's corpus has none"
        return reason

    @classmethod
    def stages(cls, config: PairedContrastiveConfig, setting: Setting) -> list[Stage]:
        assert setting.teacher is not None
        return [
            TrainStage(
                name="contrast",
                version=2,
                learner=PairedContrastiveLearner,
                params={"width": setting.teacher.embedding, "temperature": config.temperature},
                feed=Feed(images="corpus", captions=True),
                recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, warmup=0.04, budget=config.budget),
                trains="student",
                reads=("student",),
            )
        ]
