"""Learners as a run would build them, for tests that look inside."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tiny import Case, fitted, given_for, make_case, make_images
from torch import Tensor

from methods.contract import Learner, Method, TrainStage
from methods.heads import TEACHER_HEAD


def learner_of(
    case: Case,
    method: type[Method],
    results: Mapping[str, Mapping[str, Tensor]] | None = None,
    stage: int = -1,
    **knobs: Any,
) -> tuple[Learner, TrainStage]:
    """The learner of a stage, every fitted stage before it computed, and `results` for what is trained before it."""
    images, labels = make_images()
    stages = method.stages(method.Config(**knobs), case.setting)
    known = dict(results or {})
    for fit in stages:
        if fit.name == TEACHER_HEAD:
            known[fit.name] = fitted(fit, case, images, labels, known)
    one = stages[stage]
    assert isinstance(one, TrainStage)
    torch.manual_seed(0)
    learner = one.learner(one.params, given_for(one, case, labels[: case.setting.task.labelled], known))
    return learner.train(), one


def twins(kind: str = "vit") -> Case:
    """A case whose student is a copy of its teacher."""
    case = make_case(kind, kind)
    return replace(case, student=copy.deepcopy(case.teacher))
