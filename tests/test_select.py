"""Reading trials, ranking, choosing, the Pareto front, and the printed leaderboard."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.errors import UserError, WorkError
from orchestrator.files import read_facts
from orchestrator.select.leaderboard import print_leaderboard
from orchestrator.select.results import (
    COLUMNS,
    check_ended,
    choose,
    leaderboard,
    margin_note,
    pareto,
    read_trials,
    short_name,
)
from orchestrator.select.subject import find_student
from orchestrator.spec import METRICS, Objective, better
from orchestrator.sweep.choice import against_baseline

VAL = [Objective()]


def trial(number: int, **values: Any) -> dict[str, Any]:
    row = {
        "trial_id": f"t{number:04d}",
        "number": number,
        "method": "kd",
        "teacher": "timm/vit_base_patch16_224.augreg",
        "student": "timm/resnet18",
        "status": "complete",
        "reason": "",
        "config": "{}",
        "seed": 0,
        "repeats": 1,
        "val_metric": 0.8,
        "val_sd": math.nan,
        "params_total": 1000,
        "params_trained": 1000,
        "flops": 2_000_000,
        "latency_ms": 2.0,
        "latency_iqr_ms": 0.1,
        "latency_setup": "cpu, 1 thread, batch 1",
        "memory_mb": 3.0,
        "model_mb": 1.5,
        "optimizer_steps": 100,
        "images_seen": 6400,
        "teacher_forwards": 400,
        "teacher_forwards_shared": 1200,
        "device_seconds": 12.5,
        "store_seconds_saved": 3.0,
        "student_path": f"students/t{number:04d}",
    }
    return row | values


def failed(number: int, status: str = "failed", **values: Any) -> dict[str, Any]:
    blank = {"val_metric": math.nan, "latency_ms": math.nan, "latency_iqr_ms": math.nan, "params_total": None}
    return trial(number, **{"status": status, "reason": "diverged at step 12", "student_path": "", **blank, **values})


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))


def sweep(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "sweep.yaml").write_text("name: s\n", encoding="utf-8")
    if rows:
        frame(*rows).to_parquet(folder / "trials.parquet")
    return folder


def printed(trials: pd.DataFrame, width: int = 100, **options: Any) -> str:
    stream = io.StringIO()
    print_leaderboard(Console(file=stream, width=width, color_system=None), trials, **options)
    return stream.getvalue()


# --- reading -------------------------------------------------------------------------------------------------------


def test_reading_gives_plain_types_in_proposal_order(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", trial(2, teacher=None), failed(0), trial(1))
    trials = read_trials(folder)
    assert list(trials["trial_id"]) == ["t0000", "t0001", "t0002"]
    assert trials["teacher"][2] is None
    rows = json.loads(trials.to_json(orient="records"))
    assert rows[0]["params_total"] is None
    assert rows[1]["params_total"] == 1000
    assert rows[0]["val_metric"] is None
    assert f"{trials.iloc[1]['params_total']:,}" == "1,000"


def test_a_sweep_without_recorded_trials_is_empty(tmp_path: Path) -> None:
    trials = read_trials(sweep(tmp_path / "s"))
    assert trials.empty
    assert list(trials.columns) == list(COLUMNS)
    assert leaderboard(trials, VAL).empty
    assert pareto(trials, VAL) == []
    assert "no trials yet" in printed(trials)
    with pytest.raises(UserError, match="no trials yet"):
        choose(trials, "val_metric", "max")


def test_what_is_not_a_sweep_is_named(tmp_path: Path) -> None:
    sweep(tmp_path / "pets", trial(0))
    with pytest.raises(UserError, match=r"no sweep folder .*Did you mean 'pets'"):
        read_trials(tmp_path / "pet")
    with pytest.raises(UserError, match=r"has no sweep\.yaml\. The sweeps below it are pets"):
        read_trials(tmp_path)


def test_a_damaged_or_foreign_table_is_named(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s")
    (folder / "trials.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read"):
        read_trials(folder)
    pd.DataFrame({"trial_id": ["t0000"]}).to_parquet(folder / "trials.parquet")
    with pytest.raises(UserError, match="has no column method"):
        read_trials(folder)


def beside(folder: Path, row: dict[str, Any], where: str = "trials") -> None:
    """A row in a file of its own, as a trial's process writes it."""
    (folder / where).mkdir(parents=True, exist_ok=True)
    (folder / where / f"{row['trial_id']}.json").write_text(json.dumps(row), encoding="utf-8")


def test_rows_that_the_table_does_not_have_yet_are_read_from_their_files(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", trial(0, val_metric=0.5), failed(1, "running"), failed(3, "running"))
    spec = {"task": {"data": "packaged/clipart"}, "methods": {"kd": {}}}
    (folder / "sweep.yaml").write_text(json.dumps({"name": "s", **spec}), encoding="utf-8")
    beside(folder, trial(1, val_metric=0.9))  # its driver was killed before it wrote the table anew
    beside(folder, trial(2, val_metric=0.7, repeats=3))
    beside(folder, failed(3, "running", node="head"), "trials/running")
    beside(folder, failed(4, "running"), "trials/running")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    trials = read_trials(folder)
    assert list(trials["trial_id"]) == [f"t000{n}" for n in range(5)]
    assert list(trials["status"]) == ["complete"] * 3 + ["running"] * 2
    assert list(trials["repeats"]) == [1, 1, 3, 1, 1]
    assert choose(trials, "val_metric", "max")["trial_id"] == "t0001"
    assert find_student(str(folder)) == folder / "students" / "t0001"
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before, "nothing is written"
    (folder / "trials.parquet").unlink()
    assert list(read_trials(folder)["trial_id"]) == ["t0001", "t0002", "t0003", "t0004"]


def test_a_row_that_ends_while_it_is_looked_for_is_found_and_one_that_cannot_be_read_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep(tmp_path / "s", failed(0, "running"), failed(1, "running"))
    beside(folder, failed(0, "running"), "trials/running")
    (folder / "trials" / "t0001.json").write_text("{", encoding="utf-8")
    looked = read_facts

    def ends_now(path: Path) -> dict[str, Any]:
        found = looked(path)
        if path.name == "t0000.json" and path.parent.name == "trials":
            beside(folder, trial(0))
            (folder / "trials" / "running" / "t0000.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr("orchestrator.select.results.read_facts", ends_now)
    assert list(read_trials(folder)["status"]) == ["complete", "running"]


def test_a_sweep_that_was_broken_off_is_told_with_what_continues_it(tmp_path: Path) -> None:
    check_ended(tmp_path, frame(trial(0), failed(1), failed(2, "pruned")), True)
    with pytest.raises(WorkError, match=r"^Stopped while a trial was running; continue with `orchestrator resume "):
        check_ended(tmp_path, frame(trial(0), failed(1, "running")), False)
    with pytest.raises(WorkError, match=r"^Stopped when trials were still to come; continue with `orchestrator "):
        check_ended(tmp_path, frame(trial(0)), False)


# --- ranking -------------------------------------------------------------------------------------------------------


def test_complete_rows_are_ranked_and_the_others_follow() -> None:
    rows = [failed(0), trial(1, val_metric=0.7), failed(2, "pruned"), trial(3, val_metric=0.9), failed(4, "running")]
    board = leaderboard(frame(*rows), VAL)
    assert list(board["trial_id"]) == ["t0003", "t0001", "t0004", "t0002", "t0000"]
    assert list(board["rank"][:2]) == [1, 2]
    assert board["rank"][2:].isna().all()


def test_an_objective_that_is_better_when_smaller_ranks_upwards() -> None:
    board = leaderboard(frame(trial(0, flops=30), trial(1, flops=10), trial(2, flops=20)), [Objective(metric="flops")])
    assert list(board["trial_id"]) == ["t0001", "t0002", "t0000"]


def test_ties_go_to_fewer_parameters_then_lower_latency_then_the_earlier_trial() -> None:
    rows = [
        trial(0, params_total=2000, latency_ms=1.0),
        trial(1, params_total=1000, latency_ms=3.0),
        trial(3, params_total=1000, latency_ms=2.0),
        trial(2, params_total=1000, latency_ms=2.0),
    ]
    assert list(leaderboard(frame(*rows), VAL)["trial_id"]) == ["t0002", "t0003", "t0001", "t0000"]
    assert choose(frame(*rows), "val_metric", "max")["trial_id"] == "t0002"


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown metric 'latency'; allowed: .*Did you mean 'latency_ms'"):
        choose(frame(trial(0)), "latency", "min")


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_choose(metric: str) -> None:
    direction = METRICS[metric]
    values = {"val_metric": 0.5} if metric == "val_metric" else {metric: 1}
    other = trial(1, **values)
    expected = "t0000" if direction == "max" else "t0001"
    assert choose(frame(trial(0), other), metric, direction)["trial_id"] == expected


# --- choosing under limits -----------------------------------------------------------------------------------------


def test_only_complete_trials_with_a_student_are_chosen() -> None:
    rows = [trial(0, val_metric=0.99, status="pruned"), trial(1, val_metric=0.98, student_path=""), trial(2)]
    assert choose(frame(*rows), "val_metric", "max")["trial_id"] == "t0002"
    with pytest.raises(UserError, match=r"No trial is complete: 1 pruned and 2 failed\."):
        choose(frame(failed(0), failed(1, "pruned"), failed(2)), "val_metric", "max")
    with pytest.raises(UserError, match="kept its student"):
        choose(frame(rows[1]), "val_metric", "max")
    with pytest.raises(UserError, match="value of val_metric"):
        choose(frame(trial(0, val_metric=math.nan)), "val_metric", "max")


def test_a_limit_takes_what_just_fits() -> None:
    rows = [trial(0, val_metric=0.9, params_total=1001), trial(1, val_metric=0.8, params_total=1000)]
    assert choose(frame(*rows), "val_metric", "max", {"params_total": 1000})["trial_id"] == "t0001"


def test_a_limit_that_nothing_keeps_names_the_nearest_miss() -> None:
    rows = [trial(2, params_total=4_000_000, latency_ms=2.5), trial(3, params_total=101_234, latency_ms=7.25)]
    with pytest.raises(UserError) as error:
        choose(frame(*rows), "val_metric", "max", {"params_total": 1000})
    want = "No complete trial has at most 1,000 parameters; the smallest has 101,234 (t0003)."
    assert str(error.value) == want
    with pytest.raises(UserError) as error:
        choose(frame(*rows), "val_metric", "max", {"latency_ms": 1.5})
    assert str(error.value) == "No complete trial has a latency of at most 1.5 ms; the fastest takes 2.5 ms (t0002)."
    with pytest.raises(UserError) as error:
        choose(frame(*rows), "val_metric", "max", {"params_total": 200_000, "latency_ms": 3})
    assert str(error.value) == (
        "No complete trial has both at most 200,000 parameters and a latency of at most 3 ms: of those that keep the "
        "others, the smallest has 4,000,000 (t0002); of those that keep the others, the fastest takes 7.25 ms (t0003)."
    )


def test_other_limits_make_an_infeasible_trial_a_candidate_again() -> None:
    rows = [trial(0, val_metric=0.7), trial(1, val_metric=0.9, status="infeasible", latency_ms=9.0, reason="too slow")]
    assert choose(frame(*rows), "val_metric", "max")["trial_id"] == "t0000"
    assert choose(frame(*rows), "val_metric", "max", {"latency_ms": 5})["trial_id"] == "t0000"
    assert choose(frame(*rows), "val_metric", "max", {"latency_ms": 10})["trial_id"] == "t0001"
    untrained = trial(
        2, status="infeasible", val_metric=math.nan, student_path="", reason="too big; nothing was trained"
    )
    with pytest.raises(
        UserError, match=r"No trial is complete: 1 infeasible\. The first: too big; nothing was trained"
    ):
        choose(frame(untrained), "val_metric", "max", {"latency_ms": 10})


def test_a_limit_of_the_val_metric_is_the_least_that_is_taken() -> None:
    assert choose(frame(trial(0, val_metric=0.7)), "latency_ms", "min", {"val_metric": 0.7})["trial_id"] == "t0000"
    with pytest.raises(UserError, match=r"has val_metric of at least 0\.71; the nearest has 0\.7 \(t0000\)\."):
        choose(frame(trial(0, val_metric=0.7)), "latency_ms", "min", {"val_metric": 0.71})


def test_a_trial_without_a_measured_latency_keeps_no_latency_limit() -> None:
    with pytest.raises(UserError, match="none has a measured latency"):
        choose(frame(trial(0, latency_ms=math.nan)), "val_metric", "max", {"latency_ms": 5})


# --- uncertainty ---------------------------------------------------------------------------------------------------


def test_a_runner_up_within_one_standard_error_is_noted() -> None:
    trials = frame(trial(0, val_metric=0.80), trial(1, val_metric=0.79), trial(2, val_metric=0.77, method="fitnet"))
    best = choose(trials, "val_metric", "max")
    # sqrt(0.77 * 0.23 / 100) = 0.0421 and sqrt(0.77 * 0.23 / 400) = 0.0210, against a difference of 0.03
    note = margin_note(trials, best, "val_metric", 100)
    assert note is not None
    assert "t0002 (fitnet), is 0.030 away" in note
    assert "(0.042 on 100 val images)" in note
    assert margin_note(trials, best, "val_metric", 400) is None


def test_equal_accuracies_are_noted_even_without_a_standard_error() -> None:
    trials = frame(trial(0, val_metric=1.0), trial(1, val_metric=1.0, method="fitnet"))
    assert margin_note(trials, choose(trials, "val_metric", "max"), "val_metric", 50) is not None


def test_other_metrics_and_single_methods_have_no_such_note() -> None:
    trials = frame(trial(0), trial(1))
    row = choose(trials, "val_metric", "max")
    assert margin_note(trials, row, "val_metric", 100) is None
    assert margin_note(frame(trial(0), trial(1, method="fitnet")), row, "flops", 100) is None


def compared(*rows: dict[str, Any], by: str = "val_metric", images: int = 1000, **limits: float) -> list[str]:
    """What is said of the chosen one beside what was, or was not, trained on the labels alone."""
    trials = frame(*rows)
    return against_baseline(trials, choose(trials, by, better(by), limits), images, "classification", limits)


def test_a_baseline_that_wins_is_above_the_best_transfer_method() -> None:
    rows = [trial(0, method="finetune", val_metric=0.8), trial(1, val_metric=0.75), trial(2, val_metric=0.7)]
    # sqrt(0.8 * 0.2 / 1000 + 0.75 * 0.25 / 1000) = 0.0186, and twice that is less than the difference of 0.05
    assert compared(*rows) == [
        "No transfer method beat training on the labels alone: the best, t0001 (kd), is 0.050 below, more than twice "
        "its standard error (0.019 on 1000 images)."
    ]
    assert "is 0.050 below, within twice its standard error (0.059 on" in compared(*rows, images=100)[0]
    assert compared(*rows[:1], trial(1, val_metric=0.8))[0].endswith("the best, t0001 (kd), is as good.")


def test_a_transfer_method_that_wins_is_above_the_best_baseline() -> None:
    rows = [trial(0, val_metric=0.8), trial(1, method="linear_probe", val_metric=0.6), trial(2, method="finetune")]
    assert compared(rows[0], rows[1]) == [
        "The best network trained on the labels alone, t0001 (linear_probe), reaches val 0.600, which is 0.200 below, "
        "more than twice its standard error (0.020 on 1000 images)."
    ]
    assert compared(*rows)[0].endswith("t0002 (finetune), reaches val 0.800, which is as good.")
    assert compared(rows[0]) == []


def test_under_limits_a_choice_is_compared_with_what_keeps_them_too() -> None:
    rows = [
        trial(0, method="finetune", val_metric=0.5),
        trial(1, val_metric=0.7, latency_ms=9.0),
        trial(2, val_metric=0.4),
        trial(3, val_metric=0.45, status="infeasible"),  # under limits that others have taken the place of
    ]
    (said,) = compared(*rows, latency_ms=5.0)
    assert said.startswith(
        "No transfer method that keeps the limits beat training on the labels alone: the best, t0003"
    )
    assert compared(*rows[:2], latency_ms=5.0) == []


@pytest.mark.parametrize(
    ("fast", "slow", "words"),
    [
        ("finetune", "kd", "The best transfer method, t0001 (kd), reaches val 0.700, which is 0.150 above, more than"),
        (
            "kd",
            "finetune",
            "The best network trained on the labels alone, t0001 (finetune), reaches val 0.700, which is 0.150 above, "
            "more than twice its standard error (0.021 on",
        ),
    ],
    ids=["baseline", "transfer"],
)
def test_a_choice_by_another_metric_may_be_worse_on_val_and_is_said_to_be(fast: str, slow: str, words: str) -> None:
    rows = [trial(0, method=fast, val_metric=0.55), trial(1, method=slow, val_metric=0.7, latency_ms=9.0)]
    (said,) = compared(*rows, by="latency_ms")
    assert said.startswith(words)


# --- Pareto --------------------------------------------------------------------------------------------------------

TWO = [Objective(), Objective(metric="flops")]


def test_the_front_holds_what_nothing_dominates() -> None:
    rows = [
        trial(0, val_metric=0.9, flops=100),
        trial(1, val_metric=0.8, flops=50),
        trial(2, val_metric=0.8, flops=60),  # dominated by t0001
        trial(3, val_metric=0.7, flops=50),  # dominated by t0001
        trial(4, val_metric=0.9, flops=100),  # equal to t0000: both stay
        trial(5, val_metric=0.99, flops=1, status="pruned"),
        trial(6, val_metric=math.nan, flops=1),
    ]
    assert pareto(frame(*rows), TWO) == ["t0000", "t0004", "t0001"]
    board = leaderboard(frame(*rows), TWO)
    assert set(board.loc[board["pareto"], "trial_id"]) == {"t0000", "t0001", "t0004"}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_front_is_what_brute_force_finds(points: list[tuple[int, int, int]]) -> None:
    rows = [trial(i, val_metric=v / 5, flops=f, params_total=p) for i, (v, f, p) in enumerate(points)]
    want = {
        f"t{i:04d}"
        for i, a in enumerate(points)
        if not any(b != a and b[0] >= a[0] and b[1] <= a[1] and b[2] <= a[2] for b in points)
    }
    assert set(pareto(frame(*rows), [*TWO, Objective(metric="params_total")])) == want


# --- the printed table ---------------------------------------------------------------------------------------------


def wide() -> pd.DataFrame:
    return frame(
        trial(0, params_total=86_567_656, flops=35_130_000_000, latency_ms=123.456, latency_iqr_ms=4.4),
        trial(1, val_metric=0.8765, teacher="packaged/vit_clipart", student=None, method="block_distillation"),
        trial(2, val_metric=0.7, teacher=None, student="local:/some/where/my_net.safetensors", method="finetune"),
        failed(3, reason="The loss is not finite at step 12; try a smaller lr."),
        failed(4, "pruned", reason="below the median at 25 %"),
    )


@pytest.mark.parametrize("width", [100, 120])
def test_the_table_fits_and_shows_ids_numbers_reasons_and_units(width: int) -> None:
    text = printed(wide(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    first = next(line for line in text.splitlines() if line.lstrip().startswith("1 "))
    assert "t0001" in first
    assert "0.8765" in first
    for part in ("86.6M", "35,130", "123 (4)", "400/1200", "12.5", "smaller lr", "below the median"):
        assert part in text, part
    flat = " ".join(text.split())
    assert "Trials: 3 complete, 1 pruned and 1 failed." in flat
    assert "2 per multiply-add, for one image" in flat
    assert "cpu, 1 thread, batch 1" in flat
    assert "…" not in text


def test_latencies_of_different_setups_are_said_not_to_compare() -> None:
    text = printed(frame(trial(0), trial(1, latency_setup="cuda, 1 thread, batch 1")), 120)
    assert "do not compare: cpu, 1 thread, batch 1; cuda, 1 thread, batch 1" in " ".join(text.split())


def test_several_objectives_mark_the_front() -> None:
    text = printed(frame(trial(0, val_metric=0.9, flops=9), trial(1, flops=20)), objectives=TWO)
    assert "1* t0000" in " ".join(text.split())
    assert "2 t0001" in " ".join(text.split())
    assert "* on the Pareto front of val_metric and flops." in text


def test_a_limit_says_what_it_leaves_out() -> None:
    text = printed(frame(*(trial(i) for i in range(5))), limit=2)
    assert "t0001" in text
    assert "t0002" not in text
    assert "and 3 more complete trials" in text


def test_names_are_shortened() -> None:
    assert short_name("timm/vit_base_patch16_224.augreg_in21k") == "vit_base_patch16_224"
    assert short_name("packaged/vit_clipart") == "vit_clipart"
    assert short_name("local:/some/where/my_net.safetensors") == "my_net"
    assert short_name(None) == ""
