"""DIME-FM: a small image tower learns a dual encoder's space from images and sentences that do not belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract import Batch, Feed, FitStage, Given, Recipe, Setting, Stage, Texts, TrainStage
from methods.knobs import MethodConfig, Range, knob
from methods.ranks import gathered
from methods.text_student import text_student_stage
from methods.texts import TEXTS, texts_stage
from methods.vision_language import (
    EMBEDDING,
    ByDualEncoder,
    EmbeddingLearner,
    decay_knob,
    divergence,
    rate_knob,
    similarities,
)

TEMPERATURES = "temperatures"
CALIBRATED = 4096  # images whose similarities set the temperatures


def vl_loss(v_t: Tensor, v_s: Tensor, u_t: Tensor, temperature: float, scale: float) -> Tensor:
    """L_vl: images against texts, and texts against images; v [B, d], u [M, d]."""
    teacher, student = similarities(v_t, u_t, scale), similarities(v_s, u_t, scale)
    return divergence(teacher, student, temperature) + divergence(teacher.T, student.T, temperature)


def pvl_loss(v_t: Tensor, v_s: Tensor, temperature: float, scale: float) -> Tensor:
    """L_p-vl: the teacher's image embeddings stand in for texts; doubled to L_vl's two directions [code]."""
    return 2 * divergence(similarities(v_t, v_t, scale), similarities(v_s, v_t, scale), temperature)


def udist_loss(v_t: Tensor, v_s: Tensor, temperature: float, scale: float) -> Tensor:
    """L_udist: distances among the student's own embeddings, free of any rotation; doubled as L_p-vl [code]."""
    return 2 * divergence(similarities(v_t, v_t, scale), similarities(v_s, v_s, scale), temperature)


def diagonal_mass(embeddings: Tensor, temperature: float, scale: float, batch: int) -> float:
    """What softmax(A(v, v) / T) leaves on the diagonal, the mean over batches of `batch` of the rows [n, d]."""
    masses = [
        F.softmax(similarities(rows, rows, scale) / temperature, dim=-1).diagonal()
        for rows in embeddings.split(batch)
        if len(rows) == min(batch, len(embeddings))
    ]
    return float(torch.cat(masses).mean())


def calibrate(params: Mapping[str, Any], given: Given) -> dict[str, Tensor]:
    """`temperature` [n] at which the diagonal of the teacher's self-similarities takes the wanted mass, and `mass` [n].

    One for each of the `batches`, so many rows that a loss sees: the diagonal has the less the more rows there are.
    With the diagonal near 1 the losses that hold it are numerically 0.
    """
    table = given.table(EMBEDDING)
    batches, scale, wanted = params["batches"], float(params["scale"]), float(params["mass"])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(table), generator=generator)[: max(CALIBRATED, *batches)]
    embeddings = table.rows(rows.numpy()).float()
    temperatures = [_temperature(embeddings, wanted, scale, batch) for batch in batches]
    masses = [diagonal_mass(embeddings, t, scale, batch) for t, batch in zip(temperatures, batches, strict=True)]
    return {"temperature": torch.tensor(temperatures), "mass": torch.tensor(masses)}


def _temperature(embeddings: Tensor, wanted: float, scale: float, batch: int) -> float:
    """Where `diagonal_mass` is the wanted one."""
    low, high = math.log(1e-2), math.log(1e4)
    for _ in range(40):  # the mass falls as the temperature rises
        middle = (low + high) / 2
        if diagonal_mass(embeddings, math.exp(middle), scale, batch) > wanted:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


class DimeFMConfig(MethodConfig):
    """Knobs of DIME-FM."""

    pvl_weight: float = knob(
        0.3, "w2, the weight of L_p-vl; L_vl has what the others leave.", search=Range(low=0.0, high=0.6), ge=0, le=1
    )
    udist_weight: float = knob(0.0, "w3, the weight of L_udist.", search=Range(low=0.0, high=0.3), ge=0, le=1)
    t_vl: float = knob(
        1.0,
        "T1, the temperature of L_vl; a softer one learns faster in few steps.",
        search=Range(low=0.5, high=16, log=True),
        gt=0,
        le=100,
    )
    t_pvl: float = knob(3.0, "T2, of L_p-vl, where it is not calibrated.", gt=0, le=1000)
    t_udist: float = knob(7.0, "T3, of L_udist, where it is not calibrated.", gt=0, le=1000)
    mass: float = knob(
        0.7,
        "Calibrate T2 and T3 so that the diagonal of the teacher's self-similarities takes this mass; 0 keeps them.",
        search=Range(low=0.5, high=0.9),
        ge=0,
        lt=1,
    )
    scale: float = knob(
        100.0,
        "The logit scale, constant: CLIP's learned one is 100.",
        search=Range(low=20, high=100, log=True),
        gt=0,
        le=1000,
    )
    texts: Literal["sentences", "prompts", "captions"] = knob(
        "prompts", "Texts: sentences of the corpus, prompts of the class names, or captions of the corpus's images."
    )
    text_rule: Literal["all", "random", "grounded", "coverage"] = knob(
        "coverage", "Which sentences: see `docs/corpus.md`. Prompts and captions are all used."
    )
    text_budget: int = knob(100_000, "How many sentences are kept.", ge=2, le=100_000_000)
    text_top: int = knob(4, "coverage: sentences kept for each image.", ge=1, le=64)
    text_clusters: int = knob(256, "coverage: clusters of sentences.", ge=1, le=65536)
    text_cap: float = knob(2.0, "coverage: a cluster's largest part, as a multiple of an even share.", gt=0, le=1000)
    text_anchors: int = knob(20_000, "Images that sentences are compared with, at most.", ge=2, le=10_000_000)
    text_batch: int = knob(0, "M, texts of a step; 0 for as many as images.", ge=0, le=65536)
    teacher_view: Literal["center", "same"] = knob(
        "center", "The teacher's embedding of the plain image, or of the view that the student sees."
    )
    text_student: Literal["none", "small"] = knob(
        "none", "Keep the teacher's text tower, or distil it too, into a small transformer, before the images."
    )
    text_width: int = knob(96, "small: its width, in steps of 32.", ge=32, le=4096, multiple_of=32)
    text_layers: int = knob(2, "small: its blocks.", ge=1, le=24)
    text_lr: float = knob(2e-3, "small: its peak learning rate.", gt=0, le=1)
    text_steps: float = knob(1.0, "small: its steps, as a share of the sweep's.", gt=0, le=4)
    lr: float = rate_knob()
    weight_decay: float = decay_knob()
    warmup: float = knob(0.04, "Share of the steps with a rising learning rate.", ge=0, lt=1)
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


class DimeFMLearner(EmbeddingLearner):
    """`w1 · L_vl + w2 · L_p-vl + w3 · L_udist`, w1 = 1 - w2 - w3, over the images of all ranks.

    The teacher's image embeddings v_t [B, d] are those of the plain images (or of the same views), its text embeddings
    u_t [M, d] those of texts that belong to no image in particular. The student keeps the teacher's text tower.

    Calibrated temperatures are those of the calibrated number of rows that is nearest to what a loss sees: where a
    training that ran out of memory is tried again, micro batches are half as large as planned.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.weights: tuple[float, float, float] = tuple(params["weights"])
        self.temperatures: list[float] = list(params["temperatures"])
        self.scale: float = params["scale"]
        self.calibrated: dict[int, float] = {}
        if params["calibrated"]:
            found = given.result(TEMPERATURES)["temperature"].tolist()
            self.calibrated = dict(zip(params["calibrated"], found, strict=True))
            self.temperatures[1:] = [found[0]] * 2

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.texts is not None or self.weights[0] == 0
        v_t, v_s = gathered(batch.outputs[EMBEDDING.key]), gathered(self.student(batch.images))
        return self.combine(v_t, v_s, batch.texts)

    def combine(self, v_t: Tensor, v_s: Tensor, u_t: Tensor | None) -> dict[str, Tensor]:
        """The loss of embeddings [B, d] and [M, d]; a part of weight 0 is neither computed nor told."""
        parts: dict[str, Tensor] = {}
        if self.calibrated:
            nearest = min(self.calibrated, key=lambda rows: abs(rows - len(v_t)))
            self.temperatures[1:] = [self.calibrated[nearest]] * 2
        t_vl, t_pvl, t_udist = self.temperatures
        vl, pvl, udist = self.weights
        if vl > 0 and u_t is not None:
            parts["vl"] = vl_loss(v_t, v_s, u_t, t_vl, self.scale)
        if pvl > 0:
            parts["pvl"] = pvl_loss(v_t, v_s, t_pvl, self.scale)
        if udist > 0:
            parts["udist"] = udist_loss(v_t, v_s, t_udist, self.scale)
        shares = {"vl": vl, "pvl": pvl, "udist": udist}
        return {"loss": torch.stack([shares[name] * part for name, part in parts.items()]).sum(), **parts}

    def facts(self) -> dict[str, float]:
        return dict(zip(("t_vl", "t_pvl", "t_udist"), self.temperatures, strict=True))


class DimeFM(ByDualEncoder):
    """Distillation of a dual encoder into a small image tower from unpaired images and sentences.

    Losses, scale 100, temperatures 1 / 3 / 7, weights 0.7 / 0.3 / 0, AdamW(0.9, 0.999) at 8e-4 with weight decay 0.05,
    the kept text tower and the teacher's embeddings of plain images are the released code's [code]. Calibrated
    temperatures, the choice of sentences, and the schedule in shares of the sweep's steps are ours [inferred];
    `mass: 0` gives the code's temperatures; so is the smaller text student, of which the code has none.
    """

    name = "dime_fm"
    family = "remapping"
    paper = "Sun et al., DIME-FM: DIstilling Multimodal and Efficient Foundation Models, ICCV 2023, arXiv 2303.18232"
    Config = DimeFMConfig

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, DimeFMConfig)
        if config.pvl_weight + config.udist_weight > 1:
            return f"pvl_weight {config.pvl_weight:g} + udist_weight {config.udist_weight:g} leave L_vl nothing"
        if config.texts not in setting.task.texts:
            return f"texts {config.texts!r}: there are none; the sweep file brings {', '.join(setting.task.texts)}"
        if config.teacher_view == "same" and setting.task.streamed:
            return "teacher_view 'same' needs stored views, and the corpus is streamed; its teacher sees plain images"
        if config.text_student == "small" and setting.teacher is not None and setting.teacher.vocabulary == 0:
            return f"text_student 'small': {setting.teacher.name} does not tell its tokenizer's vocabulary"
        return None

    @classmethod
    def stages(cls, config: DimeFMConfig, setting: Setting) -> list[Stage]:
        assert setting.teacher is not None
        stages: list[Stage] = []
        texts: list[Stage] = []
        if config.text_student == "small":
            also: tuple[Texts, ...] = () if config.texts == "prompts" else (config.texts,)
            small = {"width": config.text_width, "layers": config.text_layers}
            texts.append(
                text_student_stage(setting, ("prompts", *also), **small, lr=config.text_lr, budget=config.text_steps)
            )
        rest = 1 - config.pvl_weight - config.udist_weight
        chooses = config.texts == "sentences" and config.text_rule != "all"
        if chooses:
            names = ("budget", "top", "clusters", "cap", "anchors")
            chosen = {name: getattr(config, f"text_{name}") for name in names}
            stages.append(texts_stage({**chosen, "rule": config.text_rule, "seed": 0}))
        calibrated: list[int] = []
        if config.mass > 0 and rest < 1:
            # Out of device memory a stage is tried once more, with micro batches half as large.
            calibrated = [setting.task.batch, max(1, setting.task.batch // 2)]
            params = {"mass": config.mass, "scale": config.scale, "batches": calibrated}
            stages.append(
                FitStage(
                    name=TEMPERATURES, version=2, fit=calibrate, params=params, outputs=(EMBEDDING,), images="corpus"
                )
            )
        train = TrainStage(
            name="distil_embeddings",
            version=2,
            learner=DimeFMLearner,
            params={
                "width": setting.teacher.embedding,
                "weights": [rest, config.pvl_weight, config.udist_weight],
                "temperatures": [config.t_vl, config.t_pvl, config.t_udist],
                "scale": config.scale,
                "calibrated": calibrated,
            },
            feed=Feed(
                images="corpus",
                outputs=(EMBEDDING,),
                plain=config.teacher_view == "center",
                texts=config.texts,
                text_rows=TEXTS if chooses else "",
                text_batch=config.text_batch,
            ),
            recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, warmup=config.warmup, budget=config.budget),
            trains="student",
            reads=("student",),
            inputs=tuple(stage.name for stage in stages),
        )
        return [*texts, *stages, train]
