"""LN-tuning: only the weights and biases of the teacher's normalisation layers are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from methods.anatomy import NORMS
from methods.knobs import Range, knob
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class LNTuningConfig(TuningConfig):
    """Knobs of LN-tuning."""

    lr: float = knob(3e-3, "Peak learning rate.", search=Range(low=1e-4, high=3e-2, log=True), gt=0, le=100)


class LNTuningLearner(TuningLearner):
    """The teacher with the weights and biases of its layer (group, batch, RMS) norms trained, and the head.

    A ViT of width D and L blocks has L · 4D + 2D of them. Batch norm keeps its statistics: only its affine part is
    trained. Norms whose affine part is fixed by construction stay as they are.
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        norms = [m for m in network.modules() if isinstance(m, NORMS) and any(True for _ in m.parameters())]
        if not norms:
            raise ValueError(f"ln_tuning trains normalisation layers, and {type(network).__name__} has none to train.")
        for norm in norms:
            norm.requires_grad_(True)
        return network


class LNTuning(TunedTeacher):
    """Trains the affine parts of the teacher's normalisation layers on the labelled images."""

    name = "ln_tuning"
    family = "parameter"
    paper = "Qi et al., Parameter-Efficient Tuning on Layer Normalization, 2022; Frankle et al., ICLR 2021 (batch norm)"
    Config = LNTuningConfig
    learner = LNTuningLearner
