"""Where the parts of a timm network lie, for the methods that change or train some of them."""

from __future__ import annotations

from timm.layers import RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
from timm.layers.norm_act import FrozenBatchNorm2d, FrozenBatchNormAct2d
from timm.models import group_parameters
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm, nn.RMSNorm, RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d)
FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)  # their affine part is no parameter


def is_transformer(network: nn.Module) -> bool:
    """Whether it has a patch embedding, blocks and a final norm."""
    return all(hasattr(network, name) for name in ("patch_embed", "blocks", "norm"))


def uniform_blocks(network: nn.Module) -> int:
    """How many blocks a transformer has that are alike: of one class, with parameters of the same names and shapes.

    Planning calls such a network a `vit`. 0 where the network is no transformer or its blocks differ (stages of several
    widths, keys and values for fewer heads in some of them).
    """
    blocks = getattr(network, "blocks", None)
    if not is_transformer(network) or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        return 0
    kinds = {(type(b), tuple((name, p.shape) for name, p in b.named_parameters())) for b in blocks}
    return len(blocks) if len(kinds) == 1 else 0


def plain_blocks(network: nn.Module, method: str) -> list[Block]:
    """The blocks of a timm vision transformer, all of them `x + ls1(attn(norm1 x))`, then `x + ls2(mlp(norm2 x))`.

    Args:
        network: a timm network.
        method: for the message.

    Raises:
        ValueError: if its blocks are of another kind (norms after the branches, parallel branches, ...).
    """
    blocks = getattr(network, "blocks", None)
    found = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
    plain = [block for block in found if isinstance(block, Block) and type(block).forward is Block.forward]
    if not found or len(plain) < len(found):
        kinds = sorted({type(block).__name__ for block in found}) or ["none"]
        raise ValueError(
            f"{method} serves timm's pre-norm transformer blocks (Block), and the blocks of {type(network).__name__} "
            f"are {', '.join(kinds)}."
        )
    return plain


def distance_to_head(network: nn.Module) -> dict[str, int]:
    """For each parameter, how many groups of layers lie between it and the end: 0 for the head's own group.

    The groups are timm's: stem, each transformer block (stage of a CNN), head; a final norm belongs to the last block.

    Raises:
        ValueError: if timm does not know the network's groups.
    """
    if not hasattr(network, "group_matcher"):
        raise ValueError(f"timm does not say how the layers of {type(network).__name__} are grouped.")
    try:
        matcher = network.group_matcher(coarse=True)  # type: ignore[operator]
    except AssertionError as error:
        raise ValueError(
            f"timm does not say how the layers of {type(network).__name__} are grouped: {error}."
        ) from None
    group = group_parameters(network, matcher, reverse=True)
    return {name: max(group.values()) - number for name, number in group.items()}
