"""Wider and deeper timm networks: blocks with more hidden units, stages with more blocks of their last kind."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from timm.layers import Mlp
from timm.models._efficientnet_blocks import EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

# By class of block: which layers give its hidden units and which read them, one entry for each group of units.
_HIDDEN: dict[type[nn.Module], tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    InvertedResidual: ((("conv_pw", "bn1", "conv_dw", "bn2"), ("conv_pwl",)),),
    EdgeResidual: ((("conv_exp", "bn1"), ("conv_pwl",)),),
    BasicBlock: ((("conv1", "bn1"), ("conv2",)),),
    Bottleneck: ((("conv1", "bn1"), ("conv2",)), (("conv2", "bn2"), ("conv3",))),
}


def hidden_units(block: nn.Module) -> list[tuple[list[str], list[str]]]:
    """For each group of hidden units of a timm block, the layers that give them and the layers that read them.

    Empty for a block that cannot be widened exactly: an unknown one, or one that blurs, groups or gates its hidden
    channels in another way.
    """
    mlp = getattr(block, "mlp", None)
    if type(mlp) is Mlp:
        return [(["mlp.fc1"], ["mlp.fc2"])] if isinstance(mlp.norm, nn.Identity) else []
    groups = [(list(giving), list(reading)) for giving, reading in _HIDDEN.get(type(block), ())]
    if not isinstance(getattr(block, "aa", None), nn.Identity | None) or getattr(block, "conv_s2d", None) is not None:
        return []
    gate = getattr(block, "se", None)
    if type(block) in (InvertedResidual, EdgeResidual) and not isinstance(gate, nn.Identity):
        # Elsewhere a gate acts on a block's result; here on its hidden units, which it also reads.
        if type(gate) is not SqueezeExcite:
            return []
        groups[0][0].append("se.conv_expand")
        groups[0][1].append("se.conv_reduce")
    layers = [block.get_submodule(name) for giving, reading in groups for name in (*giving, *reading)]
    if any(isinstance(m, nn.Conv2d) and m.groups not in (1, m.in_channels) for m in layers):
        return []
    return groups


def outputs_of(layer: nn.Module) -> int:
    """Channels that a linear map, convolution or batch norm gives."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    assert isinstance(layer, nn.BatchNorm2d)
    return layer.num_features


def resized(layer: nn.Module, outputs: int | None = None, inputs: int | None = None) -> nn.Module:
    """A linear map, convolution or batch norm like `layer` with fresh weights and other numbers of channels.

    A depthwise convolution stays one. None keeps a number.
    """
    new = copy.deepcopy(layer)
    with torch.no_grad():
        if isinstance(new, nn.Linear):
            new.out_features, new.in_features = outputs or new.out_features, inputs or new.in_features
            new.weight = nn.Parameter(new.weight.new_zeros(new.out_features, new.in_features))
            if new.bias is not None:
                new.bias = nn.Parameter(new.bias.new_zeros(new.out_features))
        elif isinstance(new, nn.Conv2d):
            depthwise = new.groups > 1
            new.out_channels = outputs or new.out_channels
            new.in_channels = new.out_channels if depthwise else inputs or new.in_channels
            new.groups = new.out_channels if depthwise else 1
            shape = (new.out_channels, new.in_channels // new.groups, *new.kernel_size)
            new.weight = nn.Parameter(new.weight.new_zeros(shape))
            if new.bias is not None:
                new.bias = nn.Parameter(new.bias.new_zeros(new.out_channels))
        elif isinstance(new, nn.BatchNorm2d):
            new.num_features = outputs or new.num_features
            for name in ("weight", "bias"):
                if getattr(new, name) is not None:
                    setattr(new, name, nn.Parameter(getattr(new, name).new_zeros(new.num_features)))
            for name in ("running_mean", "running_var"):
                if getattr(new, name) is not None:
                    setattr(new, name, getattr(new, name).new_zeros(new.num_features))
        else:
            raise ValueError(f"Only linear maps, convolutions and batch norms are resized, not {type(new).__name__}.")
    new.reset_parameters()
    return new


def grown(network: nn.Module, widths: Mapping[str, Sequence[int]], copies: Mapping[str, int]) -> nn.Module:
    """`network` with wider blocks, then longer stages; the new and the widened layers have fresh weights.

    Args:
        network: a timm network; it is changed.
        widths: by block name, hidden units of each of its groups, as `hidden_units` lists them.
        copies: by name of a list of blocks, how many blocks like its last one follow it.
    """
    for name, sizes in widths.items():
        block = network.get_submodule(name)
        for (giving, reading), size in zip(hidden_units(block), sizes, strict=True):
            for layer in giving:
                block.set_submodule(layer, resized(block.get_submodule(layer), outputs=size))
            for layer in reading:
                block.set_submodule(layer, resized(block.get_submodule(layer), inputs=size))
    for name, count in copies.items():
        stage = network.get_submodule(name)
        assert isinstance(stage, nn.Sequential | nn.ModuleList)
        for _ in range(count):
            stage.append(copy.deepcopy(stage[-1]))
    return network
