"""In what precision a network computes."""

from __future__ import annotations

import torch

from orchestrator.spec import Model

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, precision: str) -> torch.autocast:
    """The context of `fp32`, which changes nothing, `bf16` or `fp16` on a device such as `cuda:0`; enter it once."""
    return torch.autocast(device.split(":")[0], dtype=HALF.get(precision), enabled=precision in HALF)


def identified(entry: Model, weights_hash: str) -> str:
    """What a teacher's outputs depend on: its weights, and its precision where that is not single."""
    return weights_hash if entry.precision == "fp32" else f"{weights_hash}@{entry.precision}"
