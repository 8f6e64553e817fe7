"""Full tuning of the teacher; with a fitted head to start from it is LP-FT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from methods.anatomy import distance_to_head
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
        "Further factor for each transformer block (stage of a CNN) away from the head.",
        search=Choice(values=(0.6, 0.75, 0.9, 1.0)),
        gt=0,
        le=1,
    )


class FullTuningLearner(TuningLearner):
    """Every weight of the teacher is trained, the head at the recipe's rate and what lies below it more slowly.

    Rate of a weight below the head: lr · backbone · layer_decay^n, n = 1 in the last block (stage) with the final norm,
    one more for each block before it, and the stem last. Normalisation layers with batch statistics keep those of
    pre-training; their weights and biases are trained. Positional embeddings and class tokens are not decayed.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        head = {id(p) for p in self.student.get_classifier().parameters()}  # type: ignore[operator]
        self.head = {name for name, p in self.student.named_parameters() if id(p) in head}

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        self.distance = distance_to_head(network) if params["layer_decay"] != 1 else {}
        return network.requires_grad_(True)

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().rehearsed(params), "backbone": 1.0, "layer_decay": 1.0 if params["layer_decay"] == 1 else 0.5}

    def lr_scale(self, name: str) -> float:
        inner = name.removeprefix("student.")
        if inner in self.head:
            return 1.0
        return self.params["backbone"] * self.params["layer_decay"] ** self.distance.get(inner, 0)


class FullTuning(TunedTeacher):
    """Trains every weight of the teacher on the labelled images.

    `head_init: probe` is linear probing, then fine-tuning (LP-FT); `zero` is plain fine-tuning. ViT-B/16 has 85.80 M
    parameters below the head.
    """

    name = "full_tuning"
    family = "fine-tuning"
    paper = "Yu et al., Visual Tuning (survey), ACM CSUR 2024: full fine-tuning; Kumar et al., LP-FT, ICLR 2022"
    Config = FullTuningConfig
    learner = FullTuningLearner
    version = 3  # its rates below the head are obeyed
