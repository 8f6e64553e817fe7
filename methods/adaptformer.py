"""AdaptFormer: a bottleneck beside the MLP of every block of the frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from methods.anatomy import plain_blocks
from methods.contract import Structure
from methods.knobs import Choice, Range, knob
from methods.parts.adapters import Adapter, add_parallel_adapters
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class AdaptFormerConfig(TuningConfig):
    """Knobs of AdaptFormer."""

    bottleneck: int = knob(64, "Inner width.", search=Choice(values=(8, 32, 64)), ge=1, le=4096)
    scale: float = knob(
        0.1, "s, the fixed factor of the adapter.", search=Choice(values=(0.01, 0.05, 0.1, 0.2, 1.0)), gt=0, le=10
    )
    lr: float = knob(3e-3, "Peak learning rate.", search=Range(low=3e-4, high=3e-2, log=True), gt=0, le=100)


class AdaptFormerLearner(TuningLearner):
    """The frozen teacher with `x + MLP(LN2 x) + s · W_up ReLU(W_down x)` in every block.

    The adapter sees x before LN2, without a norm of its own; W_down starts Kaiming-uniform, all else at 0 [code].
    Trained: 2·D·b + b + D a block at bottleneck b. Where a block has a layer scale, the adapter is outside it
    [inferred]. The authors train with SGD, a rate of 0.1 · batch/256 and a batch norm before the head [code]; here it
    is AdamW, and the head is the plain one of every method.
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        plain_blocks(network, "adaptformer")
        add_parallel_adapters(network, params["bottleneck"], params["scale"])
        for module in network.modules():
            if isinstance(module, Adapter):
                module.requires_grad_(True)
        return network

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().rehearsed(params), "bottleneck": 1, "scale": 1.0}

    def structure(self) -> Structure:
        arguments = {"bottleneck": self.params["bottleneck"], "s": self.params["scale"]}
        return Structure("methods.parts.adapters:add_parallel_adapters", arguments)


class AdaptFormer(TunedTeacher):
    """Parallel adapters, trained on the labelled images; the teacher with its adapters is deployed."""

    name = "adaptformer"
    family = "adapter"
    paper = "Chen et al., AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, NeurIPS 2022"
    Config = AdaptFormerConfig
    deployed_size = "larger"
    learner = AdaptFormerLearner
    teacher_kinds = ("vit",)
