"""LoRA, rank-stabilised LoRA and DoRA of the teacher itself, by peft, with a trained head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from methods.contract import Setting
from methods.knobs import Choice, MethodConfig, knob
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner

Targets = Literal["qkv", "attn", "mlp", "all"]
BLOCK_MAPS: dict[str, str] = {
    "qkv": r"attn\.qkv",
    "attn": r"attn\.(qkv|proj)",
    "mlp": r"mlp\.(fc1|fc2)",
    "all": r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
}


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


def target_modules(network: nn.Module, targets: Targets) -> list[str]:
    """Full names of the modules of a timm network (its classifier already linear) that are adapted.

    In a transformer only maps inside `blocks`: peft's own matching by suffix would take the patch embedding's `proj`
    for an attention output. Elsewhere linear maps and convolutions, but not grouped ones, the first one (the stem) or
    the classifier.

    Raises:
        ValueError: if there are none.
    """
    names: list[str]
    if hasattr(network, "blocks") and any(re.search(r"\.attn\.qkv$", name) for name, _ in network.named_modules()):
        pattern = re.compile(rf"blocks\.\d+\.{BLOCK_MAPS[targets]}")
        names = [name for name, _ in network.named_modules() if pattern.fullmatch(name)]
    elif targets in ("qkv", "attn"):
        names = []
    else:
        head = network.get_classifier()  # type: ignore[operator]
        maps = [
            (name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and m is not head
        ]
        names = [name for name, m in maps[1:] if isinstance(m, nn.Linear) or _mixes(m, pointwise=targets == "mlp")]
    if not names:
        raise ValueError(f"The network has no module for the LoRA targets {targets!r}.")
    return names


class LoRALearner(TuningLearner):
    """The frozen teacher with low-rank updates and a trained head, under cross-entropy; logits [B, C].

    `y = W x + b + s · B A x`, s = alpha/rank (`lora`, `dora`) or alpha/√rank (`rslora`). The fused qkv has one A for
    all three parts: rank · (D + 3D) scalars, not three independent pairs. Batch norm stays in evaluation mode.
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=params["rank"],
            lora_alpha=params["alpha_ratio"] * params["rank"],  # type: ignore[arg-type]
            lora_dropout=params["dropout"],
            target_modules="|".join(map(re.escape, target_modules(network, params["targets"]))),
            use_rslora=params["variant"] == "rslora",
            use_dora=params["variant"] == "dora",
        )
        return get_peft_model(network, config)  # type: ignore[arg-type]

    def fold(self, network: nn.Module) -> nn.Module:
        return network.merge_and_unload()  # type: ignore[operator]

    def train(self, mode: bool = True) -> LoRALearner:
        super().train(mode)
        for name, module in self.student.named_modules():
            if "lora_dropout" in name and isinstance(module, nn.Dropout):  # ours, unlike the teacher's own
                module.train(mode)
        return self


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
    version = 2

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, LoRAConfig)
        assert setting.teacher is not None
        kind, targets = setting.teacher.kind, config.targets
        if (kind == "cnn" and targets in ("qkv", "attn")) or (kind == "other" and targets != "all"):
            return (
                f"targets {targets!r} names parts of a transformer block, and {setting.teacher.name} is of kind {kind}"
            )
        return None


def _mixes(module: nn.Module, pointwise: bool) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and (not pointwise or module.kernel_size == (1, 1))
