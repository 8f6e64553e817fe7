"""Weights: a file of them read safely, and the hash that says which they are."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from orchestrator.errors import UserError, first_lines, listed

AVERAGED = ("state_dict_ema", "model_ema")
WRAPPERS = (*AVERAGED, "state_dict", "model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, also in one that holds it beside other things.

    Of a training script's checkpoint the averaged weights (`state_dict_ema`, `model_ema`) are read where it has some:
    they are what the script scored, and timm reads them too. Else `state_dict`, else `model`. Names lose what DDP,
    `torch.compile` and `AveragedModel` put before them. An averaged entry that is empty, or holds other things than
    tensors, is passed over.

    Raises:
        UserError: if the file cannot be read, or holds none.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # safetensors, zip and unpickling errors share no base class
        raise UserError(f"The weight file {str(path)!r} cannot be read: {first_lines(error, 2)}") from error
    for wrapper in WRAPPERS:
        held = state.get(wrapper) if isinstance(state, dict) else None
        if isinstance(held, dict) and (wrapper not in AVERAGED or _is_state(held)):
            state = held
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"; it holds {listed(list(state)[:8])}" if isinstance(state, dict) else ""
        raise UserError(
            f"The weight file {str(path)!r} does not hold a state dict of tensors, by itself or as {listed(WRAPPERS)}"
            f"{found}."
        )
    averages = state.pop("n_averaged", None) is not None  # a counter of torch's AveragedModel
    state = clean_state_dict(state)
    return clean_state_dict(state) if averages else state  # DDP's prefix may lie within AveragedModel's


def _is_state(held: dict[Any, Any]) -> bool:
    return bool(held) and all(isinstance(value, Tensor) for value in held.values())


def _unpickled(path: Path) -> Any:
    """What torch saved; timm's and many other scripts keep their arguments, a plain `Namespace`, beside the weights."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, "cpu", weights_only=True)


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
