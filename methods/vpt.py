"""Visual prompt tuning: learned tokens in the frozen teacher, at its first block (shallow) or at every one (deep)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from methods.contract import Recipe, Setting, Structure
from methods.knobs import Choice, Range, knob
from methods.parts.prompts import Prompted, add_prompts
from methods.tuning import TunedTeacher, TuningConfig, TuningLearner


class VPTConfig(TuningConfig):
    """Knobs of visual prompt tuning."""

    depth: Literal["shallow", "deep"] = knob(
        "deep",
        "Prompts at the first block, or new ones at every block.",
        search=Choice(values=("shallow", "deep")),
    )
    prompts: int = knob(
        10,
        "Prompts at a block; the sequence gets longer by as many.",
        search=Choice(values=(1, 5, 10, 50)),
        ge=1,
        le=500,
    )
    dropout: float = knob(0.0, "Dropout of the prompts.", search=Choice(values=(0.0, 0.1)), ge=0, lt=1)
    optimizer: Literal["adamw", "sgd"] = knob(
        "adamw", "The authors tune with sgd and a rate of 0.05 to 50 times batch/256; adamw needs far less."
    )
    lr: float = knob(1e-2, "Peak learning rate.", search=Range(low=1e-3, high=1e-1, log=True), gt=0, le=100)


def folds(network: nn.Module) -> bool:
    """Whether prompts at the first block are exactly what timm calls register tokens of this network.

    They are where register tokens meet no norm before that block and are not pooled, and where the class builds its
    tokens as `VisionTransformer` does: [class; registers; patches].
    """
    return (
        isinstance(network, VisionTransformer)
        and type(network)._pos_embed is VisionTransformer._pos_embed
        and isinstance(network.norm_pre, nn.Identity)
        and not network.pool_include_prefix
    )


@torch.no_grad()
def as_registers(network: VisionTransformer) -> VisionTransformer:
    """Turns the prompts of the first block into register tokens, in place; their positional embeddings are 0.

    Any register tokens that the network has stay in front of them.
    """
    blocks = network.blocks
    first = blocks[0]
    assert isinstance(first, Prompted)
    assert first.prompts is not None
    prompts = first.prompts
    for i, block in enumerate(blocks):
        blocks[i] = block.block if isinstance(block, Prompted) else block
    at, count = network.num_prefix_tokens, prompts.shape[1]
    own = [] if network.reg_token is None else [network.reg_token]
    network.reg_token = nn.Parameter(torch.cat([*own, prompts], dim=1))
    if network.pos_embed is not None and not network.no_embed_class:
        rows = network.pos_embed
        none = rows.new_zeros(1, count, rows.shape[-1])
        network.pos_embed = nn.Parameter(torch.cat([rows[:, :at], none, rows[:, at:]], dim=1))
    network.num_reg_tokens += count
    network.num_prefix_tokens += count
    return network


class VPTLearner(TuningLearner):
    """The frozen teacher with trained prompts and a trained head; logits [B, C].

    `shallow`: the first block sees [class; P; patches], and the prompts travel on: p · D scalars. `deep`: block l sees
    [class; P_l; patches], and its prompt outputs are discarded: L · p · D. The prompts have no positional embedding and
    start as U(-v, v), v = √(6 / (3 · patch² + D)) [code]; on a convolutional stem we read 3 · patch² as the inputs of
    the patch map [inferred]. They are not decayed, and all of the teacher stays in evaluation mode [code].

    Shallow prompts are deployed as timm's register tokens, wherever that is exactly the same (`folds`).
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        if not isinstance(network, VisionTransformer):
            raise ValueError(f"vpt serves timm's VisionTransformer, and the teacher is a {type(network).__name__}.")
        self.deep: bool = params["depth"] == "deep"
        self.registers = 0 if self.deep or not folds(network) else network.num_reg_tokens + params["prompts"]
        add_prompts(network, params["prompts"], self.deep, params["dropout"])
        for block in network.blocks:
            if isinstance(block, Prompted) and block.prompts is not None:
                block.prompts.requires_grad_(True)
        return network

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().rehearsed(params), "prompts": 1, "dropout": 0.0}

    def fold(self, network: nn.Module) -> nn.Module:
        if self.registers:
            assert isinstance(network, VisionTransformer)
            return as_registers(network)
        for module in network.modules():
            if isinstance(module, Prompted):
                module.drop = None
        return network

    def changes(self) -> dict[str, Any]:
        return {"reg_tokens": self.registers} if self.registers else {}

    def structure(self) -> Structure | None:
        if self.registers:
            return None
        return Structure("methods.parts.prompts:add_prompts", {"prompts": self.params["prompts"], "deep": self.deep})

    def dropouts(self) -> list[nn.Module]:
        return [m.drop for m in self.student.modules() if isinstance(m, Prompted) and m.drop is not None]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return super().decays(name, parameter) and not name.endswith(".prompts")


class VPT(TunedTeacher):
    """Visual prompt tuning on the labelled images; the teacher with its prompts is deployed.

    Prompts need a far higher learning rate than weights do: 10 to 1000 times with SGD [code]. The default is ours, for
    AdamW.
    """

    name = "vpt"
    family = "prompt"
    paper = "Jia et al., Visual Prompt Tuning, ECCV 2022"
    Config = VPTConfig
    deployed_size = "larger"
    learner = VPTLearner
    version = 2
    teacher_kinds = ("vit",)

    @classmethod
    def params(cls, config: VPTConfig, setting: Setting) -> dict[str, Any]:
        params = super().params(config, setting)
        del params["optimizer"]
        return params

    @classmethod
    def recipe(cls, config: VPTConfig) -> Recipe:
        return Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget, optimizer=config.optimizer)
