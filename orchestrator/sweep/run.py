"""A sweep from its file to its leaderboard: what is checked before anything is paid for, start, and resume."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from methods.contract import TaskInfo
from orchestrator.data.corpus import corpus_at
from orchestrator.data.embed import absent
from orchestrator.data.memory import AHEAD, stream_memory
from orchestrator.data.task import TaskData
from orchestrator.errors import FullDiskError, StudyLostError, UserError, disk_full, listed
from orchestrator.models.check import check_model
from orchestrator.models.load import load_network, plan_network
from orchestrator.models.names import Role, wants_weights
from orchestrator.spec import SweepSpec
from orchestrator.store import store_at
from orchestrator.sweep.begun import begun_task, keep_images
from orchestrator.sweep.capacity import check_actors, check_gpus, check_shape, has, nodes_now
from orchestrator.sweep.earlier import check_earlier, first_trials, starts, trials_in_all
from orchestrator.sweep.folder import RAY_DASHBOARD
from orchestrator.sweep.holdings import holdings_of
from orchestrator.sweep.space import Space, check_cell, default_knobs, grid, method_space, wanted_outputs
from orchestrator.trial.context import SweepContext
from orchestrator.trial.limits import NETWORK_METRICS, foretold, planned_excess
from orchestrator.trial.plan import Cell, TrialConfig, configure, feasible_cells


@dataclass
class Prepared:
    """A checked sweep.

    Attributes:
        task: the data, split.
        cells: every combination of method, teacher and student that can run.
        spaces: knobs by method.
        dropped: methods or combinations that cannot run, with the reason.
        unchecked: what could not be checked here.
    """

    spec: SweepSpec
    task: TaskData
    cells: list[Cell]
    spaces: dict[str, Space]
    dropped: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def trials(self) -> int:
        """Trials in all."""
        return trials_in_all(self.spec, first_trials(self.spec, self.cells, self.spaces))


def prepare(spec: SweepSpec, folder: Path | None = None, *, dry: bool = False) -> Prepared:
    """Checks everything that can be checked without training: schema, data, models, methods, knobs.

    Args:
        spec: the sweep file.
        folder: of the sweep, where it has begun and its folder is not named like it.
        dry: accept a corpus that is not here, as `corpus.expect` describes it.

    Raises:
        UserError: the first thing that is wrong.
    """
    unchecked = _check_corpora(spec, dry)
    listing: list[tuple[Role, list[Any]]] = [("teacher", spec.teachers), ("student", spec.students)]
    for role, entries in listing:
        for entry in entries:
            unchecked += check_model(entry, role)
            plan_network(entry, role)
            if entry.model.startswith("local:"):
                load_network(entry, role)  # the file is here: whether it can be read and fits is known now
    if spec.upstream.given:
        from orchestrator.models.upstream import check_section

        check_section(spec.upstream)
    _check_stream(spec, holdings_of(spec).row_group)
    spaces = {name: method_space(spec, name) for name in spec.methods}
    task = begun_task(spec.task, folder or Path(spec.storage) / spec.name, store_at(spec.store_address))
    images = len(task.labelled)
    if images == 0:
        raise UserError("task: no labelled image is left in train.")
    cells, dropped = feasible_cells(spec, task.info)
    runnable: list[Cell] = []
    too_big: list[str] = []
    for cell in cells:
        reason = check_cell(spec, spaces[cell.method], cell, task.info)
        excess = planned_excess(spec, cell, len(task.classes)) if reason is None else ""
        if excess:
            network = spec.teachers[cell.teacher or 0] if cell.student is None else spec.students[cell.student]
            too_big.append(f"{cell.method} with {network.model}: {excess}")
        elif reason is None:
            runnable.append(cell)
        else:
            dropped.append(reason)
    if spec.search.sampler == "grid":
        for cell in runnable:
            next(grid(spaces[cell.method], cell.method))
    dropped += too_big
    if not runnable and too_big:
        raise UserError(f"limits: nothing can keep them: {'; '.join(dict.fromkeys(too_big))}.")
    if not runnable:
        raise UserError(f"methods: none of {listed(spec.methods)} can run on this data: {'; '.join(dropped)}.")
    starts(spec, runnable, spaces)
    check_earlier(spec)
    unchecked += _found_late(spec, runnable, spaces, task.info)
    return Prepared(spec, task, runnable, spaces, list(dict.fromkeys(dropped)), unchecked)


def load_teachers(spec: SweepSpec, *, fetch: bool = True) -> None:
    """Loads the teachers into this process: unreadable weights end a sweep here, before a trial is paid for.

    Args:
        spec: the sweep file.
        fetch: also those whose weights may have to be downloaded.

    Raises:
        UserError: with what cannot be read.
    """
    for entry in spec.teachers:
        here = entry.model.startswith(("local:", "packaged/")) or not wants_weights(entry, "teacher")
        if fetch or here:
            load_network(entry, "teacher")


def _found_late(spec: SweepSpec, cells: list[Cell], spaces: dict[str, Space], task: TaskInfo) -> list[str]:
    """Which methods' networks are not wholly known before training, where there are limits of networks."""
    if not set(spec.limits.given) & {*NETWORK_METRICS, *spec.latencies}:
        return []
    found: dict[str, list[str]] = {"least": [], "no": []}
    for cell in cells:
        config = configure(spec, TrialConfig("", 0, cell, default_knobs(spaces[cell.method], cell.method), 0))
        found.get(foretold(spec, cell, config, task), []).append(cell.method)
    words = {
        "least": "in part before training: what it has at least is weighed then, and the rest after",
        "no": "after training only: what exceeds a limit is trained first",
    }
    return [
        f"limits: what {listed(dict.fromkeys(methods))} deploys is known {words[how]}."
        for how, methods in found.items()
        if methods
    ]


def _check_corpora(spec: SweepSpec, dry: bool) -> list[str]:
    """What is not here and was not checked.

    Raises:
        UserError: if a corpus is not here.
    """
    corpus = spec.corpus
    named = {"images": corpus.images, "sentences": corpus.sentences}
    gone = absent(spec) if dry else ()
    for kind, address in named.items():
        if address is not None and kind not in gone:
            corpus_at(address, kind)  # type: ignore[arg-type]
    return [
        f"corpus.{kind}: {named[kind]!r} is not here; corpus.expect is taken at its word, and a sweep would refuse."
        for kind in gone
    ]


def _check_stream(spec: SweepSpec, row_group: int) -> None:
    """Refuses a window for which `corpus.memory_gb` leaves no room."""
    corpus, train = spec.corpus, spec.train
    if corpus.memory_gb is None or corpus.images is None:
        return
    size = max((plan_network(entry, "student")[1].size for entry in spec.students), default=0)
    batch = train.batch // train.workers
    ahead = AHEAD if train.device == "cuda" else 1  # `auto` may be the CPU: what is sure not to fit is refused
    memory = stream_memory(corpus.window, row_group, size, batch, corpus.readers or 1, corpus.memory_gb * 1e9, ahead)
    if memory.total > corpus.memory_gb * 1e9:
        raise UserError(
            f"corpus.memory_gb: {corpus.memory_gb:g} is too little for a stream of {size} px with corpus.window: "
            f"{corpus.window} and {corpus.readers} readers, which takes {memory.total / 1e9:.2f} GB at least; use a "
            "smaller window, fewer readers, or more memory."
        )


def check_capacity(spec: SweepSpec, device: str) -> None:
    """For a cluster of this machine alone, which never grows.

    Raises:
        UserError: if one trial needs more than there is, so that it would wait for ever.
    """
    import ray

    train = spec.train
    wanted = {"CPU": float(train.threads * train.fewest)}
    if device == "cuda":
        wanted["GPU"] = train.gpus_per_worker * train.fewest
    for name, amount in wanted.items():
        there = ray.cluster_resources().get(name, 0)
        if amount > there:
            share = "threads" if name == "CPU" else "gpus_per_worker"
            workers = "workers" if train.fewest == train.workers else "min_workers"
            raise UserError(
                f"train.{workers} x train.{share} = {amount:g} {name}s are needed by a trial, and there are {there:g}."
            )
    check_actors(spec, device, [nodes_now()])


def device_of(spec: SweepSpec) -> str:
    """`cuda` or `cpu`; auto takes a GPU where the cluster has one.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    gpus = has("GPU", spec, nodes_now())
    if spec.train.device == "cuda" and not gpus:
        raise UserError("train.device: cuda is asked for, and the cluster has no GPU; use cpu or auto.")
    return "cuda" if gpus and spec.train.device != "cpu" else "cpu"


def run(prepared: Prepared, folder: Path, on_event: Any = None) -> bool:
    """Runs or continues a sweep to its end, on the cluster or on this machine.

    Its trials see the images as they were listed when it began: one that was added since is in none of their splits.

    Returns:
        Whether it came to its end; False if a Ctrl-C broke it off.

    Raises:
        UserError: if another process runs this sweep.
        FullDiskError, StudyLostError: with what to do then.
    """
    folder = folder.absolute()  # trials have folders of their own, and Ray takes a relative path for an address
    lock = FileLock(folder / ".driver.lock", timeout=0)
    try:
        with lock:
            keep_images(folder, prepared.task)
            return _run(prepared, folder, on_event)
    except Timeout:
        raise UserError(f"Another process is running the sweep {str(folder)!r}.") from None
    except StudyLostError as error:
        raise StudyLostError(f"{error} Continue with `orchestrator resume {folder}` once it is back.") from None
    except Exception as error:
        if isinstance(error, FullDiskError) or disk_full(error):
            said = str(error) if isinstance(error, FullDiskError) else f"The disk of {str(folder)!r} is full."
            raise FullDiskError(f"{said} Make room, then continue with `orchestrator resume {folder}`.") from error
        raise


def _run(prepared: Prepared, folder: Path, on_event: Any) -> bool:
    from orchestrator.sweep.cluster import start_ray
    from orchestrator.sweep.nodes import check_nodes
    from orchestrator.sweep.study import Study
    from orchestrator.sweep.study_storage import check_study
    from orchestrator.sweep.tune import run_search

    spec = prepared.spec
    load_teachers(spec)
    check_study(spec)
    ray_dashboard = start_ray(spec.train.threads)
    check_nodes(spec)
    device = device_of(spec)
    if device == "cpu" and any(profile.device == "cuda" for profile in spec.latencies.values()):
        raise UserError("latency.device: cuda is asked for, and the trials have no GPU; use cpu or auto.")
    check_gpus(spec, device)
    if not os.environ.get("RAY_ADDRESS"):
        check_capacity(spec, device)
    elif spec.cluster.nodes:
        check_shape(spec, device, nodes_now())
    context = SweepContext(
        spec,
        str(folder),
        device,
        wanted_outputs(spec, prepared.spaces, prepared.cells, prepared.task.info),
        prepared.task.listing,
    )
    study = Study(spec, folder, prepared.cells, prepared.spaces, prepared.task.info, sole=True)
    try:
        if ray_dashboard is not None:
            (folder / RAY_DASHBOARD).write_text(ray_dashboard, encoding="utf-8")
        return run_search(context, study, on_event)
    finally:
        (folder / RAY_DASHBOARD).unlink(missing_ok=True)
        for scratch in (".tune", ".train"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
