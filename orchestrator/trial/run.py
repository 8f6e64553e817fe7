"""Runs one configuration: its stages through the store, then the common evaluation. Knows nothing of Ray."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from methods.contract import Deployed, FitStage, TrainStage
from methods.heads import load_head
from methods.outputs import Output
from orchestrator.data.outputs import Bill, ensure_outputs, open_outputs
from orchestrator.data.pixels import open_pixels
from orchestrator.data.task import Split, TaskData, load_task
from orchestrator.errors import FullDiskError, UserError, WorkError, disk_full
from orchestrator.evaluate.accuracy import accuracy, pooled_features, probe_head
from orchestrator.evaluate.cost import flops, latency, parameters
from orchestrator.models import Network, load_student, save_student
from orchestrator.models.load import describe
from orchestrator.spec import SweepSpec
from orchestrator.store import Entry, Store, key_of
from orchestrator.train.job import (
    Networks,
    TrainJob,
    fresh_student,
    given_for,
    networks_of,
    run_job,
    stage_results,
)
from orchestrator.train.loop import Report
from orchestrator.trial.plan import (
    TrialConfig,
    configure,
    method_named,
    policy_of,
    setting_of,
    stage_reads,
    stage_steps,
)

EVALUATION_VERSION = 1


class Runner(Protocol):
    """Runs a training job, in this process or on a worker group."""

    def __call__(self, job: TrainJob, folder: Path, report: Callable[[Report], None] | None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class SweepContext:
    """What every trial of a sweep shares. Picklable.

    Attributes:
        spec: the sweep file.
        folder: `<storage>/<sweep>`.
        device: `cpu` or `cuda`.
        prefetch: by teacher position, the outputs that some trial of the sweep may want: computed in one pass.
    """

    spec: SweepSpec
    folder: str
    device: str = "cpu"
    prefetch: dict[int, tuple[Output, ...]] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return Store(Path(self.spec.storage) / "store", min_free_gb=self.spec.store.min_free_gb)


Progress = Callable[[float, float | None], None]  # (share of the whole budget, val metric or None)


def run_trial(
    context: SweepContext, config: TrialConfig, progress: Progress | None = None, runner: Runner = run_job
) -> dict[str, Any]:
    """Runs one trial to its row. Whatever goes wrong inside becomes a row with status `failed` and a reason.

    Raises:
        FullDiskError: which is no fault of the trial.
    """
    started = time.time()
    row = blank_row(context.spec, config) | {"started": started, "pid": os.getpid(), "node": platform.node()}
    bill = Bill()
    try:
        row |= _run(context, config, bill, progress, runner) | {"status": "complete"}
    except FullDiskError:
        raise
    except (UserError, WorkError) as error:
        row |= {"status": "failed", "reason": str(error)}
    except torch.OutOfMemoryError:
        reason = (
            f"out of device memory with train.batch {context.spec.train.batch}; try {context.spec.train.batch // 2}"
        )
        row |= {"status": "failed", "reason": reason}
    except Exception as error:  # one trial's defect must not end the sweep; its traceback is kept beside the row
        if disk_full(error):
            raise FullDiskError(f"The disk of {context.folder!r} is full.") from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        row |= {"status": "failed", "reason": f"{type(error).__name__} at {where}: {error}"[:500]}
        folder = Path(context.folder) / "trials"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{config.trial_id}.traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    row |= {
        "ended": time.time(),
        "device_seconds": (time.time() - started) * context.spec.train.workers * _devices(context),
        "teacher_forwards": row["teacher_forwards"] + bill.forwards_paid,
        "teacher_forwards_shared": bill.forwards_shared,
        "store_seconds_paid": bill.seconds_paid,
        "store_seconds_saved": bill.seconds_saved,
        "store_hits": bill.hits,
        "store_misses": bill.misses,
    }
    return row


def _devices(context: SweepContext) -> float:
    train = context.spec.train
    return train.gpus_per_worker if context.device == "cuda" else float(train.threads)


def blank_row(spec: SweepSpec, config: TrialConfig) -> dict[str, Any]:
    """The leaderboard's row of a trial of which nothing is known yet."""
    cell = config.cell
    return {
        "trial_id": config.trial_id,
        "number": config.number,
        "method": cell.method,
        "teacher": spec.teachers[cell.teacher].model if cell.teacher is not None else None,
        "student": spec.students[cell.student].model if cell.student is not None else None,
        "status": "running",
        "reason": "",
        "config": config.to_json(),
        "seed": config.seed,
        "val_metric": float("nan"),
        "params_total": 0,
        "params_trained": 0,
        "flops": 0,
        "latency_ms": float("nan"),
        "latency_iqr_ms": float("nan"),
        "latency_setup": "",
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
        "student_path": "",
        "started": 0.0,
        "ended": 0.0,
        "pid": 0,
        "node": "",
    }


def _run(
    context: SweepContext, config: TrialConfig, bill: Bill, progress: Progress | None, runner: Runner
) -> dict[str, Any]:
    torch.set_num_threads(context.spec.train.threads)
    spec, store, cell = context.spec, context.store, config.cell
    task = load_task(spec.task, store)
    method = method_named(cell.method)
    settings = configure(spec, config)
    stages = method.stages(settings, setting_of(spec, task.info, cell))
    networks = networks_of(spec, cell.teacher, cell.student)
    total = sum(stage_steps(s, spec, task) for s in stages if isinstance(s, TrainStage)) or 1
    before = 0
    keys: dict[str, str] = {}
    last: Entry | None = None
    facts: dict[str, Any] = {"optimizer_steps": 0, "images_seen": 0, "params_trained": 0, "loop_seconds": 0.0}
    live = 0
    for stage in stages:
        reads = stage_reads(stage, spec, task, config, keys)
        key = key_of(reads)
        if isinstance(stage, FitStage):
            entry = _fit_stage(context, config, stage, key, reads, networks, task, keys, bill)
        else:
            report = _reporter(context, networks, task, stage, method.trains_head, progress, before, total)
            entry = _train_stage(context, config, stage, key, reads, networks, task, keys, bill, report, runner)
            about = entry.meta["about"]
            before += about["optimizer_steps"]
            for name in ("optimizer_steps", "images_seen", "loop_seconds"):
                facts[name] += about[name]
            facts["params_trained"] = about["params_trained"]
            live += about["live_forwards"] if entry.computed else 0
            last = entry
        keys[stage.name] = f"{entry.stage}/{entry.key}"
    scores = _evaluate(context, config, method, networks, task, last, bill)
    # The common probe's head is trained too, only not by a stage.
    facts["params_trained"] += scores.pop("probe_parameters")
    return facts | {"teacher_forwards": live} | scores


def _output_entries(
    context: SweepContext,
    config: TrialConfig,
    outputs: tuple[Output, ...],
    networks: Networks,
    task: TaskData,
    views: int,
    bill: Bill,
) -> dict[str, list[Entry]]:
    teacher = config.cell.teacher
    if not outputs or teacher is None:
        return {}
    return ensure_outputs(
        context.store,
        task,
        task.train,
        networks.trained("teacher"),
        policy_of(context.spec),
        range(views),
        outputs,
        also=context.prefetch.get(teacher, ()),
        device=context.device,
        bill=bill,
    )


def _fit_stage(
    context: SweepContext,
    config: TrialConfig,
    stage: FitStage,
    key: str,
    reads: dict[str, Any],
    networks: Networks,
    task: TaskData,
    keys: dict[str, str],
    bill: Bill,
) -> Entry:
    def write(folder: Path) -> dict[str, Any]:
        entries = _output_entries(context, config, stage.outputs, networks, task, 1, bill)
        rows = list(task.labelled) if stage.images == "labelled" else list(range(len(task.train)))
        outputs = {name: open_outputs(found)[0].rows(rows).float() for name, found in entries.items()}
        began = time.perf_counter()
        inputs = stage_results(context.store, {name: keys[name] for name in stage.inputs})
        given = given_for(stage.reads, networks, task, config.seed, inputs, outputs)
        tensors = stage.fit(stage.params, given)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
        return {"seconds": time.perf_counter() - began}

    return bill.add(context.store.compute(stage.name, key, write, reads=reads))


def _train_stage(
    context: SweepContext,
    config: TrialConfig,
    stage: TrainStage,
    key: str,
    reads: dict[str, Any],
    networks: Networks,
    task: TaskData,
    keys: dict[str, str],
    bill: Bill,
    report: Callable[[Report], None] | None,
    runner: Runner,
) -> Entry:
    spec, store = context.spec, context.store
    cell = config.cell

    def write(folder: Path) -> dict[str, Any]:
        entries: dict[str, list[Entry]] = {}
        if not spec.train.fresh:
            entries = _output_entries(context, config, stage.feed.outputs, networks, task, spec.train.views, bill)
        job = TrainJob(
            spec=spec,
            store_root=str(store.root),
            stage=stage,
            teacher=cell.teacher,
            student=cell.student,
            outputs={name: [f"{e.stage}/{e.key}" for e in found] for name, found in entries.items()},
            inputs={name: keys[name] for name in stage.inputs},
            steps=stage_steps(stage, spec, task),
            seed=config.seed,
            device=context.device,
            scratch=str(store.scratch(stage.name, key)),
            policy=policy_of(spec),
        )
        return runner(job, folder, report)

    return bill.add(store.compute(stage.name, key, write, reads=reads))


def _reporter(
    context: SweepContext,
    networks: Networks,
    task: TaskData,
    stage: TrainStage,
    trains_head: bool,
    progress: Progress | None,
    before: int,
    total: int,
) -> Callable[[Report], None] | None:
    """Tells `progress` how far the trial is, with the val metric at each eighth if trials may be stopped."""
    if progress is None:
        return None
    measured = {"at": 0}
    stops = context.spec.search.scheduler != "none"

    def report(state: Report) -> None:
        share = (before + state.step) / total
        metric = None
        if stops and int(share * 8) > measured["at"]:
            measured["at"] = int(share * 8)
            base = networks.trained(stage.trains)
            student = state.learner.student
            if trains_head:
                metric = accuracy(student, base.preprocessing, _pixels(context, task, task.val, base), task.val)
            else:
                metric = _probe_accuracy(context, task, student, base)
        progress(min(share, 0.999), metric)

    return report


def _pixels(context: SweepContext, task: TaskData, split: Split, base: Network, store: Store | None = None) -> Any:
    limit = context.spec.store.pixels_gb
    return open_pixels(store or context.store, task, split, policy_of(context.spec), 1, base.preprocessing, limit)


def _probe_accuracy(context: SweepContext, task: TaskData, network: torch.nn.Module, base: Network) -> float:
    weight, bias = _probe(context, task, network, base)
    rows = np.arange(len(task.val))
    features = pooled_features(network, base.preprocessing, _pixels(context, task, task.val, base), rows)
    predicted = (features @ weight.T + bias).argmax(1)
    return float((predicted == torch.tensor(task.val.labels)).float().mean())


def _probe(context: SweepContext, task: TaskData, network: torch.nn.Module, base: Network) -> tuple[Any, Any]:
    rows = np.asarray(task.labelled)
    labels = torch.tensor([task.train.labels[i] for i in task.labelled])
    pixels = _pixels(context, task, task.train, base)
    return probe_head(network, base.preprocessing, pixels, rows, labels, len(task.classes))


def _evaluate(
    context: SweepContext,
    config: TrialConfig,
    method: Any,
    networks: Networks,
    task: TaskData,
    last: Entry | None,
    bill: Bill,
) -> dict[str, Any]:
    """The deployed network: a head if it has none yet, then val, size, FLOPs and latency; all through the store."""
    store, spec = context.store, context.spec
    base = networks.trained(method.deploys)
    reads = {
        "network": f"{last.stage}/{last.key}" if last else {"base": base.weights_hash, "seed": config.seed},
        "labels": task.labels_hash,
        "val": [task.val.images_hash, list(task.val.labels)],
        "version": EVALUATION_VERSION,
        "probe": not method.trains_head,
    }

    def write(folder: Path) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if last is not None:
            network, stored = load_student(last.path)
            changes = stored["changes"]
        else:
            torch.manual_seed(config.seed)
            network = fresh_student(base, len(task.classes)).eval()
        if not method.trains_head:
            weight, bias = _probe(context, task, network, base)
            load_head(network, weight, bias)
        val = accuracy(network, base.preprocessing, _pixels(context, task, task.val, base), task.val)
        meta = {
            "model": base.entry.model_dump(mode="json"),
            "role": base.role,
            "changes": changes,
            "num_classes": len(task.classes),
            "classes": list(task.classes),
            "preprocessing": describe(base.preprocessing),
            "val_metric": val,
            "task": spec.task.model_dump(mode="json"),
        }
        save_student(folder, Deployed(network, method.deploys, changes), meta)
        head = 0 if method.trains_head else sum(p.numel() for p in network.get_classifier().parameters())  # type: ignore[operator]
        return {
            "val_metric": val,
            "params_total": parameters(network),
            "probe_parameters": head,
            "flops": flops(network, base.preprocessing.size),
        }

    entry = bill.add(store.compute("evaluate", key_of(reads), write, reads=reads))
    about = entry.meta["about"]
    student = Path(context.folder) / "students" / config.trial_id
    if not (student / "student.json").is_file():
        temporary = student.with_name(f".{config.trial_id}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(entry.path, temporary, ignore=shutil.ignore_patterns("meta.json"))
        meta = json.loads((temporary / "student.json").read_text(encoding="utf-8"))
        row = blank_row(spec, config)
        meta |= {
            "method": config.cell.method,
            "trial_id": config.trial_id,
            "teacher": row["teacher"],
            "config": config.to_json(),
        }
        (temporary / "student.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        shutil.rmtree(student, ignore_errors=True)
        temporary.rename(student)
    timing = _latency(context, entry, base)
    return {
        "val_metric": about["val_metric"],
        "params_total": about["params_total"],
        "probe_parameters": about["probe_parameters"],
        "flops": about["flops"],
        "student_path": f"students/{config.trial_id}",
        **timing,
    }


def _latency(context: SweepContext, entry: Entry, base: Network) -> dict[str, Any]:
    """Latency belongs to the architecture, the device and the threads: measured once for each, then shared."""
    meta = json.loads((entry.path / "student.json").read_text(encoding="utf-8"))
    train = context.spec.train
    reads = {
        "model": meta["model"],
        "changes": meta["changes"],
        "classes": meta["num_classes"],
        "size": base.preprocessing.size,
        "device": context.device,
        "threads": train.threads,
    }

    def write(folder: Path) -> dict[str, Any]:
        network, _ = load_student(entry.path)
        measured = latency(network, base.preprocessing.size, device=context.device, threads=train.threads)
        return {"median": measured.median_ms, "iqr": measured.iqr_ms, "batch": measured.batch}

    about = context.store.compute("latency", key_of(reads), write, reads=reads).meta["about"]
    setup = f"{context.device}, {train.threads} thread{'s' if train.threads > 1 else ''}, batch {about['batch']}"
    return {"latency_ms": about["median"], "latency_iqr_ms": about["iqr"], "latency_setup": setup}
