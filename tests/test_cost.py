"""Parameters, FLOPs and latency."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from orchestrator.evaluate.cost import Latency, flops, latency, parameters

SIZE, PATCH, D, DEPTH, HEADS, RATIO, CLASSES = 32, 8, 24, 2, 3, 4, 5
TOKENS = (SIZE // PATCH) ** 2 + 1


def tiny_vit() -> Any:
    return VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=D, depth=DEPTH, num_heads=HEADS, mlp_ratio=RATIO, num_classes=CLASSES
    )


def vit_flops() -> int:
    """2 for each multiply-add: patches, then in each block qkv, attention (two products), projection, MLP; the head."""
    patches = (TOKENS - 1) * 3 * PATCH * PATCH * D
    block = TOKENS * D * 3 * D + 2 * TOKENS * TOKENS * D + TOKENS * D * D + 2 * TOKENS * D * RATIO * D
    return 2 * (patches + DEPTH * block + D * CLASSES)


def test_a_tiny_vit_has_its_closed_form_parameters() -> None:
    block = 3 * D * D + 3 * D + D * D + D + 2 * RATIO * D * D + RATIO * D + D + 4 * D
    embed = 3 * PATCH * PATCH * D + D + TOKENS * D + D
    assert parameters(tiny_vit()) == embed + DEPTH * block + 2 * D + D * CLASSES + CLASSES


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(4, 4)
    assert parameters(nn.Sequential(layer, layer)) == 20


def test_a_tiny_vit_has_its_closed_form_flops_with_attention() -> None:
    network = tiny_vit()
    assert all(block.attn.fused_attn for block in network.blocks)
    assert flops(network, SIZE) == vit_flops()


def test_the_fast_path_of_multihead_attention_is_counted() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, D, PATCH, PATCH)
            self.layer = nn.TransformerEncoderLayer(D, HEADS, RATIO * D, batch_first=True)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(self.embed(images).flatten(2).transpose(1, 2))

    n = TOKENS - 1
    block = n * D * 3 * D + 2 * n * n * D + n * D * D + 2 * n * D * RATIO * D
    assert flops(Tokens(), SIZE) == 2 * (n * 3 * PATCH * PATCH * D + block)


def test_a_conv_net_has_its_closed_form_flops() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    area = 16 * 16
    assert flops(network, 32) == 2 * (area * 8 * 3 * 9 + area * 8 * 9 + area * 8 * 16 + 16 * 10)


def test_resnet18_has_twice_its_published_multiply_adds() -> None:
    assert abs(flops(timm.create_model("resnet18"), 224) / 1e9 - 2 * 1.82) < 0.02


def test_counting_leaves_no_trace() -> None:
    network = tiny_vit().train()
    network.blocks[0].eval()
    norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())
    flops(network, SIZE)
    flops(norm, 8)
    assert network.training
    assert not network.blocks[0].training
    assert network.blocks[1].training
    assert int(norm.state_dict()["1.num_batches_tracked"]) == 0
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_latency_states_how_it_was_measured() -> None:
    network, threads = tiny_vit().train(), torch.get_num_threads()
    measured = latency(network, SIZE, threads=2, batch=2, min_run_time=0.05)
    assert isinstance(measured, Latency)
    assert measured.median_ms > 0
    assert measured.iqr_ms >= 0
    assert measured.runs >= 1
    assert measured.setup == "cpu, 2 threads, batch 2"
    assert torch.get_num_threads() == threads
    assert network.training


def test_latency_grows_with_the_work() -> None:
    small = latency(tiny_vit(), SIZE, min_run_time=0.1)
    large = latency(timm.create_model("resnet18"), 224, min_run_time=0.2)
    assert large.median_ms > small.median_ms  # the work of 3.6 GFLOPs against that of 0.7 MFLOPs
    assert small.setup == "cpu, 1 thread, batch 1"
