"""The search: what Optuna hears, what is proposed when, and continuing after a death."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from small import small_spec, study_of

from methods.knobs import Choice
from orchestrator.errors import UserError
from orchestrator.sweep.earlier import first_trials
from orchestrator.sweep.held import Held
from orchestrator.sweep.ledger import Clock, Ledger
from orchestrator.sweep.run import prepare
from orchestrator.sweep.space import scale_of
from orchestrator.sweep.study import Study
from orchestrator.trial.context import SweepContext

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def row(status: str, **values: Any) -> dict[str, Any]:
    return {"status": status, "reason": "" if status == "complete" else "because", **values}


@pytest.mark.parametrize(("device", "devices"), [("cpu", 2 * 3), ("cuda", 2 * 2)])
def test_a_stopped_trial_has_taken_all_its_devices_as_one_that_ended_by_itself(
    colours: Path, tmp_path: Path, device: str, devices: float
) -> None:
    from orchestrator.sweep.tune import _Bridge

    train = {"steps": 6, "batch": 12, "workers": 2, "threads": 3, "gpus_per_worker": 2}
    spec = small_spec(colours, tmp_path, train=train)
    study, ledger = study_of(spec, tmp_path / "s"), Ledger(tmp_path / "s")
    context = SweepContext(spec, str(tmp_path / "s"), device)
    clock, held = Clock(tmp_path / "s"), Held(tmp_path / "s", spec, device)
    bridge = _Bridge(context, study, ledger, 1, clock, held)
    bridge.suggest("tune's name")
    bridge.on_trial_complete("tune's name", {"time_total_s": 7.0, "progress": 50, "val_metric": 0.4})
    (stopped,) = ledger.rows()
    assert (stopped["status"], stopped["device_seconds"]) == ("pruned", 7.0 * devices)
    assert context.devices == held.devices == devices


def test_every_method_is_tried_once_at_its_defaults_before_the_sampler_draws(colours: Path, tmp_path: Path) -> None:
    study = study_of(small_spec(colours, tmp_path), tmp_path / "s")
    first = [study.ask() for _ in range(3)]
    assert [c.cell.method for c in first] == ["finetune", "kd", "wecolora"]
    assert first[1].knobs["temperature"] == pytest.approx(4.0)


def test_defaults_take_at_most_half_of_the_trials_but_one_of_each_method(colours: Path, tmp_path: Path) -> None:
    students = [{"model": "timm/test_resnet", "image_size": size} for size in (32, 48, 64, 96)]
    methods = {"finetune": {}, "kd": {}}

    def first(trials: int) -> list[tuple[str, int | None]]:
        spec = small_spec(colours, tmp_path, students=students, methods=methods, search={"trials": trials})
        prepared = prepare(spec)
        return [(cell.method, cell.student) for cell, _ in first_trials(spec, prepared.cells, prepared.spaces)]

    assert first(16) == [(method, student) for method in methods for student in range(4)]
    assert first(15) == first(14) == [(m, (s + turn) % 4) for s in range(4) for turn, m in enumerate(methods)][:7]
    assert first(1) == first(5) == [("finetune", 0), ("kd", 1)]


def test_a_sweep_that_began_with_another_list_of_first_trials_repeats_none(colours: Path, tmp_path: Path) -> None:
    students = [{"model": "timm/test_resnet", "image_size": size} for size in (32, 48, 64)]
    fixed = {"lr": [1e-3, 1e-2], "label_smoothing": 0.1}
    changes = {"students": students, "methods": {"finetune": fixed, "kd": {"lr": [1e-3, 1e-2], "temperature": 4.0}}}
    whole = study_of(small_spec(colours, tmp_path, search={"trials": 12}, **changes), tmp_path / "s")
    begun = [whole.ask() for _ in range(3)]
    assert [(c.cell.method, c.cell.student) for c in begun] == [("finetune", 0), ("finetune", 1), ("finetune", 2)]
    fewer = study_of(small_spec(colours, tmp_path, search={"trials": 10}, **changes), tmp_path / "s")
    then = [fewer.ask() for _ in range(7)]
    assert len({(c.cell, tuple(sorted(c.knobs.items()))) for c in [*begun, *then]}) == 10


def test_optuna_hears_complete_pruned_failed_and_incomplete_as_such(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, objectives=["val_metric", "params_total"])
    study = study_of(spec, tmp_path / "s")
    for _ in range(4):
        study.ask()
    study.tell(0, row("complete", val_metric=0.5, params_total=10))
    study.tell(1, row("pruned", val_metric=0.2))
    study.tell(2, row("failed"))
    study.tell(3, row("complete", val_metric=0.5))  # a row that lacks one of the objectives
    trials = study._study.get_trials(deepcopy=False)
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert [t.number for t in study._study.best_trials] == [0]
    assert trials[1].user_attrs["reason"] == "because"


def test_a_reopened_study_continues_the_numbers_and_draws_what_it_would_have_drawn(
    colours: Path, tmp_path: Path
) -> None:
    spec = small_spec(colours, tmp_path)

    def run(folder: Path, reopen_after: int | None) -> list[str]:
        study = study_of(spec, folder)
        seen = []
        for number in range(12):
            if number == reopen_after:
                study = study_of(spec, folder)
            config = study.ask()
            seen.append(config.to_json())
            study.tell(number, row("complete", val_metric=(number * 7 % 5) / 10))
        return seen

    whole = run(tmp_path / "a", None)
    assert run(tmp_path / "b", 5) == whole
    assert len(set(whole)) == 12


def test_a_proposal_asked_for_when_the_driver_died_is_proposed_again(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    study = study_of(spec, tmp_path / "s")
    asked = [study.ask(), study.ask()]
    study.tell(0, row("complete", val_metric=0.1))
    again = study_of(spec, tmp_path / "s").proposed()
    assert [(c.to_json(), told) for c, told in again] == [(asked[0].to_json(), True), (asked[1].to_json(), False)]


def test_grid_is_every_combination_once_and_refuses_ranges(colours: Path, tmp_path: Path) -> None:
    methods = {"finetune": {"lr": [0.001, 0.01]}, "wecolora": {"rank": [4, 8], "factor": [2, 3]}}
    search = {"sampler": "grid", "trials": 50}
    study = study_of(small_spec(colours, tmp_path, methods=methods, search=search), tmp_path / "s")
    configs = [study.ask() for _ in range(study.size)]
    assert len({(c.cell, tuple(sorted(c.knobs.items()))) for c in configs}) == study.size == 6
    spec = small_spec(colours, tmp_path, methods={"finetune": {"lr": {"low": 0.001, "high": 0.1}}}, search=search)
    with pytest.raises(UserError, match=r"methods\.finetune\.lr: search\.sampler grid needs a list"):
        prepare(spec)


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_no_configuration_is_proposed_twice_while_there_are_others(colours: Path, tmp_path: Path, sampler: str) -> None:
    """10 configurations of a flat landscape, whose best one is always the first: a search likes to repeat it."""
    methods = {"finetune": {"lr": [0.001, 0.01]}, "wecolora": {"rank": [4, 8, 16, 32], "factor": [2, 3]}}
    search = {"sampler": sampler, "trials": 12, "defaults_first": False}
    study = study_of(small_spec(colours, tmp_path, methods=methods, search=search), tmp_path / "s")
    seen = []
    for number in range(12):
        config = study.ask()
        seen.append((config.cell, tuple(sorted(config.knobs.items()))))
        study.tell(number, row("complete", val_metric=0.9 if number == 0 else 0.1))
    assert len(set(seen[:10])) == 10
    assert set(seen[10:]) <= set(seen[:10])  # where all were tried, one comes again


def test_what_optuna_records_is_what_is_trained(colours: Path, tmp_path: Path) -> None:
    """Of numbers to choose from it records the number, not the place that was drawn beside it."""
    methods = {"kd": {"lr": [0.001, 0.003, 0.01], "temperature": {"low": 1.0, "high": 8.0}, "weight": [0.5, 0.9]}}
    study = study_of(small_spec(colours, tmp_path, methods=methods), tmp_path / "s")
    for number in range(12):
        config = study.ask()
        recorded = study._study.trials[number].params
        assert {k.partition(".")[2]: v for k, v in recorded.items() if k.startswith("kd.") and k != "kd.networks"} == {
            k: v for k, v in config.knobs.items() if f"kd.{k}" in recorded
        }
        assert config.knobs["lr"] in (0.001, 0.003, 0.01)
        assert {"kd.lr", "kd.temperature", "kd.weight"} <= recorded.keys()
        study.tell(number, row("complete", val_metric=config.knobs["lr"]))


@pytest.mark.parametrize(
    ("values", "log", "low", "high"),
    [
        ((8, 32, 16), True, 8 / 2**0.5, 32 * 2**0.5),
        ((1, 2, 3), False, 0.5, 3.5),
        ((0.0, 1e-3), False, -5e-4, 1.5e-3),
        ((1e-4, 1e-3, 3e-3), True, 1e-4 / 10**0.5, 3e-3 * 3**0.5),
    ],
)
def test_numbers_to_choose_from_are_places_along_a_line(
    values: tuple[float, ...], log: bool, low: float, high: float
) -> None:
    scale = scale_of(Choice(values=values))
    assert scale is not None
    assert scale.log is log
    assert (scale.low, scale.high) == pytest.approx((low, high))
    assert [scale.nearest(value) for value in values] == list(values)
    assert all(type(scale.nearest(float(v))) is type(v) for v in values)
    assert {scale.nearest(scale.low), scale.nearest(scale.high)} == {min(values), max(values)}


@pytest.mark.parametrize("values", [("a", "b"), (True, False), (None, 1), (3,)])
def test_words_and_lone_values_are_no_line(values: tuple[object, ...]) -> None:
    assert scale_of(Choice(values=values)) is None


def test_a_last_line_that_a_dying_driver_left_unfinished_is_dropped(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    study = study_of(spec, tmp_path / "s")
    asked = study.ask()
    journal = tmp_path / "s" / "study.db"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"x","stu')
    again = study_of(spec, tmp_path / "s")
    assert [c.to_json() for c, _ in again.proposed()] == [asked.to_json()]
    assert again.ask().number == 1
    study_of(spec, tmp_path / "s")


@pytest.mark.parametrize("number", [1, 9])
def test_wherever_a_proposal_is_broken_off_it_is_made_again_and_the_same(
    colours: Path, tmp_path: Path, number: int
) -> None:
    spec = small_spec(colours, tmp_path)

    def told(study: Study, first: int, last: int) -> list[str]:
        seen = []
        for i in range(first, last):
            seen.append(study.ask().to_json())
            study.tell(i, row("complete", val_metric=(i * 7 % 5) / 10))
        return seen

    whole = told(study_of(spec, tmp_path / "whole"), 0, number + 2)
    study = study_of(spec, tmp_path / "s")
    told(study, 0, number)
    journal = tmp_path / "s" / "study.db"
    before = len(journal.read_bytes().splitlines())
    study.ask()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) - before > 3
    for kept in range(before, len(lines)):  # every line of the proposal but the last: the driver died after it
        folder = tmp_path / f"cut{kept}"
        folder.mkdir()
        (folder / "study.db").write_bytes(b"".join(lines[:kept]))
        again = study_of(spec, folder)
        assert len(again.proposed()) == number
        assert told(again, number, number + 2) == whole[number:]
        assert [c.number for c, _ in study_of(spec, folder).proposed()] == list(range(number + 2))
