"""Named outputs of a network, read the same way from a teacher and from a student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts.dense import Segmenter, finer_layers, join_maps


@dataclass(frozen=True)
class Output:
    """One kind of network output.

    Attributes:
        kind: `pooled` [B, D], the feature before the head; `logits` [B, C], of the network's own head;
            `tokens` [B, N, D], all tokens after transformer block `layer`; `map` [B, C, g, g], intermediate
            map `layer` averaged onto a `grid` x `grid` raster (patch tokens of a transformer on their raster);
            `dense` [B, D, h, w], the map that a decoder of pixels reads (see `methods.parts.dense.join_maps`);
            `embedding` [B, d], what an image tower gives when called: the image in the space that it shares with
            texts, not normalised.
        layer: which block or intermediate map; from the end where negative.
        norm: for `tokens` of the last block: after the final norm (True) or before it.
        grid: side of the raster of a `map`; 0 keeps the network's own.
    """

    kind: Literal["pooled", "logits", "tokens", "map", "dense", "embedding"]
    layer: int = -1
    norm: bool = False
    grid: int = 0

    @property
    def key(self) -> str:
        """A short name that is also a valid file name."""
        if self.kind in ("pooled", "logits", "dense", "embedding"):
            return self.kind
        if self.kind == "tokens":
            return f"tokens_{self.layer}_{'post' if self.norm else 'pre'}norm"
        return f"map_{self.layer}_grid{self.grid}"


def read_outputs(network: nn.Module, images: Tensor, outputs: Sequence[Output]) -> dict[str, Tensor]:
    """Runs `network` once on `images` [B, 3, S, S] and returns every output by its key.

    The network is a timm model (`forward_features`, `forward_head`, `forward_intermediates`), or one of these under a
    decoder of pixels: then `logits` are the decoder's [B, C, S, S], and everything else is the backbone's.

    Raises:
        ValueError: if the network cannot give one of them.
    """
    whole = network
    if isinstance(network, Segmenter):
        network = network.backbone
    blocks = getattr(network, "blocks", None)
    tapped: dict[int, Tensor] = {}
    handles = []
    for layer in {o.layer for o in outputs if o.kind == "tokens"}:
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not -len(blocks) <= layer < len(blocks):
            raise ValueError(f"The network has no transformer block {layer} to read tokens from.")

        def keep(_module: nn.Module, _args: object, result: Tensor, layer: int = layer) -> None:
            tapped[layer] = result

        handles.append(blocks[layer].register_forward_hook(keep))
    try:
        kinds = {o.kind for o in outputs}
        decodes = isinstance(whole, Segmenter) and "logits" in kinds
        finer = finer_layers(network) if "dense" in kinds or decodes else []
        maps = sorted({o.layer for o in outputs if o.kind == "map"} | set(finer))
        raw: dict[int, Tensor] = {}
        if maps:
            count = len(intermediate_channels(network))
            indices = [layer % count for layer in maps]
            final, taps = network.forward_intermediates(images, indices=sorted(set(indices)), output_fmt="NCHW")  # type: ignore[operator]
            by_index = dict(zip(sorted(set(indices)), taps, strict=True))
            raw = {layer: by_index[index] for layer, index in zip(maps, indices, strict=True)}
        else:
            final = network.forward_features(images)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    result: dict[str, Tensor] = {}
    for output in outputs:
        if output.kind == "pooled":
            result[output.key] = network.forward_head(final, pre_logits=True)  # type: ignore[operator]
        elif isinstance(whole, Segmenter) and output.kind == "logits":
            size = (int(images.shape[-2]), int(images.shape[-1]))
            result[output.key] = whole.decode(join_maps(network, final, [raw[layer] for layer in finer]), size)
        elif output.kind in ("logits", "embedding"):
            result[output.key] = network.forward_head(final)  # type: ignore[operator]
        elif output.kind == "tokens":
            tokens = tapped[output.layer]
            result[output.key] = network.norm(tokens) if output.norm else tokens  # type: ignore[operator]
        elif output.kind == "dense":
            result[output.key] = join_maps(network, final, [raw[layer] for layer in finer])
        else:
            feature = raw[output.layer]
            result[output.key] = F.adaptive_avg_pool2d(feature, output.grid) if output.grid else feature
    return result


def intermediate_channels(network: nn.Module) -> tuple[int, ...]:
    """Channels of each map that `network.forward_intermediates` can give; none where it has no such method."""
    if isinstance(network, Segmenter):
        network = network.backbone
    info = getattr(network, "feature_info", None)
    if info is None or not hasattr(network, "forward_intermediates"):
        return ()
    return tuple(int(stage["num_chs"]) for stage in info)
