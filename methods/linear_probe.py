"""Linear probe: the student's network stays as it comes, and only a head is fitted."""

from __future__ import annotations

from methods.contract import Method, Setting, Stage
from methods.knobs import MethodConfig


class LinearProbeConfig(MethodConfig):
    """A linear probe has no knobs."""


class LinearProbe(Method):
    """The student's frozen features under the common probe; the baseline that trains nothing.

    It has no stage of its own. A student without pre-trained weights is probed on random features.
    """

    name = "linear_probe"
    family = "fine-tuning"
    paper = "Yu et al., Visual Tuning (survey), ACM CSUR 2024: linear probe"
    Config = LinearProbeConfig
    deployed_size = "base"
    uses_teacher = False
    needs_labels = False
    trains_head = False
    tasks = ("classification", "multilabel", "segmentation")

    @classmethod
    def stages(cls, config: LinearProbeConfig, setting: Setting) -> list[Stage]:
        return []
