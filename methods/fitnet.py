"""FitNets: the student first imitates an intermediate map of the teacher, then its class probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from methods.contract import Batch, Given, Setting, Stage, TrainStage
from methods.kd import KD, KDConfig, KDLearner
from methods.knobs import Choice, Range, knob
from methods.outputs import Output, intermediate_channels, read_outputs


class FitNetConfig(KDConfig):
    """Knobs of FitNets: those of its second stage are logit distillation's."""

    hint_layer: float = knob(
        0.5,
        "Depth of the compared maps as a share of each network's intermediate maps; 1 is the last map.",
        search=Choice(values=(0.25, 0.5, 0.75, 1.0)),
        gt=0,
        le=1,
    )
    hint_share: float = knob(
        0.3, "Share of the steps that imitate the map.", search=Range(low=0.1, high=0.5), ge=0, le=1
    )
    grid: int = knob(
        4, "Maps are averaged onto a raster with this side.", search=Choice(values=(1, 2, 4, 8)), ge=1, le=8
    )


def layer_at(fraction: float, count: int) -> int:
    """The 0-based map at `fraction` in (0, 1] of `count` maps."""
    return min(max(math.ceil(fraction * count) - 1, 0), count - 1)


class FitNetLearner(KDLearner):
    """The student with a regressor; hints first, logit distillation after `hint_share` of the steps.

    Hint loss (Eq. 3 [memory]): `½ · mean (r(v) - u)²`, v [B, Cs, g, g] the student's map, u [B, Ct, g, g] the
    teacher's, r a 1×1 convolution. The paper sums over elements, ours is a mean, so that the learning rate does not
    depend on the size of the map [inferred].
    """

    steady = False  # hints reach the network up to one layer only, and later losses no regressor

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.hint_share: float = params["hint_share"]
        self.mine = Output("map", layer=params["student_layer"], grid=params["grid"])
        self.theirs = Output("map", layer=params["teacher_layer"], grid=params["grid"])
        inputs = intermediate_channels(self.student)[self.mine.layer]
        self.regressor = nn.Conv2d(inputs, params["teacher_channels"], kernel_size=1)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        if progress >= self.hint_share:
            return super().loss(batch, progress)
        own = read_outputs(self.student, batch.images, [self.mine])
        hint = self.hint_loss(self.regressor(own[self.mine.key]), batch.outputs[self.theirs.key])
        return {"loss": hint, "hint": hint}

    @staticmethod
    def hint_loss(guess: Tensor, target: Tensor) -> Tensor:
        """Half the mean squared error of maps [B, C, g, g]."""
        return 0.5 * (guess.float() - target.float()).square().mean()


class FitNet(KD):
    """Hints from a middle layer of the teacher, then logit distillation.

    The paper trains in two stages: the student up to its guided layer against the teacher's hint layer through a
    convolutional regressor (Eq. 3), then the whole student on labels and softened logits (Eq. 2), the weight of the
    latter falling linearly [memory]. Ours runs both in one training stage under one learning rate schedule: the first
    `hint_share` of the steps are the hint's, and λ stays constant [inferred]. Maps are brought onto one raster by
    averaging, so the regressor is a 1×1 convolution [inferred]. During hints, what lies above the guided layer gets no
    gradient and does not move (batch statistics apart). The regressor is not deployed.
    """

    name = "fitnet"
    paper = "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015"
    Config = FitNetConfig

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        for network in (setting.teacher, setting.student):
            if network is not None and network.intermediates == 0:
                return f"{cls.name} compares intermediate maps, and {network.name} gives none"
        return super().refuses(setting)

    @classmethod
    def stages(cls, config: KDConfig, setting: Setting) -> list[Stage]:
        assert isinstance(config, FitNetConfig)
        teacher, student = setting.teacher, setting.student
        assert teacher is not None
        assert student is not None
        *earlier, distil = super().stages(config, setting)
        assert isinstance(distil, TrainStage)
        theirs = layer_at(config.hint_layer, teacher.intermediates)
        params = {
            **distil.params,
            "hint_share": config.hint_share,
            "grid": config.grid,
            "teacher_layer": theirs,
            "teacher_channels": teacher.channels[theirs],
            "student_layer": layer_at(config.hint_layer, student.intermediates),
        }
        outputs = (*distil.feed.outputs, Output("map", layer=theirs, grid=config.grid))
        return [
            *earlier,
            replace(distil, learner=FitNetLearner, params=params, feed=replace(distil.feed, outputs=outputs)),
        ]
