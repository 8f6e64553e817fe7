"""Sequential adapters: a bottleneck after the branches of every block of the frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from methods.anatomy import plain_blocks
from methods.contract import Structure
from methods.knobs import Choice, Range, knob
from methods.parts.adapters import Adapter, add_adapters
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class AdapterConfig(TuningConfig):
    """Knobs of sequential adapters."""

    variant: Literal["pfeiffer", "houlsby"] = knob(
        "pfeiffer",
        "After the MLP, or after attention and MLP.",
        search=Choice(values=("pfeiffer", "houlsby")),
    )
    bottleneck: int = knob(
        32, "Inner width; the VPT repository takes an eighth of D.", search=Choice(values=(8, 32, 64)), ge=1, le=4096
    )
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=100)


class AdapterLearner(TuningLearner):
    """The frozen teacher with `h ← h + W_up σ(W_down h)` on what a branch adds to the residual stream.

    `pfeiffer`: the MLP's branch, `houlsby`: the attention's too. σ is GELU, W_up starts at 0. Trained for each adapter
    of bottleneck b: 2·D·b weights, which is the survey's 2·D·(D/8) at b = D/8, and b + D biases. Where a block has a
    layer scale the adapter comes after it, so that its own output is not scaled down [inferred].
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        plain_blocks(network, "adapter")
        self.branches = ["mlp"] if params["variant"] == "pfeiffer" else ["attn", "mlp"]
        add_adapters(network, params["bottleneck"], self.branches)  # type: ignore[arg-type]
        for module in network.modules():
            if isinstance(module, Adapter):
                module.requires_grad_(True)
        return network

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().rehearsed(params), "bottleneck": 1}

    def structure(self) -> Structure:
        arguments = {"bottleneck": self.params["bottleneck"], "branches": self.branches}
        return Structure("methods.parts.adapters:add_adapters", arguments)


class SequentialAdapter(TunedTeacher):
    """Sequential adapters, trained on the labelled images; the teacher with its adapters is deployed."""

    name = "adapter"
    family = "adapter"
    paper = "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019; Pfeiffer et al., EMNLP 2020"
    Config = AdapterConfig
    deployed_size = "larger"
    learner = AdapterLearner
    teacher_kinds = ("vit",)
