"""IRF, image re-representation fine-tuning: the first half of OTA tunes the teacher by way of upstream codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from methods.contract import Feed, ImageStage, Recipe, Setting, Stage, TrainStage
from methods.full_tuning import FullTuning, FullTuningLearner
from methods.generators.makers import Rerepresentation
from methods.heads import TEACHER_HEAD, teacher_head_stage
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.tuning import TunedTeacher

TRANSFER = "transfer"
DELIVER = "deliver"
CALIBRATE = "calibrate"
Mode = Literal["irf", "lp_ft", "ft"]
MODE_DESCRIPTION = (
    "irf: the head is fitted on re-represented images, then all is tuned; lp_ft: fitted on the images themselves; "
    "ft: all is tuned from a fresh head."
)


class IRFConfig(MethodConfig):
    """Knobs of IRF."""

    mode: Mode = knob("irf", MODE_DESCRIPTION)
    lr: float = knob(
        1e-3, "Calibration: peak learning rate of the head.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1
    )
    backbone: float = knob(
        0.1,
        "Calibration: factor on the learning rate below the head.",
        search=Choice(values=(0.01, 0.03, 0.1)),
        gt=0,
        le=1,
    )
    layer_decay: float = knob(
        1.0,
        "Calibration: further factor for each transformer block (stage of a CNN) away from the head.",
        search=Choice(values=(0.6, 0.75, 0.9, 1.0)),
        gt=0,
        le=1,
    )
    weight_decay: float = knob(
        0.05, "AdamW's weight decay.", search=Choice(values=(0.0, 1e-4, 1e-3, 1e-2, 5e-2)), ge=0, le=1
    )
    budget: float = knob(0.5, "Share of the sweep's steps that calibration takes.", gt=0, le=4)


class IRF(TunedTeacher):
    """Tunes the teacher in the four stages of the paper's figure [fig]; the calibrated teacher is deployed.

    1. Priming: a VQGAN and a latent transformer on upstream images. The provider does this once: it is the sweep
       file's `upstream.vq`.
    2. Assembling (stage `transfer`): each labelled image x becomes x' = G(Q(E(x))), spelt in upstream codes.
    3. Delivering (`deliver`): with the backbone frozen, the head is learned on x' and the labels of x. The paper
       trains it by the task loss; ours is the exact minimum of that loss on the frozen features of x', its L2 penalty
       chosen by cross-validation, so there is no learning rate and no number of epochs to search [inferred].
    4. Calibration (`calibrate`): backbone and head are tuned on the true images, from where stage 3 left them, by the
       task loss. Learning rates, schedule and layer decay were not found in the paper: AdamW at 1e-3 for the head and
       10 to 100 times less below it, weight decay 0.05, cosine with a tenth of warm-up [inferred].

    The modes `lp_ft` and `ft` are the ablations: the same calibration without stage 2, and without 2 and 3. Throwing
    the head of stage 3 away before calibration would undo all that stage 3 did, and so is `ft` too.
    """

    name = "irf"
    family = "fine-tuning"
    paper = "Wang et al., OTA: One to Transfer All, 2021 (arXiv 2111.12386): image re-representation fine-tuning"
    Config = IRFConfig
    learner = FullTuningLearner
    version = FullTuning.version  # their learner is one
    upstream = ("vq",)

    @classmethod
    def params(cls, config: Any, setting: Setting) -> dict[str, Any]:
        assert isinstance(config, IRFConfig)
        head: Mapping[str, Any] = {"head_init": "zero"}
        if config.mode != "ft":
            head = {"head_init": "probe", "head": DELIVER if config.mode == "irf" else TEACHER_HEAD}
        return {**head, "backbone": config.backbone, "layer_decay": config.layer_decay}

    @classmethod
    def recipe(cls, config: Any) -> Recipe:
        return Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget)

    @classmethod
    def stages(cls, config: Any, setting: Setting) -> list[Stage]:
        assert isinstance(config, IRFConfig)
        assert setting.teacher is not None
        head: list[Stage] = []
        probe = teacher_head_stage(setting.task.kind)
        if config.mode == "irf":
            transfer = ImageStage(
                name=TRANSFER,
                version=1,
                maker=Rerepresentation,
                size=setting.teacher.image_size,
                seeded=False,
                reads=("vq",),
            )
            head = [transfer, replace(probe, name=DELIVER, pool=TRANSFER)]
        elif config.mode == "lp_ft":
            head = [probe]
        calibrate = TrainStage(
            name=CALIBRATE,
            version=cls.version,
            learner=cls.learner,
            params=cls.params(config, setting),
            feed=Feed(images="labelled", labels=True),
            recipe=cls.recipe(config),
            trains="teacher",
            reads=("teacher",),
            inputs=(head[-1].name,) if head else (),
        )
        return [*head, calibrate]
