"""What a search is given to begin with: configurations to try first, and the trials of an earlier sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from methods.knobs import Choice, Range
from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import SweepSpec, read_spec
from orchestrator.sweep.space import Space, default_knobs, grid
from orchestrator.trial.plan import Cell, TrialConfig

SAME = ("shots", "kind", "decoder", "splits", "seed", "draw", "unlabelled")  # of `task`, besides its data
BUDGET = ("steps", "epochs", "batch")


def allows(space: Space, knobs: Mapping[str, Any]) -> str:
    """Why a space has no such knobs; empty if it has."""
    for knob, value in knobs.items():
        if knob not in space:
            return f"{knob} is no knob that is searched; there are {listed(space)}.{nearest(knob, space)}"
        domain = space[knob]
        if isinstance(domain, Choice):
            if value not in domain.values:
                return f"{knob}: {value!r} is none of {listed(domain.values)}"
        elif isinstance(domain, Range):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not domain.low <= value <= domain.high or (domain.int and value % 1):
                return f"{knob}: {value!r} is not in the range {domain.low:g} to {domain.high:g}"
        elif value != domain:
            return f"{knob}: {value!r} is not {domain!r}, where the file has fixed it"
    return ""


def starts(spec: SweepSpec, cells: list[Cell], spaces: Mapping[str, Space]) -> list[tuple[Cell, dict[str, Any]]]:
    """The configurations of `search.begin`.

    Raises:
        UserError: if this sweep has no such configuration.
    """
    found = []
    for number, start in enumerate(spec.search.begin):
        key = f"search.begin.{number}"
        cell = Cell(start.method, start.teacher, start.student)
        if start.method not in spaces:
            hint = nearest(start.method, spaces)
            raise UserError(f"{key}.method: {start.method!r} is none of this sweep's {listed(spaces)}.{hint}")
        if cell not in cells:
            there = listed(f"teacher {c.teacher}, student {c.student}" for c in cells if c.method == start.method)
            raise UserError(
                f"{key}: {start.method} cannot run with teacher {start.teacher}, student {start.student}; there are "
                f"{there}."
            )
        reason = allows(spaces[start.method], start.knobs)
        if reason:
            raise UserError(f"{key}.knobs: {reason.rstrip('.')}.")
        found.append((cell, dict(start.knobs)))
    return found


def first_trials(spec: SweepSpec, cells: list[Cell], spaces: Mapping[str, Space]) -> list[tuple[Cell, dict[str, Any]]]:
    """What is tried before the sampler draws, in order; a grid is nothing else."""
    begin = starts(spec, cells, spaces)
    usual: list[tuple[Cell, dict[str, Any]]] = []
    if spec.search.sampler == "grid":
        usual = [(cell, knobs) for cell in cells for knobs in grid(spaces[cell.method], cell.method)]
    elif spec.search.defaults_first:
        usual = [(c, default_knobs(spaces[c.method], c.method)) for c in _tried_first(cells, spec.search.trials)]
    return [*begin, *(first for first in usual if first not in begin)]


def _tried_first(cells: list[Cell], trials: int) -> list[Cell]:
    """All of them; where that were more than half of the trials, so many, at least one of each method.

    Each method begins with another of its networks, and comes again when all have had their turn.
    """
    if 2 * len(cells) <= trials:
        return cells
    of_method: dict[str, list[Cell]] = {}
    for cell in cells:
        of_method.setdefault(cell.method, []).append(cell)
    turns = enumerate(of_method.values())
    rounds = [[*own[turn % len(own) :], *own[: turn % len(own)]] for turn, own in turns]
    ordered = [cell for of_round in zip_longest(*rounds) for cell in of_round if cell is not None]
    return ordered[: max(len(of_method), trials // 2)]


def trials_in_all(spec: SweepSpec, first: Sequence[Any]) -> int:
    """What the sweep file asks for, or the grid if that is smaller.

    Args:
        first: as `first_trials` gives it.
    """
    return min(spec.search.trials, len(first)) if spec.search.sampler == "grid" else spec.search.trials


def check_earlier(spec: SweepSpec) -> None:
    """Refuses an earlier sweep whose results do not compare with this one's.

    Raises:
        UserError: naming the first key that differs.
    """
    if spec.search.warm_start is None:
        return
    from orchestrator.select.results import read_trials  # pandas, which most sweeps do not need to begin

    read_trials(spec.search.warm_start)
    old = read_spec(Path(spec.search.warm_start) / "sweep.yaml")
    pairs: list[tuple[str, Any, Any]] = [("task.data", old.task.data, spec.task.data)]
    pairs += [(f"task.{key}", getattr(old.task, key), getattr(spec.task, key)) for key in SAME]
    pairs += [(f"train.{key}", getattr(old.train, key), getattr(spec.train, key)) for key in BUDGET]
    pairs.append(("objectives", old.objectives, spec.objectives))
    for key, there, here in pairs:
        if there != here:
            raise UserError(
                f"search.warm_start: the sweep {spec.search.warm_start!r} has {key}: {_plain(there)}, and this one "
                f"{_plain(here)}: their results do not compare. Name its best configurations in search.begin instead."
            )


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return listed(f"{o.metric} ({o.direction})" for o in value)
    return value


def earlier(
    spec: SweepSpec, cells: list[Cell], spaces: Mapping[str, Space]
) -> list[tuple[Cell, dict[str, Any], dict[str, Any]]]:
    """Trials of the `warm_start` sweep that this sweep's space has too: cell, knobs and row, in their order.

    Complete and infeasible ones only; networks are matched by their whole entry, not by position.
    """
    if spec.search.warm_start is None:
        return []
    old = read_spec(Path(spec.search.warm_start) / "sweep.yaml")

    def moved(position: int | None, there: list[Any], here: list[Any]) -> int | None:
        return None if position is None else here.index(there[position]) if there[position] in here else -1

    found = []
    from orchestrator.select.results import read_trials

    frame = read_trials(spec.search.warm_start)
    for row in frame[frame["status"].isin(["complete", "infeasible"])].to_dict("records"):
        config = TrialConfig.from_json(str(row["config"]))
        teacher = moved(config.cell.teacher, old.teachers, spec.teachers)
        cell = Cell(config.cell.method, teacher, moved(config.cell.student, old.students, spec.students))
        if cell not in cells:
            continue
        space = spaces[cell.method]
        if set(config.knobs) == set(space) and not allows(space, config.knobs):
            found.append((cell, config.knobs, {str(k): v for k, v in row.items()}))
    return found
