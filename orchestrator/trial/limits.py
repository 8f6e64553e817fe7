"""The sweep file's `limits`, checked on a network that was not trained yet, and the latency that every trial shares."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from methods.contract import Method, Stage, Structure, TaskInfo, TrainStage
from methods.dense import structure_of
from methods.knobs import MethodConfig
from methods.parts.dense import segmenter
from methods.parts.zero_shot import attach
from orchestrator.data.task import TaskData, load_task
from orchestrator.errors import WorkError
from orchestrator.evaluate.cost import costs, latency, processor, timed
from orchestrator.models.load import Network, build_network, plan_network
from orchestrator.models.names import Role
from orchestrator.models.onnx import onnx_runner, write_onnx
from orchestrator.spec import Latency, Model, SweepSpec, latency_column
from orchestrator.store import key_of
from orchestrator.train.given import Networks, given_for, networks_of
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig, configure, method_named, setting_of

LATENCY_VERSION = 3  # 3: in rounds
ROUNDS, MORE_ROUNDS = 3, 9
NETWORK_METRICS = {"params_total", "flops", "memory_mb", "model_mb"}  # that a network has untrained, besides latencies


class InfeasibleError(Exception):
    """A configuration that cannot keep a limit; `facts` is what of its row is known."""

    def __init__(self, reason: str, facts: dict[str, Any]) -> None:
        super().__init__(reason)
        self.reason, self.facts = reason, facts

    def __reduce__(self) -> tuple[type[InfeasibleError], tuple[str, dict[str, Any]]]:
        return InfeasibleError, (self.reason, self.facts)  # a worker may have found it out


@dataclass(frozen=True)
class Blueprint:
    """What a trial will deploy, as far as it is known before training.

    Attributes:
        build: makes the network, with any weights.
        size: side of its input.
        entry: its base.
        classes: of its head.
        changes, structure: as in `Deployed`.
        exact: whether it is the network itself; else what is deployed has all of this, and more.
    """

    build: Callable[[], nn.Module]
    size: int
    entry: Model
    classes: int
    changes: dict[str, Any] = field(default_factory=dict)
    structure: Structure | None = None
    exact: bool = True


def base_blueprint(spec: SweepSpec, cell: Cell, classes: int) -> Blueprint | None:
    """Of a cell whose method deploys its base network, or that with something more; None of any other.

    Args:
        classes: of the task.
    """
    method = method_named(cell.method)
    if method.zero_shot:
        return _zero_shot(spec, cell, classes)
    if method.deployed_size == "own":
        return None
    entry, size = _base(spec, cell)
    dense = spec.task.kind == "segmentation"

    def build() -> nn.Module:
        network = build_network(entry, num_classes=0 if dense else classes)
        return segmenter(network, classes, spec.task.decoder) if dense else network

    structure = structure_of(_drawn(build)) if dense else None
    return Blueprint(build, size, entry, classes, structure=structure, exact=method.deployed_size == "base")


def _base(spec: SweepSpec, cell: Cell) -> tuple[Model, int]:
    """The network that what a cell deploys is made from, and the side of its input."""
    role: Role = method_named(cell.method).deploys
    number, entries = (cell.teacher, spec.teachers) if role == "teacher" else (cell.student, spec.students)
    assert number is not None
    return entries[number], plan_network(entries[number], role)[1].size


def _zero_shot(spec: SweepSpec, cell: Cell, classes: int) -> Blueprint:
    """The student with a head as wide as the teacher's embedding, under one prototype a class."""
    assert cell.teacher is not None
    entry, size = _base(spec, cell)
    width = plan_network(spec.teachers[cell.teacher], "teacher")[0].embedding
    arguments = {"width": width, "classes": classes}

    def build() -> nn.Module:
        return attach(build_network(entry, num_classes=classes), **arguments)

    structure = Structure("methods.parts.zero_shot:attach", arguments)
    return Blueprint(build, size, entry, classes, structure=structure)


def foretold(spec: SweepSpec, cell: Cell, config: MethodConfig, task: TaskInfo) -> Literal["exact", "least", "no"]:
    """How much of what a trial deploys is known before it trains: all, a network that it cannot be smaller than, or
    nothing.
    """
    method = method_named(cell.method)
    if method.zero_shot or method.deployed_size == "base":
        return "exact"
    setting = setting_of(spec, task, cell)
    last = _last(method.stages(config, setting))
    if last is not None and _from_base_alone(last):
        return "exact"
    if method.deployed_size == "larger":
        return "least"
    return "no" if method.smallest(config, setting) is None else "least"


def _last(stages: list[Stage]) -> TrainStage | None:
    return next((s for s in reversed(stages) if isinstance(s, TrainStage)), None)


def _from_base_alone(last: TrainStage) -> bool:
    return not last.inputs and set(last.reads) <= {"teacher", "student"}


def _drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """The network without weights, where that can be."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()  # a few constructors compute with their tensors


def planned_excess(spec: SweepSpec, cell: Cell, classes: int) -> str:
    """Which limits no trial of this cell can keep, whatever its knobs and the machine; empty if none is known."""
    if not set(spec.limits.given) & {"params_total", "flops", "memory_mb", "model_mb"}:
        return ""
    blueprint = base_blueprint(spec, cell, classes)
    if blueprint is None:
        return ""
    return spec.limits.broken(costs(_drawn(blueprint.build), blueprint.size))


def check_before(
    context: SweepContext,
    config: TrialConfig,
    method: type[Method],
    networks: Networks,
    task: TaskData,
    elsewhere: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Refuses a configuration before anything is trained, if what it will deploy cannot keep a limit.

    Args:
        context, config, method, networks, task: of the trial.
        elsewhere: where this is done anew, if a latency is wanted and this process has no device to measure it on.

    Raises:
        InfeasibleError: naming the limits.
    """
    limits, cell = context.spec.limits, config.cell
    if not limits.given:
        return
    classes = len(task.classes)
    blueprint = base_blueprint(context.spec, cell, classes)
    if blueprint is None or not blueprint.exact:
        more = _untrained(context, config, method, networks, task) or blueprint
        blueprint = more or _smallest(context.spec, config, method, task)
    if blueprint is None:
        return
    facts: dict[str, Any] = dict(costs(_drawn(blueprint.build), blueprint.size))
    latencies = [metric for metric in context.spec.latencies if metric in limits.given]
    if not limits.broken(facts) and latencies:
        if elsewhere is not None:
            return elsewhere(partial(_check_here, context, config))
        facts |= latency_of(context, blueprint, latencies)
    broken = limits.broken(facts)
    if broken:
        least = "" if blueprint.exact else " without what the method adds"
        slow = [metric for metric in latencies if limits.excess(facts).get(metric, 0) > 0]
        setup = f" ({'; '.join(facts[latency_column(metric, 'setup')] for metric in slow)})" if slow else ""
        raise InfeasibleError(f"{broken}{least}{setup}; nothing was trained", facts)


def _check_here(context: SweepContext, config: TrialConfig) -> None:
    """`check_before` in another process than the trial's."""
    task, cell = load_task(context.spec.task, context.store, listing=context.listing), config.cell
    networks = networks_of(context.spec, cell.teacher, cell.student)
    torch.set_num_threads(context.spec.train.threads)
    check_before(context, config, method_named(cell.method), networks, task)


def _untrained(
    context: SweepContext, config: TrialConfig, method: type[Method], networks: Networks, task: TaskData
) -> Blueprint | None:
    """Of a method that makes a network of its own from nothing but its base: what it makes, before it trains it."""
    settings = configure(context.spec, config)
    stages = method.stages(settings, setting_of(context.spec, task.info, config.cell))
    last = _last(stages)
    if last is None or not _from_base_alone(last):
        return None
    given = given_for(last.reads, networks, task, context.store, config.seed, {})
    deployed = last.learner(last.params, given).deployed()
    network: Any = deployed.network
    base: Network = networks.trained(method.deploys)
    structure = deployed.structure
    if not method.trains_head:
        if task.spec.kind == "segmentation":
            if structure is not None:
                return None
            network.reset_classifier(0)
            network = segmenter(network, len(task.classes), task.spec.decoder)
            structure = structure_of(network)
        else:
            network.reset_classifier(len(task.classes))
    return Blueprint(
        lambda: network, base.preprocessing.size, base.entry, len(task.classes), dict(deployed.changes), structure
    )


def _smallest(spec: SweepSpec, config: TrialConfig, method: type[Method], task: TaskData) -> Blueprint | None:
    """Of a method that decides what it deploys while it trains: what that cannot be smaller than."""
    structure = method.smallest(configure(spec, config), setting_of(spec, task.info, config.cell))
    if structure is None:
        return None
    entry, size = _base(spec, config.cell)
    classes = len(task.classes)

    def build() -> nn.Module:
        return structure.apply(build_network(entry, num_classes=classes))

    return Blueprint(build, size, entry, classes, structure=structure, exact=False)


def latency_of(context: SweepContext, blueprint: Blueprint, metrics: Collection[str] | None = None) -> dict[str, Any]:
    """Latency belongs to the architecture, the device and the profile: measured once for each, then shared.

    The median decides about a limit. Where that lies between the smallest and the largest median of the rounds, it is
    measured in more of them, and these count.

    Args:
        metrics: latencies that are wanted; None: on all profiles.

    Returns:
        Of a row, for each profile: `latency_ms`, `latency_iqr_ms`, `latency_low_ms` and `latency_high_ms` (the smallest
        and the largest median of a round) and `latency_setup`; of a further profile with its name behind them.
    """
    found: dict[str, Any] = {}
    for metric, profile in context.spec.latencies.items():
        if metrics is not None and metric not in metrics:
            continue
        limit = context.spec.limits.given.get(metric, math.nan)
        about, setup = _measured(context, blueprint, profile, ROUNDS)
        if about["low"] <= limit <= about["high"]:
            about, setup = _measured(context, blueprint, profile, MORE_ROUNDS)
        found |= {metric: about["median"], latency_column(metric, "iqr"): about["iqr"]}
        found |= {latency_column(metric, "low"): about["low"], latency_column(metric, "high"): about["high"]}
        found[latency_column(metric, "setup")] = setup
    return found


def _measured(
    context: SweepContext, blueprint: Blueprint, profile: Latency, rounds: int
) -> tuple[dict[str, float], str]:
    """`median`, `iqr`, `low` and `high` in ms, and how it was measured."""
    train = context.spec.train
    onnx = profile.runtime == "onnxruntime"
    device = "cpu" if onnx else context.device if profile.device == "auto" else profile.device
    threads = profile.threads or train.threads
    if device == "cuda" and not torch.cuda.is_available():
        raise WorkError("latency.device: cuda is asked for, and this trial has no GPU.")
    reads = {
        "model": blueprint.entry.model_dump(mode="json", exclude={"precision"}),
        "changes": blueprint.changes,
        "structure": asdict(blueprint.structure) if blueprint.structure is not None else None,
        "classes": blueprint.classes,
        "size": blueprint.size,
        "device": device,
        "chip": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": threads,
        "batch": profile.batch,
        "runtime": profile.runtime,
        "min_run_s": profile.min_run_s,
        "rounds": rounds,
        "version": LATENCY_VERSION,
    }
    shared = device == "cuda" and train.gpus_per_worker < 1
    if shared:  # neighbours compute beside it: no number for those who have a GPU to themselves
        reads["gpu_share"] = train.gpus_per_worker

    def write(folder: Path) -> dict[str, Any]:
        network = blueprint.build().cpu().eval()
        seconds = profile.min_run_s * rounds / ROUNDS
        options = {"threads": threads, "batch": profile.batch, "min_run_time": seconds, "rounds": rounds}
        if not onnx:
            measured = latency(network, blueprint.size, device=device, **options)  # type: ignore[arg-type]
        else:
            with tempfile.TemporaryDirectory() as scratch:
                write_onnx(network, blueprint.size, Path(scratch) / "model.onnx", blueprint.entry.model)
                run = onnx_runner(Path(scratch) / "model.onnx", threads)
                images = torch.zeros(profile.batch, 3, blueprint.size, blueprint.size)
                measured = timed(lambda: run(images), "cpu", **options)  # type: ignore[arg-type]
        ends = {"low": measured.low_ms, "high": measured.high_ms}
        return {"median": measured.median_ms, "iqr": measured.iqr_ms, "runs": measured.runs, **ends}

    about = context.store.compute("latency", key_of(reads), write, reads=reads).meta["about"]
    name = f"{profile.profile}: " if profile.profile else ""
    runtime = ", onnxruntime" if onnx else ""
    runtime += f", on {train.gpus_per_worker:g} of a GPU that other trials share" if shared else ""
    setup = f"{name}{device} ({reads['chip']}), {threads} thread{'s' if threads > 1 else ''}, batch {profile.batch}"
    return about, setup + runtime
