"""Compares methods and settings at equal steps over several seeds, through the product's own trials and store.

An arm is one configuration. Each seed draws other labelled images and other initial weights. What is reported is what
the deployed student scores on val; test images are never read.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.record import RESULTS, write_result


@dataclass(frozen=True)
class Arm:
    """One configuration to compare: a label for the table, a method, its knobs, and which networks of the spec."""

    label: str
    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    teacher: int | None = 0
    student: int | None = None


def run_arm(raw: dict[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
    """The row of one trial; the task is drawn anew by `seed`."""
    from orchestrator.spec import parse_spec
    from orchestrator.sweep.folder import resolved
    from orchestrator.trial.context import SweepContext
    from orchestrator.trial.plan import Cell, TrialConfig
    from orchestrator.trial.run import run_trial

    spec = resolved(parse_spec({**raw, "task": {**raw["task"], "seed": seed}, "methods": {arm.method: {}}}))
    name = "".join(c if c.isalnum() else "-" for c in arm.label).strip("-")
    config = TrialConfig(f"{name}-{seed}", seed, Cell(arm.method, arm.teacher, arm.student), arm.knobs, seed)
    row = run_trial(SweepContext(spec, f"{spec.storage}/{spec.name}"), config)
    if row["status"] != "complete":
        raise SystemExit(f"{arm.label}, seed {seed}: {row['reason']}")
    return row


def compare(
    name: str,
    question: str,
    raw: dict[str, Any],
    arms: Sequence[Arm],
    argv: list[str] | None = None,
    more: Callable[[str], dict[str, Any]] = lambda storage: {},
) -> None:
    """Runs every arm with every seed, prints a table of mean and sd, and writes `benchmarks/results/NAME.json`.

    With other seeds or steps than the script's own nothing is written.

    Args:
        name: of the ablation and its result file.
        question: what it asks, in one line.
        raw: the sweep file, without methods.
        arms: what to compare.
        argv: the command line; else the process's.
        more: what else belongs into the result, from the storage that the trials lie in.
    """
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=raw["train"]["steps"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    own = all(getattr(options, key) == parser.get_default(key) for key in ("seeds", "steps"))
    raw = {**raw, "name": name, "storage": options.storage, "train": {**raw["train"], "steps": options.steps}}
    began = time.time()
    rows: dict[str, list[dict[str, Any]]] = {arm.label: [] for arm in arms}
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [(arm, pool.submit(run_arm, raw, arm, seed)) for seed in range(options.seeds) for arm in arms]
        for arm, job in jobs:
            row = job.result()
            rows[arm.label].append(row)
            print(f"{arm.label}, seed {row['seed']}: {row['val_metric']:.4f}", file=sys.stderr, flush=True)
    table = [_line(arm, rows[arm.label]) for arm in arms]
    print(f"\n{question}\n{options.seeds} seeds, {options.steps} steps at budget 1, {raw['task']['data']}\n")
    width = max(len(arm.label) for arm in arms)
    for line in table:
        print(
            f"{line['arm']:<{width}}  {line['mean']:.4f} ± {line['sd']:.4f}   {line['params']:>9,} parameters, "
            f"{line['trained']:>9,} trained, {line['steps']} steps"
        )
    result = {
        "question": question,
        "seeds": options.seeds,
        "spec": {**raw, "storage": "runs"},  # wherever it was on this machine
        "machine": f"{platform.machine()}, {options.processes} processes of 1 thread",
        "seconds": round(time.time() - began),
        "arms": table,
        **more(options.storage),
    }
    if own and not options.dry:
        write_result(RESULTS / f"{name}.json", result)


def _line(arm: Arm, rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = [row["val_metric"] for row in rows]
    return {
        "arm": arm.label,
        "method": arm.method,
        "knobs": arm.knobs,
        "values": values,
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "params": rows[0]["params_total"],
        "trained": rows[0]["params_trained"],
        "steps": rows[0]["optimizer_steps"],
    }
