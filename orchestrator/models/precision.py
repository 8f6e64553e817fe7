"""In what precision a network computes."""

from __future__ import annotations

import torch

from orchestrator.spec import Model

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, precision: str) -> torch.autocast:
    """The context of `fp32`, which changes nothing, `bf16` or `fp16` on a device such as `cuda:0`; enter it once."""
    return torch.autocast(device.split(":")[0], dtype=HALF.get(precision), enabled=precision in HALF)


def identified(entry: Model, name: str) -> str:
    """A teacher's name, or the hash of its weights, with its precision where that is not single."""
    return name if entry.precision == "fp32" else f"{name}@{entry.precision}"
