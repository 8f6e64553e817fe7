"""Linear probe of the teacher: it stays as it comes, and only a head is fitted."""

from __future__ import annotations

from methods.contract import Method, Setting, Stage
from methods.knobs import MethodConfig


class TeacherProbeConfig(MethodConfig):
    """A linear probe has no knobs."""


class TeacherProbe(Method):
    """The teacher's frozen features under the common probe; the baseline of every method that tunes the teacher.

    It has no stage of its own. Trained: the head, C · D + C.
    """

    name = "teacher_probe"
    family = "fine-tuning"
    paper = "Yu et al., Visual Tuning (survey), ACM CSUR 2024: linear probe"
    Config = TeacherProbeConfig
    deployed_size = "base"
    deploys = "teacher"
    needs_labels = False
    trains_head = False

    @classmethod
    def stages(cls, config: TeacherProbeConfig, setting: Setting) -> list[Stage]:
        return []
