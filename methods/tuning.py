"""Tuned teachers: what the methods that adapt the teacher share, and how a distillation takes one as its teacher."""

from __future__ import annotations

import copy
import functools
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from methods.contract import (
    TEACHER,
    Batch,
    Deployed,
    Feed,
    Given,
    Learner,
    Method,
    NetworkInfo,
    Recipe,
    Setting,
    Stage,
    Structure,
    TrainStage,
    supervised_loss,
)
from methods.heads import DENSE, POOLED, TEACHER_HEAD, load_head, teacher_head_stage, zero_head
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.outputs import Output

TUNE = "tune"
NONE = "none"
OWN = "own"
LOGITS = Output("logits")


class TuningConfig(MethodConfig):
    """Knobs that every tuning of the teacher has."""

    head_init: Literal["probe", "zero"] = knob(
        "probe",
        "The head starts as a fitted linear probe (LP, then tuning), or at zero.",
        search=Choice(values=("probe", "zero")),
    )
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-5, high=1e-2, log=True), gt=0, le=100)
    weight_decay: float = knob(
        1e-2, "AdamW's weight decay.", search=Choice(values=(0.0, 1e-4, 1e-3, 1e-2, 5e-2)), ge=0, le=1
    )
    budget: float = knob(0.5, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


class TuningLearner(Learner):
    """The teacher with some of it trained, and a head, under the task's own loss; logits [B, C].

    Subclasses say what is trained in `adapt`, and with `fold` and `structure` how a plain network comes out of it. All
    of the teacher stays in evaluation mode (batch norm, dropout, drop path). With `head_init: probe` the head starts
    as the stage `head` of the parameters fitted it (`teacher_head` where they name none).
    """

    steady = True

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.kind = given.kind
        self.params: Mapping[str, Any] = params
        network = given.teacher
        if params["head_init"] == "probe":
            head = given.result(params.get("head", TEACHER_HEAD))
            load_head(network, head["weight"], head["bias"])
        else:
            zero_head(network, given.num_classes)
        network.requires_grad_(False)
        classifier = network.get_classifier()  # type: ignore[operator]
        self.student = self.adapt(network, params)
        classifier.requires_grad_(True)

    @abstractmethod
    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        """Makes trainable what this method trains, in place or around `network` (frozen, its classifier linear)."""

    @classmethod
    def rehearse(cls, params: Mapping[str, Any], teacher: NetworkInfo, num_classes: int) -> str | None:
        """Why this cannot tune a network with the modules of this teacher; None if it can."""
        learner = cls.__new__(cls)
        nn.Module.__init__(learner)
        learner.params = params
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                student = learner.adapt(copy.deepcopy(headed_skeleton(teacher, num_classes)), params)
        except ValueError as error:
            return str(error).rstrip(".")
        except (NotImplementedError, RuntimeError):  # it computes with weights, and a skeleton has none
            return None
        return _outdated(student)

    @classmethod
    def rehearsed(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters in place of these that fit the same networks: few different ones, as each is rehearsed anew."""
        return {k: v for k, v in params.items() if k != "head"} | {"head_init": "zero"}

    def fold(self, network: nn.Module) -> nn.Module:
        """The plain network of a copy of the trained one: adapters merged where they can be."""
        return network

    def structure(self) -> Structure | None:
        """How the folded network's modules come from the teacher's; None where they are the same."""
        return None

    def changes(self) -> dict[str, Any]:
        """Constructor arguments in which the folded network differs from the teacher."""
        return {}

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        supervised = supervised_loss(self.student(batch.images), batch.labels, self.kind)
        return {"loss": supervised, "ce": supervised}

    def deployed(self) -> Deployed:
        network = self.fold(copy.deepcopy(self.student)).eval()
        return Deployed(network, "teacher", self.changes(), self.structure())

    def frozen(self) -> list[nn.Module]:
        return [self.student]

    def dropouts(self) -> list[nn.Module]:
        """Dropout of the method's own: it acts while training, unlike the teacher's."""
        return []

    def train(self, mode: bool = True) -> TuningLearner:
        super().train(mode)
        for module in self.dropouts():
            module.train(mode)
        return self


class TunedTeacher(Method):
    """The base of the methods that tune the teacher on the labelled images and deploy it.

    Class attributes:
        learner: the `TuningLearner`.
        version: of the learner's code; raise it whenever what it computes changes.
        teaches: whether the tuned teacher may teach: a value of the knob `teacher_tuning` of the distillations.
    """

    deploys = "teacher"
    deployed_size: ClassVar[Literal["base", "larger", "own"]] = "base"
    learner: ClassVar[type[TuningLearner]]
    version: ClassVar[int] = 1
    teaches: ClassVar[bool] = True

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        teacher = setting.teacher
        if teacher is None or teacher.skeleton is None:
            return None
        params = json.dumps(cls.learner.rehearsed(cls.params(config, setting)), sort_keys=True)
        reason = _rehearsed(cls.learner, params, teacher, setting.task.num_classes)
        return f"{cls.name} cannot serve {teacher.name}: {reason}" if reason else None

    @classmethod
    def params(cls, config: Any, setting: Setting) -> dict[str, Any]:
        """What the learner reads of the configuration: everything that is not the recipe's."""
        return config.model_dump(exclude={"lr", "weight_decay", "budget"}, mode="json")

    @classmethod
    def recipe(cls, config: Any) -> Recipe:
        """How the training stage is optimised."""
        return Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget)

    @classmethod
    def stages(cls, config: Any, setting: Setting) -> list[Stage]:
        from_probe = config.head_init == "probe"
        train = TrainStage(
            name=TUNE,
            version=cls.version,
            learner=cls.learner,
            params=cls.params(config, setting),
            feed=Feed(images="labelled", labels=True),
            recipe=cls.recipe(config),
            trains="teacher",
            reads=("teacher",),
            inputs=(TEACHER_HEAD,) if from_probe else (),
        )
        return [teacher_head_stage(setting.task.kind), train] if from_probe else [train]


@functools.lru_cache(maxsize=1024)
def _rehearsed(learner: type[TuningLearner], params: str, teacher: NetworkInfo, num_classes: int) -> str | None:
    return learner.rehearse(json.loads(params), teacher, num_classes)


@functools.lru_cache(maxsize=64)
def headed_skeleton(teacher: NetworkInfo, num_classes: int) -> nn.Module:
    """The teacher's modules under a linear head, frozen, on the meta device: no values. Never to be changed.

    Raises:
        ValueError: if its classifier is not one linear layer.
    """
    assert teacher.skeleton is not None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = copy.deepcopy(teacher.skeleton).to("meta")  # some skeletons had to be built with values
        try:
            zero_head(network, num_classes)
        except ValueError:  # it prints the classifier, which may take many lines
            kind = type(network.get_classifier()).__name__  # type: ignore[operator]
            raise ValueError(f"its classifier is not one linear layer but a {kind}.") from None
        return network.requires_grad_(False).eval()


def _outdated(network: nn.Module) -> str | None:
    """Which module would compute with outdated weights while it is trained in evaluation mode; None if none would."""
    for name, module in network.named_modules():
        if hasattr(module, "attention_bias_cache") and any(p.requires_grad for p in module.parameters(recurse=False)):
            return (
                f"{name!r} keeps what it computed of its attention biases while it is in evaluation mode, where a "
                "tuned teacher is held, so that they cannot be trained"
            )
    return None


def tunings() -> dict[str, type[TunedTeacher]]:
    """The methods whose tuned teacher may teach, by name."""
    from methods import discover

    return {n: m for n, m in discover().items() if issubclass(m, TunedTeacher) and m.teaches}


def _known_tuning(value: str) -> str:
    known = [NONE, OWN, *tunings()]
    if value not in known:
        import difflib

        near = difflib.get_close_matches(value, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no tuned teacher {value!r}; allowed: {', '.join(known)}.{hint}")
    return value


TeacherTuning = Annotated[str, AfterValidator(_known_tuning)]


def tuning_knob() -> Any:
    """The knob `teacher_tuning` of a distillation; searched only where the sweep file lists values."""
    return knob(
        NONE,
        "none: the teacher as it comes, with a fitted head; own: under the head that its weights came with, whose "
        "outputs must be the task's classes in the order of their sorted names (kd and the methods built on it); or "
        "the method (its defaults) that first tunes the teacher.",
        pattern=r"^[a-z0-9_]+$",
    )


def tuning_refuses(name: str, setting: Setting, *, own: bool = False) -> str | None:
    """Why the tuning `name` at its defaults cannot serve this setting; None if it can.

    Args:
        name: a value of the knob.
        setting: of the method that asks.
        own: whether that method can read the class scores of a teacher's own head.
    """
    if name == NONE:
        return None
    if name == OWN:
        reason = _own_refuses(setting) if own else "that is for kd and the methods built on it"
        return f"teacher_tuning {name!r}: {reason}" if reason else None
    method = tunings()[name]
    reason = method.refuses(setting) or method.invalid(method.Config(), setting)
    return f"teacher_tuning {name!r}: {reason}" if reason else None


def _own_refuses(setting: Setting) -> str | None:
    teacher, task = setting.teacher, setting.task
    assert teacher is not None
    if task.kind == "segmentation":
        return "a teacher's own head gives no class a pixel"
    if teacher.classes == task.num_classes:
        return None
    head = f"a head of {teacher.classes} classes" if teacher.classes else "no head"
    return f"the weights of {teacher.name} came with {head}, and the task has {task.num_classes} classes"


@dataclass(frozen=True)
class SoftTargets:
    """Where a distillation's class scores come from.

    Attributes:
        stages: to run first.
        outputs: to ask for in the feed.
        of: whose outputs they are (`Feed.of`).
        inputs: stages that the learner must name in `inputs`.
        params: for `SoftTeacher`.
    """

    stages: list[Stage]
    outputs: tuple[Output, ...]
    of: str = TEACHER
    inputs: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)


def soft_targets(tuning: str, setting: Setting) -> SoftTargets:
    """The teacher as it comes under a fitted head or its own, or first tuned by the method `tuning` at its defaults.

    A tuned teacher's stage has the address that it has as a trial of its own: whoever comes first pays for both.
    """
    if tuning == NONE:
        head = teacher_head_stage(setting.task.kind)
        return SoftTargets([head], head.outputs, inputs=(TEACHER_HEAD,), params={"tuned": False})
    if tuning == OWN:
        return SoftTargets([], (LOGITS,), params={"tuned": True})
    method = tunings()[tuning]
    stages = method.stages(method.Config(), setting)
    return SoftTargets(stages, (LOGITS,), of=stages[-1].name, params={"tuned": True})


class SoftTeacher(nn.Module):
    """Teacher logits [B, C] (of pixels: [B, C, h, w]) float32 of the outputs that `soft_targets` asked for."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__()
        head = None if params["tuned"] else given.result(TEACHER_HEAD)
        self.register_buffer("weight", None if head is None else head["weight"].clone(), persistent=False)
        self.register_buffer("bias", None if head is None else head["bias"].clone(), persistent=False)

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor]) -> Tensor:
        if self.weight is None:
            return outputs[LOGITS.key].float()
        if DENSE.key in outputs:
            return F.conv2d(outputs[DENSE.key].to(self.weight.dtype), self.weight[:, :, None, None], self.bias)
        return F.linear(outputs[POOLED.key].to(self.weight.dtype), self.weight, self.bias)
