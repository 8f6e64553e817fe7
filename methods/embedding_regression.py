"""The plain alternative to DIME-FM: the student's embedding of an image is pulled to the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from methods.contract import Batch, Feed, Recipe, Setting, Stage, TrainStage
from methods.knobs import MethodConfig, knob
from methods.vision_language import EMBEDDING, ByDualEncoder, EmbeddingLearner, decay_knob, rate_knob


class EmbeddingRegressionConfig(MethodConfig):
    """Knobs of embedding regression."""

    lr: float = rate_knob()
    weight_decay: float = decay_knob()
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


class RegressionLearner(EmbeddingLearner):
    """`1 - cos(v_s, v_t)`, the mean over images; texts play no part."""

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        own, target = self.student(batch.images).float(), batch.outputs[EMBEDDING.key]
        loss = (1 - F.cosine_similarity(own, target, dim=-1)).mean()
        return {"loss": loss, "cosine": loss}


class EmbeddingRegression(ByDualEncoder):
    """Cosine regression to a dual encoder's image embeddings: what DIME-FM is measured against."""

    name = "embedding_regression"
    family = "remapping"
    paper = "the feature baseline of Sun et al., DIME-FM, ICCV 2023 [inferred]"
    Config = EmbeddingRegressionConfig

    @classmethod
    def stages(cls, config: EmbeddingRegressionConfig, setting: Setting) -> list[Stage]:
        assert setting.teacher is not None
        return [
            TrainStage(
                name="regress_embeddings",
                version=1,
                learner=RegressionLearner,
                params={"width": setting.teacher.embedding},
                feed=Feed(images="corpus", outputs=(EMBEDDING,), plain=True),
                recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, warmup=0.04, budget=config.budget),
                trains="student",
                reads=("student",),
            )
        ]
