"""A trial's row on the leaderboard: its columns, and what its limits make of it."""

from __future__ import annotations

from typing import Any

from orchestrator.models.precision import identified
from orchestrator.spec import SweepSpec, latency_column
from orchestrator.trial.plan import TrialConfig


def blank_row(spec: SweepSpec, config: TrialConfig) -> dict[str, Any]:
    """The leaderboard's row of a trial of which nothing is known yet."""
    cell = config.cell
    teacher = spec.teachers[cell.teacher] if cell.teacher is not None else None
    return {
        "trial_id": config.trial_id,
        "number": config.number,
        "method": cell.method,
        "teacher": identified(teacher, teacher.model) if teacher is not None else None,
        "student": spec.students[cell.student].model if cell.student is not None else None,
        "status": "running",
        "reason": "",
        "config": config.to_json(),
        "seed": config.seed,
        "val_metric": float("nan"),
        "val_sd": float("nan"),
        "val_values": "",
        "repeats": 1,
        "params_total": 0,
        "params_trained": 0,
        "flops": 0,
        **blank_latencies(spec),
        "memory_mb": float("nan"),
        "model_mb": float("nan"),
        "optimizer_steps": 0,
        "images_seen": 0,
        "teacher_forwards": 0,
        "teacher_forwards_shared": 0,
        "device_seconds": 0.0,
        "store_seconds_paid": 0.0,
        "store_seconds_saved": 0.0,
        "store_hits": 0,
        "store_misses": 0,
        "loop_seconds": 0.0,
        "facts": "{}",
        "student_path": "",
        "started": 0.0,
        "ended": 0.0,
        "pid": 0,
        "node": "",
    }


def blank_latencies(spec: SweepSpec) -> dict[str, Any]:
    """Of a row, the columns of `latency_of`."""
    found: dict[str, Any] = {}
    for metric in spec.latencies:
        names = (metric, *(latency_column(metric, part) for part in ("iqr", "low", "high")))
        found |= dict.fromkeys(names, float("nan")) | {latency_column(metric, "setup"): ""}
    return found


def verdict(spec: SweepSpec, facts: dict[str, Any]) -> dict[str, Any]:
    """Status and reason of a trial that has ended well but exceeds a limit; nothing of one that keeps all."""
    broken = spec.limits.broken(facts)
    return {"status": "infeasible", "reason": broken} if broken else {}


def judged(spec: SweepSpec, row: dict[str, Any]) -> dict[str, Any]:
    """The row, infeasible if it is complete and exceeds a limit; its student and its values stay."""
    return row | verdict(spec, row) if row["status"] == "complete" else row
