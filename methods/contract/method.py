"""A method: what it is called, what it can serve, and its stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from methods.contract.learner import Structure
from methods.contract.setting import Kind, Setting
from methods.contract.stages import Stage
from methods.knobs import MethodConfig


class Method(ABC):
    """One way to move knowledge from a teacher to a student. One file in `methods/`, found by itself.

    Class attributes:
        name: as in the sweep file.
        family: one of the survey's families (`fine-tuning`, `prompt`, `adapter`, `parameter`, `remapping`).
        paper: the reference in one line.
        Config: its knobs.
        uses_teacher: whether it reads a teacher.
        deploys: which architecture is deployed: a `student` of the sweep file, or one derived from the `teacher`.
        needs_labels: whether a stage of its own trains on labels.
        trains_head: False if the deployed network's head is not trained by a stage: the common probe then fits it.
        zero_shot: the deployed network embeds images into the teacher's space, and classes are told by the teacher's
            embeddings of their names. It needs no label.
        teacher_kinds: kinds of teacher that it can serve.
        tasks: kinds of task that it can serve.
        upstream: upstream generators without which it cannot run at all.
        deployed_size: whether what is deployed has the `base`'s own architecture (with the task's head), all of it and
            something more (`larger`), or one of its `own`. What is known to be too big is not trained.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    uses_teacher: ClassVar[bool] = True
    deploys: ClassVar[Literal["teacher", "student"]] = "student"
    needs_labels: ClassVar[bool] = True
    trains_head: ClassVar[bool] = True
    zero_shot: ClassVar[bool] = False
    teacher_kinds: ClassVar[tuple[str, ...]] = ("vit", "cnn", "other")
    tasks: ClassVar[tuple[Kind, ...]] = ("classification", "multilabel")
    upstream: ClassVar[tuple[str, ...]] = ()
    deployed_size: ClassVar[Literal["base", "larger", "own"]] = "own"

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        """Why this method cannot serve this task, teacher and student; None if it can."""
        task, teacher = setting.task, setting.teacher
        if task.kind not in cls.tasks:
            return f"{cls.name} serves {' and '.join(cls.tasks)}, and the task is {task.kind}"
        missing = [name for name in cls.upstream if name not in task.upstream]
        if missing:
            return f"{cls.name} needs an upstream generator, and the sweep file has no `upstream.{missing[0]}`"
        if cls.uses_teacher and teacher is not None and teacher.kind not in cls.teacher_kinds:
            kinds = " or ".join(cls.teacher_kinds)
            return f"{cls.name} needs a {kinds} teacher, and {teacher.name} is of kind {teacher.kind}"
        return None

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        """Why this configuration cannot run in this setting (e.g. more blocks kept than there are); None if it can."""
        return None

    @classmethod
    def smallest(cls, config: Any, setting: Setting) -> Structure | None:
        """Where training decides what is deployed: a network that it is not smaller than, whatever is decided; None if
        none is known. A trial for which that is too big is not trained.
        """
        return None

    @classmethod
    @abstractmethod
    def stages(cls, config: Any, setting: Setting) -> list[Stage]:
        """The stages in order. The last `TrainStage` delivers the network; none delivers the base as it is."""
