"""What a stage is given: the networks of its trial, and what it declared to read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from methods.contract import Given
from methods.parts.dense import segmenter
from orchestrator.data.labels import plain_labels
from orchestrator.data.task import TaskData
from orchestrator.models.load import Network, build_network, load_network
from orchestrator.spec import SweepSpec
from orchestrator.store import Entry, Store


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
    store: Store,
    seed: int,
    results: dict[str, dict[str, torch.Tensor]],
    outputs: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
) -> Given:
    """What a stage declared, and nothing else. Seeds torch, so that new layers are drawn from `seed`.

    Masks are given at the teacher's input size, since whoever reads labels reads the teacher's outputs too.
    """
    torch.manual_seed(seed)
    classes = len(task.classes)
    decoder = task.spec.decoder if task.spec.kind == "segmentation" else None
    values: dict[str, Any] = dict(texts or {})
    if "teacher" in reads:
        values["teacher"] = _thawed(networks.trained("teacher").module)
    if "student" in reads:
        values["student"] = fresh_student(networks.trained("student"), classes, decoder)
    if "labels" in reads:
        size = networks.teacher.preprocessing.size if networks.teacher is not None else 0
        values["labels"] = plain_labels(store, task, task.train, task.labelled, size)
    return Given(values=values, num_classes=classes, results=results, outputs=outputs, kind=task.info.kind)


def _thawed(module: torch.nn.Module) -> torch.nn.Module:
    # Its parameters are copied straight to the CPU: on a GPU a teacher would not have room for two of itself.
    here = {id(p): torch.nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in module.parameters()}
    module = copy.deepcopy(module, here).cpu()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def fresh_student(network: Network, classes: int, decoder: str | None = None) -> torch.nn.Module:
    """A network with `classes` outputs: its pre-trained weights, or else (a student) ones drawn from torch's seed.

    Args:
        network: as loaded.
        classes: of the task.
        decoder: `linear` or `conv` for `classes` outputs a pixel.
    """
    from orchestrator.models.names import wants_weights

    if decoder is not None:
        return segmenter(fresh_student(network, 0), classes, decoder)
    if network.role == "teacher" or wants_weights(network.entry, "student"):
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
