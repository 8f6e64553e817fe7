"""Full fine-tuning of the student on the labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from methods.contract import Batch, Deployed, Feed, Given, Learner, Method, Recipe, Setting, Stage, TrainStage
from methods.contract import masked_cross_entropy
from methods.knobs import MethodConfig, Range, knob


class FineTuneLearner(Learner):
    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = given.student

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        return {"loss": masked_cross_entropy(self.student(batch.images), batch.labels)}

    def deployed(self) -> Deployed:
        return Deployed(self.student, "student")


class FineTune(Method):
    """Full fine-tuning."""

    name = "finetune"
    family = "fine-tuning"
    paper = "baseline"
    uses_teacher = False

    class Config(MethodConfig):
        lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1)

    @classmethod
    def stages(cls, config: Any, setting: Setting) -> list[Stage]:
        return [TrainStage(name="finetune", version=1, learner=FineTuneLearner, feed=Feed("labelled", labels=True),
                           recipe=Recipe(lr=config.lr), trains="student", reads=("student",))]
