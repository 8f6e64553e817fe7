"""OFT and BOFT: rotations of the inputs of the teacher's maps, block by block, by peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from methods.by_peft import PeftLearner, Targets, exactly
from methods.contract import Setting
from methods.knobs import Choice, MethodConfig, knob
from methods.tuning import TunedTeacher, TuningConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class OFTConfig(TuningConfig):
    """Knobs of OFT."""

    variant: Literal["oft", "boft"] = knob(
        "oft",
        "oft: block rotations. boft: the same by a full generator, and a learned scale of each output; slower.",
        search=Choice(values=("oft", "boft")),
    )
    block: int = knob(
        8, "Side of the rotated blocks; divides the maps' inputs.", search=Choice(values=(4, 8, 16)), ge=2, le=256
    )
    targets: Targets = knob(
        "all", "Fused qkv / attention / MLP / both.", search=Choice(values=("qkv", "attn", "mlp", "all"))
    )


class OFTLearner(PeftLearner):
    """The frozen teacher with `y = W R x + b`, R block-diagonal and orthogonal: Cayley's map of a skew Q, at first 0.

    Trained for each map with n inputs and blocks of side k: n/k · k(k-1)/2 (`oft`), or n/k · k² and one scale an output
    (`boft`: `y = s ⊙ (W R x) + b`). Cayley's map is the exact one, not peft's truncated series. `boft` has one
    butterfly factor, for which its R is OFT's: peft has more of them only with a CUDA extension that it compiles by
    itself, and results must not depend on the machine. It also holds a square matrix of each map's inputs.
    """

    @classmethod
    def wrapped(cls, params: Mapping[str, Any], network: nn.Module) -> list[str]:
        names, size = super().wrapped(params, network), params["block"]
        for name in names:
            inputs = network.get_submodule(name).in_features
            if inputs % size:  # type: ignore[operator]  # peft would silently take another size
                raise ValueError(f"block is {size} and does not divide the {inputs} inputs of {name!r}.")
        return names

    def peft_config(self, names: list[str], params: Mapping[str, Any]) -> PeftConfig:
        from peft import BOFTConfig
        from peft import OFTConfig as Tuner

        size = params["block"]
        if params["variant"] == "boft":
            import peft.tuners.boft.layer

            # Else peft would compile its CUDA extension here, and a trial killed meanwhile would leave it locked.
            peft.tuners.boft.layer._FBD_CUDA = False  # type: ignore[assignment]
            return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1, target_modules=exactly(names))
        return Tuner(r=0, oft_block_size=size, use_cayley_neumann=False, target_modules=exactly(names))

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return super().decays(name, parameter) and ".boft_s." not in name


class OFT(TunedTeacher):
    """Orthogonal tuning of the teacher on the labelled images; the merged teacher is deployed."""

    name = "oft"
    family = "parameter"
    paper = "Qiu et al., Controlling Text-to-Image Diffusion by OFT, NeurIPS 2023; Liu et al., BOFT, ICLR 2024"
    Config = OFTConfig
    learner = OFTLearner
    version = 3
    teacher_kinds = ("vit",)

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, OFTConfig)
        assert setting.teacher is not None
        if setting.teacher.width % config.block:
            return f"block {config.block} does not divide the width {setting.teacher.width} of {setting.teacher.name}"
        return super().invalid(config, setting)
