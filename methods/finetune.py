"""Full fine-tuning of the student on the labelled images: the baseline without a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from methods.contract import (
    Batch,
    Deployed,
    Feed,
    Given,
    Learner,
    Method,
    Recipe,
    Setting,
    Stage,
    TrainStage,
    supervised_loss,
)
from methods.dense import structure_of
from methods.knobs import Choice, MethodConfig, Range, knob


class FineTuneConfig(MethodConfig):
    """Knobs of full fine-tuning."""

    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-5, high=1e-2, log=True), gt=0, le=1)
    weight_decay: float = knob(
        0.05, "AdamW's weight decay.", search=Choice(values=(0.0, 1e-4, 1e-3, 1e-2, 5e-2)), ge=0, le=1
    )
    label_smoothing: float = knob(
        0.0, "Share of each label spread over all classes.", search=Choice(values=(0.0, 0.1)), ge=0, lt=1
    )
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


class FineTuneLearner(Learner):
    """The student under the task's own loss with label smoothing; logits [B, C], or [B, C, S, S] of pixels."""

    steady = True

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = given.student
        self.kind = given.kind
        self.label_smoothing: float = params["label_smoothing"]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        ce = supervised_loss(self.student(batch.images), batch.labels, self.kind, self.label_smoothing)
        return {"loss": ce, "ce": ce}

    def deployed(self) -> Deployed:
        return Deployed(self.student.eval(), "student", structure=structure_of(self.student))


class FineTune(Method):
    """Trains every weight of the student on the labelled images, from the weights that it comes with.

    A student without pre-trained weights is trained from scratch.
    """

    name = "finetune"
    family = "fine-tuning"
    paper = "Yu et al., Visual Tuning (survey), ACM CSUR 2024: fine-tuning"
    Config = FineTuneConfig
    deployed_size = "base"
    uses_teacher = False
    tasks = ("classification", "multilabel", "segmentation")

    @classmethod
    def stages(cls, config: FineTuneConfig, setting: Setting) -> list[Stage]:
        return [
            TrainStage(
                name="finetune",
                version=1,
                learner=FineTuneLearner,
                params={"label_smoothing": config.label_smoothing},
                feed=Feed(images="labelled", labels=True),
                recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget),
                trains="student",
                reads=("student",),
            )
        ]
