"""Sweeps for the tests of reports: a real one of three trials without Ray, and rows made up for a big or odd one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from small import small_spec

from orchestrator.spec import SweepSpec
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.run import prepare
from orchestrator.sweep.study import Study
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.row import blank_row
from orchestrator.trial.run import run_trial

CELLS = (("finetune", Cell("finetune", None, 0)), ("kd", Cell("kd", 0, 0)), ("wecolora", Cell("wecolora", 0, None)))


def real_sweep(data: Path, storage: Path) -> Path:
    """Three trials that ran, one that failed and one that was stopped, as the study proposed them and heard of them."""
    kd = {"teacher_tuning": "none", "lr": 1e-6, "temperature": [2.0, 4.0, 6.0]}  # it makes errors
    methods = {"finetune": {}, "wecolora": {"rank": 4, "factor": 2}, "kd": kd}
    spec = small_spec(
        data, storage, methods=methods | {"finetune": {"lr": 3e-3}}, search={"trials": 5, "sampler": "grid"}
    )
    folder = create(spec)
    ledger, context, prepared = Ledger(folder), SweepContext(spec, str(folder)), prepare(spec)
    study = Study(spec, folder, prepared.cells, prepared.spaces, prepared.task.info)
    for number in range(5):
        config = study.ask()
        if number < 3:
            row = run_trial(context, config)
            assert row["status"] == "complete", row["reason"]
            ledger.mark(row["trial_id"], 0.5, row["val_metric"])
        else:
            row = blank_row(spec, config) | {"started": 1.0, "ended": 2.0}
            failed = {"status": "failed", "reason": "The loss is <b>not</b> finite", "device_seconds": 2.5}
            pruned = {"status": "pruned", "reason": "stopped by asha at 25%", "device_seconds": 1.25}
            row |= failed if number == 3 else pruned
        ledger.write(row)
        study.tell(number, row)
    ledger.publish()
    (folder / "clock.json").write_text(json.dumps({"seconds": 12.0}))
    return folder


def made_up(spec: SweepSpec, number: int, method: str, **values: Any) -> dict[str, Any]:
    """A row of a trial that did not run here."""
    cell = dict(CELLS)[method]
    knobs = {"lr": 10 ** -(2 + number % 7 / 3), "temperature": 1 + number % 5}
    row = blank_row(spec, TrialConfig(f"t{number:04d}", number, cell, knobs, 0))
    return row | {"reason": "", "started": 1.0, "ended": 2.0} | values


def big_sweep(data: Path, storage: Path, trials: int) -> Path:
    """A sweep of many trials with learning curves, whose networks are not there."""
    spec = small_spec(data, storage, name="big", search={"trials": trials})
    folder = create(spec)
    ledger = Ledger(folder)
    for number in range(trials):
        method = CELLS[number % 3][0]
        student = f"students/t{number:04d}"
        quality = math.sin(number) / 5 + 0.7
        ledger.write(
            made_up(
                spec,
                number,
                method,
                status="complete",
                val_metric=quality,
                params_total=10**5 + 997 * (number % 211),
                params_trained=10**5,
                flops=10**7 + number * 10**4,
                latency_ms=1 + (number % 37) / 10,
                latency_iqr_ms=0.1,
                latency_setup="cpu, 1 thread, batch 1",
                optimizer_steps=500,
                device_seconds=3 + number / 1000,
                store_seconds_saved=0.1 * number,
                student_path=student,
            )
        )
        points = [
            {"step": float(s), "loss": 2 / (1 + s / 50) + number / 1e4, "ce": 1 / (1 + s)} for s in range(0, 500, 25)
        ]
        (folder / student).mkdir(parents=True)
        (folder / student / "history.json").write_text(json.dumps({"history": points}))
    ledger.publish()
    return folder
