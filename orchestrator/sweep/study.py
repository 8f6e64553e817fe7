"""The search itself: with `study_storage.py` all that knows Optuna. The study is the truth about what was proposed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from methods.knobs import Choice, Range
from orchestrator.spec import METRICS, SweepSpec
from orchestrator.sweep.earlier import earlier, first_trials, trials_in_all
from orchestrator.sweep.proposals import Told, most_promising
from orchestrator.sweep.space import Space, Suggests, count, grid, has_range, sample, scale_of
from orchestrator.sweep.study_storage import Result, StudyPlace
from orchestrator.trial.plan import Cell, TrialConfig, configure, method_named, same_key, setting_of

optuna.logging.set_verbosity(optuna.logging.WARNING)
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
REPORTED = (TrialState.COMPLETE, TrialState.PRUNED)
REDRAWS = 50  # of a configuration that cannot run, or was proposed before
LEARNED = 40  # of them, before chance alone draws
STARTUP = 4  # results before TPE draws; the methods' defaults are among them


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class Study:
    """Proposes configurations and hears how they ended. Opening the same folder again continues where it stopped.

    The sampler is built anew for each proposal with a seed from the sweep's seed and the proposal's number: proposals
    depend on nothing but the results told so far and on what runs, and continuing does not replay old draws. A proposal
    that a killed driver left half made is void: Optuna hears that it failed, and its number is proposed again. So our
    numbers have no holes, and may differ from Optuna's.

    Of numbers to choose from, TPE is told their places along a line (`Scale`), so that it learns from neighbours; what
    it then proposes, and Optuna records, is one of them. No configuration is proposed twice while there are others.

    Args:
        spec: the sweep file; `search.study` says where the study lies.
        folder: the sweep's.
        cells: feasible combinations of method, teacher and student.
        spaces: knobs by method.
        task: for refusing configurations that cannot run.
        sole: see `StudyPlace`.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: Path,
        cells: list[Cell],
        spaces: dict[str, Space],
        task: Any,
        *,
        sole: bool = False,
    ) -> None:
        self.spec, self.cells, self.spaces, self.task = spec, cells, spaces, task
        self._place = StudyPlace(spec, folder, sole)
        self._whole: list[tuple[TrialConfig, int]] = []  # what was proposed whole, with Optuna's number of it
        self._points: dict[int, tuple[Cell, dict[str, Any]]] = {}  # by Optuna's number, as the surrogate takes them
        self._patiently(self._open)
        self._fixed = first_trials(spec, cells, spaces)
        if spec.search.warm_start is not None:
            self._patiently(self._learn)

    def _open(self) -> None:
        self._study = self._place.open()
        trials = self._study.get_trials(deepcopy=False)
        self._waits = any(trial.state is TrialState.WAITING for trial in trials)  # a dead driver's proposal
        whole = [trial for trial in trials if "config" in trial.user_attrs]
        self._whole = [(TrialConfig.from_json(trial.user_attrs["config"]), trial.number) for trial in whole]
        self._seen = {same_key(config.cell, config.knobs) for config, _ in self._whole}
        for trial in trials:
            if trial.state is TrialState.RUNNING and "config" not in trial.user_attrs:
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _patiently(self, work: Callable[[], Result]) -> Result:
        return self._place.patiently(work, self._open, self.spec.search.study_patience_s)

    def _learn(self) -> None:
        """Adds the trials of the earlier sweep, once; they have no number of ours."""
        source = Path(str(self.spec.search.warm_start)).name
        there = {t.user_attrs.get("earlier") for t in self._study.get_trials(deepcopy=False)}
        for cell, knobs, row in earlier(self.spec, self.cells, self.spaces):
            name = f"{source}:{row['trial_id']}"
            values = [float(row[o.metric]) for o in self.spec.objectives]
            known = all(math.isfinite(v) for v in values)
            if name in there or not (known or row["status"] == "infeasible"):
                continue
            distributions = self._distributions(cell)
            parameters = self._parameters(cell, knobs)
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.COMPLETE if known else TrialState.PRUNED,
                    values=values if known else None,
                    params={name: parameters[name] for name in distributions},
                    distributions=distributions,
                    user_attrs={"earlier": name},
                    constraints=self.spec.limits.excess(row),
                )
            )

    def _distributions(self, cell: Cell) -> dict[str, BaseDistribution]:
        """Of the parameters that a proposal of this cell has."""
        found: dict[str, BaseDistribution] = {"method": CategoricalDistribution(self._methods)}
        networks = list({_cell_name(self.spec, c): c for c in self.cells if c.method == cell.method})
        if len(networks) > 1:
            found[f"{cell.method}.networks"] = CategoricalDistribution(networks)
        for knob, domain in self.spaces[cell.method].items():
            name = f"{cell.method}.{knob}"
            if self._along and (scale := scale_of(domain)) is not None:
                found[name] = FloatDistribution(scale.low, scale.high, log=scale.log)
            elif isinstance(domain, Choice):
                found[name] = CategoricalDistribution(list(domain.values))
            elif isinstance(domain, Range) and domain.int:
                found[name] = IntDistribution(int(domain.low), int(domain.high), log=domain.log)
            elif isinstance(domain, Range):
                found[name] = FloatDistribution(domain.low, domain.high, log=domain.log)
        return found

    @property
    def _methods(self) -> list[str]:
        return list(dict.fromkeys(c.method for c in self.cells))

    @property
    def size(self) -> int:
        """Trials in all: what the sweep file asks for, or the grid if that is smaller."""
        return trials_in_all(self.spec, self._fixed)

    def keep(self, name: str, value: int) -> int:
        """What was kept under this name when the sweep began; `value` if nothing was."""
        known = self._study.user_attrs
        if name not in known:
            self._study.set_user_attr(name, value)
        return int(known.get(name, value))

    def needs_results(self, number: int) -> bool:
        """Whether the proposal of that number depends on earlier results."""
        return number >= len(self._fixed) and self._along

    def proposed(self) -> list[tuple[TrialConfig, bool]]:
        """Every configuration proposed so far, with whether its end was told."""
        trials = self._patiently(lambda: self._study.get_trials(deepcopy=False))
        return [(config, trials[number].state.is_finished()) for config, number in self._whole]

    def ask(self) -> TrialConfig:
        """Proposes the next configuration.

        A connection that is lost on the way leaves a proposal half made, which is void as a dead driver's is; or a
        whole one of which only the answer was lost, and which is then the one.

        Raises:
            StudyLostError: if the study's database stays away.
        """
        number = len(self._whole)

        def propose() -> TrialConfig:
            return self._whole[number][0] if len(self._whole) > number else self._propose(number)

        return self._patiently(propose)

    def _propose(self, number: int) -> TrialConfig:
        if not self._waits:
            self._study.enqueue_trial(self._parameters(*self._drawn(number)))
        trial = self._study.ask()
        self._waits = False
        config = TrialConfig(f"t{number:04d}", number, *self._choose(trial, None, self._along), self.spec.search.seed)
        trial.set_user_attr("config", config.to_json())
        self._whole.append((config, trial.number))
        self._seen.add(same_key(config.cell, config.knobs))
        return config

    def _choose(self, trial: Suggests, cell: Cell | None, along: bool) -> tuple[Cell, dict[str, Any]]:
        if cell is None:
            method = trial.suggest_categorical("method", self._methods)
            cell = self._cell(trial, method, [c for c in self.cells if c.method == method])
        return cell, sample(self.spaces[cell.method], cell.method, trial, along)

    def _drawn(self, number: int) -> tuple[Cell, dict[str, Any]]:
        """The configuration of that number, by what was told until now: one that can run and was not proposed before,
        where there is one.
        """
        first, given = self._first(number)
        fresh = first is None and len(self._seen) < self._all
        if fresh and self.spec.search.sampler == "gp":
            signs = [1 if o.direction == "max" else -1 for o in self.spec.objectives]
            seed = _seed(self.spec.search.seed, number)
            for cell, knobs in most_promising(self._told(), self.cells, self.spaces, self._seen, signs, seed):
                if self._runs(cell, knobs):
                    return cell, knobs
        fallback = None
        for attempt in range(REDRAWS):
            draw = _Draw(self._study, self._sampler(number, attempt))
            cell, knobs = self._choose(draw, first, self.spec.search.sampler == "tpe")
            if attempt < LEARNED:
                knobs |= given
            if not self._runs(cell, knobs):
                fallback = fallback or (cell, knobs)
            elif fresh and same_key(cell, knobs) in self._seen:
                fallback = (cell, knobs)
            else:
                return cell, knobs
        assert fallback is not None
        return next(self._left(), fallback) if fresh else fallback

    def _first(self, number: int) -> tuple[Cell | None, dict[str, Any]]:
        """The first trial of that number, if it is one; where the sweep began with another list of them (by an earlier
        version, or for another number of trials), one that was not proposed then.
        """
        return next((one for one in self._fixed[number:] if same_key(*one) not in self._seen), (None, {}))

    @property
    def _all(self) -> float:
        return sum(count(self.spaces[cell.method]) for cell in self.cells)

    def _told(self) -> list[Told]:
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            point = self._point(trial)
            if point is not None:
                over = max(trial.constraints.values(), default=None) if trial.state in REPORTED else None
                found.append(Told(point, self._values(trial), over, trial.state is TrialState.RUNNING))
        return found

    def _values(self, trial: FrozenTrial) -> list[float] | None:
        """Objectives of a trial; of one that was stopped, those it had until then."""
        if trial.state is TrialState.COMPLETE:
            return list(trial.values)
        if trial.state is not TrialState.PRUNED:
            return None
        known = [trial.user_attrs.get(o.metric) for o in self.spec.objectives]
        finite = [float(value) for value in known if value is not None and math.isfinite(value)]
        return finite if len(finite) == len(known) else None

    def _point(self, trial: FrozenTrial) -> tuple[Cell, dict[str, Any]] | None:
        """Cell and searched knobs; None of a proposal that was broken off, and of what is not searched any more."""
        if trial.number not in self._points:
            point = self._read(trial)
            if point is None:
                return None
            self._points[trial.number] = point
        return self._points[trial.number]

    def _read(self, trial: FrozenTrial) -> tuple[Cell, dict[str, Any]] | None:
        if "config" in trial.user_attrs:
            config = TrialConfig.from_json(trial.user_attrs["config"])
            cell, knobs = config.cell, config.knobs
        elif "earlier" in trial.user_attrs:  # what Optuna recorded is all there is of an earlier sweep's
            method = trial.params["method"]
            networks = trial.params.get(f"{method}.networks")
            cells = [c for c in self.cells if c.method == method and networks in (None, _cell_name(self.spec, c))]
            if not cells:
                return None
            cell, knobs = cells[0], {}
            for knob, domain in self.spaces[method].items():
                if (name := f"{method}.{knob}") in trial.params:
                    scale = scale_of(domain)  # whose values Optuna holds as floats, whole numbers too
                    knobs[knob] = scale.nearest(trial.params[name]) if scale is not None else trial.params[name]
        else:
            return None
        searched = {knob for knob, d in self.spaces.get(cell.method, {}).items() if isinstance(d, Range | Choice)}
        return (cell, {k: knobs[k] for k in searched}) if cell in self.cells and searched <= knobs.keys() else None

    def _runs(self, cell: Cell, knobs: dict[str, Any]) -> bool:
        config = configure(self.spec, TrialConfig("", 0, cell, knobs, 0))
        return method_named(cell.method).invalid(config, setting_of(self.spec, self.task, cell)) is None

    def _left(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """What was not proposed yet of the cells without ranges: chance takes long to find the last of them."""
        for cell in self.cells:
            space = self.spaces[cell.method]
            if not has_range(space):
                for knobs in grid(space, cell.method):
                    if same_key(cell, knobs) not in self._seen and self._runs(cell, knobs):
                        yield cell, knobs

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = _seed(self.spec.search.seed, number, *([attempt] if attempt else []))
        if self.spec.search.sampler == "tpe" and attempt < LEARNED:
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        return optuna.samplers.RandomSampler(seed=seed)

    @property
    def _along(self) -> bool:
        return self.spec.search.sampler in ("gp", "tpe")

    def _record(self, number: int) -> FrozenTrial:
        storage = self._study._storage
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number))

    def _parameters(self, cell: Cell, knobs: dict[str, Any]) -> dict[str, Any]:
        names = {f"{cell.method}.{knob}": value for knob, value in knobs.items()}
        return {"method": cell.method, f"{cell.method}.networks": _cell_name(self.spec, cell), **names}

    def _cell(self, trial: Suggests, method: str, cells: list[Cell]) -> Cell:
        options = {_cell_name(self.spec, c): c for c in cells}
        if len(options) == 1:
            return cells[0]
        return options[trial.suggest_categorical(f"{method}.networks", list(options))]

    def tell(self, number: int, row: dict[str, Any]) -> None:
        """Tells how a trial ended, in Optuna's own states: complete with its values, pruned, or failed.

        The excess over each of the sweep's limits is an Optuna constraint, so that its samplers prefer what keeps them
        and learn from how far the others are off. An infeasible trial is complete, or if it was not trained, pruned.

        Raises:
            StudyLostError: if the study's database stays away.
        """
        self._patiently(lambda: self._tell(number, row))

    def _tell(self, number: int, row: dict[str, Any]) -> None:
        frozen = self._record(self._whole[number][1])
        if frozen.state.is_finished():
            return
        if row["status"] == "pruned":  # its network and costs are not known, and stand as zeros in its row
            row = {key: row.get(key) for key in ("status", "reason", "trial_id", "val_metric")}
        values = [float(row.get(o.metric, float("nan"))) for o in self.spec.objectives]
        known = all(math.isfinite(v) for v in values)
        state = STATES.get(row["status"], TrialState.FAIL)
        if row["status"] == "infeasible":  # what was not trained has no values, and that is no failure
            state = TrialState.COMPLETE if known else TrialState.PRUNED
        elif state is TrialState.COMPLETE and not known:
            state = TrialState.FAIL
        storage, trial_id = self._study._storage, frozen._trial_id
        for metric, over in self.spec.limits.excess(row).items() if state in REPORTED else ():
            storage.set_trial_system_attr(trial_id, f"constraints:{metric}", over)
        storage.set_trial_user_attr(trial_id, "status", row["status"])
        storage.set_trial_user_attr(trial_id, "reason", row.get("reason", ""))
        storage.set_trial_user_attr(trial_id, "trial", row.get("trial_id", ""))
        for metric in (*METRICS, *(m for m in self.spec.latencies if m not in METRICS)):
            storage.set_trial_user_attr(trial_id, metric, json.loads(json.dumps(row.get(metric))))
        self._study.tell(frozen.number, values if state is TrialState.COMPLETE else None, state=state)


class _Draw:
    """What a sampler would propose next, without a trial that records it."""

    def __init__(self, study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> None:
        self._study, self._sampler = study, sampler
        self._trial = optuna.trial.create_trial(state=TrialState.RUNNING)

    def _value(self, name: str, domain: BaseDistribution) -> Any:
        return self._sampler.sample_independent(self._study, self._trial, name, domain)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._value(name, CategoricalDistribution(choices))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._value(name, FloatDistribution(low, high, log=log)))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._value(name, IntDistribution(low, high, log=log)))


def _cell_name(spec: SweepSpec, cell: Cell) -> str:
    teacher = f"{cell.teacher}:{spec.teachers[cell.teacher].model}" if cell.teacher is not None else ""
    student = f"{cell.student}:{spec.students[cell.student].model}" if cell.student is not None else ""
    return " -> ".join(part for part in (teacher, student) if part)
