"""What a sweep searches: for each method its knobs, fixed, to choose from, or a range."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from methods.contract import TEACHER, Feed, FitStage, Stage, TrainStage
from methods.knobs import Choice, Range, default_space
from methods.outputs import Output
from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import SweepSpec, explain
from orchestrator.trial.plan import Cell, TrialConfig, configure, method_named, setting_of

Space = dict[str, Any]  # knob -> Range, Choice, or a fixed value


class Suggests(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


def method_space(spec: SweepSpec, name: str) -> Space:
    """The knobs of one method as the sweep file has them; an empty block means the method's own space.

    Raises:
        UserError: if a knob is unknown, a range is upside down, out of the knob's bounds, or searches nothing.
    """
    method = method_named(name)
    block = spec.methods[name]
    known = method.Config.model_fields
    if not block:
        return dict(default_space(method.Config))
    space: Space = {}
    for knob, value in block.items():
        key = f"methods.{name}.{knob}"
        if knob not in known:
            raise UserError(f"Unknown knob {key!r}; {name} has {listed(known)}.{nearest(knob, known)}")
        space[knob] = _parse(key, value, known[knob].annotation)
        for probe in _extremes(space[knob]):
            _check_value(method.Config, name, knob, probe)
    return space


def _parse(key: str, value: Any, annotation: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise UserError(f"{key}: an empty list samples nothing; give at least one value.")
        if any(isinstance(v, dict | list) for v in value):
            raise UserError(f"{key}: a list holds plain values, not {listed(value)}.")
        return Choice(values=tuple(value)) if len(value) > 1 else value[0]
    if isinstance(value, dict):
        try:
            given = Range.model_validate(value)
        except ValidationError as error:
            raise UserError(explain(error, Range, key)) from None
        if given.low > given.high:
            raise UserError(f"{key}: the range is upside down, low {given.low:g} is above high {given.high:g}.")
        if given.log and given.low <= 0:
            raise UserError(f"{key}: a log range must begin above 0; found low {given.low:g}.")
        if given.low == given.high:
            raise UserError(
                f"{key}: low and high are both {given.low:g}, which samples nothing; write the value itself."
            )
        whole = given.int or annotation is int
        if whole and (given.low % 1 or given.high % 1):
            raise UserError(f"{key}: this knob takes whole numbers; found {given.low:g} to {given.high:g}.")
        return given.model_copy(update={"int": whole})
    return value


def _extremes(value: Any) -> list[Any]:
    if isinstance(value, Choice):
        return list(value.values)
    if isinstance(value, Range):
        return [int(value.low), int(value.high)] if value.int else [value.low, value.high]
    return [value]


def _check_value(config: Any, method: str, knob: str, value: Any) -> None:
    try:
        config.model_validate({knob: value})
    except ValidationError as error:
        if any(knob in problem["loc"] for problem in error.errors()):
            raise UserError(explain(error, config, f"methods.{method}")) from None


@dataclass(frozen=True)
class Scale:
    """Numbers to choose from as places along a line, for a search that learns from neighbours.

    Attributes:
        values: rising.
        low, high: ends of the line, half a step beyond its last values, so that each has a stretch of its own.
        log: whether steps are ratios.
    """

    values: tuple[float, ...]
    low: float
    high: float
    log: bool

    def nearest(self, place: float) -> Any:
        """The value whose stretch a place is in."""
        if self.log:
            return min(self.values, key=lambda value: abs(math.log(value / place)))
        return min(self.values, key=lambda value: abs(value - place))


def scale_of(domain: Any) -> Scale | None:
    """The line of a choice among two numbers or more, by ratios where these are more even than differences."""
    if not isinstance(domain, Choice):
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in domain.values):
        return None
    values = tuple(sorted(set(domain.values)))
    if len(values) < 2:
        return None

    logs = [math.log(v) for v in values] if values[0] > 0 else []
    if logs and unevenness(logs) <= unevenness(values):
        below, above = (math.sqrt(values[at + 1] / values[at]) for at in (0, len(values) - 2))
        return Scale(values, values[0] / below, values[-1] * above, True)
    below, above = ((values[at + 1] - values[at]) / 2 for at in (0, len(values) - 2))
    return Scale(values, values[0] - below, values[-1] + above, False)


def unevenness(places: Sequence[float]) -> float:
    """The largest step between rising places over the smallest."""
    steps = [b - a for a, b in itertools.pairwise(places)]
    return max(steps) / min(steps)


def has_range(space: Space) -> bool:
    """Whether its configurations cannot be listed by `grid`."""
    return any(isinstance(domain, Range) for domain in space.values())


def count(space: Space) -> float:
    """How many configurations there are; infinite with a range of real numbers."""
    found = 1.0
    for domain in space.values():
        if isinstance(domain, Choice):
            found *= len(domain.values)
        elif isinstance(domain, Range):
            found *= domain.high - domain.low + 1 if domain.int else math.inf
    return found


def sample(space: Space, method: str, trial: Suggests, along: bool = False) -> dict[str, Any]:
    """Draws one value for each knob, named `method.knob`.

    Args:
        along: whether numbers to choose from are drawn as places along their `Scale`.
    """
    knobs: dict[str, Any] = {}
    for knob, domain in space.items():
        name = f"{method}.{knob}"
        if along and (scale := scale_of(domain)) is not None:
            knobs[knob] = scale.nearest(trial.suggest_float(name, scale.low, scale.high, log=scale.log))
        elif isinstance(domain, Choice):
            knobs[knob] = trial.suggest_categorical(name, list(domain.values))
        elif isinstance(domain, Range) and domain.int:
            knobs[knob] = trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
        elif isinstance(domain, Range):
            knobs[knob] = trial.suggest_float(name, domain.low, domain.high, log=domain.log)
        else:
            knobs[knob] = domain
    return knobs


def default_knobs(space: Space, method: str) -> dict[str, Any]:
    """Each knob's own default, or what of the space is nearest to it."""
    fields = method_named(method).Config.model_fields
    knobs: dict[str, Any] = {}
    for knob, domain in space.items():
        default = fields[knob].get_default(call_default_factory=True)
        if isinstance(domain, Choice):
            knobs[knob] = default if default in domain.values else domain.values[0]
        elif isinstance(domain, Range):
            clipped = min(max(default, domain.low), domain.high) if isinstance(default, int | float) else domain.low
            knobs[knob] = int(clipped) if domain.int else float(clipped)
        else:
            knobs[knob] = domain
    return knobs


def grid(space: Space, method: str) -> Iterator[dict[str, Any]]:
    """Every combination.

    Raises:
        UserError: if a knob is a range.
    """
    for knob, domain in space.items():
        if isinstance(domain, Range):
            raise UserError(
                f"methods.{method}.{knob}: search.sampler grid needs a list or a fixed value, and this is the range "
                f"{domain.low:g} to {domain.high:g}; list its values, or use gp, tpe or random."
            )
    axes = [list(d.values) if isinstance(d, Choice) else [d] for d in space.values()]
    for values in itertools.product(*axes):
        yield dict(zip(space, values, strict=True))


class Dice:
    """Draws from a space without a study."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return math.exp(self._random.uniform(math.log(low), math.log(high)))
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        if log:
            return min(max(round(self.suggest_float(name, low - 0.5, high + 0.5, log=True)), low), high)
        return self._random.randint(low, high)


def neighbours(space: Space, knobs: Mapping[str, Any], dice: random.Random) -> Iterator[dict[str, Any]]:
    """Configurations with one knob changed: to each other value of a choice, or to some near it in a range."""
    for knob, domain in space.items():
        if isinstance(domain, Choice):
            yield from ({**knobs, knob: value} for value in domain.values if value != knobs[knob])
        elif isinstance(domain, Range):
            for share in (0.05, 0.05, 0.2, 0.2):
                yield {**knobs, knob: _moved(domain, knobs[knob], dice.gauss(0, share))}


def _moved(domain: Range, value: float, share: float) -> float:
    """A value that share of the range away, at most at its end."""
    if domain.log:
        moved = value * (domain.high / domain.low) ** share
    else:
        moved = value + share * (domain.high - domain.low)
    moved = min(max(moved, domain.low), domain.high)
    return round(moved) if domain.int else moved


def check_cell(spec: SweepSpec, space: Space, cell: Cell, task: Any, draws: int = 16) -> str | None:
    """Why no configuration of this cell can run, as far as some draws tell; None if one can."""
    setting = setting_of(spec, task, cell)
    reason = None
    for seed in range(draws):
        knobs = default_knobs(space, cell.method) if seed == 0 else sample(space, cell.method, Dice(seed))
        config = configure(spec, TrialConfig("", 0, cell, knobs, 0))
        reason = method_named(cell.method).invalid(config, setting)
        if reason is None:
            return None
    return reason


def stage_lists(
    spec: SweepSpec, spaces: Mapping[str, Space], cell: Cell, task: Any, draws: int
) -> Iterator[list[Stage]]:
    """The stages of the cell's defaults and of some draws from its space."""
    setting = setting_of(spec, task, cell)
    method = method_named(cell.method)
    space = spaces[cell.method]
    for seed in range(draws):
        knobs = default_knobs(space, cell.method) if seed == 0 else sample(space, cell.method, Dice(seed))
        config = configure(spec, TrialConfig("", 0, cell, knobs, 0))
        if method.invalid(config, setting) is None:
            yield method.stages(config, setting)


def wanted_outputs(
    spec: SweepSpec, spaces: Mapping[str, Space], cells: list[Cell], task: Any, draws: int = 48
) -> dict[int, tuple[Output, ...]]:
    """By teacher position, the teacher outputs that trials of this sweep will ask for, as far as draws tell."""
    wanted: dict[int, dict[Output, None]] = {}
    for cell in cells:
        if cell.teacher is None:
            continue
        for stages in stage_lists(spec, spaces, cell, task, draws):
            for stage in stages:
                feed = stage.feed if isinstance(stage, TrainStage) else stage
                if isinstance(feed, Feed | FitStage) and feed.of == TEACHER and not (feed is stage and feed.pool):
                    wanted.setdefault(cell.teacher, {}).update(dict.fromkeys(feed.outputs))
    return {teacher: tuple(sorted(outputs, key=lambda o: o.key)) for teacher, outputs in wanted.items()}
