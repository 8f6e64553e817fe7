"""How a trial looks while it trains: what decides whether it is stopped early."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from orchestrator.data.task import TaskData, load_task
from orchestrator.train.job import networks_of
from orchestrator.train.loop import Report
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell
from orchestrator.trial.score import val_metric


@dataclass
class Watch:
    """Judges reports of one training stage: how far the trial is, and at each eighth of its budget, what it scores.

    Picklable: with a worker group it goes to where the training runs.

    Attributes:
        context, cell: of the trial.
        trains: which network the stage trains.
        has_head: whether that network's own head is trained.
        before, total: optimizer steps of the trial before this stage, and in all.
        measures: whether to score at all; not where no trial is stopped, nor in a stage whose network is not the
            candidate.
    """

    context: SweepContext
    cell: Cell
    trains: Literal["teacher", "student"]
    has_head: bool
    before: int
    total: int
    measures: bool
    measured: int = 0

    @functools.cached_property
    def task(self) -> TaskData:
        return load_task(self.context.spec.task, self.context.store)

    def __call__(self, report: Report) -> tuple[float, float | None]:
        share = (self.before + report.step) / self.total
        metric = None
        if self.measures and int(share * 8) > self.measured:
            self.measured = int(share * 8)
            base = networks_of(self.context.spec, self.cell.teacher, self.cell.student).trained(self.trains)
            metric = val_metric(self.context, self.task, report.learner.student, base, self.has_head)
        return min(share, 0.999), metric
