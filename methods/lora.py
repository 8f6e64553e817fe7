"""LoRA, rank-stabilised LoRA and DoRA of the teacher itself, by peft, with a trained head."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from methods.contract import (
    Batch,
    Deployed,
    Feed,
    Given,
    Learner,
    Method,
    Recipe,
    Setting,
    Stage,
    TrainStage,
    masked_cross_entropy,
)
from methods.heads import TEACHER_HEAD, load_head, teacher_head_stage
from methods.knobs import Choice, MethodConfig, Range, knob

Targets = Literal["qkv", "attn", "mlp", "all"]
BLOCK_MAPS: dict[str, str] = {
    "qkv": r"attn\.qkv",
    "attn": r"attn\.(qkv|proj)",
    "mlp": r"mlp\.(fc1|fc2)",
    "all": r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
}


class LoRAConfig(MethodConfig):
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
    head_init: Literal["probe", "zero"] = knob(
        "probe",
        "The head starts as a fitted linear probe, or at zero.",
        search=Choice(values=("probe", "zero")),
    )
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-5, high=1e-2, log=True), gt=0, le=1)
    weight_decay: float = knob(
        1e-2, "AdamW's weight decay.", search=Choice(values=(0.0, 1e-4, 1e-3, 1e-2, 5e-2)), ge=0, le=1
    )
    budget: float = knob(0.5, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


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


class LoRALearner(Learner):
    """The frozen teacher with low-rank updates and a trained head, under cross-entropy; logits [B, C].

    `y = W x + b + s · B A x`, s = alpha/rank (`lora`, `dora`) or alpha/√rank (`rslora`). The fused qkv has one A for
    all three parts: rank · (D + 3D) scalars, not three independent pairs. Batch norm stays in evaluation mode.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(params, given)
        network = given.teacher
        if params["head_init"] == "probe":
            head = given.result(TEACHER_HEAD)
            load_head(network, head["weight"], head["bias"])
        else:
            network.reset_classifier(given.num_classes)  # type: ignore[operator]
            for tensor in network.get_classifier().parameters():  # type: ignore[operator]
                nn.init.zeros_(tensor)
        config = LoraConfig(
            r=params["rank"],
            lora_alpha=params["alpha_ratio"] * params["rank"],  # type: ignore[arg-type]
            lora_dropout=params["dropout"],
            target_modules="|".join(map(re.escape, target_modules(network, params["targets"]))),
            use_rslora=params["variant"] == "rslora",
            use_dora=params["variant"] == "dora",
        )
        classifier = network.get_classifier()  # type: ignore[operator]
        self.student = get_peft_model(network, config)  # type: ignore[arg-type]
        classifier.requires_grad_(True)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        ce = masked_cross_entropy(self.student(batch.images).float(), batch.labels)
        return {"loss": ce, "ce": ce}

    def deployed(self) -> Deployed:
        network = copy.deepcopy(self.student).merge_and_unload()  # type: ignore[operator]
        return Deployed(network=network.eval(), base="teacher")

    def frozen(self) -> list[nn.Module]:
        return [self.student]

    def train(self, mode: bool = True) -> LoRALearner:
        super().train(mode)
        for name, module in self.student.named_modules():
            if "lora_dropout" in name and isinstance(module, nn.Dropout):  # ours, unlike the teacher's own
                module.train(mode)
        return self


class LoRA(Method):
    """Low-rank adaptation of the teacher on the labelled images; the merged teacher is deployed.

    The head is not among peft's targets: it is a plain linear layer, fitted first (`teacher_head`, as in linear probing
    then fine-tuning) or zero, and trained along.
    """

    name = "lora"
    family = "parameter"
    paper = "Hu et al., LoRA, ICLR 2022; Kalajdzievski, rsLoRA, 2023; Liu et al., DoRA, ICML 2024"
    Config = LoRAConfig
    deploys = "teacher"

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

    @classmethod
    def stages(cls, config: LoRAConfig, setting: Setting) -> list[Stage]:
        from_probe = config.head_init == "probe"
        params = config.model_dump(
            include={"variant", "rank", "alpha_ratio", "targets", "dropout", "head_init"}, mode="json"
        )
        train = TrainStage(
            name="adapt",
            version=1,
            learner=LoRALearner,
            params=params,
            feed=Feed(images="labelled", labels=True),
            recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget),
            trains="teacher",
            reads=("teacher",),
            inputs=(TEACHER_HEAD,) if from_probe else (),
        )
        return [teacher_head_stage(), train] if from_probe else [train]


def _mixes(module: nn.Module, pointwise: bool) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and (not pointwise or module.kernel_size == (1, 1))
