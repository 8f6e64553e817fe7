"""What the benchmarks reckon with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import search_cost
from benchmarks.profile import part_of
from benchmarks.record import command_of, own_sweep
from benchmarks.search_cost import SPECS, Search, at_random, averaged, checked, grid_file, key_of, product, reached
from orchestrator.sweep.space import grid


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """Trials of 8 seconds that score what they end with all along; one of them is good."""
    prepared = checked(json.dumps(SPECS["clipart"]))
    keys = [key_of(c.method, knobs) for c in prepared.cells for knobs in grid(prepared.spaces[c.method], c.method)]
    trials = {}
    for number, key in enumerate(keys):
        value = 0.9 if number == 40 else (number * 37 % 101) / 200
        trials[key] = {"seconds": 8.0, "curve": [(s / 8, value, float(s)) for s in range(1, 9)]}
    return {"spec": SPECS["clipart"], "trials": trials}


def test_a_replayed_search_pays_for_what_it_trains_and_for_that_once(table: dict[str, Any]) -> None:
    paid: list[float] = []

    def heard(search: Search) -> Search:
        def steps(table: dict[str, Any], seed: int) -> Iterator[tuple[float, float]]:
            paid.clear()
            for seconds, value in search(table, seed):
                paid.append(seconds)
                yield seconds, value

        return steps

    (spent, count, _), (sooner, fewer, _) = reached(table, heard(product("gp", "none")), 3, [0.89, 0.45])
    assert len(paid) == count > fewer
    assert spent == 8.0 * sum(seconds > 0 for seconds in paid)
    assert sooner == 8.0 * sum(seconds > 0 for seconds in paid[:fewer])
    [(stopped, _, _)] = reached(table, heard(product("gp", "asha")), 3, [0.89])
    assert stopped < 8.0 * sum(seconds > 0 for seconds in paid)
    (some, _, hit), (nothing, trials, missed) = reached(table, at_random, 3, [0.1, 2.0])
    assert (hit, missed) == (True, False)
    assert some < nothing
    assert (nothing, trials) == (8.0 * len(table["trials"]), len(table["trials"]))


@pytest.mark.parametrize(("options", "mark"), [((), "clipart"), (("--repeats", "3", "--task", "icons"), "icons_means")])
def test_a_grid_is_published_under_its_own_name(monkeypatch: pytest.MonkeyPatch, options: Any, mark: str) -> None:
    published: list[str] = []
    monkeypatch.setattr(search_cost, "publish", lambda name, result, text: published.append(name))
    monkeypatch.setattr(search_cost, "SEARCHES", {"random": search_cost.SEARCHES["random"]})
    monkeypatch.setattr(search_cost, "ORDERS", 3)
    monkeypatch.setattr(sys, "argv", ["search_cost", "--replay", *options])
    search_cost.main()
    assert published == [f"search_cost_{mark}"]


def test_a_grid_of_several_students_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec = {
        **SPECS["clipart"],
        "students": ["timm/test_vit", "timm/test_resnet"],
        "methods": {"finetune": {"lr": [0.1]}},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.setattr(sys, "argv", ["search_cost", "--spec", str(tmp_path / "two.yaml"), "--storage", str(tmp_path)])
    with pytest.raises(SystemExit):
        search_cost.main()
    assert "one teacher and one student" in capsys.readouterr().err


def test_a_configuration_of_several_seeds_scores_their_mean_and_costs_their_sum() -> None:
    runs = [{"seconds": 4.0, "curve": [(0.5, v, 2.0), (1.0, 2 * v, 4.0)]} for v in (0.1, 0.3, 9.0)]
    found = averaged({"task": "clipart", "spec": {}, "machine": "m", "runs": {"k": runs}}, 2)["trials"]["k"]
    assert found == {"seconds": 8.0, "curve": [(0.5, pytest.approx(0.2), 4.0), (1.0, pytest.approx(0.4), 8.0)]}
    with pytest.raises(SystemExit, match="has 3 seeds, not 4"):
        averaged({"task": "clipart", "spec": {}, "machine": "m", "runs": {"k": runs}}, 4)


@pytest.mark.parametrize("task", SPECS)
def test_the_recorded_grid_is_whole(task: str) -> None:
    known = json.loads(grid_file(task).read_text(encoding="utf-8"))["runs"]
    prepared = checked(json.dumps(SPECS[task]))
    keys = {key_of(c.method, knobs) for c in prepared.cells for knobs in grid(prepared.spaces[c.method], c.method)}
    assert set(known) == keys
    assert all(run["curve"][-1][2] == run["seconds"] for runs in known.values() for run in runs)


def test_a_benchmark_reads_no_more_of_a_sweep_file_than_it_says(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntask: {data: 'folder:images'}\nstudents: [timm/test_vit]\nmethods: {finetune: {lr: [0.1, 0.2]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = own_sweep(Path("mine.yaml"))
    assert set(found) == {"name", "task", "students", "methods"}
    assert found["task"]["data"] == f"folder:{tmp_path}/images"
    assert found["methods"] == {"finetune": {"lr": [0.1, 0.2]}}
    with pytest.raises(SystemExit, match=r"Did you mean 'mine\.yaml'"):
        own_sweep(Path("mine.yml"))


TRIAL = "run_trial (orchestrator/trial/run.py:1);fit (orchestrator/train/loop.py:1);"
PASS = "run_trial (orchestrator/trial/run.py:1);entries (orchestrator/data/passes.py:1);"


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (TRIAL + "learning_rate (orchestrator/train/loop.py:9)", "training loop, the rest"),
        (TRIAL + "step (torch/optim/adamw.py:1)", "optimiser"),
        (PASS + "_join (orchestrator/data/passes.py:9)", "teacher's pass, the rest"),
        (PASS + "live_outputs (orchestrator/data/passes.py:9);forward (timm/x.py:1)", "teacher's forward passes"),
        ("main (x.py:1);poll (ray/_private/worker.py:1)", "Ray in the driver and in trials"),
    ],
)
def test_a_stack_counts_for_its_innermost_part(stack: str, part: str) -> None:
    assert part_of(stack) == part


def test_a_command_is_told_as_it_is_typed() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--trials", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--student-size", type=int, default=48)
    typed = ["--dry", "--trials", "6", "12"]
    assert command_of("x", parser, parser.parse_args(typed)) == "python -m benchmarks.x --dry --trials 6 12"
    assert command_of("x", parser, parser.parse_args([*typed, "--student-size", "32"]), ["dry"]) == (
        "python -m benchmarks.x --trials 6 12 --student-size 32"
    )
