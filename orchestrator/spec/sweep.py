"""The whole sweep file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec.corpus import Corpus, Estimate
from orchestrator.spec.explain import explain, section_of
from orchestrator.spec.metrics import LATENCY
from orchestrator.spec.networks import Model, ModelEntry, Upstream, as_student
from orchestrator.spec.places import Cluster, StoreLimits
from orchestrator.spec.search import Search
from orchestrator.spec.section import Section
from orchestrator.spec.task import Task
from orchestrator.spec.text import override, read_mapping, to_yaml
from orchestrator.spec.train import Generate, Train
from orchestrator.spec.wanted import Latency, Limits, Objective, Objectives, Profiles

PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SweepSpec(Section):
    """A sweep file."""

    name: str = Field(description="The sweep's folder below `storage`: letters, digits, `.`, `_`, `-`; at most 64.")
    task: Task = Field(description="The user's data.")
    teachers: list[ModelEntry] = Field(default_factory=list, description="Frozen pre-trained networks; searched.")
    students: list[ModelEntry] = Field(default_factory=list, description="Networks that may be deployed; searched.")
    methods: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Method name -> its knobs: a fixed value, a list to choose from, or {low, high, log, int}. "
        "An empty mapping means the method's own default space. `orchestrator methods` lists them.",
    )
    upstream: Upstream = Field(default_factory=Upstream, description="Generators trained on upstream images.")
    objectives: Objectives = Field(
        default_factory=lambda: [Objective()],
        min_length=1,
        description="One or several; the first ranks the leaderboard.",
    )
    limits: Limits = Field(default_factory=Limits, description="What the chosen student must keep.")
    latency: Profiles = Field(
        default_factory=Latency, description="The profile on which latency is measured, or a list of several."
    )
    search: Search = Field(default_factory=Search, description="How trials are proposed and stopped.")
    train: Train = Field(default_factory=Train, description="The budget that all methods share.")
    generate: Generate = Field(default_factory=Generate, description="The actors that generate images.")
    corpus: Corpus = Field(default_factory=Corpus, description="Images and sentences beyond the task's own.")
    estimate: Estimate = Field(default_factory=Estimate, description="Machines for the estimate that `check` prints.")
    store: StoreLimits = Field(default_factory=StoreLimits, description="The shared store, and its limits.")
    cluster: Cluster = Field(default_factory=Cluster, description="The cluster's limits and prices.")
    storage: str = Field(default="runs", description="Folder for sweeps and the store; a shared one on a cluster.")

    @field_validator("name")
    @classmethod
    def _short_name(cls, value: str) -> str:
        if value == "store" or not NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} cannot name a folder; allowed: letters, digits, '.', '_', '-', at most 64, not 'store'"
            )
        return value

    @field_validator("students")
    @classmethod
    def _without_weights(cls, value: list[Model]) -> list[Model]:
        return [as_student(entry) for entry in value]

    @field_validator("methods", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _distinct_objectives(self) -> SweepSpec:
        metrics = [o.metric for o in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objectives name {listed(metrics)}: each metric once")
        if len(metrics) > 1 and self.search.scheduler != "none":
            raise ValueError(
                f"search.scheduler: {self.search.scheduler} stops by one metric and cannot serve "
                f"{len(metrics)} objectives; use none"
            )
        return self

    @model_validator(mode="after")
    def _profiles_of_latency(self) -> SweepSpec:
        profiles = [self.latency] if isinstance(self.latency, Latency) else self.latency
        names = [profile.profile for profile in profiles]
        for at, name in enumerate(names[1:], 1):
            if not PROFILE.fullmatch(name):
                raise ValueError(
                    f"latency.{at}.profile: {name!r} cannot name a column; of several profiles, each but the first "
                    "needs a name of letters, digits, '_' and '-'"
                )
            if name in names[:at]:
                raise ValueError(f"latency.{at}.profile: {name!r} is the name of two profiles")
        for key, metrics in (("objectives", [o.metric for o in self.objectives]), ("limits", list(self.limits.given))):
            for metric in metrics:
                if metric.startswith(f"{LATENCY}_") and metric not in self.latencies:
                    raise ValueError(
                        f"{key}: {metric} is of no profile of latency; the latencies are {listed(self.latencies)}."
                        f"{nearest(metric, self.latencies)}"
                    )
        return self

    @property
    def latencies(self) -> dict[str, Latency]:
        """The profiles on which latency is measured, by metric: `latency_ms` is the first one."""
        profiles = [self.latency] if isinstance(self.latency, Latency) else self.latency
        return {LATENCY: profiles[0]} | {f"{LATENCY}_{profile.profile}": profile for profile in profiles[1:]}

    @model_validator(mode="after")
    def _budget_has_prices(self) -> SweepSpec:
        if self.search.budget is not None and not any(self.cluster.prices.values()):
            raise ValueError(f"search.budget: {self.search.budget:g} needs cluster.prices, and there are none")
        return self

    @model_validator(mode="after")
    def _elastic_reads_no_stream(self) -> SweepSpec:
        train = self.train
        if self.corpus.images is not None and train.fewest < train.workers:
            raise ValueError(
                f"train.min_workers: {train.min_workers} and corpus.images are both given; each worker of a streamed "
                "corpus has a stream of its own, so their number must stay: leave min_workers out"
            )
        return self

    @property
    def store_address(self) -> str:
        """Where the store lies: an address, or a folder."""
        return self.store.remote or str(Path(self.storage) / "store")

    def to_yaml(self) -> str:
        """The whole file with every default written out; reading it gives an equal spec."""
        return to_yaml(self.model_dump(mode="json"))


def read_spec(path: str | Path, overrides: list[str] | None = None) -> SweepSpec:
    """Reads a sweep file and applies `key.path=value` overrides (values are YAML).

    Raises:
        UserError: if the file is missing, is not YAML, or does not fit the schema.
    """
    raw = read_mapping(Path(path), "sweep file", "; `orchestrator check --keys` prints its keys")
    for pair in overrides or []:
        override(raw, pair)
    return parse_spec(raw, str(path))


def parse_spec(raw: dict[str, Any], where: str = "the sweep file") -> SweepSpec:
    """Validates a mapping; `where` names it in errors."""
    try:
        return SweepSpec.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, SweepSpec, where)) from None


def documented_keys(section: type[BaseModel] = SweepSpec, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key of the sweep file: (dotted key, default as YAML or `required`, description)."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        kind = str(field.annotation)
        many = "[]" if "list" in kind else ".NAME" if "dict" in kind else ""
        key = f"{prefix}{name}{many if inner is not None else ''}"
        if inner is not None:
            rows.append((key, "required" if field.is_required() else "", field.description or ""))
            rows += documented_keys(inner, f"{key}.")
            continue
        default = "required" if field.is_required() else yaml.safe_dump(field.get_default(call_default_factory=True))
        rows.append((key, default.replace("...", "").strip(), field.description or ""))
    return rows
