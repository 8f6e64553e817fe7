"""Upstream generators: what a provider publishes instead of images. Plain PyTorch; diffusers is imported when built.

`VQPackage` (codes and their prior) completes images, `DiffusionPackage` varies them. Both are built from plain JSON, so
that a folder with `config.json` and weights is all that is ever published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

if TYPE_CHECKING:
    from methods.knobs import MethodConfig

C = TypeVar("C", bound="MethodConfig")


def read_config(kind: type[C], config: Mapping[str, Any] | C) -> C:
    """A generator's configuration from plain JSON values.

    Raises:
        ValueError: one sentence that names the key, what was found and what is allowed.
    """
    import json

    if isinstance(config, kind):
        return config
    try:
        return kind.model_validate_json(json.dumps(dict(config)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = f"{key} = {first['input']!r}" if key else "the configuration"
        known = ", ".join(kind.model_fields)
        text = f"{where}: {first['msg'].removeprefix('Value error, ')}"
        raise ValueError(
            f"{text}; known keys are {known}." if first["type"] == "extra_forbidden" else f"{text}."
        ) from (None)


def generators(seeds: Sequence[int], rows: int) -> list[torch.Generator]:
    """One generator a row, so that a row's draws depend on its own seed and not on its neighbours.

    Raises:
        ValueError: if there is not one seed a row.
    """
    if len(seeds) != rows:
        raise ValueError(f"{rows} rows need {rows} seeds, and {len(seeds)} were given.")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def row_noise(draws: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """[B, ...] standard normal noise of the shape of `like`, row i from generator i (on the CPU, on any device)."""
    rows = [torch.randn(like.shape[1:], generator=draw) for draw in draws]
    return torch.stack(rows).to(like.device) if rows else torch.zeros_like(like)
