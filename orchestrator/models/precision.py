"""In what precision a network computes, and what identifies it: that, its weights, and how it was built."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from orchestrator.spec import Model

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, precision: str) -> torch.autocast:
    """The context of `fp32`, which changes nothing, `bf16` or `fp16` on a device such as `cuda:0`; enter it once."""
    return torch.autocast(device.split(":")[0], dtype=HALF.get(precision), enabled=precision in HALF)


def identified(entry: Model, name: str, built: Any = None) -> str:
    """A network's name, or the hash of its weights, with its precision where that is not single.

    Args:
        entry: its options.
        name: or hash.
        built: its architecture, plain JSON: with equal weights another one, or other options, computes something else.
    """
    if built is not None:
        text = json.dumps([built, entry.kwargs], sort_keys=True)
        name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return name if entry.precision == "fp32" else f"{name}@{entry.precision}"
