"""One training stage as a picklable job, run in this process or by every rank of a group."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from methods.contract import Deployed, Given, TrainStage, trainable_parameters
from orchestrator.data.outputs import open_outputs
from orchestrator.data.pixels import RenderedPixels, open_pixels
from orchestrator.data.task import TaskData, load_task
from orchestrator.data.views import Policy
from orchestrator.models import Network, build_network, load_network, save_student
from orchestrator.models.load import describe
from orchestrator.spec import SweepSpec
from orchestrator.store import Entry, Store
from orchestrator.train.feed import Feeder, LiveTeacher
from orchestrator.train.loop import Checkpoint, Report, fit


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank needs to run one training stage; the data and the teacher's outputs are read from the store.

    Attributes:
        spec: the sweep file.
        store_root: the store that every rank can read.
        stage: what to train.
        teacher, student: positions in the sweep file, or None.
        outputs: store addresses of teacher outputs, by output key, one for each view; empty for a live teacher.
        inputs: store addresses of earlier stages' results by stage name.
        steps, seed, device: for how long, from where, on what.
        scratch: folder of the checkpoint.
        policy: how views are drawn.
    """

    spec: SweepSpec
    store_root: str
    stage: TrainStage
    teacher: int | None
    student: int | None
    outputs: dict[str, list[str]]
    inputs: dict[str, str]
    steps: int
    seed: int
    device: str
    scratch: str
    policy: Policy


@dataclass(frozen=True)
class Networks:
    """The networks of a trial as its stages see them."""

    teacher: Network | None
    student: Network | None

    def trained(self, which: str) -> Network:
        network = self.teacher if which == "teacher" else self.student
        assert network is not None
        return network


def networks_of(spec: SweepSpec, teacher: int | None, student: int | None) -> Networks:
    """Loads what a cell names, once a process."""
    return Networks(
        load_network(spec.teachers[teacher], "teacher") if teacher is not None else None,
        load_network(spec.students[student], "student") if student is not None else None,
    )


def given_for(
    reads: tuple[str, ...],
    networks: Networks,
    task: TaskData,
    seed: int,
    results: dict[str, dict[str, torch.Tensor]],
    outputs: dict[str, torch.Tensor] | None = None,
) -> Given:
    """What a stage declared, and nothing else. Seeds torch, so that new layers are drawn from `seed`."""
    torch.manual_seed(seed)
    classes = len(task.classes)
    values: dict[str, Any] = {}
    if "teacher" in reads:
        values["teacher"] = _thawed(networks.trained("teacher").module)
    if "student" in reads:
        values["student"] = fresh_student(networks.trained("student"), classes)
    if "labels" in reads:
        values["labels"] = torch.tensor([task.train.labels[i] for i in task.labelled])
    return Given(values=values, num_classes=classes, results=results, outputs=outputs)


def _thawed(module: torch.nn.Module) -> torch.nn.Module:
    module = copy.deepcopy(module).cpu()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def fresh_student(network: Network, classes: int) -> torch.nn.Module:
    """A student with `classes` outputs: its pre-trained weights, or else ones drawn from torch's seed."""
    from orchestrator.models.names import wants_weights

    if wants_weights(network.entry, "student"):
        module = _thawed(network.module)
        module.reset_classifier(classes)  # type: ignore[operator]
        return module
    return build_network(network.entry, num_classes=classes)


def entry_at(store: Store, address: str) -> Entry:
    """The published entry at `stage/key`."""
    stage, _, key = address.partition("/")
    entry = store.get(stage, key)
    if entry is None:
        raise LookupError(f"The store has lost {address}.")
    return entry


def stage_results(store: Store, inputs: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of earlier stages by stage name."""
    return {name: load_file(entry_at(store, address).path / "model.safetensors") for name, address in inputs.items()}


def run_job(
    job: TrainJob,
    folder: Path,
    report: Callable[[Report], None] | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Trains one stage and (rank 0) writes its deployed network to `folder`; returns what the ledger needs."""
    began = time.perf_counter()
    spec, stage = job.spec, job.stage
    device = device or job.device
    torch.set_num_threads(spec.train.threads)
    store = Store(job.store_root)
    task = load_task(spec.task, store)
    networks = networks_of(spec, job.teacher, job.student)
    trained = networks.trained(stage.trains)
    given = given_for(stage.reads, networks, task, job.seed, stage_results(store, job.inputs))
    learner = stage.learner(stage.params, given)
    views = None if spec.train.fresh else spec.train.views
    pixels = open_pixels(store, task, task.train, job.policy, views, trained.preprocessing, spec.store.pixels_gb)
    live = None
    if stage.feed.outputs and spec.train.fresh:
        teacher = networks.trained("teacher")
        teacher_pixels = RenderedPixels(task, task.train, job.policy, teacher.preprocessing)
        live = LiveTeacher(teacher, teacher_pixels, stage.feed.outputs, device)
    feeder = Feeder(
        stage.feed,
        task,
        pixels,
        trained.preprocessing,
        tables={key: open_outputs([entry_at(store, a) for a in addresses]) for key, addresses in job.outputs.items()},
        live=live,
        batch=spec.train.batch,
        views=views,
        seed=job.seed,
        rank=rank,
        world=world,
    )
    history = fit(
        learner,
        feeder,
        stage.recipe,
        job.steps,
        device=device,
        precision=spec.train.precision,
        seed=job.seed,
        rank=rank,
        world=world,
        sync_batchnorm=spec.train.sync_batchnorm,
        checkpoint=Checkpoint(Path(job.scratch) / "checkpoint.pt", spec.train.checkpoint_s),
        report=report,
    )
    about = {
        "optimizer_steps": job.steps,
        "images_seen": job.steps * spec.train.batch,
        "params_trained": trainable_parameters(learner),
        "live_forwards": (live.forwards if live is not None else 0) * world,
        "loop_seconds": history.loop_seconds,
        "history": history.points,
        "seconds": time.perf_counter() - began,
    }
    if rank == 0:
        deployed = learner.deployed()
        write_deployed(folder, deployed, trained, len(task.classes), about)
    return about


def write_deployed(folder: Path, deployed: Deployed, base: Network, classes: int, about: dict[str, Any]) -> None:
    """Writes a trained network so that a fresh process can rebuild it."""
    classifier = deployed.network.get_classifier()  # type: ignore[operator]
    outputs = getattr(classifier, "out_features", 0)
    meta = {
        "model": base.entry.model_dump(mode="json"),
        "role": base.role,
        "changes": dict(deployed.changes),
        "num_classes": int(outputs),
        "preprocessing": describe(base.preprocessing),
    }
    deployed.network.cpu()
    save_student(folder, deployed, meta)
    (folder / "history.json").write_text(json.dumps(about), encoding="utf-8")
