"""Side-tuning: a small network learns beside the frozen teacher, and their features are mixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import Batch, Deployed, Feed, Given, Learner, Recipe, Setting, Stage, Structure, TrainStage
from methods.heads import POOLED
from methods.knobs import Choice, Range, knob
from methods.parts.side import SideNetwork, SideTuned, side_tuned
from methods.ranks import gathered
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner

SIDE = "side"


class SideTuningConfig(TuningConfig):
    """Knobs of side-tuning."""

    side_init: Literal["distilled", "scratch"] = knob(
        "distilled",
        "The side network first learns the teacher's features on all images without labels, or starts at random.",
        search=Choice(values=("distilled", "scratch")),
    )
    width: int = knob(
        16,
        "Channels of the side network's first convolution; each further one has twice as many, at most 256.",
        search=Choice(values=(16, 32)),
        ge=4,
        le=256,
    )
    depth: int = knob(4, "Halving convolutions of the side network.", search=Choice(values=(3, 4, 5)), ge=2, le=6)
    alpha: float = knob(
        0.5, "Alpha at the start: the teacher's share of the features.", search=Choice(values=(0.5, 0.8)), gt=0, lt=1
    )
    alpha_rate: float = knob(
        10.0, "Factor on the learning rate of alpha's logit.", search=Choice(values=(1.0, 10.0)), gt=0, le=1000
    )
    side_lr: float = knob(
        3e-3,
        "Peak learning rate while the side network learns the teacher's features.",
        search=Range(low=1e-3, high=1e-2, log=True),
        gt=0,
        le=1,
    )
    side_budget: float = knob(0.5, "Share of the sweep's steps that this takes.", gt=0, le=4)
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=3e-4, high=1e-2, log=True), gt=0, le=1)


class ImitationLearner(Learner):
    """The side network alone: its result [B, D] against the teacher's pooled features, without labels.

    Mean squared error in units of the features' variance over the global batch, so that the loss of the best constant
    is about 1 [inferred].
    """

    steady = True

    student: SideNetwork

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = SideNetwork(params["features"], params["width"], params["depth"])

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        target = batch.outputs[POOLED.key].float()
        spread = gathered(target).var(0, correction=0).mean().clamp_min(1e-12)
        apart = F.mse_loss(self.student(batch.images).float(), target) / spread
        return {"loss": apart, "imitation": apart}

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.student.state_dict().items()}

    def deployed(self) -> Deployed:
        """The side network alone. The stage publishes its tensors, so nobody deploys it."""
        return Deployed(self.student.eval(), "teacher")


class SideTuningLearner(TuningLearner):
    """`R(x) = α · B(x) + (1 - α) · S(x)`, then a head: B frozen, α = sigmoid(logit), S and the head trained."""

    student: SideTuned

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        if params["side_init"] == "distilled":
            self.student.side.load_state_dict(dict(given.result(SIDE)))

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        classifier = network.get_classifier()  # type: ignore[operator]
        self.arguments = {"features": classifier.in_features, "width": params["width"], "depth": params["depth"]}
        student = side_tuned(network, **self.arguments)
        nn.init.constant_(student.mix, math.log(params["alpha"] / (1 - params["alpha"])))
        return student

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        alike = {"side_init": "scratch", "width": 16, "depth": 4, "alpha": 0.5, "alpha_rate": 1.0}
        return {**super().rehearsed(params), **alike}

    def structure(self) -> Structure:
        return Structure("methods.parts.side:side_tuned", self.arguments)

    def lr_scale(self, name: str) -> float:
        return self.params["alpha_rate"] if name == "student.mix" else 1.0

    def frozen(self) -> list[nn.Module]:
        return [self.student.base]


class SideTuning(TunedTeacher):
    """`R(x) = α · B(x) + (1 - α) · S(x)` [memory]: the teacher B stays as it is, S and α learn the task.

    Deployed are B and S together. What is deployed is rebuilt from one network of the sweep file, so B is the teacher
    and S a small convolutional network of this package, projected to B's width, not one of the sweep's students
    [inferred]. S starts from a distillation of B on all images, or at random [memory]; features are mixed after
    pooling, and the head sees the mixture [inferred].
    """

    name = "side_tuning"
    family = "remapping"
    paper = "Zhang et al., Side-Tuning, ECCV 2020"
    Config = SideTuningConfig
    deployed_size = "larger"
    learner = SideTuningLearner
    version = 2

    @classmethod
    def params(cls, config: Any, setting: Setting) -> dict[str, Any]:
        values = super().params(config, setting)
        return {name: value for name, value in values.items() if name not in ("side_lr", "side_budget")}

    @classmethod
    def stages(cls, config: Any, setting: Setting) -> list[Stage]:
        *earlier, tune = super().stages(config, setting)
        if config.side_init == "scratch":
            return [*earlier, tune]
        assert isinstance(tune, TrainStage)
        assert setting.teacher is not None
        imitate = TrainStage(
            name=SIDE,
            version=1,
            learner=ImitationLearner,
            params={"features": setting.teacher.width, "width": config.width, "depth": config.depth},
            feed=Feed(images="all", labels=False, outputs=(POOLED,)),
            recipe=Recipe(lr=config.side_lr, weight_decay=config.weight_decay, budget=config.side_budget),
            trains="teacher",
            publishes="tensors",
        )
        return [*earlier, imitate, replace(tune, inputs=(*tune.inputs, SIDE))]
