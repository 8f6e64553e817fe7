"""The network under evaluation: a student's folder or a model by name, with the text tower that shares its space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from methods.outputs import Output, read_outputs
from methods.parts.dense import Segmenter
from methods.parts.zero_shot import ZeroShot
from orchestrator.data.embed import text_tower_of
from orchestrator.errors import UserError
from orchestrator.models.check import check_model
from orchestrator.models.clip import is_clip
from orchestrator.models.load import Preprocessing, built_of, entry_of, load_network, load_student
from orchestrator.models.precision import identified
from orchestrator.models.texts import StudentTexts, has_text_tower
from orchestrator.models.weights import hash_weights
from orchestrator.spec import Model, Task, explain

POOLED, LOGITS = Output("pooled"), Output("logits")


@dataclass(frozen=True)
class Subject:
    """A network under evaluation.

    Attributes:
        name: for people.
        module: images to what it gives; frozen, in evaluation mode.
        preprocessing: its own.
        identity: of what it computes from pixels.
        texts: the dual encoder whose text tower shares its space; None where it does not embed images.
        own_texts: folder of the smaller text tower that was trained beside it; None where the dual encoder's is used.
        classes: of its own head; none where that is no classifier.
        task: what it was trained for, where that is known.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    identity: str
    texts: Model | None
    classes: tuple[str, ...] = ()
    task: Task | None = None
    own_texts: Path | None = None

    @property
    def embeds(self) -> bool:
        return self.texts is not None

    def embed(self, texts: Sequence[str], device: str) -> Tensor:
        """[n, d] embeddings of texts, on the CPU; only of a network that embeds."""
        assert self.texts is not None
        tower = text_tower_of(self.texts)
        own = StudentTexts(self.own_texts, tower) if self.own_texts is not None else None
        return own.embed(texts) if own is not None else tower.to(device).embed(texts)

    @torch.inference_mode()
    def read(self, images: Tensor) -> Tensor:
        """[B, D] features of normalised images [B, 3, S, S]: embeddings, or pooled features; then its head's [B, C]."""
        if isinstance(self.module, ZeroShot):
            return self.module.embed(images).float()
        if self.embeds:
            return self.module(images).float()
        if not self.classes:
            return read_outputs(self.module, images, [POOLED])["pooled"].float()
        found = read_outputs(self.module, images, [POOLED, LOGITS])
        return torch.cat([found["pooled"].float(), found["logits"].float()], 1)


def named_subject(model: str) -> Subject:
    """A network by its name, as a sweep file names its teachers, with pre-trained weights.

    Raises:
        UserError: if there is none, or its weights cannot be had.
    """
    try:
        entry = Model(model=model)
    except ValidationError as error:
        raise UserError(explain(error, Model, "MODEL").replace("In MODEL, model: ", "MODEL: ")) from None
    check_model(entry, "teacher")
    network = load_network(entry, "teacher")
    texts = entry if is_clip(entry) else None
    return Subject(model, network.module.eval(), network.preprocessing, network.identity, texts)


def stored_subject(folder: Path) -> Subject:
    """A student that a sweep left.

    Raises:
        UserError: if the folder holds none, or one without features of whole images.
    """
    module, meta = load_student(folder)
    module.requires_grad_(False)
    if isinstance(module, Segmenter):
        raise UserError(f"The student in {str(folder)!r} predicts masks; a suite's tasks have classes of whole images.")
    if not isinstance(module, ZeroShot) and not hasattr(module, "forward_head"):
        raise UserError(f"The student in {str(folder)!r} has no features to evaluate ({type(module).__name__}).")
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    task = Task.model_validate(meta["task"])
    texts, classes, own = None, tuple(meta["classes"]), None
    if isinstance(module, ZeroShot):
        texts, classes = _teacher(meta, folder), ()
        own = folder if has_text_tower(folder) else None
        theirs = int(text_tower_of(texts).embed([""]).shape[1])
        width = module.prototypes.vectors.shape[1]
        if theirs != width:
            raise UserError(
                f"The student in {str(folder)!r} embeds into {width} dimensions and the text tower of "
                f"{texts.model!r} into {theirs}: that is not the teacher that it learned from."
            )
    entry = entry_of(meta)
    built = [built_of(entry), meta["changes"], meta.get("structure")]
    identity = identified(entry, hash_weights(module), built)
    return Subject(str(folder), module, preprocessing, identity, texts, classes, task, own)


def _teacher(meta: dict[str, Any], folder: Path) -> Model:
    if not meta.get("teacher_entry"):
        raise UserError(
            f"The student.json in {str(folder)!r} does not tell which teacher's text tower it shares (`teacher_entry`)."
        )
    try:
        return Model.model_validate(meta["teacher_entry"])
    except ValidationError as error:
        raise UserError(explain(error, Model, f"teacher_entry of {str(folder / 'student.json')!r}")) from None
