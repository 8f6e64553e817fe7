"""What the methods with a dual-encoder teacher share: similarities, and the student that embeds images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import Deployed, Given, Learner, Method
from methods.knobs import Range, knob
from methods.outputs import Output

EMBEDDING = Output("embedding")


def rate_knob() -> Any:
    """The knob `lr`; the default is DIME-FM's [code]."""
    return knob(8e-4, "Peak learning rate.", search=Range(low=1e-4, high=2e-3, log=True), gt=0, le=10)


def decay_knob() -> Any:
    """The knob `weight_decay`; the default is DIME-FM's [code]."""
    return knob(0.05, "AdamW's weight decay.", search=Range(low=0.01, high=0.2, log=True), ge=0, le=1)


def similarities(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`A(a, b) = scale · â b̂ᵀ` [n, m] of rows [n, d] and [m, d], in float32 at least: half precision fails at 100."""
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        return scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`KL(softmax(P / T) ‖ softmax(Q / T))`, the mean over rows [n, m], without a factor T² [code]."""
    p, q = (F.log_softmax(x / temperature, dim=-1) for x in (teacher, student))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


class EmbeddingLearner(Learner):
    """A student whose head gives an embedding as wide as the teacher's: the projection of the paper's models."""

    steady = True

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student: nn.Module = given.student
        self.student.reset_classifier(params["width"])  # type: ignore[operator]

    def deployed(self) -> Deployed:
        return Deployed(self.student.eval(), "student")


class ByDualEncoder(Method):
    """The base of the methods whose student embeds images into a dual encoder's space, without any label."""

    needs_labels = False
    trains_head = False
    zero_shot = True
    teacher_kinds = ("clip",)
    tasks = ("classification",)
