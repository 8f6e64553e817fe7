"""Net2Net: the teacher grows wider and deeper without changing what it computes, then learns the task."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from methods.contract import Setting, Structure
from methods.full_tuning import FullTuningConfig, FullTuningLearner
from methods.knobs import Choice, MethodConfig, knob
from methods.parts.grown import hidden_units, outputs_of, resized
from methods.tuning import TunedTeacher

# By class of residual block: the last layers of its branches. At zero the block passes its input on.
_LAST: dict[type[nn.Module], tuple[str, ...]] = {
    Block: ("attn.proj", "mlp.fc2"),
    ConvNeXtBlock: ("mlp.fc2",),
    InvertedResidual: ("bn3",),
    EdgeResidual: ("bn2",),
    BasicBlock: ("bn2",),
    Bottleneck: ("bn3",),
}


class Net2NetConfig(FullTuningConfig):
    """Knobs of Net2Net: those of the training are full tuning's."""

    width: float = knob(
        1.5,
        "Hidden units of each block (MLP, expansion, bottleneck) as a multiple of the teacher's.",
        search=Choice(values=(1.0, 1.25, 1.5, 2.0)),
        ge=1,
        le=4,
    )
    deeper: int = knob(1, "Blocks that are inserted.", search=Choice(values=(0, 1, 2, 4)), ge=0, le=24)
    noise: float = knob(
        0.01,
        "Noise that tells copies of a unit apart, as a share of the standard deviation of the weights that read them.",
        search=Choice(values=(0.0, 0.01, 0.02)),
        ge=0,
        le=1,
    )


def replication(units: int, wider: int) -> Tensor:
    """[wider] which of `units` each new unit copies: itself for the first `units`, a random one for the others.

    Raises:
        ValueError: if `wider` is less than `units`: nothing can then be preserved.
    """
    if wider < units:
        raise ValueError(f"Net2Wider cannot go from {units} units to {wider}: it only adds units.")
    return torch.cat([torch.arange(units), torch.randint(0, units, (wider - units,))])


@torch.no_grad()
def net2wider(
    giving: Sequence[nn.Module], reading: Sequence[nn.Module], wider: int, noise: float = 0.0
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Net2WiderNet: copies of layers around a hidden layer that has `wider` units and computes the same.

    Units are replicated by a random map; the weights that read a unit are divided by its number of copies. Noise is
    added to those weights so that it sums to 0 over the copies of a unit: the copies learn apart, and the function
    stays. The paper adds a little noise to the copies' own weights, which changes it [memory].

    Args:
        giving: layers whose output channels are the hidden units: linear maps, convolutions (full or depthwise),
            and batch norms, whose statistics are replicated too.
        reading: layers whose input channels they are: linear maps or full convolutions.
        wider: number of units, at least as many as there are.
        noise: as a share of the standard deviation of a reading layer's weights.

    Returns:
        The new `giving` and `reading`.
    """
    units = outputs_of(giving[0])
    copied = replication(units, wider)
    # Not by torch.bincount, which cannot run on the meta device, where growth is rehearsed.
    counts = torch.zeros(units, dtype=torch.int64).index_add_(0, copied, torch.ones_like(copied))
    given = [resized(layer, outputs=wider) for layer in giving]
    for old, new in zip(giving, given, strict=True):
        state = {n: t[copied] if t.ndim else t for n, t in old.state_dict().items()}
        new.load_state_dict(state, strict=True)
    read = [resized(layer, inputs=wider) for layer in reading]
    for old, new in zip(reading, read, strict=True):
        weight: Tensor = old.weight  # type: ignore[assignment]
        spread = (1, -1, *(1,) * (weight.ndim - 2))
        shared = weight[:, copied] / counts[copied].view(spread)
        if noise:
            drawn = noise * weight.std() * torch.randn_like(shared)
            means = torch.zeros_like(weight).index_add_(1, copied, drawn) / counts.view(spread)
            shared = shared + drawn - means[:, copied]
        new.load_state_dict({**old.state_dict(), "weight": shared}, strict=True)
    return given, read


@torch.no_grad()
def net2deeper(channels: int, kernel: int = 3, norm: bool = True) -> nn.Sequential:
    """Net2DeeperNet for plain convolutional networks: a new layer that passes its input on.

    To be put, with a ReLU after it, behind a ReLU (which leaves what is not negative alone).

    Args:
        channels: of input [B, C, h, w] and output.
        kernel: odd; the identity kernel has a 1 at its centre.
        norm: follow it with a batch norm that undoes its own normalisation: scale √(var + ε), shift the mean. That
            is exact in evaluation mode.
    """
    convolution = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=not norm)
    nn.init.dirac_(convolution.weight)
    if not norm:
        assert convolution.bias is not None
        nn.init.zeros_(convolution.bias)
        return nn.Sequential(convolution)
    batch_norm = nn.BatchNorm2d(channels)
    assert batch_norm.running_var is not None
    batch_norm.weight.copy_((batch_norm.running_var + batch_norm.eps).sqrt())
    return nn.Sequential(convolution, batch_norm)


@torch.no_grad()
def identity_block(block: nn.Module) -> nn.Module | None:
    """Net2DeeperNet for residual networks: a copy of a timm block with zero residual branches.

    None where such a copy would not pass its input on: no shortcut, or an activation after the sum other than ReLU
    (whose input, the result of another ReLU, it leaves alone).
    """
    last = _LAST.get(type(block))
    if last is None or getattr(block, "downsample", None) is not None or not getattr(block, "has_skip", True):
        return None
    if not isinstance(getattr(block, "shortcut", None), nn.Identity | None):
        return None
    after = "act2" if type(block) is BasicBlock else "act3" if type(block) is Bottleneck else None
    if after is not None and not isinstance(getattr(block, after), nn.ReLU):
        return None
    result = copy.deepcopy(block)
    for name in last:
        for tensor in result.get_submodule(name).parameters():
            nn.init.zeros_(tensor)
    return result


def widen_block(block: nn.Module, ratio: float, noise: float) -> list[int]:
    """Multiplies the hidden units of a timm block, in place; returns how many each group has, [] if it has none."""
    sizes = []
    for giving, reading in hidden_units(block):
        units = outputs_of(block.get_submodule(giving[0]))
        sizes.append(max(units, round(units * ratio)))
        layers = [block.get_submodule(n) for n in giving], [block.get_submodule(n) for n in reading]
        for names, new in zip((giving, reading), net2wider(*layers, sizes[-1], noise), strict=True):
            for name, layer in zip(names, new, strict=True):
                block.set_submodule(name, layer)
    return sizes


class Net2NetLearner(FullTuningLearner):
    """The grown teacher under full tuning; before the first step its logits are the teacher's.

    A transformer gets its new blocks evenly spaced and every MLP equally wide, so it is the same timm network with
    another `depth` and `mlp_ratio`. A convolutional network is widened inside its blocks and gets copies of the last
    blocks of its stages, one each, from the last stage backwards.
    """

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        self.changed: dict[str, Any] = {}
        self.grown: dict[str, Any] = {}
        if params["transformer"]:
            self._grow_transformer(network, params)
            if hasattr(network, "_model_args"):  # timm's note of how to build this network again
                network._model_args = {**network._model_args, **self.changed}  # type: ignore[assignment, dict-item]
        else:
            self._grow_convolutions(network, params)
        return super().adapt(network, params)

    def _grow_transformer(self, network: nn.Module, params: Mapping[str, Any]) -> None:
        blocks = network.blocks
        assert isinstance(blocks, nn.Sequential | nn.ModuleList)
        if params["width"] > 1:
            sizes = [widen_block(block, params["width"], params["noise"]) for block in blocks]
            if [] in sizes:
                raise ValueError(f"net2net cannot widen a transformer block of kind {type(blocks[0]).__name__}.")
            width = outputs_of(blocks[0].mlp.fc2)  # type: ignore[union-attr, arg-type]
            self.changed["mlp_ratio"] = _ratio(sizes[0][0], width)
        if params["deeper"]:
            after = _spread(params["deeper"], len(blocks))
            chain: list[nn.Module] = []
            for i, block in enumerate(blocks):
                added = [identity_block(block) for _ in range(after.count(i))]
                if None in added:
                    raise ValueError(f"net2net cannot insert a transformer block of kind {type(block).__name__}.")
                chain += [block, *(b for b in added if b is not None)]
            network.blocks = nn.Sequential(*chain) if isinstance(blocks, nn.Sequential) else nn.ModuleList(chain)
            self.changed["depth"] = len(chain)
            info = getattr(network, "feature_info", None)
            if isinstance(info, list):
                network.feature_info = [{**info[0], "module": f"blocks.{i}"} for i in range(len(chain))]  # type: ignore[assignment]

    def _grow_convolutions(self, network: nn.Module, params: Mapping[str, Any]) -> None:
        widths: dict[str, list[int]] = {}
        if params["width"] > 1:
            for name, block in list(network.named_modules()):
                sizes = widen_block(block, params["width"], params["noise"])
                if sizes:
                    widths[name] = sizes
        copies: dict[str, int] = {}
        stages = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList) and len(m)]
        free = [(name, stage) for name, stage in reversed(stages) if identity_block(stage[-1]) is not None]
        for i in range(params["deeper"] if free else 0):
            name, stage = free[i % len(free)]
            stage.append(identity_block(stage[-1]))  # type: ignore[arg-type]
            copies[name] = copies.get(name, 0) + 1
        if (params["width"] > 1 and not widths) or (params["deeper"] and not free):
            kinds = ", ".join(sorted(kind.__name__ for kind in _LAST))
            raise ValueError(
                f"net2net cannot grow a {type(network).__name__} as asked without changing what it computes; it can "
                f"where there are blocks of the kinds {kinds}, deeper where a stage ends in one with a shortcut."
            )
        self.grown = {"widths": widths, "copies": copies}

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        width, deeper = (1.5 if params["width"] > 1 else 1.0), min(params["deeper"], 1)
        return {**super().rehearsed(params), "width": width, "deeper": deeper, "noise": 0.0}

    def changes(self) -> dict[str, Any]:
        return self.changed

    def structure(self) -> Structure | None:
        return Structure("methods.parts.grown:grown", self.grown) if self.grown else None


def _spread(count: int, blocks: int) -> list[int]:
    """After which of `blocks` blocks `count` new ones are inserted, evenly."""
    return [max(round((i + 1) * blocks / (count + 1)) - 1, 0) for i in range(count)]


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` of which timm's int(width · ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


class Net2Net(TunedTeacher):
    """Function-preserving growth of the teacher, then full tuning: more capacity for the task, from where it stands.

    Net2Wider replicates hidden units (batch statistics too), Net2Deeper inserts identities: in residual networks a
    block whose branches end in zeros [memory; methods after the paper do so]. Only units inside blocks are widened,
    because what a shortcut adds up cannot be replicated alone. It deploys a network that is bigger than the teacher.
    """

    name = "net2net"
    family = "remapping"
    paper = "Chen, Goodfellow, Shlens, Net2Net: Accelerating Learning via Knowledge Transfer, ICLR 2016"
    Config = Net2NetConfig
    deployed_size = "larger"
    learner = Net2NetLearner
    teacher_kinds = ("vit", "cnn")

    @classmethod
    def params(cls, config: Any, setting: Setting) -> dict[str, Any]:
        assert setting.teacher is not None
        return {**super().params(config, setting), "transformer": setting.teacher.kind == "vit"}

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, Net2NetConfig)
        if config.width == 1 and config.deeper == 0:
            return "width 1 and deeper 0 leave the teacher as it is: that is full_tuning"
        return super().invalid(config, setting)
