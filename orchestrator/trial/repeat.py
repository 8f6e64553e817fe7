"""A configuration run several times (`search.repeats`): other labelled images, another seed, one row."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.data.pool import Mapper, make_here
from orchestrator.train.loop import Tell
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.row import judged
from orchestrator.trial.run import Runner, run_trial

SUMS = (
    "loop_seconds",
    "device_seconds",
    "teacher_forwards",
    "teacher_forwards_shared",
    "store_seconds_paid",
    "store_seconds_saved",
    "store_hits",
    "store_misses",
)


def run_repeats(
    context: SweepContext,
    config: TrialConfig,
    progress: Tell | None = None,
    runner: Runner = run_job,
    mapper: Mapper = make_here,
) -> dict[str, Any]:
    """Runs a configuration `search.repeats` times and makes one row of it; once, this is `run_trial`.

    Repeat *i* adds *i* to the trial's seed and to the draw of the labelled images; val and test stay. The row has the
    mean of the val metric, its standard deviation over the repeats (n - 1) and its values; costs are summed; steps,
    parameters and latency are those of one network. The network of the first repeat is the one that may be deployed:
    which one it is was decided before any was scored. `progress` hears of the first repeat, as of a whole trial, so
    that trials are stopped early by what is comparable. If a repeat fails, the trial has failed; if the first one
    exceeds a limit, it is the only one.
    """
    count = context.spec.search.repeats
    rows = [run_trial(context, config, progress, runner, mapper)]
    while len(rows) < count and rows[-1]["status"] == "complete":
        number = len(rows)
        again = replace(config, trial_id=f"{config.trial_id}.{number}", seed=config.seed + number)
        rows.append(run_trial(redrawn(context, number), again, None, runner, mapper))
        shutil.rmtree(Path(context.folder) / "students" / again.trial_id, ignore_errors=True)
    return judged(context.spec, rows[0] if len(rows) == 1 else joined(rows))


def redrawn(context: SweepContext, number: int) -> SweepContext:
    """The same sweep with the labelled images of another draw."""
    task = context.spec.task
    other = task.model_copy(update={"draw": task.draw + number})
    return replace(context, spec=context.spec.model_copy(update={"task": other}))


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the repeats of a trial, in their order."""
    row = rows[0] | {name: sum(r[name] for r in rows) for name in SUMS} | {"ended": rows[-1]["ended"]}
    if rows[-1]["status"] != "complete":
        reason = f"repeat {len(rows) - 1}: {rows[-1]['reason']}"
        return row | {"status": rows[-1]["status"], "reason": reason, "val_metric": float("nan"), "student_path": ""}
    values = [float(r["val_metric"]) for r in rows]
    return row | {
        "val_metric": statistics.mean(values),
        "val_sd": statistics.stdev(values),
        "val_values": json.dumps(values),
        "repeats": len(rows),
    }
