"""(IA)³: learned scales on the outputs (or inputs) of the teacher's maps, by peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from methods.by_peft import PeftLearner, exactly
from methods.contract import Setting
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.tuning import TunedTeacher, TuningConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class IA3Config(TuningConfig):
    """Knobs of (IA)³."""

    lr: float = knob(5e-3, "Peak learning rate.", search=Range(low=5e-4, high=5e-2, log=True), gt=0, le=100)
    scales: Literal["outputs", "paper"] = knob(
        "outputs",
        "outputs: of every map (CNN: every ungrouped convolution but the first); paper: qkv's outputs, fc2's inputs.",
        search=Choice(values=("outputs", "paper")),
    )


class IA3Learner(PeftLearner):
    """The frozen teacher with scales that start at 1: `y = l ⊙ (W x + b)`, or `y = W (l ⊙ x) + b`.

    `outputs` scales what qkv, proj, fc1 and fc2 give: 3D + D + 4D + D scalars a block at MLP ratio 4. `paper` follows
    the paper's three vectors on keys, values and the inner MLP: fused qkv's outputs (q is then scaled too, unlike
    there) and fc2's inputs, 3D + 4D a block. The scales are not decayed: 0 is not where they start.
    """

    @classmethod
    def wrapped(cls, params: Mapping[str, Any], network: nn.Module) -> list[str]:
        names = super().wrapped({"targets": "all"}, network)
        return [n for n in names if n.endswith((".attn.qkv", ".mlp.fc2"))] if params["scales"] == "paper" else names

    def peft_config(self, names: list[str], params: Mapping[str, Any]) -> PeftConfig:
        from peft import IA3Config as Tuner

        inner = [name for name in names if name.endswith(".mlp.fc2")] if params["scales"] == "paper" else []
        return Tuner(target_modules=exactly(names), feedforward_modules=exactly(inner) if inner else [])

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return super().decays(name, parameter) and ".ia3_l." not in name


class IA3(TunedTeacher):
    """Learned scales of the teacher's activations on the labelled images; the merged teacher is deployed."""

    name = "ia3"
    family = "parameter"
    paper = "Liu et al., Few-Shot Parameter-Efficient Fine-Tuning Is Better and Cheaper (IA3), NeurIPS 2022"
    Config = IA3Config
    learner = IA3Learner
    version = 3

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, IA3Config)
        assert setting.teacher is not None
        if config.scales == "paper" and setting.teacher.kind != "vit":
            kind = setting.teacher.kind
            return f"scales 'paper' names parts of a transformer block, and {setting.teacher.name} is of kind {kind}"
        return super().invalid(config, setting)
