"""BitFit: only the biases of the teacher are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from methods.knobs import Range, knob
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class BitFitConfig(TuningConfig):
    """Knobs of BitFit."""

    lr: float = knob(3e-3, "Peak learning rate.", search=Range(low=1e-4, high=3e-2, log=True), gt=0, le=100)


class BitFitLearner(TuningLearner):
    """The teacher with all its biases trained (of maps, convolutions, norms and the patch embedding), and the head.

    A ViT of width D and L blocks at MLP ratio 4 has L · 11D + 2D of them. Batch norm keeps its statistics.
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
        if len(biases) <= 1:  # the head's
            raise ValueError(f"bitfit trains biases, and {type(network).__name__} has none below its head.")
        for bias in biases:
            bias.requires_grad_(True)
        return network


class BitFit(TunedTeacher):
    """Trains the teacher's biases on the labelled images."""

    name = "bitfit"
    family = "parameter"
    paper = "Ben Zaken et al., BitFit, ACL 2022"
    Config = BitFitConfig
    learner = BitFitLearner
