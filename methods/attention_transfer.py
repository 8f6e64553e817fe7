"""Attention transfer: the student attends where the teacher does, at several depths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract import Batch, Given, Setting, Stage, TrainStage
from methods.fitnet import layer_at
from methods.kd import KD, KDConfig, KDLearner
from methods.knobs import Choice, Range, knob
from methods.outputs import Output, read_outputs
from methods.tuning import LOGITS

Compared = Literal["attention", "affinity"]


class AttentionTransferConfig(KDConfig):
    """Knobs of attention transfer: those of the class scores are logit distillation's."""

    kind: Compared = knob(
        "attention",
        "What is compared at each depth: where the activations are large, or which places resemble each other.",
        search=Choice(values=("attention", "affinity")),
    )
    strength: float = knob(
        10.0, "β: weight of the comparison.", search=Range(low=1, high=100, log=True), ge=0, le=10000
    )
    depths: int = knob(
        3,
        "How many maps of each network are compared, evenly spread, the last map among them.",
        search=Choice(values=(1, 2, 3)),
        ge=1,
        le=8,
    )
    grid: int = knob(4, "Maps are averaged onto a raster with this side.", search=Choice(values=(4, 8)), ge=2, le=16)


def attention(maps: Tensor) -> Tensor:
    """[B, g²] of maps [B, C, g, g]: sums of squares over channels, brought to length 1 (Eq. 1, 2, p = 2 [memory])."""
    return F.normalize(maps.float().square().sum(1).flatten(1), dim=1)


def affinity(maps: Tensor) -> Tensor:
    """[B, g², g²] of maps [B, C, g, g]: cosine similarity of the channel vectors at every two places."""
    places = F.normalize(maps.float().flatten(2), dim=1)
    with torch.autocast(maps.device.type, enabled=False):
        return places.transpose(1, 2) @ places


def attention_loss(student: Tensor, teacher: Tensor, kind: Compared) -> Tensor:
    """Squared distance of what is compared of two maps [B, C, g, g] and [B, E, g, g], the mean over rows.

    `attention`: summed over the raster, at most 2. `affinity`: averaged over pairs of places, at most 4.
    """
    if kind == "attention":
        return (attention(student) - attention(teacher)).square().sum(1).mean()
    return (affinity(student) - affinity(teacher)).square().mean()


def depths_of(count: int, maps: int) -> list[int]:
    """Which of `maps` intermediate maps are compared: at the shares 1/count, 2/count, …, 1 of the depth."""
    return [layer_at((i + 1) / count, maps) for i in range(count)]


class AttentionTransferLearner(KDLearner):
    """Logit distillation + β · the mean over depths of `attention_loss`."""

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.compared: Compared = params["compared"]
        self.strength: float = params["strength"]
        self.pairs = [
            (Output("map", layer=mine, grid=params["grid"]), Output("map", layer=theirs, grid=params["grid"]))
            for mine, theirs in zip(params["student_layers"], params["teacher_layers"], strict=True)
        ]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        own = read_outputs(self.student, batch.images, [LOGITS, *(mine for mine, _ in self.pairs)])
        parts = self.distillation(own[LOGITS.key], batch)
        apart = sum(
            (attention_loss(own[mine.key], batch.outputs[theirs.key], self.compared) for mine, theirs in self.pairs),
            start=own[LOGITS.key].new_zeros((), dtype=parts["loss"].dtype),
        ) / len(self.pairs)
        return {**parts, "loss": parts["loss"] + self.strength * apart, self.compared: apart}


class AttentionTransfer(KD):
    """Activation-based attention maps of several depths, beside class scores; or the places' affinities.

    An attention map is the sum over channels of squared activations, of length 1 [memory]; two maps compare whatever
    their channels, so there is no regressor, and the networks may be convolutional or transformers (patch tokens on
    their raster). Maps are averaged onto one raster before they are squared, and β multiplies a squared distance that
    is summed over the raster, where the authors' β = 1000 multiplies a mean over the map's elements [inferred from
    memory: 10 on a 10 x 10 raster]. `kind: affinity` compares the cosine similarity of every two places instead, as
    pair-wise structured distillation does (Liu et al., CVPR 2019 [memory]). Neither needs labels.
    """

    name = "attention_transfer"
    paper = "Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017"
    Config = AttentionTransferConfig

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        for network in (setting.teacher, setting.student):
            if network is not None and network.intermediates == 0:
                return f"{cls.name} compares intermediate maps, and {network.name} gives none"
        return super().refuses(setting)

    @classmethod
    def stages(cls, config: KDConfig, setting: Setting) -> list[Stage]:
        assert isinstance(config, AttentionTransferConfig)
        assert setting.teacher is not None
        assert setting.student is not None
        *earlier, distil = super().stages(config, setting)
        assert isinstance(distil, TrainStage)
        theirs = depths_of(config.depths, setting.teacher.intermediates)
        params = {
            **distil.params,
            "compared": config.kind,
            "strength": config.strength,
            "grid": config.grid,
            "teacher_layers": theirs,
            "student_layers": depths_of(config.depths, setting.student.intermediates),
        }
        maps = (Output("map", layer=layer, grid=config.grid) for layer in theirs)
        outputs = tuple(dict.fromkeys((*distil.feed.outputs, *maps)))
        return [
            *earlier,
            replace(
                distil,
                version=1,
                learner=AttentionTransferLearner,
                params=params,
                feed=replace(distil.feed, outputs=outputs),
            ),
        ]
