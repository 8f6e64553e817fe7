"""Runs one configuration: its stages through the store, then the common evaluation. Knows nothing of Ray."""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors.torch import save_file

from methods.contract import TEACHER, FitStage, ImageStage, Stage, TrainStage
from orchestrator.data.contact import contact_sheet
from orchestrator.data.outputs import Bill, open_outputs, open_pool_outputs
from orchestrator.data.pool import Mapper, PoolJob, Sources, ensure_pool, make_here, pool_images
from orchestrator.data.task import load_task
from orchestrator.errors import FullDiskError, UserError, WorkError, disk_full, told_at
from orchestrator.spec import SweepSpec
from orchestrator.store import Entry, key_of
from orchestrator.train.batches import joined_records
from orchestrator.train.given import entry_at, given_for, networks_of, stage_results
from orchestrator.train.job import TrainJob
from orchestrator.train.loop import DeviceMemoryError, Reporter
from orchestrator.train.memory import is_out_of_memory, release_memory
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext
from orchestrator.trial.limits import InfeasibleError, check_before
from orchestrator.trial.materials import Elsewhere, Materials, address_of, joined, still_there
from orchestrator.trial.plan import (
    TEXT_SOURCES,
    TrialConfig,
    configure,
    method_named,
    policy_of,
    setting_of,
    stage_reads,
    stage_steps,
)
from orchestrator.trial.row import blank_latencies, blank_row, verdict
from orchestrator.trial.score import ValGauge, evaluate


class Runner(Protocol):
    """Runs a training job, in this process or on a worker group."""

    def __call__(self, job: TrainJob, folder: Path, report: Reporter | None) -> dict[str, Any]: ...


T = TypeVar("T")


@runtime_checkable
class Place(Protocol):
    """Does picklable work in a process that holds a device: a worker group."""

    def elsewhere(self, work: Callable[[], T]) -> T: ...


def elsewhere_of(context: SweepContext, runner: Runner) -> Elsewhere | None:
    """Where a trial does what needs a device, if its own process holds none: where a group trains on GPUs."""
    return runner.elsewhere if context.device != "cpu" and isinstance(runner, Place) else None


# Metrics of a network, which no repeat of its trial changes.
KNOWN_AT_ONCE = ("params_total", "params_trained", "flops", "memory_mb", "model_mb")
Progress = Callable[[float, float | None], None]  # (share of the whole budget, val metric or None)


def run_trial(
    context: SweepContext,
    config: TrialConfig,
    progress: Progress | None = None,
    runner: Runner = run_job,
    mapper: Mapper = make_here,
) -> dict[str, Any]:
    """Runs one trial to its row. Whatever goes wrong inside becomes a row with status `failed` and a reason.

    Args:
        progress: hears how far the trial is.
        runner: runs its training stages; a worker group with GPUs does all that needs one.
        mapper: makes its generated images.

    Raises:
        FullDiskError: which is no fault of the trial.
    """
    started = time.time()
    row = blank_row(context.spec, config) | {"started": started, "pid": os.getpid(), "node": platform.node()}
    bill = Bill()
    try:
        row |= _Trial(context, config, bill, progress, runner, mapper).run() | {"status": "complete"}
        row |= verdict(context.spec, {name: row[name] for name in (*KNOWN_AT_ONCE, *blank_latencies(context.spec))})
    except InfeasibleError as error:
        row |= error.facts | {"status": "infeasible", "reason": str(error)}
    except FullDiskError:
        raise
    except (UserError, WorkError) as error:
        row |= {"status": "failed", "reason": str(error)}
    except Exception as error:  # one trial's defect must not end the sweep; its traceback is kept beside the row
        if disk_full(error):
            raise FullDiskError(f"The disk of {context.folder!r} is full.") from error
        row |= {"status": "failed", "reason": _reason(context.spec, error)}
        folder = Path(context.folder) / "trials"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{config.trial_id}.traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    row |= {
        "ended": time.time(),
        "device_seconds": (time.time() - started) * context.devices,
        "teacher_forwards": row["teacher_forwards"] + bill.forwards_paid,
        "teacher_forwards_shared": bill.forwards_shared,
        "store_seconds_paid": bill.seconds_paid,
        "store_seconds_saved": bill.seconds_saved,
        "store_hits": bill.hits,
        "store_misses": bill.misses,
    }
    release_memory()
    return row


def _reason(spec: SweepSpec, error: Exception) -> str:
    """Why a trial failed, where the error is none that is told as it is."""
    if is_out_of_memory(error):
        return f"out of device memory with train.batch {spec.train.batch}; try {spec.train.batch // 2}"
    return f"{type(error).__name__} at {told_at(error)}: {error}"[:500]


@dataclass
class _Trial:
    """One run of one configuration.

    Attributes:
        texts: the text tower that a stage has trained; None where the teacher's is kept.
    """

    context: SweepContext
    config: TrialConfig
    bill: Bill
    progress: Progress | None
    runner: Runner
    mapper: Mapper
    texts: Entry | None = None

    def __post_init__(self) -> None:
        torch.set_num_threads(self.context.spec.train.threads)
        self.elsewhere = elsewhere_of(self.context, self.runner)
        self.materials = Materials(self.context, self.config, self.bill, self.mapper, self.elsewhere)
        self.spec, self.store, self.task = self.materials.spec, self.materials.store, self.materials.task
        self.method, self.networks = method_named(self.config.cell.method), self.materials.networks
        self.addresses, self.pools = self.materials.addresses, self.materials.pools

    def run(self) -> dict[str, Any]:
        """Every stage in order, then the evaluation; returns the facts of the row."""
        settings = configure(self.spec, self.config)
        check_before(self.context, self.config, self.method, self.networks, self.task, self.elsewhere)
        stages = self.method.stages(settings, setting_of(self.spec, self.task.info, self.config.cell))
        trained = [s for s in stages if isinstance(s, TrainStage)]
        total = sum(stage_steps(s, self.spec, self.task) for s in trained) or 1
        facts: dict[str, Any] = {"optimizer_steps": 0, "images_seen": 0, "params_trained": 0, "loop_seconds": 0.0}
        live = 0
        found: dict[str, float] = {}
        last: Entry | None = None
        params_texts = 0
        for stage in stages:
            if isinstance(stage, TrainStage):
                report = self._reporter(stage, facts["optimizer_steps"], total, stage is trained[-1])
                entry = self._train(stage, report)
                about = entry.meta["about"]
                for name in ("optimizer_steps", "images_seen", "loop_seconds"):
                    facts[name] += about[name]
                if stage.publishes == "texts":
                    self.texts, params_texts = entry, about["params_trained"]
                facts["params_trained"] = about["params_trained"] + params_texts * (stage.publishes != "texts")
                found |= about.get("facts", {})
                if about.get("accumulate", 1) > self.spec.train.accumulate:
                    found["accumulate"] = about["accumulate"]  # out of memory without
                live += about["live_forwards"] if entry.computed else 0
                last = entry if stage.publishes == "network" else last
                self.addresses[stage.name] = f"{entry.stage}/{entry.key}"
                continue
            reads = stage_reads(stage, self.spec, self.task, self.config, self.addresses)
            key = key_of(reads)
            if isinstance(stage, ImageStage):
                self.pools[stage.name] = self._make(stage, key)
                self.addresses[stage.name] = f"{stage.name}/{key}"
                continue
            entry = self._fit(stage, key, reads)
            self.addresses[stage.name] = f"{entry.stage}/{entry.key}"
        self._picture(stages)
        scores = self._scored(last)
        found |= scores.pop("facts")
        # The common probe's head is trained too, only not by a stage.
        facts["params_trained"] += scores.pop("probe_parameters")
        return facts | {"teacher_forwards": live, "facts": json.dumps(found)} | scores

    def _scored(self, last: Entry | None) -> dict[str, Any]:
        """What `evaluate` gives of the network of the last stage."""
        trial = (self.context, self.config)
        if self.elsewhere is None:
            return evaluate(*trial, self.method, self.networks, self.task, last, self.bill, self.texts)
        network, texts = (address_of(entry) if entry is not None else None for entry in (last, self.texts))
        scores, bill = self.elsewhere(partial(_score, *trial, network, texts))
        joined(self.bill, bill)
        return dict(scores)

    def _make(self, stage: ImageStage, key: str) -> list[Entry]:
        images = len(self.task.labelled) if stage.images == "labelled" else len(self.task.train)
        job = PoolJob(
            spec=self.spec,
            store_root=self.store.address,
            stage=stage,
            key=key,
            inputs=stage_results(self.store, {name: self.addresses[name] for name in stage.inputs}),
            seed=self.config.seed,
            device=self.context.device,
            listing=self.task.listing,
        )
        return [self.bill.add(entry) for entry in ensure_pool(job, stage.count or images, self.mapper)]

    def _fit(self, stage: FitStage, key: str, reads: dict[str, Any]) -> Entry:
        tables: dict[str, list[Entry]] = {}
        if stage.images != "corpus" and not stage.pool and self.store.get(stage.name, key) is None:
            # Before the stage is anybody's: whoever else needs it takes a part in the teacher's pass.
            tables = self.materials.outputs(stage.outputs, stage.of, 1)

        def write(folder: Path) -> dict[str, Any]:
            rows = list(self.task.labelled) if stage.images == "labelled" else list(range(len(self.task.train)))
            outputs: dict[str, Any]
            if stage.images == "corpus":
                addresses = self.materials.corpus_outputs(stage.outputs)
                outputs = {name: joined_records(self.store, found) for name, found in addresses.items()}
            elif stage.pool:
                made = self.materials.pool_outputs(stage.pool, stage.outputs, stage.of, 1)
                outputs = {n: open_pool_outputs(e)[0].rows(list(range(len(rows)))).float() for n, e in made.items()}
            else:
                found = tables if still_there(tables) else self.materials.outputs(stage.outputs, stage.of, 1)
                outputs = {name: open_outputs(e)[0].rows(rows).float() for name, e in found.items()}
            began = time.perf_counter()
            inputs = stage_results(self.store, {name: self.addresses[name] for name in stage.inputs})
            texts: dict[str, Any] = {
                n: joined_records(self.store, self.materials.text_addresses(n))
                for n in TEXT_SOURCES
                if n in stage.reads
            }
            given = given_for(
                stage.reads, self.networks, self.task, self.store, self.config.seed, inputs, outputs, texts
            )
            tensors = stage.fit(stage.params, given)
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
            return {"seconds": time.perf_counter() - began}

        return self.bill.add(self.store.compute(stage.name, key, write, reads=reads))

    def _train(self, stage: TrainStage, report: Reporter | None) -> Entry:
        """The stage's entry. Out of device memory it is tried once more, if the sweep file allows it."""
        train = self.spec.train
        try:
            return self._trained(stage, self.spec, report)
        except DeviceMemoryError as error:
            tried = str(error)  # the error itself holds what filled the memory
        if not train.oom_retry:
            raise DeviceMemoryError(f"{tried}; train.oom_retry or train.accumulate: {2 * train.accumulate} may help")
        if train.batch % (2 * train.accumulate * train.workers):
            raise DeviceMemoryError(f"{tried}; that is no even number, so it was not tried at half as many")
        release_memory()
        halved = train.model_copy(update={"accumulate": 2 * train.accumulate})
        try:
            return self._trained(stage, self.spec.model_copy(update={"train": halved}), report)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{tried}; then {error}") from None

    def _trained(self, stage: TrainStage, spec: SweepSpec, report: Reporter | None) -> Entry:
        feed, cell, views = stage.feed, self.config.cell, spec.train.views
        # Micro batches of another size are another computation: it has an address of its own.
        reads = stage_reads(stage, spec, self.task, self.config, self.addresses)
        key = key_of(reads)

        streamed = self.spec.corpus.streams(feed.images)
        stored = not streamed and (feed.plain or not self.spec.train.fresh)

        def outputs() -> dict[str, list[Entry]]:
            return self.materials.outputs(feed.outputs, feed.of, 1 if feed.plain else views) if stored else {}

        # As in `_fit`: a stage that several trials need is waited for with the teacher's pass made together.
        early = outputs() if self.store.get(stage.name, key) is None else {}

        def write(folder: Path) -> dict[str, Any]:
            entries = early if still_there(early) else outputs()
            generated: dict[str, list[list[Entry]]] = {}
            if feed.pool and not self.spec.train.fresh:
                generated = self.materials.pool_outputs(feed.pool, feed.pool_outputs, feed.of, views, feed.pool_size)
            shards = self.materials.shards(feed.pool, feed.pool_size) if feed.pool else []
            job = TrainJob(
                spec=spec,
                store_root=self.store.address,
                stage=stage,
                teacher=cell.teacher,
                student=cell.student,
                outputs=self.materials.corpus_outputs(feed.outputs)
                if streamed
                else {name: [address_of(e) for e in found] for name, found in entries.items()},
                inputs={name: self.addresses[name] for name in stage.inputs},
                steps=stage_steps(stage, self.spec, self.task),
                seed=self.config.seed,
                device=self.context.device,
                scratch=str(self.store.scratch(stage.name, key)),
                policy=policy_of(self.spec),
                of=self.addresses[feed.of] if feed.of != TEACHER else None,
                pool=[address_of(e) for e in shards],
                pool_outputs={n: [[address_of(e) for e in view] for view in found] for n, found in generated.items()},
                captions=self.materials.text_addresses("captions") if feed.captions else [],
                texts=self.materials.text_addresses(feed.texts) if feed.texts else [],
                tokens={
                    name: (self.materials.text_addresses(name), self.materials.token_addresses(name))
                    for name in feed.tokens
                },
                stream_here=self.mapper is make_here,
                listing=self.task.listing,
            )
            return self.runner(job, folder, report)

        return self.bill.add(self.store.compute(stage.name, key, write, reads=reads))

    def _reporter(self, stage: TrainStage, before: int, total: int, final: bool) -> Reporter | None:
        """What tells `progress` how far the trial is; an earlier stage's network is not the candidate."""
        if self.progress is None:
            return None
        stops = self.spec.search.scheduler != "none" and final
        texts = str(self.texts.path) if self.texts is not None else None
        gauge = ValGauge(self.context, self.config, stage.trains, self.task.listing, before, total, stops, texts, final)
        return Reporter(gauge, self.progress)

    def _picture(self, stages: list[Stage], rows: int = 6, copies: int = 4) -> None:
        """A contact sheet of sources and what was made of them, once for each pool."""
        made = [s for s in stages if isinstance(s, ImageStage)]
        if not made:
            return
        stage = made[-1]
        path = Path(self.context.folder) / "pictures" / f"{self.addresses[stage.name].replace('/', '-')}.png"
        if path.exists():
            return
        sources = Sources(self.task, stage, self.store)
        total = len(sources.split)
        chosen = list(range(0, total, max(1, total // rows)))[:rows]
        columns = {"source": sources.pixels(chosen)}
        for one in made:
            count = one.count or total
            for copy in range(min(copies, max(1, count // total)) if one.images == stage.images else 0):
                wanted = [copy * total + i for i in chosen]
                title = f"{one.name} {copy + 1}" if copy else one.name
                columns[title] = pool_images(self.pools[one.name], wanted)
        contact_sheet(columns, path)


def _score(
    context: SweepContext, config: TrialConfig, network: str | None, texts: str | None
) -> tuple[dict[str, Any], Bill]:
    """`evaluate` in another process than the trial's; the entries of its stages come as addresses."""
    store, cell, bill = context.store, config.cell, Bill()
    torch.set_num_threads(context.spec.train.threads)
    task = load_task(context.spec.task, store, listing=context.listing)
    networks = networks_of(context.spec, cell.teacher, cell.student)
    last, tower = (entry_at(store, address) if address is not None else None for address in (network, texts))
    return evaluate(context, config, method_named(cell.method), networks, task, last, bill, tower), bill
