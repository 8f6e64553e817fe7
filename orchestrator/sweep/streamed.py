"""What the trials of a sweep train on a stream of images, counted before anything is built with weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.contract import FitStage, Stage, TrainStage
from orchestrator.data.embed import prompts_of
from orchestrator.data.task import TaskData
from orchestrator.evaluate.cost import flops, parameters
from orchestrator.models.clip import build_clip
from orchestrator.models.load import build_network, plan_network
from orchestrator.spec import Model, SweepSpec
from orchestrator.sweep.space import Space, default_knobs, stage_lists
from orchestrator.trial.plan import Cell, TrialConfig, configure, method_named, setting_of, stage_steps

DRAWS = 16  # of a space, to tell what its trials want embedded


@dataclass(frozen=True)
class Training:
    """One streamed training stage, of a trial at its method's default knobs.

    Attributes:
        teacher: of its cell, position in the sweep file.
        image_flops, text_flops: of the teacher, one image or text.
        width: of its embeddings.
        student_flops: forward pass of an image.
        student_parameters: projection included.
        size: side of the student's images, in pixels.
        steps: optimizer steps.
        texts: `sentences`, `captions`, `prompts` or None.
        prompts: how many there are.
        text_batch: texts of a step.
        embeds: names of what the teacher embeds for this trial: `images`, `sentences`, `captions`.
    """

    teacher: int
    image_flops: int
    text_flops: int
    width: int
    student_flops: int
    student_parameters: int
    size: int
    steps: int
    texts: str | None
    prompts: int
    text_batch: int
    embeds: tuple[str, ...]


class _Texts(nn.Module):
    """The text side of a dual encoder as a network of images, so that its FLOPs are counted alike."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.zeros(1, int(self.model.context_length), dtype=torch.int64, device=images.device)  # type: ignore[arg-type]
        return self.model.encode_text(tokens)  # type: ignore[operator]


@functools.lru_cache(maxsize=32)
def _teacher_flops(key: str) -> tuple[int, int]:
    """Of an image, and of a text under the tower beside it; no weights are loaded."""
    entry = Model.model_validate_json(key)
    info, seen = plan_network(entry, "teacher")
    assert info.skeleton is not None
    with torch.device("meta"):
        return flops(info.skeleton, seen.size), flops(_Texts(build_clip(entry, weights=False)), 16)


@functools.lru_cache(maxsize=32)
def _student_facts(key: str, width: int) -> tuple[int, int]:
    """(FLOPs of an image without a head, parameters with a projection to `width`)."""
    entry = Model.model_validate_json(key)
    with torch.device("meta"):
        network: Any = build_network(entry, num_classes=0)
        forward = flops(network, plan_network(entry, "student")[1].size)
        network.reset_classifier(width)
    return forward, parameters(network)


def streamed_trainings(
    spec: SweepSpec, task: TaskData, cells: Sequence[Cell], spaces: Mapping[str, Space]
) -> list[Training]:
    """The streamed training stages of every cell at its defaults, with what any of its draws wants embedded.

    Empty without a corpus of images.
    """
    if spec.corpus.images is None:
        return []
    found = []
    for cell in cells:
        setting = setting_of(spec, task.info, cell)
        method = method_named(cell.method)
        config = configure(spec, TrialConfig("", 0, cell, default_knobs(spaces[cell.method], cell.method), 0))
        if method.invalid(config, setting) is not None or cell.teacher is None or cell.student is None:
            continue
        stages = method.stages(config, setting)
        drawn = [one for draw in stage_lists(spec, spaces, cell, task.info, DRAWS) for one in draw]
        found += [
            _training(stage, drawn, spec, task, cell)
            for stage in stages
            if isinstance(stage, TrainStage) and stage.feed.images == "corpus"
        ]
    return found


def _training(stage: TrainStage, drawn: list[Stage], spec: SweepSpec, task: TaskData, cell: Cell) -> Training:
    assert cell.teacher is not None
    assert cell.student is not None
    teacher, student = spec.teachers[cell.teacher], spec.students[cell.student]
    width = plan_network(teacher, "teacher")[0].embedding
    size = plan_network(student, "student")[1].size
    feed = stage.feed
    feeds = [one.feed for one in drawn if isinstance(one, TrainStage)]
    reads = {name for one in drawn if isinstance(one, FitStage) for name in one.reads} | {one.texts for one in feeds}
    reads |= {"captions"} if any(one.captions for one in feeds) else set()
    reads |= {name for one in feeds for name in one.tokens}
    embeds = ["images"] if any(one.outputs for one in feeds) else []
    embeds += [name for name in ("sentences", "captions") if name in reads]
    image_flops, text_flops = _teacher_flops(teacher.model_dump_json())
    student_flops, student_parameters = _student_facts(student.model_dump_json(), width)
    return Training(
        teacher=cell.teacher,
        image_flops=image_flops,
        text_flops=text_flops,
        width=width,
        student_flops=student_flops,
        student_parameters=student_parameters,
        size=size,
        steps=stage_steps(stage, spec, task),
        texts=feed.texts,
        prompts=len(prompts_of(task)),
        text_batch=feed.text_batch or spec.train.batch,
        embeds=tuple(embeds),
    )
