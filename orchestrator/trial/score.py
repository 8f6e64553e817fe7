"""What a trial's deployed network scores and costs: one protocol for every method, through the store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from methods.contract import Deployed, Method, Structure
from methods.dense import structure_of
from methods.parts.zero_shot import Prototypes, ZeroShot
from orchestrator.data.embed import class_vectors, embedded_prompts, prompts_of, text_tower_of, texts_identity
from orchestrator.data.labels import Labels, open_labels
from orchestrator.data.outputs import Bill
from orchestrator.data.pixels import Pixels, open_pixels
from orchestrator.data.task import Split, TaskData, load_task
from orchestrator.errors import WorkError
from orchestrator.evaluate.cost import costs
from orchestrator.evaluate.details import Details
from orchestrator.evaluate.forward import device_here
from orchestrator.evaluate.metrics import score
from orchestrator.evaluate.outcomes import write_outcomes
from orchestrator.evaluate.probe import Probe, fit_probe
from orchestrator.models.load import Network, describe, load_student, save_student
from orchestrator.models.load import structure_of as stored_structure
from orchestrator.models.texts import ABOUT, WEIGHTS, StudentTexts
from orchestrator.store import Entry, Records, key_of
from orchestrator.train.given import Networks, fresh_student, networks_of
from orchestrator.train.loop import Report
from orchestrator.trial.context import SweepContext
from orchestrator.trial.limits import Blueprint, latency_of
from orchestrator.trial.plan import TrialConfig, method_named, policy_of, source_reads

PROBE_VERSION = 2  # 2: of classes with one label each
EVALUATION_VERSION = 3  # 2: details by class; 3: memory, file size and outcomes by image


def val_metric(
    context: SweepContext, task: TaskData, scored: nn.Module, base: Network, details: Details | None = None
) -> float:
    """What a network with a head scores on val; nothing is stored.

    Args:
        scored: at any moment of its training; run on the device where it is.
        base: whose preprocessing it has.
        details: hears every batch.
    """
    size = base.preprocessing.size
    labels = _labels(context, task, task.val, range(len(task.val)), size)
    pixels = _pixels(context, task, task.val, base)
    hear = details.hear if details is not None else None
    kind, classes = task.spec.kind, len(task.classes)
    return score(scored, base.preprocessing, pixels, labels, len(task.val), kind, classes, hear=hear).value


@dataclass
class ValGauge:
    """The val metric of the stage that trains what is deployed, at each eighth of the trial's budget.

    Attributes:
        context, config: the trial.
        trains: whose preprocessing the stage's network has.
        listing: of the task's images, as in `load_task`.
        before, total: optimizer steps of earlier stages, and of all.
        stops: whether anybody wants to know: trials may be stopped, and this stage trains the candidate.
        texts: folder of the text tower that an earlier stage trained; None for the teacher's.
        final: whether this stage trains the candidate: its losses are noted.
    """

    context: SweepContext
    config: TrialConfig
    trains: str
    listing: str
    before: int
    total: int
    stops: bool
    texts: str | None = None
    final: bool = False
    measured: int = 0

    def share(self, step: int) -> float:
        """Of the trial's whole budget that is done after this step, below 1."""
        return min((self.before + step) / self.total, 0.999)

    def due(self, step: int) -> bool:
        """Whether a further eighth of the budget is done; ask once a step."""
        eighth = int(self.share(step) * 8)
        if not self.stops or eighth <= self.measured:
            return False
        self.measured = eighth
        return True

    def note(self, state: Report) -> None:
        """Adds a line to `trials/<trial>.loss.jsonl`: a trial that is stopped or fails leaves no other curve."""
        if not self.final:
            return
        folder = Path(self.context.folder) / "trials"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{self.config.trial_id}.loss.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": float(state.step), **state.parts}) + "\n")

    def measure(self, state: Report) -> float:
        """What the network scores on val now."""
        cell, spec = self.config.cell, self.context.spec
        task = load_task(spec.task, self.context.store, listing=self.listing)
        base = networks_of(spec, cell.teacher, cell.student).trained(self.trains)
        method, network = method_named(cell.method), state.learner.student
        if method.zero_shot:
            texts = Path(self.texts) if self.texts is not None else None
            network = zero_shot(self.context, self.config, task, network, texts)
        elif not method.trains_head:
            network = _probe(self.context, task, network, base).over(network)
        return val_metric(self.context, task, network, base)


def _pixels(context: SweepContext, task: TaskData, split: Split, base: Network) -> Pixels:
    limit = context.spec.store.pixels_gb
    return open_pixels(context.store, task, split, policy_of(context.spec), 1, base.preprocessing, limit)


def _labels(context: SweepContext, task: TaskData, split: Split, rows: Sequence[int], size: int) -> Labels:
    limit = context.spec.store.pixels_gb
    return open_labels(context.store, task, split, rows, policy_of(context.spec), 1, size, limit)


def zero_shot(
    context: SweepContext,
    config: TrialConfig,
    task: TaskData,
    network: nn.Module,
    texts: Path | None = None,
    device: str | None = None,
) -> ZeroShot:
    """`network`, which embeds images into the teacher's space, under embeddings of the class names.

    Args:
        texts: folder of the text tower that embeds them; None for the teacher's own.
        device: where the teacher's tower runs; None: where trials train, if this process has such a device.
    """
    assert config.cell.teacher is not None
    teacher = context.spec.teachers[config.cell.teacher]
    if texts is not None:
        prompts = StudentTexts(texts, text_tower_of(teacher)).embed(prompts_of(task))
    else:
        entry = embedded_prompts(context.store, task, teacher, device or device_here(context.device))
        prompts = Records(entry.path / "records.arrow").all()
    vectors = class_vectors(prompts, len(task.classes))
    prototypes = Prototypes(*vectors.shape)
    prototypes.vectors.copy_(vectors)
    return ZeroShot(network, prototypes.to(next(network.parameters()).device)).eval()


def _probe(context: SweepContext, task: TaskData, network: nn.Module, base: Network) -> Probe:
    return fit_probe(
        network,
        base.preprocessing,
        _pixels(context, task, task.train, base),
        _labels(context, task, task.train, task.labelled, base.preprocessing.size),
        np.asarray(task.labelled),
        task.spec.kind,
        len(task.classes),
        task.spec.decoder,
    )


def evaluate(
    context: SweepContext,
    config: TrialConfig,
    method: type[Method],
    networks: Networks,
    task: TaskData,
    last: Entry | None,
    bill: Bill,
    texts: Entry | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """The deployed network: a head if it has none yet, then val, size, FLOPs and latency; all through the store.

    Args:
        texts: the text tower that a stage has trained; it is kept beside the network.
        device: where the network sees images; None: where trials train, if this process has such a device.
    """
    store, spec = context.store, context.spec
    device = device or device_here(context.device)
    base = networks.trained(method.deploys)
    reads = {
        "network": f"{last.stage}/{last.key}" if last else source_reads(base.entry, base.role) | {"seed": config.seed},
        "labels": task.labels_hash,
        "val": [task.val.images_hash, list(task.val.labels)],
        "version": EVALUATION_VERSION,
        "probe": False if method.trains_head else PROBE_VERSION,
    }
    if method.zero_shot:
        assert config.cell.teacher is not None
        tower = text_tower_of(spec.teachers[config.cell.teacher])
        reads["texts"] = [tower.identity, texts_identity(spec, task, "prompts")]
        if texts is not None:
            reads["text_tower"] = f"{texts.stage}/{texts.key}"
    if task.spec.kind != "classification":
        reads |= {"kind": task.spec.kind, "decoder": task.spec.decoder}

    def write(folder: Path) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        structure = None
        if last is not None:
            network, stored = load_student(last.path)
            changes, structure = stored["changes"], stored_structure(stored)
        else:
            torch.manual_seed(config.seed)
            network = fresh_student(base, len(task.classes)).eval()
        network.to(device)
        fitted = 0
        if method.zero_shot:
            network = zero_shot(context, config, task, network, texts.path if texts is not None else None, device)
            classes, width = network.prototypes.vectors.shape
            structure = Structure("methods.parts.zero_shot:attach", {"width": width, "classes": classes})
        elif not method.trains_head:
            probe = _probe(context, task, network, base)
            network, fitted = probe.attached(network).to(device), probe.parameters  # its head is fitted on the CPU
            if structure is not None and structure_of(network) is not None:
                raise WorkError(f"{method.name} leaves a network with modules of its own: no decoder can be put on it.")
            structure = structure or structure_of(network)
        details = Details(task.spec.kind, len(task.classes))
        val = val_metric(context, task, network, base, details)
        network.cpu()
        details.write(folder, task.classes)
        write_outcomes(folder, task.spec.kind, *details.joined())
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
        save_student(folder, Deployed(network, method.deploys, changes, structure), meta)
        if last is not None and (last.path / "history.json").is_file():
            shutil.copy(last.path / "history.json", folder)  # the learning curves of what is deployed
        if texts is not None:
            for name in (ABOUT, WEIGHTS):
                shutil.copy(texts.path / name, folder)
        return {
            "val_metric": val,
            "probe_parameters": fitted,
            **costs(network, base.preprocessing.size),
        }

    entry = bill.add(store.compute("evaluate", key_of(reads), write, reads=reads))
    about = entry.meta["about"]
    student = Path(context.folder) / "students" / config.trial_id
    if not (student / "student.json").is_file():
        _keep(context, config, entry, student, val_identity(task))
    facts: dict[str, float] = {}
    if method.zero_shot:
        assert config.cell.teacher is not None
        kept = text_tower_of(spec.teachers[config.cell.teacher])
        facts["text_params"] = (StudentTexts(student, kept) if texts is not None else kept).parameters
    meta = json.loads((entry.path / "student.json").read_text(encoding="utf-8"))
    deployed = Blueprint(
        lambda: load_student(entry.path)[0],
        base.preprocessing.size,
        base.entry,
        meta["num_classes"],
        meta["changes"],
        stored_structure(meta),
    )
    names = ("val_metric", "probe_parameters", "params_total", "flops", "memory_mb", "model_mb")
    return {
        "facts": facts,
        **{name: about[name] for name in names},
        "student_path": f"students/{config.trial_id}",
        **latency_of(context, deployed),
    }


def val_identity(task: TaskData) -> str:
    """Of the val images and their labels: val metrics compare only where this is equal."""
    return key_of([task.val.images_hash, list(task.val.labels), list(task.classes)])


def _keep(context: SweepContext, config: TrialConfig, entry: Entry, student: Path, val: str) -> None:
    """Brings the deployed network to the sweep's `students/<trial>`, whole or not at all.

    Its weights, of a tuned teacher gigabytes, are the store's own file where the file system can link it.
    """
    temporary = student.with_name(f".{config.trial_id}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        ignore = shutil.ignore_patterns("meta.json")
        shutil.copytree(entry.path, temporary, ignore=ignore, copy_function=_linked_or_copied)
        meta = json.loads((temporary / "student.json").read_text(encoding="utf-8"))
        teacher = config.cell.teacher
        meta |= {
            "method": config.cell.method,
            "trial_id": config.trial_id,
            "teacher": context.spec.teachers[teacher].model if teacher is not None else None,
            "teacher_entry": context.spec.teachers[teacher].model_dump(mode="json") if teacher is not None else None,
            "config": config.to_json(),
            "val": val,
        }
        (temporary / "student.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        shutil.rmtree(student, ignore_errors=True)
        temporary.rename(student)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _linked_or_copied(source: str, target: str) -> None:
    """Links weights, made read-only: who wrote into them in place would change the store's entry. Copies the rest."""
    if source.endswith(".safetensors"):
        try:
            os.chmod(source, os.stat(source).st_mode & 0o555)
            os.link(source, target)
        except OSError:  # another file system, one without links, or another owner's file
            pass
        else:
            return
    shutil.copy2(source, target)
