"""The screen of a running sweep: states, best, front, store, device-seconds and an estimate, in few lines."""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small import small_spec, study_of

from orchestrator.cli.sweeps import _run as run_prepared
from orchestrator.errors import WorkError
from orchestrator.spec import SweepSpec
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.live import Estimate, LiveScreen, TrialLines, screen
from orchestrator.sweep.run import prepare
from orchestrator.sweep.study import Study
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.row import blank_row


def made_up(spec: SweepSpec, number: int, status: str, **values: Any) -> dict[str, Any]:
    blank = blank_row(spec, TrialConfig(f"t{number:04d}", number, Cell("kd", 0, 0), {}, 0))
    return blank | {"status": status, "ended": float(number)} | values


def some(spec: SweepSpec) -> list[dict[str, Any]]:
    done = {"params_total": 2000, "flops": 3_000_000, "latency_ms": 1.5, "store_hits": 3, "store_misses": 1}
    return [
        made_up(spec, 0, "complete", val_metric=0.7, **done | {"params_total": 1000}, device_seconds=10.0),
        made_up(spec, 1, "complete", val_metric=0.9, **done, device_seconds=20.0, store_seconds_saved=7.0),
        made_up(spec, 2, "complete", val_metric=0.6, **done),
        made_up(spec, 3, "failed", reason="[red]it broke[/red]\nbadly"),
        made_up(spec, 4, "pruned", reason="stopped by asha"),
        made_up(spec, 5, "running"),
    ]


def text_of(shown: Any, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(shown)
    return stream.getvalue()


def test_one_screen_says_all_of_a_running_sweep(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, search={"trials": 8})
    rows = some(spec)
    text = text_of(screen(spec, rows, {rows[5]["config"]: 0.25}, 100, 3 * 3600 + 300))
    for part in (
        "5/8 trials",
        "about 3 h 05 min left",
        "3 complete, 1 running, 1 pruned and 1 failed.",
        "30 device-seconds",
        "9 hits (75%), 7 s saved",
        "front of val_metric and params_total (2 trials)",
        "25%",
        "[red]it broke[/red] badly",
    ):
        assert part in text, (part, text)
    lines = text.splitlines()
    best = [line.split()[:2] for line in lines if " 2000 " in line or " 1000 " in line]
    assert best == [["*", "t0001"], ["*", "t0000"], ["t0002", "kd"]]
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100


def test_a_grid_that_is_smaller_than_what_was_asked_for_is_counted_to_its_end(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        methods={"finetune": {"lr": [1e-3, 1e-2]}, "kd": {"temperature": [1.0, 2.0, 4.0]}},
        search={"trials": 50, "sampler": "grid"},
    )
    total = prepare(spec).trials
    assert total == study_of(spec, tmp_path / "s").size == 5
    rows = [made_up(spec, n, "complete", val_metric=0.5) for n in range(4)]
    assert "4/5 trials" in text_of(screen(spec, rows, {}, 1, 1, total))
    estimate = Estimate(tmp_path, spec, before=0, total=total)
    estimate.started = time.time() - 40
    assert estimate.left(4) == pytest.approx(10, abs=1)
    ledger, lines = Ledger(tmp_path / "s"), []
    shown = TrialLines(tmp_path / "s", spec, lines.append, total)
    ledger.write(rows[0])
    shown.on_step_end(0, [])
    assert lines[0].split()[0] == "1/5"


def test_a_screen_of_nothing_and_of_nothing_complete(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    assert "No trial yet." in text_of(screen(spec, [], {}, 0, None))
    text = text_of(screen(spec, some(spec)[3:], {}, 5, None), 60)
    assert "No trial is complete yet." in text
    assert "the end is not known yet" in text


def test_the_estimate_goes_by_the_pace_of_this_life_and_the_budget(colours: Path, tmp_path: Path) -> None:
    estimate = Estimate(tmp_path, small_spec(colours, tmp_path, search={"trials": 10}), before=4)
    assert estimate.left(4) is None
    estimate.started = time.time() - 60
    assert estimate.left(6) == pytest.approx(4 * 30, abs=2)
    assert estimate.left(10) == 0
    (tmp_path / "clock.json").write_text('{"seconds": 900}')
    bounded = Estimate(tmp_path, small_spec(colours, tmp_path, search={"trials": 10, "time_budget_s": 1000}), before=4)
    bounded.started = time.time() - 60
    assert bounded.left(6) == pytest.approx(40, abs=2)


class Trial:
    def __init__(self, config: str, progress: float) -> None:
        self.config, self.last_result = {"trial": config}, {"progress": progress}


def test_the_live_screen_is_drawn_from_the_ledger_and_taken_away(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, search={"trials": 8})
    ledger, rows, stream = Ledger(tmp_path / "s"), some(spec), io.StringIO()
    shown = LiveScreen(tmp_path / "s", spec, Console(file=stream, force_terminal=True, width=100, height=40))
    for row in rows:
        ledger.write(row)
    shown.on_step_end(0, [Trial(rows[5]["config"], 62.5)])
    shown.close()
    assert "5/8 trials" in stream.getvalue()
    assert "62%" in stream.getvalue()
    assert pickle.loads(pickle.dumps(shown)).live is None


def test_lines_come_once_for_each_trial_that_ended(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, search={"trials": 8})
    ledger, rows = Ledger(tmp_path / "s"), some(spec)
    lines: list[str] = []
    ledger.write(rows[0])
    shown = TrialLines(tmp_path / "s", spec, lines.append)
    for row in rows[1:]:
        ledger.write(row)
    shown.on_step_end(0, [])
    shown.on_step_end(1, [])
    assert [line.split()[:2] for line in lines] == [[f"{n}/8", f"t000{n - 1}"] for n in (2, 3, 4, 5)]
    assert "val 0.900," in lines[0]


@pytest.mark.parametrize(("running", "said"), [(1, "a trial was"), (2, "2 trials were")])
def test_an_interrupted_sweep_says_what_continues_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, said: str
) -> None:
    """Ray Tune takes a Ctrl-C, stops its trials and comes back as after the last of them."""
    prepared = prepare(small_spec(colours, tmp_path))
    folder = create(prepared.spec)
    study = Study(prepared.spec, folder, prepared.cells, prepared.spaces, prepared.task.info)
    ledger = Ledger(folder)

    def interrupted(*_: Any) -> None:
        for number in range(3):
            row = blank_row(prepared.spec, study.ask()) | {"started": 1.0}
            ended = {"status": "complete", "val_metric": 0.5, "ended": 2.0}
            ledger.write(row if number < running else row | ended)
        ledger.publish()

    monkeypatch.setattr("orchestrator.sweep.run.run", interrupted)
    monkeypatch.setattr("orchestrator.sweep.cluster.stop_ray_beside", lambda work: None)
    with pytest.raises(WorkError, match=f"^Stopped while {said} running; continue with `orchestrator resume {folder}`"):
        run_prepared(prepared, folder, False)
