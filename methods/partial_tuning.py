"""Partial tuning: the last blocks of the teacher and its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from methods.anatomy import distance_to_head, is_transformer
from methods.contract import Setting
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class PartialTuningConfig(TuningConfig):
    """Knobs of partial tuning."""

    last: int = knob(
        1, "Blocks (stages of a CNN) that are trained, from the end.", search=Choice(values=(1, 2, 4)), ge=1, le=100
    )
    lr: float = knob(3e-4, "Peak learning rate.", search=Range(low=3e-5, high=3e-3, log=True), gt=0, le=100)


class PartialTuningLearner(TuningLearner):
    """The teacher with its last k transformer blocks trained, and the head.

    A block of width D at MLP ratio 4 has 12·D² + 13·D parameters; the final norm stays frozen. In a CNN the last k
    stages are trained and all that follows them; the stem counts as the first stage. Batch norm keeps its statistics.
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        distance = distance_to_head(network)
        last = params["last"]
        if last > max(distance.values()):
            raise ValueError(f"last is {last}, and {type(network).__name__} has {max(distance.values())} stages.")
        only = "blocks." if is_transformer(network) else ""
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(distance[name] <= last and name.startswith(only))
        return network


class PartialTuning(TunedTeacher):
    """Trains the last blocks of the teacher and its head on the labelled images (Partial-k)."""

    name = "partial_tuning"
    family = "fine-tuning"
    paper = "Yosinski et al., NeurIPS 2014; Partial-k in Jia et al., Visual Prompt Tuning, ECCV 2022"
    Config = PartialTuningConfig
    learner = PartialTuningLearner
    version = 2
    teacher_kinds = ("vit", "cnn")

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, PartialTuningConfig)
        assert setting.teacher is not None
        teacher = setting.teacher
        there = teacher.blocks or teacher.intermediates
        if config.last > there:
            return f"last is {config.last}, and {teacher.name} has {there} {'blocks' if teacher.blocks else 'stages'}"
        return super().invalid(config, setting)
