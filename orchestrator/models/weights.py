"""Weights: a file of them read safely, and the hash that says which they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.errors import UserError, first_lines


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, also in one that holds it beside other things.

    Raises:
        UserError: if the file cannot be read, or holds none.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        raise UserError(f"The weight file {str(path)!r} cannot be read: {first_lines(error, 2)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"The weight file {str(path)!r} does not hold a state dict of tensors.")
    return state


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
