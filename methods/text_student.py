"""A text tower smaller than the teacher's: it learns the teacher's embeddings of texts from texts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract import Batch, Deployed, Feed, Given, Learner, Recipe, Setting, Texts, TrainStage
from methods.parts.text_tower import TextTower, trimmed
from methods.ranks import gathered
from methods.vision_language import divergence, similarities

SCALE = 20.0  # of the similarities among texts: sharp enough to tell neighbours apart, soft enough to have any


class TextLearner(Learner):
    """`1 - cos(u_s, u_t)`, and the divergence of each text's similarities to the batch's texts as the teacher has them.

    The second part tells texts apart: a dual encoder's texts lie so close together that a cosine near 1 may still
    confuse them. u_t [M, d] are the teacher's embeddings, over all ranks.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = TextTower(**params["tower"])
        self.register_buffer("_cosine", torch.zeros(()), persistent=True)
        self._cosine: Tensor

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.tokens is not None
        assert batch.texts is not None
        own = self.student(trimmed(batch.tokens)).float()
        cosine = F.cosine_similarity(own, batch.texts, dim=-1).mean()
        self._cosine.lerp_(cosine.detach(), 1.0 if progress == 0 else 0.05)
        u_s, u_t = gathered(own), gathered(batch.texts)
        contrast = divergence(similarities(u_t, u_t, SCALE), similarities(u_s, u_t, SCALE), 1.0)
        return {"loss": 1 - cosine + contrast, "text_cosine": cosine, "text_contrast": contrast}

    def decays(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return super().decays(name, parameter) and not name.endswith(("positions", "tokens.weight"))

    def deployed(self) -> Deployed:
        raise NotImplementedError("A text tower is published as tensors.")

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.student.state_dict())

    def facts(self) -> dict[str, float]:
        return {"text_cosine": float(self._cosine)}


def text_student_stage(
    setting: Setting, texts: tuple[Texts, ...], *, width: int, layers: int, lr: float, budget: float
) -> TrainStage:
    """The stage that trains a text tower of that width and depth on these texts, for the teacher's tokenizer."""
    assert setting.teacher is not None
    tower = {
        "vocabulary": setting.teacher.vocabulary,
        "context": setting.teacher.context,
        "embedding": setting.teacher.embedding,
        "width": width,
        "layers": layers,
        "heads": width // 32,
        "rank": min(64, width),
    }
    return TrainStage(
        name="distil_texts",
        version=1,
        learner=TextLearner,
        params={"tower": tower},
        feed=Feed(images="none", tokens=texts),
        recipe=Recipe(lr=lr, weight_decay=0.05, warmup=0.04, budget=budget),
        trains="student",
        publishes="texts",
    )
