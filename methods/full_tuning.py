"""Full tuning of the teacher; with a fitted head to start from it is LP-FT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from methods.contract import Given
from methods.knobs import Choice, knob
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class FullTuningConfig(TuningConfig):
    """Knobs of full tuning."""

    lr: float = knob(1e-3, "Peak learning rate of the head.", search=Choice(values=(3e-4, 1e-3, 3e-3)), gt=0, le=1)
    backbone: float = knob(
        0.1, "Factor on the learning rate below the head.", search=Choice(values=(0.01, 0.03, 0.1, 1.0)), gt=0, le=1
    )
    layer_decay: float = knob(
        1.0,
        "Further factor for each transformer block (intermediate map of a CNN) away from the head.",
        search=Choice(values=(0.6, 0.75, 0.9, 1.0)),
        gt=0,
        le=1,
    )


def depth_of(name: str, blocks: int) -> int:
    """Blocks between the head and the parameter `name` of a timm network with that many (stages of) blocks."""
    match = re.search(r"(?:blocks|stages|layer)\.?(\d+)", name)
    if match:
        return max(blocks - 1 - int(match.group(1)), 0)
    return 0 if name.startswith(("norm", "fc_norm", "head", "conv_head", "bn2")) else blocks


class FullTuningLearner(TuningLearner):
    """Every weight of the teacher is trained, the head at the recipe's rate and what lies below it more slowly.

    Normalisation layers with batch statistics keep those of pre-training; their weights and biases are trained.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.blocks = len(getattr(self.student, "blocks", None) or getattr(self.student, "stages", None) or [])
        head = {id(p) for p in self.student.get_classifier().parameters()}  # type: ignore[operator]
        self.head = {name for name, p in self.named_parameters() if id(p) in head}

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        return network.requires_grad_(True)

    def lr_scale(self, name: str) -> float:
        if name in self.head:
            return 1.0
        inner = name.removeprefix("student.")
        return self.params["backbone"] * self.params["layer_decay"] ** depth_of(inner, self.blocks)


class FullTuning(TunedTeacher):
    """Trains every weight of the teacher on the labelled images.

    `head_init: probe` is linear probing, then fine-tuning (LP-FT); `zero` is plain fine-tuning.
    """

    name = "full_tuning"
    family = "fine-tuning"
    paper = "Yu et al., Visual Tuning (survey), ACM CSUR 2024: full fine-tuning; Kumar et al., LP-FT, ICLR 2022"
    Config = FullTuningConfig
    learner = FullTuningLearner
