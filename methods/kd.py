"""Knowledge distillation: the student learns the labels and the teacher's softened class probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import (
    Batch,
    Deployed,
    Feed,
    Given,
    Kind,
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
from methods.ranks import even_labels, weight_of
from methods.tuning import SoftTeacher, TeacherTuning, soft_targets, tuning_knob, tuning_refuses

LABELLED_DESCRIPTION = (
    "Share of each batch that has labels, where some images have none: rounded to whole portions, at least one and at "
    "most all but one. A portion is the greatest common divisor of 8 and half the batch: 8 images of a batch of 64."
)


class KDConfig(MethodConfig):
    """Knobs of logit distillation."""

    temperature: float = knob(
        4.0, "Softens both class distributions.", search=Range(low=1, high=8, log=True), ge=1, le=100
    )
    weight: float = knob(
        0.5, "λ: share of the teacher's term; 0 trains on labels alone.", search=Range(low=0, high=1), ge=0, le=1
    )
    labelled_fraction: float = knob(0.25, LABELLED_DESCRIPTION, search=Choice(values=(0.25, 0.5, 0.75)), ge=0, le=1)
    teacher_tuning: TeacherTuning = tuning_knob()
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1)
    weight_decay: float = knob(
        0.05, "AdamW's weight decay.", search=Choice(values=(0.0, 1e-4, 1e-3, 1e-2, 5e-2)), ge=0, le=1
    )
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, kind: Kind = "classification") -> Tensor:
    """`T² · KL(teacher ‖ student)` of logits [B, C] at temperature T, the mean over rows.

    T² keeps the size of its gradient about the same for any T (Hinton et al., §2.1 [memory]). For multi-label each
    class is a distribution of its own (yes or no), and the mean is over rows and classes [inferred]. For segmentation
    the teacher's logits [B, C, h, w] are interpolated to the student's [B, C, S, S]; each pixel is a row [inferred].
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    if kind == "segmentation":
        teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
        student, teacher = student.movedim(1, -1).flatten(0, -2), teacher.movedim(1, -1).flatten(0, -2)
    if kind == "multilabel":
        student, teacher = (
            torch.stack([student, -student], -1).flatten(0, 1) / 2,
            (torch.stack([teacher, -teacher], -1).flatten(0, 1) / 2),
        )
    divergence = F.kl_div(
        F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


def uneven_distillation_loss(student: Tensor, teacher: Tensor, temperature: float, kind: Kind) -> Tensor:
    """`distillation_loss` where the ranks of a group may have another number of rows each; every rank must ask.

    The mean over ranks is the mean over all of their rows. 0 with a graph where this rank has none.
    """
    with even_labels(False):  # which tells of labels, not of these rows
        weight = weight_of(torch.full((), len(student), device=student.device))  # filled there, not sent
    if not len(student):
        return student.sum() * 0.0
    return distillation_loss(student, teacher, temperature, kind) * weight


class KDLearner(Learner):
    """A student that trains on `(1 - λ) · CE + λ · T² · KL(teacher ‖ student)`.

    CE sees the rows (pixels) with a label, KL every one. The teacher's logits [B, C] are `teacher_head` on its stored
    pooled features [B, D] (of pixels: on its map [B, D, h, w]), or the teacher's own, tuned or not.
    """

    steady = True

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = self.network(params, given)
        self.temperature: float = params["temperature"]
        self.weight: float = params["weight"]
        self.kind: Kind = given.kind
        self.soft_teacher = SoftTeacher(params, given)

    def network(self, params: Mapping[str, Any], given: Given) -> nn.Module:
        """What is trained: the student as it comes, unless a subclass starts it otherwise."""
        return given.student

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return self.distillation(self.student(batch.images), batch)

    def distillation(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss of the student's logits [B, C] on `batch`."""
        assert batch.labels is not None
        ce = supervised_loss(logits, batch.labels, self.kind)
        kl = distillation_loss(logits, self.soft_teacher(batch.outputs), self.temperature, self.kind)
        return {"loss": (1 - self.weight) * ce + self.weight * kl, "ce": ce, "kd": kl}

    def deployed(self) -> Deployed:
        return Deployed(self.student.eval(), "student", structure=structure_of(self.student))


class KD(Method):
    """Logit distillation: `(1 - λ) · CE + λ · T² · KL(teacher ‖ student)`.

    A teacher mostly has no classes of the task, so it first gets a linear head on the labelled images (`teacher_head`,
    shared by all trials) [inferred], or is first tuned (`teacher_tuning`); one that was trained on these classes may
    teach by its own head. So unlabelled images teach too.
    """

    name = "kd"
    family = "remapping"
    paper = "Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015"
    Config = KDConfig
    teacher_kinds: ClassVar[tuple[str, ...]] = ("vit", "cnn", "clip", "other")
    tasks: ClassVar[tuple[Kind, ...]] = ("classification", "multilabel", "segmentation")
    deployed_size: ClassVar[Literal["base", "larger", "own"]] = "base"

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        teacher = setting.teacher
        if setting.task.kind == "segmentation" and teacher is not None and teacher.kind == "clip":
            return f"{cls.name} reads a map of the teacher for segmentation, and {teacher.name} gives an embedding only"
        return super().refuses(setting)

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, KDConfig)
        return tuning_refuses(config.teacher_tuning, setting, own=True)

    @classmethod
    def stages(cls, config: KDConfig, setting: Setting) -> list[Stage]:
        targets = soft_targets(config.teacher_tuning, setting)
        return [
            *targets.stages,
            TrainStage(
                name="distil",
                version=2,
                learner=KDLearner,
                params={"temperature": config.temperature, "weight": config.weight, **targets.params},
                feed=Feed(
                    images="all",
                    labels=True,
                    labelled_fraction=config.labelled_fraction,
                    outputs=targets.outputs,
                    of=targets.of,
                ),
                recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget),
                trains="student",
                reads=("student",),
                inputs=targets.inputs,
            ),
        ]
