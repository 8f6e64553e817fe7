"""How trials are proposed and stopped."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.spec.section import Section

STUDY_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")


class Start(Section):
    """A configuration that is tried first."""

    method: str = Field(description="One of `methods`.")
    teacher: int | None = Field(default=None, ge=0, description="Its position in `teachers`, from 0; null: none.")
    student: int | None = Field(default=None, ge=0, description="Its position in `students`, from 0; null: none.")
    knobs: dict[str, Any] = Field(default_factory=dict, description="Values of its knobs; the others are drawn.")


class Search(Section):
    """How trials are proposed and stopped."""

    begin: list[Start] = Field(default_factory=list, description="Configurations that are tried before all others.")
    warm_start: str | None = Field(
        default=None,
        description="Folder of an earlier sweep on the same task with the same objectives and training budget: the "
        "search learns from those of its trials that this space allows, too.",
    )

    trials: int = Field(default=20, ge=1, description="Trials in all, the first ones (see `defaults_first`) included.")
    sampler: Literal["gp", "tpe", "random", "grid"] = Field(
        default="gp",
        description="A Gaussian process over all methods at once, Optuna's TPE, random, or every combination.",
    )
    defaults_first: bool = Field(
        default=True,
        description="Begin with each method at its default knobs, once for every teacher and student it can serve; if "
        "that is more than half of the trials, with so many, at least one of each method.",
    )
    scheduler: Literal["asha", "median", "none"] = Field(default="none", description="Early stopping of weak trials.")
    grace: float = Field(
        default=0.5, gt=0, lt=1, description="Share of its budget that a trial gets before it may stop."
    )
    reduction: int = Field(default=3, ge=2, le=10, description="ASHA keeps one in this many at each rung.")
    concurrency: int | None = Field(
        default=None, ge=1, description="Trials at a time; null: as many as the devices allow."
    )
    reproducible: bool = Field(
        default=True,
        description="Propose each trial from a fixed set of earlier results, so that the same file and seed propose "
        "the same trials whatever finishes first. False lets every free slot be filled at once.",
    )
    time_budget_s: float | None = Field(default=None, gt=0, description="No new trial after this many seconds.")
    device_hours: float | None = Field(
        default=None,
        gt=0,
        description="No new trial that would go over these device-hours; counted is what trials hold, failed ones too.",
    )
    budget: float | None = Field(
        default=None, gt=0, description="The same in money, by `cluster.prices`, in their currency."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sampler and of every trial.")
    repeats: int = Field(
        default=1,
        ge=1,
        le=20,
        description="Runs of each trial, with other labelled images and another seed: rows and search get the mean.",
    )
    study: str = Field(
        default="journal",
        description="Where Optuna's study lies: journal or sqlite (a file in the sweep's folder), postgresql, or "
        "postgresql://[USER@]HOST[:PORT]/DATABASE. What opens the database comes from the environment of the driver "
        "(ORCHESTRATOR_STUDY_URL, or libpq's PGHOST, PGUSER, PGPASSFILE, ...) or from `study_file`, never from here.",
    )
    study_file: str | None = Field(
        default=None, description="A file, such as a mounted secret, with the database's address and password."
    )
    study_patience_s: float = Field(
        default=300.0, ge=0, description="A lost database is tried again for so long; then the sweep ends, resumable."
    )

    @field_validator("study")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        scheme, there, rest = value.partition("://")
        if not there and value in ("journal", "sqlite", "postgresql"):
            return value
        if not there or scheme not in STUDY_SCHEMES:
            raise ValueError(
                "study is none of journal, sqlite, postgresql and postgresql://[USER@]HOST[:PORT]/DATABASE"
            )
        user, at, _ = rest.rpartition("@")
        if (at and ":" in user) or "password" in rest.partition("?")[2].lower():
            raise ValueError(
                "study holds a password, which would be copied into the sweep's folder: take it out, and give the "
                "whole address in the variable ORCHESTRATOR_STUDY_URL or in a file that study_file names"
            )
        return value.replace(scheme, "postgresql", 1)

    @property
    def on_server(self) -> bool:
        """Whether the study lies in a database that is connected to."""
        return self.study.startswith("postgresql")

    @model_validator(mode="after")
    def _file_of_a_database(self) -> Search:
        if self.study_file is not None and not self.on_server:
            raise ValueError(f"study_file is for study: postgresql, and study is {self.study}")
        return self
