"""One class a pixel: decoders on the frozen maps of a network, and how such a network is described."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import IGNORE, Structure
from methods.parts.dense import ConvDecoder, LinearDecoder, Segmenter

STEPS = 300
BATCH = 16
LR = 1e-3


def linear_decoder(weight: Tensor, bias: Tensor) -> LinearDecoder:
    """The decoder with this head; its batch norm passes the map on as it is."""
    decoder = LinearDecoder(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        decoder.norm.running_var.fill_(1 - decoder.norm.eps)  # type: ignore[union-attr]
        decoder.classifier.weight.copy_(weight[:, :, None, None])
        decoder.classifier.bias.copy_(bias)  # type: ignore[union-attr]
    return decoder.to(weight.device).eval()


def fit_conv_decoder(maps: Tensor, masks: Tensor, num_classes: int, seed: int = 0) -> ConvDecoder:
    """A convolutional decoder trained on frozen maps [n, D, h, w] under masks [n, S, S]; the same for every method.

    300 steps of AdamW (learning rate 1e-3, half a cosine to 0) on batches of 16 images, whatever the sweep's budget
    [inferred].
    """
    size = (masks.shape[-2], masks.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = ConvDecoder(maps.shape[1], num_classes)
    decoder.to(maps.device).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(len(maps), (min(BATCH, len(maps)),), generator=generator)
            logits = decoder(maps[rows], size)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            loss = F.cross_entropy(logits, masks[rows].long(), ignore_index=IGNORE)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return decoder.eval()


def structure_of(network: nn.Module) -> Structure | None:
    """How to get `network` from its backbone, where it gives one class a pixel; else None."""
    if not isinstance(network, Segmenter):
        return None
    return Structure("methods.parts.dense:segmenter", network.arguments)
