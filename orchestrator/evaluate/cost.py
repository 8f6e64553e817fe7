"""What a deployed student costs: parameters, FLOPs and latency."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 5


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        median_ms, iqr_ms: median and interquartile range, in milliseconds.
        device, threads, batch: under which conditions.
        runs: how many forward passes were timed.
    """

    median_ms: float
    iqr_ms: float
    device: str
    threads: int
    batch: int
    runs: int


def parameters(network: nn.Module) -> int:
    """Number of scalars in all parameters."""
    return sum(p.numel() for p in network.parameters())


def flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of one image [1, 3, size, size], 2 for each multiply-add.

    Fused attention is switched off while counting: the counter does not see the fused kernel on a CPU.
    """
    plain = copy.deepcopy(network).cpu().eval()
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    fused = bool(use_fused_attn())
    set_fused_attn(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            plain(torch.zeros(1, 3, size, size))
    finally:
        set_fused_attn(fused)
    return int(counter.get_total_flops())


def latency(
    network: nn.Module, size: int, *, device: str = "cpu", threads: int = 1, batch: int = 1, min_run_time: float = 0.5
) -> Latency:
    """Times the network on random images [batch, 3, size, size] in inference mode, after a warm-up."""
    network = network.to(device).eval()
    images = torch.randn(batch, 3, size, size, device=device)
    with torch.inference_mode():
        for _ in range(WARM_UP):
            network(images)
        timer = Timer("network(images)", globals={"network": network, "images": images}, num_threads=threads)
        measured = timer.blocked_autorange(min_run_time=min_run_time)
    runs = measured.number_per_run * len(measured.times)
    return Latency(measured.median * 1e3, measured.iqr * 1e3, device, threads, batch, runs)
