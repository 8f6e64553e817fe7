"""A small text tower that a sweep trained, with its teacher's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.parts.text_tower import TextTower as SmallTower
from methods.parts.text_tower import trimmed
from orchestrator.errors import UserError
from orchestrator.models.clip import TEXT_BATCH, TextTower

ABOUT, WEIGHTS = "text.json", "text.safetensors"


class Embedder(Protocol):
    """What embeds texts: a teacher's own text tower, or a smaller one."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, d] float32, not normalised; on the CPU."""
        ...

    @property
    def parameters(self) -> int: ...


def save_text_tower(folder: Path, tower: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the weights of a `methods.parts.text_tower.TextTower`, and what builds it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(dict(tower), indent=1), encoding="utf-8")


def has_text_tower(folder: Path) -> bool:
    """Whether a text tower was saved there, maybe beside a network."""
    return (folder / ABOUT).is_file()


class StudentTexts:
    """Embeds texts with a stored text tower; frozen, on the CPU.

    Args:
        folder: that `save_text_tower` wrote.
        teacher: whose tokenizer it was trained for.

    Raises:
        UserError: if the folder holds none.
    """

    def __init__(self, folder: Path, teacher: TextTower) -> None:
        try:
            self.arguments: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            state = load_file(folder / WEIGHTS)
        except (OSError, ValueError) as error:
            raise UserError(f"There is no readable text tower in {str(folder)!r}: {error}.") from error
        self.module = SmallTower(**self.arguments)
        self.module.load_state_dict(state)
        self.module.requires_grad_(False).eval()
        self._teacher = teacher

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[n, d] float32, not normalised; on the CPU."""
        parts = [
            self.module(trimmed(self._teacher.tokenize(texts[start : start + TEXT_BATCH])))
            for start in range(0, len(texts), TEXT_BATCH)
        ]
        return torch.cat(parts).clone()
