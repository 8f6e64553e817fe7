"""LoRA, rank-stabilised LoRA and DoRA of the teacher itself, by peft, with a trained head."""

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


class LoRAConfig(TuningConfig):
    """Knobs of LoRA."""

    variant: Literal["lora", "rslora", "dora"] = knob(
        "lora",
        "lora scales by alpha/rank, rslora by alpha/sqrt(rank), dora also learns each output's magnitude.",
        search=Choice(values=("lora", "rslora", "dora")),
    )
    rank: int = knob(8, "Rank of every update.", search=Choice(values=(1, 2, 4, 8, 16, 32, 64)), ge=1, le=1024)
    alpha_ratio: float = knob(2.0, "alpha / rank.", search=Choice(values=(0.5, 1.0, 2.0, 4.0)), gt=0, le=64)
    targets: Targets = knob(
        "all",
        "Transformer: fused qkv / attention / MLP / both. CNN: mlp is the 1x1 convolutions, all every ungrouped one.",
        search=Choice(values=("qkv", "attn", "mlp", "all")),
    )
    dropout: float = knob(0.0, "Dropout before the low-rank maps.", search=Choice(values=(0.0, 0.1)), ge=0, lt=1)


class LoRALearner(PeftLearner):
    """The frozen teacher with low-rank updates and a trained head, under the task's loss; logits [B, C].

    `y = W x + b + s · B A x`, s = alpha/rank (`lora`, `dora`) or alpha/√rank (`rslora`); A Kaiming, B zero.

    Trained: rank · (inputs + outputs) for each map. The fused qkv has one A for all three parts, so `qkv` trains
    rank · (D + 3D) a block. That is the paper's count for independent pairs on q and v, 2 · rank · (D + D), but not
    the paper's parametrisation: peft cannot adapt slices of a fused map.
    """

    @classmethod
    def wrapped(cls, params: Mapping[str, Any], network: nn.Module) -> list[str]:
        names = super().wrapped(params, network)
        for name in names:
            if set(getattr(network.get_submodule(name), "dilation", ())) - {1}:
                raise ValueError(f"peft's lora of a convolution cannot be dilated, and {name!r} is.")
        return names

    def peft_config(self, names: list[str], params: Mapping[str, Any]) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=params["rank"],
            lora_alpha=params["alpha_ratio"] * params["rank"],  # type: ignore[arg-type]
            lora_dropout=params["dropout"],
            target_modules=exactly(names),
            use_rslora=params["variant"] == "rslora",
            use_dora=params["variant"] == "dora",
        )


class LoRA(TunedTeacher):
    """Low-rank adaptation of the teacher on the labelled images; the merged teacher is deployed.

    The head is not among peft's targets: it is a plain linear layer, fitted first (`teacher_head`, as in linear probing
    then fine-tuning) or zero, and trained along.
    """

    name = "lora"
    family = "parameter"
    paper = "Hu et al., LoRA, ICLR 2022; Kalajdzievski, rsLoRA, 2023; Liu et al., DoRA, ICML 2024"
    Config = LoRAConfig
    learner = LoRALearner
    version = 4

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, LoRAConfig)
        assert setting.teacher is not None
        kind, targets = setting.teacher.kind, config.targets
        if (kind == "cnn" and targets in ("qkv", "attn")) or (kind == "other" and targets != "all"):
            return (
                f"targets {targets!r} names parts of a transformer block, and {setting.teacher.name} is of kind {kind}"
            )
        return super().invalid(config, setting)
