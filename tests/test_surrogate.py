"""The model that proposals are made by: its arithmetic, and that it learns across methods."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from small import small_spec, study_of

from methods.knobs import Choice, Range
from orchestrator.sweep import surrogate
from orchestrator.sweep.proposals import Told, most_promising
from orchestrator.sweep.run import prepare
from orchestrator.sweep.space import Dice, grid, neighbours, sample
from orchestrator.sweep.study import Study
from orchestrator.sweep.surrogate import Places, Surrogate, weighed
from orchestrator.trial.plan import Cell, same_key

RATE = Choice(values=(1e-4, 1e-3, 1e-2, 1e-1))
SPACES: dict[str, dict[str, Any]] = {
    "a": {"lr": RATE, "loss": Choice(values=("l1", "l2")), "fixed": 3},
    "b": {"lr": Range(low=1e-5, high=1e-2, log=True), "depth": Range(low=1, high=5, int=True)},
}
A, B = Cell("a", 0, 0), Cell("b", 0, 0)


def test_one_line_serves_all_knobs_of_a_name() -> None:
    places = Places(SPACES)
    assert [name for name, _ in places.columns] == ["lr", "loss", "depth"]
    assert places.common == [True, False, False]
    rows = places([(A, {"lr": 1e-1, "loss": "l2", "fixed": 3}), (B, {"lr": 1e-5, "depth": 2}), (A, {"lr": 1e-3})])
    torch.testing.assert_close(rows[:, 3], torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    assert rows[1, 5] == 0.25
    assert rows[0, 5].isnan()
    assert rows[1, 4].isnan()
    apart = places.apart(rows, rows)
    assert apart[0, 1, 0] == 1
    assert apart[0, 2, 0] == 0
    assert apart[0, 2, 3] == 0.25


def test_a_name_with_numbers_here_and_words_there_is_two_columns() -> None:
    places = Places({"a": {"x": Choice(values=(1, 2, 3))}, "b": {"x": Choice(values=("p", "q"))}})
    assert [(name, line is None) for name, line in places.columns] == [("x", False), ("x", True)]
    assert places.common == [False, False]


def test_improvements_are_those_of_a_plain_gaussian_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw of the kernel, written out pair by pair with an inverse instead of factors."""
    monkeypatch.setattr(surrogate, "DRAWS", 1)
    monkeypatch.setattr(surrogate, "KEPT", 1)
    told = [
        (A, {"lr": 1e-3, "loss": "l1"}),
        (A, {"lr": 1e-2, "loss": "l2"}),
        (B, {"lr": 1e-3, "depth": 4}),
        (B, {"lr": 1e-5, "depth": 1}),
        (B, {"lr": 1e-2, "depth": 2}),
    ]
    worth = [0.30, 0.33, 0.31, 0.32, -9.0]  # the last one's badness is cut off
    running = [(A, {"lr": 1e-1, "loss": "l1"})]
    model = Surrogate(Places(SPACES), told, worth, running, seed=3, lowest=2.0)
    candidates = [(A, {"lr": 1e-2, "loss": "l1"}), (B, {"lr": 5e-3, "depth": 5}), (A, {"lr": 1e-1, "loss": "l1"})]
    places = Places(SPACES)
    rows = places([*told, *running, *candidates]).numpy()
    v, v_knob, l_knob, v_within, length = (
        x[0].numpy() for x in (model._v, model._v_knob, model._l_knob, model._v_within, model._l)
    )

    def k(x: np.ndarray, y: np.ndarray) -> float:
        found = v[1] + v[2] + (v[0] if x[0] == y[0] else 0)
        found += v_knob[0] * math.exp(-((x[3] - y[3]) ** 2) / 2 / l_knob[0] ** 2)
        if x[0] == y[0]:
            apart = (x[3] - y[3]) ** 2 / length[3] ** 2
            apart += float(x[4] != y[4]) / length[4] ** 2 if x[0] == 0 else (x[5] - y[5]) ** 2 / length[5] ** 2
            found += v_within * math.exp(-apart / 2)
        return float(found)

    gram = np.array([[k(x, y) for y in rows] for x in rows])
    noise = float(model._factor[0].square().sum(1)[0]) - gram[0, 0]
    assert noise > 0
    z = np.array(worth)
    unit = z.std()
    z = (z - z.mean()) / unit
    best = z.max()
    cut = np.median(z) - 2 * (1.48 * np.median(np.abs(z - np.median(z))) + 0.3)
    assert z[-1] < cut < z[:-1].min()
    z = np.maximum(z, cut)
    n = len(told)
    for number, got in enumerate(model.improvements(candidates, 0.33).tolist()):
        across = gram[n + 1 + number, : n + 1]
        mean = z.mean() + across[:n] @ np.linalg.inv(gram[:n, :n] + noise * np.eye(n)) @ (z - z.mean())
        inverse = np.linalg.inv(gram[: n + 1, : n + 1] + noise * np.eye(n + 1))
        sd = math.sqrt(gram[n + 1 + number, n + 1 + number] - across @ inverse @ across)
        above = (mean - best) / sd
        assert got == pytest.approx(unit * sd * (above * norm.cdf(above) + norm.pdf(above)), rel=1e-5)


def test_what_a_rate_does_under_one_method_is_expected_under_another() -> None:
    told = [(A, {"lr": lr, "loss": loss}) for lr in RATE.values[:3] for loss in ("l1", "l2")]
    told.append((B, {"lr": 1e-4, "depth": 3}))
    worth = [{1e-4: 0.1, 1e-3: 0.3, 1e-2: 0.6}[knobs["lr"]] for _, knobs in told]
    model = Surrogate(Places(SPACES), told, worth, [], seed=0)
    high, low = model.improvements([(B, {"lr": 1e-2, "depth": 3}), (B, {"lr": 3e-5, "depth": 3})], 0.6).tolist()
    assert high > 10 * low


def test_near_what_runs_already_less_is_expected() -> None:
    told = [(A, {"lr": 1e-3, "loss": "l1"}), (B, {"lr": 1e-3, "depth": 3})]
    candidate = (A, {"lr": 1e-2, "loss": "l1"})
    itself, beside, alone = (
        Surrogate(Places(SPACES), told, [0.2, 0.1], running, seed=0).improvements([candidate], 0.2).item()
        for running in ([candidate], [(A, {"lr": 1e-2, "loss": "l2"})], [])
    )
    assert itself < 0.3 * alone
    assert beside < 0.9 * alone


def test_the_best_results_are_looked_at_and_no_more_than_a_number_of_them() -> None:
    dice = Dice(0)
    told = [(B, sample(SPACES["b"], "b", dice)) for _ in range(3 * surrogate.MOST)]
    worth = [float(i % 97) for i in range(len(told))]
    model = Surrogate(Places(SPACES), told, worth, [], seed=0)
    assert len(model._z) == surrogate.MOST
    best = sorted(worth)[-surrogate.MOST // 2 :]
    kept = sorted(worth[int(i)] for i in surrogate._worth_most(torch.tensor(worth)))
    assert kept[-len(best) :] == best
    assert kept[0] == 0


def test_chances_are_told_in_the_scores_own_units() -> None:
    """Half of a line keeps a limit of 0.25: what was told is certain, what is between is not."""
    space: dict[str, dict[str, Any]] = {"a": {"x": Range(low=0, high=1)}}
    told = [(A, {"x": i / 8}) for i in range(9)]
    model = Surrogate(Places(space), told, [0.5 - i / 16 for i in range(9)], [], seed=0)
    low, edge, high = model.chances([(A, {"x": 0.1}), (A, {"x": 0.5}), (A, {"x": 0.9})], 0.25).tolist()
    assert low > 0.95
    assert 0.2 < edge < 0.8
    assert high < 0.05


def test_a_limit_that_a_minority_breaks_is_not_taken_for_kept() -> None:
    """Fifteen results of one student keep it by the same half, five of another break it by the same third."""
    space: dict[str, dict[str, Any]] = {"a": {"x": Range(low=0, high=1)}}
    small, large = Cell("a", 0, 0), Cell("a", 0, 1)
    told = [(small, {"x": i / 15}) for i in range(15)] + [(large, {"x": i / 5}) for i in range(5)]
    model = Surrogate(Places(space), told, [0.5] * 15 + [-0.3] * 5, [], seed=0)
    again, other = model.chances([(large, {"x": 0.5}), (small, {"x": 0.5})], 0.0).tolist()
    assert again < 0.1
    assert other > 0.9


def test_a_choice_of_zero_beside_ratios_does_not_bring_the_others_together() -> None:
    places = Places({"a": {"decay": Choice(values=(0.0, 1e-4, 1e-3, 1e-2))}})
    rows = places([(A, {"decay": value}) for value in (0.0, 1e-4, 1e-3, 1e-2)])
    torch.testing.assert_close(rows[:, 3], torch.tensor([0, 1, 2, 3], dtype=torch.float64) / 3)


@pytest.mark.parametrize("values", [(0, 1, 2), (0.0, 0.5, 0.9), (0.0, 0.01, 0.02), (0.0, 1e-3)])
def test_a_choice_of_even_steps_from_zero_stays_even(values: tuple[float, ...]) -> None:
    places = Places({"a": {"x": Choice(values=values)}})
    rows = places([(A, {"x": value}) for value in values])
    torch.testing.assert_close(rows[:, 3], torch.tensor([v / max(values) for v in values], dtype=torch.float64))


def test_ratios_of_one_method_are_not_lost_beside_anothers_range_from_zero() -> None:
    spaces: dict[str, dict[str, Any]] = {
        "a": {"decay": Choice(values=(0.0, 1e-3, 1e-2, 1e-1))},
        "b": {"decay": Range(low=0, high=0.1)},
    }
    rows = Places(spaces)(
        [(A, {"decay": v}) for v in (0.0, 1e-3, 1e-2, 1e-1)] + [(B, {"decay": v}) for v in (0.0, 0.1)]
    )
    torch.testing.assert_close(rows[:, 3], torch.tensor([0, 1, 2, 3, 0, 3], dtype=torch.float64) / 3)


def test_chance_draws_whole_numbers_by_ratios_where_the_range_says_so() -> None:
    dice = Dice(0)
    drawn = [dice.suggest_int("rank", 1, 1024, log=True) for _ in range(2000)]
    assert min(drawn) == 1
    assert max(drawn) == 1024
    assert 0.4 < sum(rank <= 32 for rank in drawn) / 2000 < 0.6


def test_every_part_of_a_front_is_sought_by_some_weighing() -> None:
    """Three results that nothing dominates, and one that all dominate; accuracy up, latency down."""
    values = [[0.9, 30.0], [0.8, 12.0], [0.5, 3.0], [0.4, 31.0]]
    best = []
    for seed in range(60):
        found = weighed(values, [1, -1], seed)
        assert min(found) == found[3]
        best.append(found.index(max(found)))
    assert set(best) == {0, 1, 2}


def test_neighbours_change_one_knob_and_stay_in_the_space() -> None:
    dice = random.Random(0)
    knobs = {"lr": 9e-3, "depth": 5}
    found = list(neighbours(SPACES["b"], knobs, dice))
    assert len(found) == 8
    for one in found:
        assert sum(one[k] != knobs[k] for k in knobs) <= 1
        assert 1e-5 <= one["lr"] <= 1e-2
        assert one["depth"] in range(1, 6)
        assert isinstance(one["depth"], int)
    chosen = {"lr": 1e-3, "loss": "l1", "fixed": 3}
    assert [n["lr"] for n in neighbours(SPACES["a"], chosen, dice)][:3] == [1e-4, 1e-2, 1e-1]


CELLS = [Cell("a", None, 0), Cell("a", None, 1), Cell("b", None, 0)]
LINES: dict[str, dict[str, Any]] = {"a": {"x": Range(low=0, high=1)}, "b": {"x": Range(low=0, high=1)}}


def first_of(told: list[Told], count: int = 20) -> list[Cell]:
    return [cell for cell, _ in most_promising(told, CELLS, LINES, set(), [1], 0)[:count]]


def test_a_limit_that_few_of_many_trials_break_keeps_its_student_away() -> None:
    """Of 300 trials 12 broke it, less than the surrogate would see of them by their worth."""
    told = [Told((CELLS[0], {"x": i / 288}), [0.5], -0.5, False) for i in range(288)]
    told += [Told((CELLS[1], {"x": i / 12}), None, 0.3, False) for i in range(12)]
    assert CELLS[1] not in first_of(told)


def test_what_fails_is_left_alone_while_nothing_keeps_the_limits() -> None:
    told = [Told((CELLS[0], {"x": i / 9}), None, 0.05 + i / 20, False) for i in range(10)]
    told += [Told((CELLS[2], {"x": i / 9}), None, None, False) for i in range(10)]
    assert CELLS[2] not in first_of(told)


def test_what_fails_is_bad_even_where_one_value_is_all_that_is_known() -> None:
    told = [Told((CELLS[0], {"x": 0.5}), [0.5], None, False)]
    told += [Told((CELLS[2], {"x": i / 9}), None, None, False) for i in range(10)]
    assert first_of(told).count(CELLS[2]) <= 2


def test_where_all_excesses_are_alike_something_is_still_hoped_for() -> None:
    """Every student breaks the limit by nearly the same: the untried one comes first, not a random one."""
    told = [Told((cell, {"x": i / 9}), None, 0.3 + i / 1e4, False) for i in range(10) for cell in (CELLS[0], CELLS[2])]
    assert first_of(told, 10).count(CELLS[1]) >= 9


def test_ties_are_in_a_random_order_that_the_seed_decides() -> None:
    """Nothing tells configurations of words apart that nobody tried: the first one listed has no privilege."""
    space: dict[str, dict[str, Any]] = {"a": {"w": Choice(values=tuple("pqrstuvw"))}}
    told = [Told((A, {"w": "p"}), [0.5], None, False)]
    seen = {same_key(A, {"w": "p"})}
    firsts = [most_promising(told, [A], space, seen, [1], seed)[0][1]["w"] for seed in range(12)]
    assert len(set(firsts)) > 3
    assert firsts == [most_promising(told, [A], space, seen, [1], seed)[0][1]["w"] for seed in range(12)]


def test_a_method_that_cannot_run_here_has_no_part_in_the_search() -> None:
    """Its range would turn the whole comparison of a small grid into draws."""
    spaces = {"a": {"w": Choice(values=(1, 2, 3))}, "b": {"x": Range(low=0, high=1)}}
    told = [Told((A, {"w": 1}), [0.5], None, False)]
    found = most_promising(told, [A], spaces, {same_key(A, {"w": 1})}, [1], 0)
    assert sorted(knobs["w"] for _, knobs in found) == [2, 3]


def landscape(method: str, knobs: dict[str, Any]) -> float:
    """The best of 48: kd at the highest rate, the highest temperature and the larger weight."""
    rate = math.log10(knobs["lr"]) / 10
    if method != "kd":
        return 0.5 + rate
    return 0.5 + rate + 0.02 * math.log2(knobs["temperature"]) + 0.1 * (knobs["weight"] == 0.9)


@pytest.mark.parametrize("sampler", ["gp", pytest.param("tpe", marks=pytest.mark.slow)])
def test_the_search_finds_a_lone_best_in_a_third_of_what_chance_takes(
    colours: Path, tmp_path: Path, sampler: str
) -> None:
    """Chance takes 24.5 trials in the mean; TPE, which is told nothing across methods, more than the process does."""
    rates = [3e-4, 1e-3, 3e-3, 1e-2]
    methods = {
        "kd": {"lr": rates, "temperature": [1.0, 2.0, 4.0, 8.0], "weight": [0.5, 0.9]},
        "finetune": {"lr": rates, "weight_decay": [0.0, 0.01, 0.05, 0.1]},
    }
    taken = []
    for seed in range(5):
        search = {"sampler": sampler, "trials": 48, "seed": seed}
        spec = small_spec(colours, tmp_path, methods=methods, search=search)
        study = study_of(spec, tmp_path / str(seed))
        values = {
            same_key(c, k): landscape(c.method, k) for c in study.cells for k in grid(study.spaces[c.method], c.method)
        }
        assert len(values) == 48
        best = max(values.values())
        for number in range(48):
            config = study.ask()
            value = values[same_key(config.cell, config.knobs)]
            study.tell(number, {"status": "complete", "reason": "", "val_metric": value})
            if value == best:
                taken.append(number + 1)
                break
    if sampler == "gp":
        assert statistics.fmean(taken) <= 8
    else:
        assert statistics.fmean(taken) > 8


def test_a_method_that_always_fails_is_left_alone(colours: Path, tmp_path: Path) -> None:
    """Of the proposals after the defaults few are the failing method's, although nothing is known of its worth."""
    methods = {
        "kd": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "finetune": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "fitnet": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
    }
    spec = small_spec(colours, tmp_path, methods=methods, search={"trials": 40})
    study = study_of(spec, tmp_path / "s")
    seen = []
    for number in range(30):
        config = study.ask()
        seen.append(config.cell.method)
        value = 0.5 - 0.1 * abs(math.log10(config.knobs["lr"] / 1e-2)) - 0.1 * (config.cell.method == "kd")
        row = {"reason": "", "status": "failed" if config.cell.method == "fitnet" else "complete", "val_metric": value}
        study.tell(number, row)
    assert seen[3:].count("fitnet") <= 5
    assert seen[15:].count("finetune") > seen[15:].count("kd")


def test_what_is_not_searched_any_more_is_not_learned_from(colours: Path, tmp_path: Path) -> None:
    """A sweep that is continued after its method has one more knob: its earlier trials lack it."""
    spec = small_spec(colours, tmp_path, methods={"kd": {"lr": [1e-3, 1e-2, 1e-1]}}, search={"trials": 9})
    prepared = prepare(spec)
    (folder := tmp_path / "s").mkdir()
    study = Study(spec, folder, prepared.cells, prepared.spaces, prepared.task.info)
    study.ask()
    study.tell(0, {"status": "complete", "reason": "", "val_metric": 0.5})
    spaces = {"kd": {**prepared.spaces["kd"], "weight": Choice(values=(0.5, 0.9))}}
    again = Study(spec, folder, prepared.cells, spaces, prepared.task.info)
    assert "weight" in again.ask().knobs


def test_a_stopped_trial_is_not_told_the_zeros_of_its_row(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, objectives=["val_metric", "flops"], limits={"params_total": 1e6})
    study = study_of(spec, tmp_path / "s")
    study.ask()
    study.tell(0, {"status": "pruned", "reason": "", "val_metric": 0.2, "flops": 0, "params_total": 0})
    trial = study._study.trials[0]
    assert trial.user_attrs["val_metric"] == 0.2
    assert trial.user_attrs["flops"] is None
    assert trial.constraints == {}
    assert study._values(trial) is None


def test_limits_several_objectives_and_ranges_are_searched_to_the_end(colours: Path, tmp_path: Path) -> None:
    """60 trials with two objectives of a space with ranges: each can run, none comes twice, stopped and broken ones
    among them; after half of them most proposals keep the limit."""
    methods = {
        "kd": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "weight": {"low": 0.1, "high": 0.9}},
        "finetune": {},
    }
    spec = small_spec(
        colours,
        tmp_path,
        methods=methods,
        objectives=["val_metric", "latency_ms"],
        search={"trials": 60},
        limits={"latency_ms": 5.0},
    )
    study = study_of(spec, tmp_path / "s")
    kept = []
    for number in range(60):
        config = study.ask()
        seconds = 10 * config.knobs["lr"] / 0.1 if config.cell.method == "kd" else 6.0
        row = {"reason": "", "val_metric": 0.5 + seconds / 100, "latency_ms": seconds}
        status = "failed" if number % 11 == 10 else "pruned" if number % 7 == 6 else "complete"
        study.tell(number, {"status": status, **row})
        kept.append(seconds <= 5)
    assert len({config.to_json() for config, _ in study.proposed()}) == 60
    assert sum(kept[30:]) >= 20
