"""What a student is chosen by: objectives, limits, and the profiles on which latency is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from orchestrator.errors import listed, nearest
from orchestrator.spec.metrics import LATENCY, METRICS, better, is_metric, latency_column, shown
from orchestrator.spec.section import Section


class Objective(Section):
    """One objective; a plain string stands for `{metric: STRING}`."""

    metric: str = Field(default="val_metric", description=f"One of {listed(METRICS)}, or latency_ms_PROFILE.")
    mode: Literal["max", "min"] | None = Field(default=None, description="Null: what is better for that metric.")

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if not is_metric(value):
            raise ValueError(f"unknown metric {value!r}; allowed: {listed(METRICS)}.{nearest(value, METRICS)}")
        return value

    @property
    def direction(self) -> Literal["max", "min"]:
        return self.mode or better(self.metric)


def _as_objective(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


Objectives = list[Annotated[Objective, BeforeValidator(_as_objective)]]


class Limits(Section):
    """What the chosen student must keep; what does not is `infeasible`. Found out before training where that can be."""

    val_metric: float | None = Field(default=None, ge=0, le=1, description="At least this.")
    params_total: float | None = Field(default=None, gt=0, description="At most this many parameters.")
    params_trained: float | None = Field(default=None, gt=0, description="At most this many trained parameters.")
    flops: float | None = Field(default=None, gt=0, description="At most this many FLOPs an image, 2 a multiply-add.")
    latency_ms: float | None = Field(default=None, gt=0, description="At most this median latency; see `latency`.")
    latency: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="By further profile of `latency`, at most this median latency, ms; or each as latency_ms_PROFILE.",
    )
    memory_mb: float | None = Field(
        default=None,
        gt=0,
        description="At most this peak memory of a forward pass on one image, MB (1e6 bytes): weights, input and "
        "activations, without what kernels need for themselves.",
    )
    model_mb: float | None = Field(default=None, gt=0, description="At most this size of the weights' file, MB.")
    device_seconds: float | None = Field(
        default=None, gt=0, description="At most this many device-seconds of the trial; known afterwards only."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_metric_too(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = {k: v for k, v in value.items() if isinstance(k, str) and k.startswith(f"{LATENCY}_")}
        others = {k: v for k, v in value.items() if k not in named}
        given = others.get("latency")
        if not named or not isinstance(given, Mapping | None):
            return value
        return others | {"latency": {**(given or {}), **{k.removeprefix(f"{LATENCY}_"): v for k, v in named.items()}}}

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by metric."""
        named = {name: value for name, value in self if value is not None and name != "latency"}
        return named | {f"{LATENCY}_{profile}": value for profile, value in self.latency.items()}

    def excess(self, facts: Mapping[str, Any]) -> dict[str, float]:
        """By how much each limit is exceeded, as a share of it; not above 0 where it is kept.

        Args:
            facts: a trial's row, or a part of it; what is missing or not finite is left out.
        """
        found: dict[str, float] = {}
        for name, limit in self.given.items():
            value = facts.get(name)
            if value is None or not math.isfinite(float(value)):
                continue
            over = limit - float(value) if better(name) == "max" else float(value) - limit
            found[name] = over / limit if limit else over
        return found

    def broken(self, facts: Mapping[str, Any]) -> str:
        """A clause that names the limits which `facts` exceed, each with what was found; empty if none is."""
        parts = [
            f"{name} {shown(name, float(facts[name]))} is {'below' if better(name) == 'max' else 'above'} "
            f"limits.{name}: {shown(name, self.given[name])}{_noise(name, self.given[name], facts)}"
            for name, over in self.excess(facts).items()
            if over > 0
        ]
        return listed(parts) if parts else ""


def near_limits(given: Mapping[str, float], facts: Mapping[str, Any]) -> list[str]:
    """A sentence for each latency that is kept, but nearer to its limit than it could be measured.

    Args:
        given: limits by metric.
        facts: a trial's row.
    """
    return [
        f"{name} {shown(name, float(facts[name]))} keeps the limit of {shown(name, limit)}{noise}."
        for name, limit in given.items()
        if (noise := _noise(name, limit, facts)) and float(facts[name]) <= limit
    ]


def _noise(metric: str, limit: float, facts: Mapping[str, Any]) -> str:
    """A clause where a limit lies within what repeated measurements of a latency gave."""
    if not metric.startswith(LATENCY):
        return ""
    low, high = (float(facts.get(latency_column(metric, end), math.nan)) for end in ("low", "high"))  # type: ignore[arg-type]
    if not low <= limit <= high:
        return ""
    return f", within the noise of its measurement ({shown(metric, low)} to {shown(metric, high)})"


class Latency(Section):
    """A profile of a device on which latency is measured; a limit or an objective of latency_ms means the first one."""

    profile: str = Field(
        default="",
        max_length=40,
        description="Its name, shown beside every latency. Of several, each but the first needs one of letters, "
        "digits, _ and -: its latency is the metric latency_ms_PROFILE.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: where the trial trains.")
    threads: int | None = Field(default=None, ge=1, description="Threads while measuring; null: `train.threads`.")
    batch: int = Field(default=1, ge=1, description="Images in each timed pass.")
    runtime: Literal["torch", "onnxruntime"] = Field(
        default="torch", description="What runs the student: the network itself, or what `export --format onnx` writes."
    )
    min_run_s: float = Field(default=0.5, gt=0, le=60, description="Seconds of timed passes, at least.")

    @model_validator(mode="after")
    def _onnx_on_cpu(self) -> Latency:
        if self.runtime == "onnxruntime" and self.device == "cuda":
            raise ValueError("runtime: onnxruntime measures on the CPU, and device is cuda; use cpu or auto")
        return self


def _one_or_several(value: Any) -> str:
    return "tagged-several" if isinstance(value, list) else "tagged-one"


Profiles = Annotated[
    Annotated[Latency, Tag("tagged-one")] | Annotated[list[Latency], Tag("tagged-several"), Field(min_length=1)],
    Discriminator(_one_or_several),
]
