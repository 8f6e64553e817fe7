"""Several workers take the step of one process, whatever the method; a group that cannot says why."""

from __future__ import annotations

import pytest

from benchmarks.ddp_equivalence import TOLERANCE, Runs, group_runs, runs_of, worst
from methods import discover

METHODS = sorted(discover())
STEPS = 2


@pytest.fixture(scope="module")
def runs() -> tuple[Runs, Runs]:
    """All methods on one process and on one group of two."""
    return runs_of(METHODS, STEPS), group_runs(METHODS, STEPS, 2)


@pytest.mark.parametrize("name", METHODS)
def test_two_workers_take_the_steps_of_one(runs: tuple[Runs, Runs], name: str) -> None:
    one, two = ({key: run for key, run in side.items() if key.split()[0] == name} for side in runs)
    apart = worst(one, two)
    assert all(value <= TOLERANCE for value in apart.values()), apart
    assert all(len(run["loss of each step"]) == STEPS for run in one.values())
