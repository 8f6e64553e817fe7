"""A network that gives one class a pixel: a backbone, the map that it ends in, and a decoder. torch and timm only."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 16  # a coarser last map is joined with the last map of at most this stride
STAGES = (256, 128, 64, 16)  # channels of the convolutional decoder, for a map of WIDTH channels
WIDTH = 768


def finer_layers(network: nn.Module) -> list[int]:
    """The intermediate map that goes along with the last one: the deepest with a stride of at most 16, if any.

    None for a transformer, whose tokens keep their raster, and where the last map is fine enough itself.
    """
    info = getattr(network, "feature_info", None)
    if info is None or not hasattr(network, "forward_intermediates"):
        return []
    strides = [int(stage["reduction"]) for stage in info]
    if not strides or strides[-1] <= STRIDE:
        return []
    return [i for i, stride in enumerate(strides) if stride <= STRIDE][-1:]


def dense_width(network: nn.Module) -> int:
    """Channels of `dense_map`."""
    info: Any = getattr(network, "feature_info", None)
    return int(network.num_features) + sum(int(list(info)[i]["num_chs"]) for i in finer_layers(network))  # type: ignore[arg-type]


def join_maps(network: nn.Module, final: Tensor, finer: list[Tensor]) -> Tensor:
    """[B, D, h, w] of what `forward_features` gives and the maps [B, Di, h, w] of `finer_layers`.

    Patch tokens on their raster (class and register tokens dropped), after the final norm: of a network that
    normalises only after pooling, each token by that norm. Of a convolutional network the last map, enlarged to the
    finer one's raster, then that.

    Raises:
        ValueError: if the network ends in no map.
    """
    if final.ndim == 3:
        norm = getattr(network, "fc_norm", None)
        tokens = norm(final) if isinstance(norm, nn.Module) else final
        side = math.isqrt(tokens.shape[1])
        result = tokens[:, tokens.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))
    elif final.ndim == 4:
        result = final.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else final
    else:
        raise ValueError(f"The network ends in features of shape {list(final.shape[1:])}, which is no map.")
    for other in finer:
        enlarged = F.interpolate(result, size=other.shape[-2:], mode="bilinear", align_corners=False)
        result = torch.cat([enlarged, other], dim=1)
    return result.contiguous()


def dense_map(network: nn.Module, images: Tensor) -> Tensor:
    """[B, D, h, w] the map that a decoder reads, of images [B, 3, S, S]; see `join_maps`."""
    layers = finer_layers(network)
    if not layers:
        return join_maps(network, network.forward_features(images), [])  # type: ignore[operator]
    final, finer = network.forward_intermediates(images, indices=layers, output_fmt="NCHW")  # type: ignore[operator]
    return join_maps(network, final, finer)


class LinearDecoder(nn.Module):
    """Batch norm without weights, then a 1×1 convolution: maps [B, D, h, w] to logits [B, C, h, w]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False, eps=1e-6)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        return self.classifier(self.norm(maps))


def stage_channels(width: int) -> list[int]:
    """Channels of the four stages for a map of `width` channels: 256, 128, 64 and 16 from 768 on, fewer below.

    They shrink with the width, in multiples of 8 and to no fewer than 8.
    """
    share = min(1.0, width / WIDTH)
    return [max(8, round(channels * share / 8) * 8) for channels in STAGES]


class ConvDecoder(nn.Module):
    """Four stages of a 3×3 convolution with batch norm and ReLU, then a 1×1 convolution.

    Each stage first doubles the raster, as long as it does not exceed the image: [B, D, h, w] to [B, C, ≤16h, ≤16w].
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        channels = [width, *stage_channels(width)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels[i], channels[i + 1], kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(channels[i + 1]),
                nn.ReLU(),
            )
            for i in range(4)
        )
        self.classifier = nn.Conv2d(channels[-1], num_classes, kernel_size=1)

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        for stage in self.stages:
            if 2 * maps.shape[-1] <= size[-1] and 2 * maps.shape[-2] <= size[-2]:
                maps = F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)
            maps = stage(maps)
        return self.classifier(maps)


DECODERS: dict[str, type[LinearDecoder] | type[ConvDecoder]] = {"linear": LinearDecoder, "conv": ConvDecoder}


class Segmenter(nn.Module):
    """Images [B, 3, S, S] to logits [B, C, S, S]: the decoder's, brought to the images' size bilinearly.

    Args:
        backbone: a timm network; used as it is.
        decoder: of maps [B, D, h, w] and the images' size to logits [B, C, h', w'].
    """

    def __init__(self, backbone: nn.Module, decoder: LinearDecoder | ConvDecoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.num_classes = decoder.classifier.out_channels
        self.num_features = int(backbone.num_features)  # type: ignore[arg-type]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The backbone's."""
        return getattr(self.backbone, "pretrained_cfg", {})

    @property
    def arguments(self) -> dict[str, Any]:
        """What `segmenter` needs to build this network of its backbone again."""
        return {"num_classes": self.num_classes, "decoder": "linear" if hasattr(self.decoder, "norm") else "conv"}

    def get_classifier(self) -> nn.Module:
        """The decoder's last layer."""
        return self.decoder.classifier

    def decode(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, S, S] logits at `size` of maps [B, D, h, w]."""
        logits = self.decoder(maps, size)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor) -> Tensor:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return self.decode(dense_map(self.backbone, images), size)


def segmenter(backbone: nn.Module, num_classes: int, decoder: str = "linear") -> Segmenter:
    """A backbone without its classifier, under a fresh decoder.

    Args:
        backbone: a timm network; its classifier is taken off.
        num_classes: C.
        decoder: `linear` or `conv`.
    """
    backbone.reset_classifier(0)  # type: ignore[operator]
    return Segmenter(backbone, DECODERS[decoder](dense_width(backbone), num_classes))
