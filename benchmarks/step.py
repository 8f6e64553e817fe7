"""A distillation step with stored teacher outputs, against the same step without any teacher, by turns.

    python -m benchmarks.step                      # 6 minutes; writes benchmarks/results/ and docs/performance.md
    python -m benchmarks.step --methods kd tdmr    # only these; the others stay if this machine measured them as now
    python -m benchmarks.step --spec my_sweep.yaml # every combination of your sweep file, at its knobs' defaults

Each method's job comes from the product (`run_trial`), its batches from the product's feeder, its steps from the
product's loop. Without a teacher: the same student, images, optimiser and loop; no outputs are read, no part of the
method but the student is trained, and the loss is the labels' (for a method without labels: the mean square of the
same student's tokens or embedding). Live: the teacher runs in each step, on views that are rendered in each step.

The process has one core (as in a sweep that fills its machine), so what is read ahead is paid too; `--cores 2` leaves
one free for reading.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import os
import pstats
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import (
    RESULTS,
    checked,
    command_of,
    machine,
    markdown,
    measured_alike,
    on_cpu,
    own_sweep,
    publish,
    spread,
    versions,
)
from methods.contract import Batch, Deployed, Learner, TrainStage, supervised_loss
from orchestrator.data.task import load_task
from orchestrator.errors import WorkError
from orchestrator.spec import Kind, parse_spec
from orchestrator.sweep.folder import resolved
from orchestrator.sweep.space import default_knobs, method_space, wanted_outputs
from orchestrator.train.batches import opened
from orchestrator.train.job import TrainJob
from orchestrator.train.loop import Report, fit
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig, configure, method_named, setting_of
from orchestrator.trial.run import run_trial

SMALL = {"model": "timm/test_resnet", "image_size": 48}
LARGER = {"model": "timm/resnet10t", "image_size": 64}
CLIPART: dict[str, Any] = {
    "name": "step",
    "task": {"data": "packaged/clipart", "shots": 20},
    "teachers": ["packaged/vit_clipart"],
    "students": [SMALL, LARGER],
}
ICONS: dict[str, Any] = {
    "name": "step",
    "task": {"data": "packaged/icons", "shots": None},
    "teachers": ["packaged/clip_icons"],
    "students": [SMALL],
}
Case = tuple[dict[str, Any], Cell, dict[str, Any]]  # a sweep, one of its combinations, and knobs
CASES: list[Case] = [
    (CLIPART, Cell("kd", 0, 0), {}),
    (CLIPART, Cell("kd", 0, 1), {}),
    (CLIPART, Cell("fitnet", 0, 0), {}),
    (CLIPART, Cell("rkd", 0, 0), {}),
    (CLIPART, Cell("attention_transfer", 0, 0), {}),
    (CLIPART, Cell("tdmr", 0, 0), {}),
    (CLIPART, Cell("tdmr", 0, 1), {}),
    (CLIPART, Cell("wecolora", 0, None), {"factor": 4}),
    (ICONS, Cell("embedding_regression", 0, 0), {}),
]
WARM = 3  # steps of a turn before its clock starts


class Alone(Learner):
    """The student of a method's learner without the method."""

    def __init__(self, learner: Learner, kind: Kind) -> None:
        super().__init__({}, None)  # type: ignore[arg-type]
        self.student, self.kind = learner.student, kind
        self.tokens = not hasattr(learner, "soft_teacher") and hasattr(learner, "pairs_only")

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        if batch.labels is not None:
            return {"loss": supervised_loss(self.student(batch.images), batch.labels, self.kind)}
        own = self.student.forward_features(batch.images) if self.tokens else self.student(batch.images)  # type: ignore[operator]
        return {"loss": own.square().mean()}

    def deployed(self) -> Deployed:
        raise NotImplementedError


def own_cases(path: Path) -> list[Case]:
    """Every combination of a user's sweep whose method has a teacher, at its knobs' defaults."""
    raw = on_cpu(own_sweep(path))
    prepared = checked(raw)
    base = {key: value for key, value in raw.items() if key not in ("search", "storage", "store", "limits")}
    return [
        (base, cell, default_knobs(prepared.spaces[cell.method], cell.method))
        for cell in prepared.cells
        if cell.teacher is not None
    ]


def context_of(folder: str, base: dict[str, Any], cases: list[Case], batch: int | None) -> SweepContext:
    """A sweep over every case on this base: one pass of its teacher gives the outputs of all of them."""
    train = {"steps": 50, "views": 2, "batch": 64} | base.get("train", {}) | {"fresh": False}
    train |= {"batch": batch} if batch else {}
    methods = base.get("methods", {cell.method: knobs for _, cell, knobs in cases})
    spec = resolved(parse_spec({**base, "methods": methods, "train": train, "storage": folder}))
    cells = [cell for _, cell, _ in cases]
    context = SweepContext(spec, f"{folder}/{base['name']}")
    task = load_task(spec.task, context.store)
    spaces = {name: method_space(spec, name) for name in methods}
    return replace(context, prefetch=wanted_outputs(spec, spaces, cells, task.info, draws=1))


def reading_stage(context: SweepContext, config: TrialConfig) -> str | None:
    """The name of the trial's last training stage that reads outputs of a teacher."""
    cell, info = config.cell, load_task(context.spec.task, context.store).info
    stages = method_named(cell.method).stages(configure(context.spec, config), setting_of(context.spec, info, cell))
    return next((s.name for s in reversed(stages) if isinstance(s, TrainStage) and s.feed.outputs), None)


def job_of(context: SweepContext, cell: Cell, knobs: dict[str, Any]) -> TrainJob | None:
    """The last training stage of a method that reads outputs, with everything it reads in the store; None if none does.

    The stages before it are trained.
    """
    config = TrialConfig(f"{cell.method}-{time.time_ns()}", 0, cell, knobs, 0)
    wanted = reading_stage(context, config)
    if wanted is None:
        return None
    caught: list[TrainJob] = []

    def catch(job: TrainJob, folder: Path, report: Any = None) -> dict[str, Any]:
        if job.stage.name != wanted:
            return run_job(job, folder, report)
        caught.append(job)
        raise WorkError("The job is all that is wanted.")

    row = run_trial(context, config, runner=catch)
    if not caught:
        raise SystemExit(f"{cell.method}: {row['reason']}")
    return caught[-1]


def variants(job: TrainJob) -> dict[str, TrainJob]:
    """The job as it is, without a teacher, and with a live one."""
    stage = job.stage
    assert isinstance(stage, TrainStage)
    without = replace(stage, feed=replace(stage.feed, outputs=(), texts="", captions=False))
    train = job.spec.train.model_copy(update={"fresh": True})
    live = replace(job, spec=job.spec.model_copy(update={"train": train}), outputs={})
    found = {"stored": job, "none": replace(job, stage=without, outputs={}, texts=[], captions=[])}
    return found if stage.feed.plain else found | {"live": live}


def turn(job: TrainJob, learner: Learner, steps: int) -> tuple[float, float]:
    """Milliseconds a step, of the clock and of the processor, after the first `WARM`."""
    ticks: list[tuple[int, float, float]] = []
    _, feeder = opened(job)

    def tick(report: Report) -> None:
        ticks.append((report.step, time.perf_counter(), time.process_time()))

    fit(learner, feeder, job.stage.recipe, WARM + steps, seed=job.seed, report=tick, report_every=WARM)
    (first, wall, cpu), (last, wall_then, cpu_then) = ticks[0], ticks[-1]
    return 1000 * (wall_then - wall) / (last - first), 1000 * (cpu_then - cpu) / (last - first)


def pin(cores: int) -> None:
    """Gives every thread of this process the last `cores` of its cores."""
    wanted = sorted(os.sched_getaffinity(0))[-cores:]
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), wanted)


def measure(job: TrainJob, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """What `turn` gives for each variant, by round; the variants take turns, and the first round is not counted."""
    jobs = variants(job)
    learners = {name: opened(job)[0] for name in jobs}
    learners["none"] = Alone(learners["none"], job.spec.task.kind)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        names = [name for name in jobs if name != "live" or number < 3]
        for name in names if number % 2 else reversed(names):
            value = turn(jobs[name], copy.deepcopy(learners[name]), WARM if name == "live" else steps)
            if number:
                found[name].append(value)
    return found


def profile(job: TrainJob, steps: int) -> None:
    """Prints where the steps of the stored variant go."""
    profiler = cProfile.Profile()
    learner, _ = opened(job)
    profiler.runcall(turn, job, learner, steps)
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measures every case, prints the table, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="these alone")
    parser.add_argument(
        "--spec", type=Path, help="a sweep file of yours, in place of the packaged data's; never published"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, help="else the sweep file's, or 64")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead; write nothing")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pin(options.cores)
    cases = own_cases(options.spec) if options.spec else CASES
    rows = []
    contexts: dict[str, SweepContext] = {}
    with tempfile.TemporaryDirectory() as folder:
        for base, cell, knobs in cases:
            if options.methods and cell.method not in options.methods:
                continue
            data = base["task"]["data"]
            same = [case for case in cases if case[0] is base]
            context = contexts.setdefault(data, context_of(f"{folder}/{len(contexts)}", base, same, options.batch))
            job = job_of(context, cell, knobs)
            if job is None:
                print(f"{cell.method} reads no stored outputs of its teacher: left out.", file=sys.stderr, flush=True)
                continue
            label = f"1 block in {knobs['factor']}" if "factor" in knobs else "the teacher's copy"
            if cell.student is not None:
                label = job.spec.students[cell.student].model
            if options.profile:
                print(f"\n{cell.method}, {label}", file=sys.stderr)
                profile(job, options.steps)
                continue
            found = measure(job, options.rounds, options.steps)
            row: dict[str, Any] = {"method": cell.method, "student": label.removeprefix("timm/"), "ms": found}
            if len(base["teachers"]) > 1:
                row["teacher"] = job.spec.teachers[cell.teacher or 0].model
            for number, clock in enumerate(("wall", "cpu")):
                for which in ("stored", "live"):
                    row[f"{which}_{clock}"] = [
                        a[number] / b[number] for a, b in zip(found.get(which, []), found["none"], strict=False)
                    ]
            rows.append(row)
            print(f"{cell.method}, {label}: {spread(row['stored_cpu'])}", file=sys.stderr, flush=True)
    if options.profile:
        return
    if not rows:
        raise SystemExit("No method that is asked for reads stored outputs of its teacher.")
    batch = next(iter(contexts.values())).spec.train.batch
    setting = {"batch": batch, "rounds": options.rounds, "steps": options.steps, "cores": options.cores}
    about: dict[str, Any] = {
        "setting": setting,
        "machine": f"{machine(1)}, on {options.cores} of the cores",
        "versions": versions("torch", "timm"),
    }
    old = None if options.spec else measured_alike(RESULTS / "step.json", about)
    fresh = {row["method"] for row in rows}
    kept = [row for row in old["rows"] if row["method"] not in fresh] if old else []
    order = [cell.method for _, cell, _ in cases]
    result = {
        "command": command_of("step", parser, options, but=("methods", "dry")),
        **about,
        "rows": sorted([*kept, *rows], key=lambda row: order.index(row["method"])),
    }
    print(text := table(result))
    if not (options.dry or options.spec):
        publish("step", result, text)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = []
    several = any("teacher" in row for row in result["rows"])
    for row in result["rows"]:
        ms = {name: statistics.median(cpu for _, cpu in values) for name, values in row["ms"].items() if values}
        live = f"{statistics.median(row['live_cpu']):.2f}" if row["live_cpu"] else "-"
        lines.append(
            [
                row["method"],
                *([row.get("teacher", "")] if several else []),
                row["student"],
                f"{ms['none']:.1f}",
                f"{ms['stored']:.1f}",
                spread(row["stored_cpu"]),
                spread(row["stored_wall"]),
                live,
            ]
        )
    head = [
        "method",
        *(["teacher"] if several else []),
        "student",
        "no teacher, ms",
        "stored, ms",
        "stored / none, CPU",
        "by the clock",
        "live / none, CPU",
    ]
    setting = result["setting"]
    return (
        f"`{result['command']}`: batch {setting['batch']}, median and range of {setting['rounds']} rounds of "
        f"{setting['steps']} steps by turns, milliseconds of CPU a step; {result['machine']}; {result['versions']}.\n\n"
        f"{markdown(head, lines)}"
    )


if __name__ == "__main__":
    main()
