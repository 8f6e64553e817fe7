"""VeRA: low-rank updates whose matrices are random and shared; only two vectors a map are learned. By peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from methods.by_peft import PeftLearner, Targets, exactly
from methods.knobs import Choice, Range, knob
from methods.tuning import TunedTeacher, TuningConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class VeRAConfig(TuningConfig):
    """Knobs of VeRA."""

    lr: float = knob(1e-2, "Peak learning rate.", search=Range(low=1e-3, high=5e-2, log=True), gt=0, le=100)
    rank: int = knob(64, "Rank of the shared random matrices.", search=Choice(values=(16, 64, 256)), ge=1, le=4096)
    d_initial: float = knob(0.1, "Where the scales of the rank start.", search=Choice(values=(0.01, 0.1)), gt=0, le=1)
    targets: Targets = knob(
        "all", "Fused qkv / attention / MLP / both.", search=Choice(values=("qkv", "attn", "mlp", "all"))
    )
    dropout: float = knob(0.0, "Dropout before the low-rank maps.", search=Choice(values=(0.0, 0.1)), ge=0, lt=1)


class VeRALearner(PeftLearner):
    """The frozen teacher with `y = W x + c + b ⊙ B (d ⊙ A x)`; A and B are random, frozen and shared by all maps.

    b (one scalar an output) starts at 0 and d (one a rank) at `d_initial`. Trained: outputs + rank for each map.
    A and B are drawn from a fixed seed of peft's, not from the trial's.
    """

    def peft_config(self, names: list[str], params: Mapping[str, Any]) -> PeftConfig:
        from peft import VeraConfig

        return VeraConfig(
            r=params["rank"],
            d_initial=params["d_initial"],
            vera_dropout=params["dropout"],
            target_modules=exactly(names),
        )


class VeRA(TunedTeacher):
    """Vector-based random-matrix adaptation on the labelled images; the merged teacher is deployed."""

    name = "vera"
    family = "parameter"
    paper = "Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, ICLR 2024"
    Config = VeRAConfig
    learner = VeRALearner
    version = 2
    teacher_kinds = ("vit",)
