"""A configuration run several times: other labelled images and another seed, one row."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small import small_spec
from test_select import failed, frame, trial

from orchestrator.data.task import load_task
from orchestrator.select.leaderboard import print_leaderboard
from orchestrator.select.results import margin_note, standard_error
from orchestrator.store import Store
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.repeat import joined, redrawn, run_repeats


def context_of(colours: Path, storage: Path, repeats: int) -> SweepContext:
    spec = small_spec(colours, storage, search={"trials": 1, "repeats": repeats})
    return SweepContext(spec, str(storage / "small"))


def test_repeats_share_the_split_and_draw_other_labelled_images(colours: Path, tmp_path: Path) -> None:
    context = context_of(colours, tmp_path, 3)
    tasks = [load_task(redrawn(context, n).spec.task, context.store) for n in range(3)]
    assert len({t.labelled for t in tasks}) == 3
    for split in ("train", "val", "test"):
        assert len({t.split(split).ids for t in tasks}) == 1
    assert tasks[0].labelled == load_task(context.spec.task, context.store).labelled


def test_the_row_has_mean_and_deviation_of_runs_that_share_the_teachers_outputs(colours: Path, tmp_path: Path) -> None:
    context = context_of(colours, tmp_path, 3)
    config = TrialConfig("t0000", 0, Cell("kd", 0, 0), {}, 5)
    told: list[tuple[float, float | None]] = []
    row = run_repeats(context, config, lambda share, metric: told.append((share, metric)))
    assert row["status"] == "complete", row["reason"]
    values = json.loads(row["val_values"])
    assert (len(values), row["repeats"]) == (3, 3)
    assert row["val_metric"] == pytest.approx(statistics.mean(values))
    assert row["val_sd"] == pytest.approx(statistics.stdev(values))
    task = load_task(context.spec.task, context.store)
    assert (
        row["teacher_forwards"] == len(task.train) * context.spec.train.views
    )  # paid by the first, shared by the others
    assert [share for share, _ in told] == sorted({share for share, _ in told})  # one run's progress, not three
    assert row["optimizer_steps"] == context.spec.train.steps
    assert [p.name for p in (tmp_path / "small" / "students").iterdir()] == ["t0000"]
    student = json.loads((tmp_path / "small" / "students" / "t0000" / "student.json").read_text())
    assert student["val_metric"] == values[0]
    trained = [e for e in Store(tmp_path / "store").entries() if e.stage == "distil"]
    assert sorted(e.meta["reads"]["seed"] for e in trained) == [5, 6, 7]


def test_one_run_is_what_it_was(colours: Path, tmp_path: Path) -> None:
    row = run_repeats(context_of(colours, tmp_path, 1), TrialConfig("t0000", 0, Cell("finetune", None, 0), {}, 0))
    assert (row["repeats"], row["val_values"]) == (1, "")
    assert row["val_sd"] != row["val_sd"]


def test_a_repeat_that_fails_fails_the_trial_and_says_which() -> None:
    rows: list[dict[str, Any]] = [
        {"status": "complete", "reason": "", "val_metric": 0.5, "student_path": "students/t0000", "ended": 2.0},
        {
            "status": "failed",
            "reason": "The loss is nan.",
            "val_metric": float("nan"),
            "student_path": "",
            "ended": 3.0,
        },
    ]
    costs = ("loop_seconds", "device_seconds", "teacher_forwards", "teacher_forwards_shared")
    costs += ("store_seconds_paid", "store_seconds_saved", "store_hits", "store_misses")
    row = joined([r | dict.fromkeys(costs, 2) for r in rows])
    assert (row["status"], row["reason"]) == ("failed", "repeat 1: The loss is nan.")
    assert (row["student_path"], row["device_seconds"], row["ended"]) == ("", 4, 3.0)


def test_the_leaderboard_and_the_noise_sentence_use_the_deviation() -> None:
    best = trial(0, val_metric=0.80, val_sd=0.06, repeats=3)
    other = trial(1, val_metric=0.75, val_sd=0.06, repeats=3, method="finetune")
    trials = frame(best, other, failed(2))
    stream = io.StringIO()
    print_leaderboard(Console(file=stream, width=120, color_system=None), trials)
    text = " ".join(stream.getvalue().split())
    assert "0.8000 ± 0.0600" in text
    assert "mean ± standard deviation over 3 seeds and draws of the labels" in text
    assert standard_error(trials.iloc[0], 10_000) == pytest.approx((0.8 * 0.2 / 10_000 + 0.06**2 / 3) ** 0.5)
    # 0.05 apart: far beyond the noise of 10,000 val images alone, and within that of draws with sd 0.1.
    assert margin_note(trials, trials.iloc[0], "val_metric", 10_000) is None
    noisy = frame(best | {"val_sd": 0.1}, other | {"val_sd": 0.1})
    note = margin_note(noisy, noisy.iloc[0], "val_metric", 10_000)
    assert note is not None
    assert "on 10,000 val images and over 3 repeats" in note
