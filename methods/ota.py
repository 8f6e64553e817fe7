"""OTA, One to Transfer All: the teacher is tuned by re-representation, and taught on with guided generated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, WithJsonSchema
from torch import Tensor

from methods.contract import (
    Batch,
    Deployed,
    Feed,
    Given,
    Images,
    ImageStage,
    Kind,
    Learner,
    Method,
    Recipe,
    Setting,
    Stage,
    TrainStage,
    supervised_loss,
)
from methods.generators.makers import Completion, RePaint, SDEdit, UpstreamMaker
from methods.generators.pipelines import ImageToImage, Inpaint, IPAdapter
from methods.irf import CALIBRATE, IRF, MODE_DESCRIPTION, IRFConfig, Mode
from methods.kd import uneven_distillation_loss
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.tuning import LOGITS, SoftTargets, SoftTeacher, TeacherTuning, soft_targets, tuning_refuses

GENERATE = "generate"
DISTIL = "distil"


@dataclass(frozen=True)
class Generator:
    """A way to make the pool.

    Attributes:
        maker: runs it.
        knobs: which knobs of `OTAConfig` are its parameters.
    """

    maker: type[UpstreamMaker]
    knobs: tuple[str, ...]


GENERATORS: dict[str, Generator] = {
    "completion": Generator(Completion, ("keep", "sample_temperature", "top_k")),
    "sdedit": Generator(SDEdit, ("strength", "steps")),
    "repaint": Generator(RePaint, ("keep", "steps", "jump_length", "resamples")),
    "inpaint": Generator(Inpaint, ("keep", "guidance", "steps")),
    "img2img": Generator(ImageToImage, ("strength", "guidance", "steps")),
    "ip_adapter": Generator(IPAdapter, ("strength", "guidance", "steps", "ip_scale")),
}
GeneratorName = Literal["completion", "sdedit", "repaint", "inpaint", "img2img", "ip_adapter", "none"]


def _keep(value: float | str) -> float | str:
    if value == "random" or (not isinstance(value, str) and 0 <= value <= 1):
        return value
    raise ValueError(f"keep is {value!r}; allowed: a share from 0 to 1, or random")


Keep = Annotated[
    float | str,
    AfterValidator(_keep),
    WithJsonSchema({"type": ["number", "string"], "minimum": 0, "maximum": 1, "pattern": "^random$"}),
]


class OTAConfig(MethodConfig):
    """Knobs of OTA: of the teacher's tuning, of the generated pool, and of the distillation."""

    teacher_tuning: TeacherTuning = knob(
        "irf",
        "How the teacher is tuned first: irf (see the next five knobs), another tuning at its defaults, or none.",
        pattern=r"^[a-z0-9_]+$",
    )
    irf: Mode = knob("irf", MODE_DESCRIPTION)
    calibration_lr: float = knob(1e-3, "IRF: peak learning rate of the teacher's head.", gt=0, le=1)
    calibration_backbone: float = knob(0.1, "IRF: factor on the learning rate below the head.", gt=0, le=1)
    calibration_layer_decay: float = knob(1.0, "IRF: further factor for each block away from the head.", gt=0, le=1)
    calibration_budget: float = knob(0.5, "IRF: share of the sweep's steps that calibration takes.", gt=0, le=4)

    generator: GeneratorName = knob(
        "completion",
        "completion: the paper's, by vq; sdedit, repaint: by diffusion; inpaint, img2img, ip_adapter: by pipeline; "
        "none: distils on the labelled images.",
    )
    sources: Images = knob("labelled", "Which training images guide the generation.")
    completions: int = knob(
        4, "Generated images for each source.", search=Choice(values=(1, 2, 4, 8, 16)), ge=1, le=1024
    )
    generated: int = knob(0, "Generated images in all; 0: completions x sources.", ge=0, le=100_000_000)
    keep: Keep = knob(
        "random",
        "Share of the rows that a source keeps, from the top; random: a random cut row for each image; 0: no guidance.",
        search=Choice(values=(0.25, 0.5, 0.75, "random")),
    )
    sample_temperature: float = knob(1.0, "Completion: divides the prior's logits.", gt=0, le=10)
    top_k: float = knob(0.125, "Completion: share of the codes, the likeliest, that is sampled from.", gt=0, le=1)
    strength: float = knob(0.5, "sdedit, img2img, ip_adapter: share of the noise that is added.", gt=0, le=1)
    steps: int = knob(25, "Diffusion: denoising steps.", ge=1, le=1000)
    jump_length: int = knob(5, "repaint: steps that are taken back at a time.", ge=1, le=1000)
    resamples: int = knob(3, "repaint: how often each stretch is gone through.", ge=1, le=100)
    guidance: float = knob(2.0, "Pipelines: classifier-free guidance scale; 1 for none.", ge=0, le=30)
    ip_scale: float = knob(0.6, "ip_adapter: weight of the image prompt.", ge=0, le=1)

    weight: float = knob(
        1.0,
        "λ: of the teacher's term; 0 is plain supervised training.",
        search=Range(low=0.1, high=10, log=True),
        ge=0,
        le=1000,
    )
    temperature: float = knob(
        4.0, "Softens both class distributions.", search=Range(low=1, high=8, log=True), ge=1, le=100
    )
    ratio: float = knob(
        1.0,
        "Generated images for each real one in a step.",
        search=Choice(values=(0.25, 0.5, 1.0, 2.0, 4.0)),
        gt=0,
        le=64,
    )
    min_confidence: float = knob(
        0.0, "Images on which the teacher is less sure than this (its likeliest class) do not count.", ge=0, lt=1
    )
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1)
    weight_decay: float = knob(
        0.05, "AdamW's weight decay.", search=Choice(values=(0.0, 1e-4, 1e-3, 1e-2, 5e-2)), ge=0, le=1
    )
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


def confidence(logits: Tensor, kind: Kind) -> Tensor:
    """[B] in [0, 1]: the probability of the likeliest class; for multi-label the mean over classes of yes or no's."""
    if kind == "multilabel":
        return logits.float().abs().sigmoid().mean(1)
    return logits.float().softmax(1).amax(1)


class OTALearner(Learner):
    """A student under `CE(S(x), y) + λ · T² · KL(teacher(g) ‖ S(g))`, x labelled images and g generated ones.

    The two paths are the figure's [fig]; that the second is a KL of softened classes, and the values of λ and T, were
    not found [inferred]. Generated images carry no label. Real and generated rows go through the student in one pass,
    so batch normalisation sees both [inferred]. Without a pool the KL is on the labelled images. With λ = 0 the
    student never sees a generated image. Logits [B, C].
    """

    steady = True

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = given.student
        self.kind: Kind = given.kind
        self.weight: float = params["weight"]
        if self.weight > 0:
            self.temperature: float = params["temperature"]
            self.min_confidence: float = params["min_confidence"]
            self.soft_teacher = SoftTeacher(params, given)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        if self.weight == 0:
            ce = supervised_loss(self.student(batch.images), batch.labels, self.kind)
            return {"loss": ce, "ce": ce}
        real = len(batch.images)
        if batch.generated is None:
            logits = taught = self.student(batch.images)
            outputs = batch.outputs
        else:
            logits, taught = self.student(torch.cat([batch.images, batch.generated.images])).tensor_split([real])
            outputs = batch.generated.outputs
        ce = supervised_loss(logits, batch.labels, self.kind)
        kd = self.distillation(taught, self.soft_teacher(outputs))
        return {"loss": ce + self.weight * kd, "ce": ce, "kd": kd}

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`T² · KL` over the rows, of all ranks, on which the teacher is sure enough; 0 with a graph without any."""
        if self.min_confidence > 0:  # to pick rows out makes a GPU wait, so nothing is asked where all are sure enough
            sure = confidence(teacher, self.kind) >= self.min_confidence
            student, teacher = student[sure], teacher[sure]
        return uneven_distillation_loss(student, teacher, self.temperature, self.kind)

    def deployed(self) -> Deployed:
        return Deployed(network=self.student.eval(), base="student")


class OTA(Method):
    """IRF tunes the teacher; then images guided by the downstream ones carry what it knows to the student.

    `generate` is DIGG, downstream image-guided generation: each downstream image is masked, its codes completed by the
    upstream latent transformer and decoded [fig]. A raster prior keeps what comes first, so the mask hides the rows
    below a cut [inferred]. The pool is made once for each setting of its knobs, whatever the student; a smaller pool
    is the beginning of a bigger one. `distil` trains the student: see `OTALearner`. None of the paper's
    hyperparameters was found: 4 completions of each image, a random cut, the likeliest eighth of the codes at
    temperature 1, λ = 1, T = 4 and as many generated images as real ones are our starting points [inferred].

    The other generators put a diffusion model or a pipeline in the place of the completion. With λ = 0 nothing is tuned
    or generated, and the student is that of `finetune`, bit for bit. Classification and multi-label only: for dense
    tasks the paper distils as well, in a way that was not found.
    """

    name = "ota"
    family = "remapping"
    paper = "Wang et al., OTA: One to Transfer All, 2021 (arXiv 2111.12386)"
    Config = OTAConfig
    deployed_size = "base"

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, OTAConfig)
        if config.weight == 0:
            return None
        if config.teacher_tuning != "irf":
            reason = tuning_refuses(config.teacher_tuning, setting)
            if reason is not None:
                return reason
        if config.generator in ("img2img", "ip_adapter") and int(config.strength * config.steps) < 1:
            return (
                f"generator {config.generator!r} makes int(strength · steps) denoising steps, and strength "
                f"{config.strength:g} of {config.steps} is none"
            )
        if config.generator == "repaint" and config.jump_length > config.steps:
            return f"generator 'repaint' takes back jump_length {config.jump_length} of only {config.steps} steps"
        for stage in cls.stages(config, setting):
            for source in stage.reads if isinstance(stage, ImageStage) else ():
                if source not in setting.task.upstream:
                    who = f"generator {config.generator!r}" if stage.name == GENERATE else "IRF"
                    return (
                        f"ota with {who} needs the upstream generator {source!r}, and the sweep file brings none: add "
                        f"{source!r} to its `upstream` section"
                    )
        return None

    @classmethod
    def stages(cls, config: OTAConfig, setting: Setting) -> list[Stage]:
        targets = cls.targets(config, setting)
        pool = cls.pool(config, setting)
        feed = Feed(images="labelled", labels=True)
        params: dict[str, Any] = {"weight": config.weight}
        if config.weight > 0:
            feed = replace(feed, of=targets.of, outputs=targets.outputs)
            if pool:  # then the teacher is not needed on the labelled images
                feed = replace(
                    feed,
                    outputs=(),
                    pool=pool[-1].name,
                    pool_outputs=targets.outputs,
                    pool_size=pool[-1].count,
                    pool_ratio=config.ratio,
                )
            params |= {"temperature": config.temperature, "min_confidence": config.min_confidence, **targets.params}
        distil = TrainStage(
            name=DISTIL,
            version=2,
            learner=OTALearner,
            params=params,
            feed=feed,
            recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget),
            trains="student",
            reads=("student",),
            inputs=targets.inputs,
        )
        return [*targets.stages, *pool, distil]

    @classmethod
    def targets(cls, config: OTAConfig, setting: Setting) -> SoftTargets:
        """The tuned teacher's class scores."""
        if config.weight == 0:
            return SoftTargets([], ())
        if config.teacher_tuning != "irf":
            return soft_targets(config.teacher_tuning, setting)
        irf = IRFConfig(
            mode=config.irf,
            lr=config.calibration_lr,
            backbone=config.calibration_backbone,
            layer_decay=config.calibration_layer_decay,
            budget=config.calibration_budget,
        )
        return SoftTargets(IRF.stages(irf, setting), (LOGITS,), of=CALIBRATE, params={"tuned": True})

    @classmethod
    def pool(cls, config: OTAConfig, setting: Setting) -> list[ImageStage]:
        """The stage that generates, if any does."""
        if config.weight == 0 or config.generator == "none":
            return []
        assert setting.teacher is not None
        task, generator = setting.task, GENERATORS[config.generator]
        sources = task.labelled + (task.unlabelled if config.sources == "all" else 0)
        return [
            ImageStage(
                name=GENERATE,
                version=1,
                maker=generator.maker,
                params={name: getattr(config, name) for name in generator.knobs},
                count=config.generated or config.completions * sources,
                size=setting.teacher.image_size,
                images=cast(Images, config.sources),
                reads=(generator.maker.upstream,),
            )
        ]
