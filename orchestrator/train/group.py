"""Training on a group of workers: the only module that knows Ray Train.

A group outlives its job. It is one run of a `TorchTrainer`, whose ranks train what comes along a line, job after job: a
trial's process keeps it for its next stage and its next trial. It is left to end, and another one is made, when a rank
dies or fails, when another number of workers is wanted, and after `train.idle_s` without a job.

While a group trains, the trial's own process hears how far it is and what it scores on val, and may stop it. Ray's own
way from a group to Tune reports only, and leaves a stopped group to be cleaned up after its controller's death; here
rank 0 asks whether to go on, and if not, every rank leaves its loop at the same step.

The trial's own process reserves no GPU. What else of a trial needs one (teachers' passes, scores, latencies) is an
errand of rank 0, while the other ranks wait.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.train import (
    ControllerError,
    PreemptionError,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig  # which `ray.train` gives too, but to a type checker an older one

from orchestrator.errors import FullDiskError, WorkError, disk_full, told_at
from orchestrator.process import settle
from orchestrator.train.alike import UnlikeError
from orchestrator.train.job import TrainJob
from orchestrator.train.line import Line
from orchestrator.train.loop import DeviceMemoryError, DivergedError, Gauge, Report, Reporter
from orchestrator.train.memory import device_lost, release_memory
from orchestrator.train.notice import watched
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext

ENDINGS: dict[str, type[WorkError]] = {"diverged": DivergedError, "unlike": UnlikeError}
T = TypeVar("T")
POLL_S = 0.5
RESTARTS = 2  # of a job whose group died
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class _StoppedError(Exception):
    """Raised on every rank where the trial has been stopped."""


def _serve(config: dict[str, Any]) -> None:
    """What every rank does for as long as its group lives."""
    line = config["line"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    settle()
    number = 0
    while (sent := ray.get(line.take.remote(number))) is not None:
        ray.get(line.done.remote(rank, world, _train(line, sent, rank, world)))
        release_memory()
        number += 1


def _train(line: Any, sent: bytes, rank: int, world: int) -> tuple[str, Any]:
    """How a job ended, which is alike on all ranks. What only this rank meets is raised, and ends the group."""
    job: TrainJob
    gauge: Gauge | None
    asked = pickle.loads(sent)
    if callable(asked):
        return _errand(line, asked) if rank == 0 else ("done", None)
    job, folder, gauge = asked
    device = str(ray.train.torch.get_device()) if job.device == "cuda" else "cpu"
    report = _asking(gauge, line, rank, device) if gauge is not None else None
    nodes: list[Any] = [None] * world
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    try:
        with watched(nodes) as notice:  # to lose any of them is to begin anew from what the first rank has saved
            about = run_job(job, Path(folder), report, notice=notice, rank=rank, world=world, device=device)
        return "done", about
    except _StoppedError:
        return "stopped", None
    except DivergedError as error:
        return "diverged", str(error)
    except UnlikeError as error:
        return "unlike", str(error)
    except DeviceMemoryError as error:
        # The other ranks wait for this one in vain, so that only the end of the group frees them.
        ray.get(line.complain.remote("memory", str(error)))
        raise


def _errand(line: Any, work: Callable[[], Any]) -> tuple[str, Any]:
    """What rank 0 does for the trial's process; what it raises is raised there."""
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return "done", work()
    except Exception as error:
        told = _sent(error)
        if device_lost():  # no job can run here any more, so this ends the group
            ray.get(line.complain.remote("raised", told))
            raise
        return "raised", told


def _sent(error: Exception) -> bytes:
    """An error as it goes to another process, which has no other way to its traceback or to what is behind it."""
    if disk_full(error) and not isinstance(error, FullDiskError):
        error = OSError(errno.ENOSPC, f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    place = told_at(error)
    error.add_note(f"On the first worker:\n{traceback.format_exc()}")
    try:
        sent = cloudpickle.dumps(error)
        pickle.loads(sent)  # an error with arguments of its own may not come out again
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.told_at = place  # type: ignore[attr-defined]
        return cloudpickle.dumps(plain)
    return bytes(sent)


def _asking(gauge: Gauge, line: Any, rank: int, device: str) -> Callable[[Report], None]:
    """Rank 0 measures and asks; its answer is every rank's."""

    def report(state: Report) -> None:
        if rank == 0:
            gauge.note(state)
        if not gauge.due(state.step):
            return
        verdict = torch.ones((), device=device)
        if rank == 0:
            go_on = ray.get(line.ask.remote(gauge.share(state.step), gauge.measure(state)))
            verdict.fill_(float(go_on))
        dist.broadcast(verdict, 0)
        if not verdict.item():
            raise _StoppedError

    return report


class _Group:
    """A `TorchTrainer` that runs in a thread until it is told to end, or until one of its ranks fails.

    Args:
        folder: of Ray Train's own files.
        world: how many workers.
        device: `cpu` or `cuda`.
        resources: of a worker.
        wait_s: for all workers, before the group gives up; None: for ever.
    """

    def __init__(
        self, folder: Path, world: int, device: str, resources: Mapping[str, float], wait_s: float | None
    ) -> None:
        self.world, self.device, self.busy = world, device, False
        self.line: Any = ray.remote(num_cpus=0)(Line).remote()
        self.ended: Future[None] = Future()
        gpu = device == "cuda"
        name = f"group-{uuid.uuid4().hex[:12]}"
        if wait_s is not None:
            os.environ[START_TIMEOUT] = str(wait_s)
        # A group that fails is not started again by its controller, which knows nothing of jobs.
        failures = FailureConfig(
            max_failures=0, max_preemption_failures=0, controller_failure_limit=-1 if wait_s is None else 0
        )
        trainer = TorchTrainer(
            _serve,
            train_loop_config={"line": self.line},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=world, use_gpu=gpu, resources_per_worker=dict(resources)),
            run_config=RunConfig(name=name, storage_path=str(folder), failure_config=failures),
        )

        def fit() -> None:
            try:
                trainer.fit()
                self.ended.set_result(None)
            except BaseException as error:  # whoever waits for the group meets it
                self.ended.set_exception(error)
            finally:
                shutil.rmtree(folder / name, ignore_errors=True)

        # No pool's thread: an interpreter waits for these, and this one may outlive its process's last trial.
        threading.Thread(target=fit, name="group", daemon=True).start()

    def run(self, job: TrainJob, folder: Path, report: Reporter | None) -> dict[str, Any]:
        """Trains a job on all ranks; whatever `report` raises stops it, and is raised once every rank has left it.

        Raises:
            TrainingFailedError, RayActorError: if the group has died.
        """
        gauge = report.gauge if report is not None else None
        ending, about = self._give(cloudpickle.dumps((job, str(folder), gauge)), report)
        if ending in ENDINGS:
            raise ENDINGS[ending](about)
        return dict(about)

    def errand(self, work: Callable[[], T]) -> T:
        """What `work`, which is picklable, gives on rank 0; what it raises there is raised here.

        Raises:
            TrainingFailedError, RayActorError: if the group has died.
        """
        ending, value = self._give(cloudpickle.dumps(work), None)
        if ending == "raised":
            raise pickle.loads(value)
        return value  # type: ignore[no-any-return]

    def _give(self, sent: bytes, report: Reporter | None) -> tuple[str, Any]:
        """Gives a job to all ranks; returns how it ended, once every one of them has."""
        self.busy = True
        ray.get(self.line.give.remote(sent))
        heard = self.line.hear.remote()
        stopped: BaseException | None = None
        complaint: Exception | None = None
        while True:
            ready, _ = ray.wait([heard], timeout=POLL_S)
            if not ready:
                if not self.ended.done():
                    continue
                if stopped is not None:
                    raise stopped
                if complaint is not None:
                    raise complaint
                self.ended.result()
                raise WorkError("The worker group ended before its job.")
            kind, value = ray.get(heard)
            if kind == "done":
                self.busy = False
                break
            if kind == "memory":
                complaint = DeviceMemoryError(value)
            elif kind == "raised":
                complaint = pickle.loads(value)
            else:
                number, share, metric = value
                try:
                    if stopped is None and report is not None:
                        report.tell(share, metric)
                except BaseException as error:  # how a stopped trial leaves its function: SystemExit
                    stopped = error
                ray.get(self.line.answer.remote(number, stopped is None))
            heard = self.line.hear.remote()
        if stopped is not None:
            raise stopped
        ending, about = value
        return str(ending), about

    def end(self, wait: bool) -> None:
        """Lets the ranks leave after what they are at; `wait` for them, and for their devices to be free."""
        if not self.ended.done():
            self.line.give.remote(None)
            if wait:
                self.ended.exception()


class GroupRunner:
    """Runs training jobs under DDP, on `train.workers` processes: gloo on CPUs, NCCL on GPUs. One job at a time.

    Args:
        context: the sweep's.
    """

    def __init__(self, context: SweepContext) -> None:
        self.context = context
        self.lock = threading.Lock()  # between a job and the end of an idle group
        self.group: _Group | None = None
        self.timer: threading.Timer | None = None
        self.tried = 0  # workers that a group waited for in vain, the last time; 0: none did

    def __enter__(self) -> GroupRunner:
        return self

    def __exit__(self, *about: object) -> None:
        self.end()

    def __call__(self, job: TrainJob, folder: Path, report: Reporter | None = None) -> dict[str, Any]:
        """Whatever `report` raises stops the job, and is raised once every rank has left it."""
        train = self.context.spec.train
        if self.context.spec.search.scheduler == "none":
            report = None

        def trained(group: _Group) -> dict[str, Any]:
            about = group.run(job, folder, report)
            if group.world < train.workers:
                about["facts"] = about["facts"] | {"workers": group.world}
            return about

        return self._held(job.device, trained)

    def elsewhere(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first worker, which holds a device and sees the store; it is done anew if that dies.

        Args:
            work: picklable, as is what it gives; folders that it names may be on another node.

        Raises:
            Exception: what it raises there; WorkError if the group has died too often.
        """
        return self._held(self.context.device, lambda group: group.errand(work))

    def end(self) -> None:
        """Ends the group that is kept, if there is one, and waits until its devices are free."""
        with self.lock:
            self._drop()

    def _held(self, device: str, use: Callable[[_Group], T]) -> T:
        """One use of the group, which is then kept for `train.idle_s`."""
        with self.lock:
            if self.timer is not None:
                self.timer.cancel()
            try:
                return self._run(device, use)
            finally:
                self._rest(self.context.spec.train.idle_s)

    def _rest(self, idle_s: float) -> None:
        """After a job: the group waits for the next one, if all its ranks do."""
        group = self.group
        if group is None or group.ended.done():
            self.group = None
        elif group.busy:  # this process was interrupted
            self.group = None
            group.end(wait=False)
        elif idle_s == 0:
            self._drop()
        else:
            self.timer = threading.Timer(idle_s, self.end)
            self.timer.daemon = True
            self.timer.start()

    def _drop(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.end(wait=True)

    def _run(self, device: str, use: Callable[[_Group], T]) -> T:
        train = self.context.spec.train
        died = 0
        while True:
            self.group = group = self._group(device)
            try:
                result = use(group)
            except (TrainingFailedError, RayActorError) as error:
                self.group = None
                if disk_full(error):
                    raise FullDiskError(f"The disk of {self.context.folder!r} is full.") from error
                if isinstance(error, ControllerError) and train.fewest < train.workers:
                    self.tried = group.world
                    continue
                died += not _preempted(error)
                if died > RESTARTS:
                    last = str(error).strip().splitlines()[-1]
                    raise WorkError(f"The worker group failed {died} times, the last time so: {last}") from error
            else:
                self.tried = 0
                return result

    def _group(self, device: str) -> _Group:
        """The group that is kept, if it serves; else a new one."""
        train = self.context.spec.train
        resources = {"CPU": float(train.threads)} | ({"GPU": train.gpus_per_worker} if device == "cuda" else {})
        kept = self.group
        if kept is not None and not kept.ended.done() and kept.device == device:
            best = kept.world == train.workers or kept.world >= self._count(resources, kept.world)
            if best:
                return kept
        self._drop()
        world = self._count(resources, 0)
        wait_s = train.wait_s if train.fewest < train.workers else None
        return _Group(Path(self.context.folder) / ".train", world, device, resources, wait_s)

    def _count(self, resources: Mapping[str, float], own: int) -> int:
        """How many workers a group is to have: all, or as many as the cluster holds, in equal parts of a batch.

        Args:
            resources: of a worker.
            own: workers that the process has already, beside what is free.
        """
        train = self.context.spec.train
        counts = [n for n in range(train.workers, train.fewest - 1, -1) if train.workers % n == 0]
        if len(counts) == 1:
            return train.workers

        def room(there: Mapping[str, float]) -> int:
            return min(int(there.get(name, 0) / amount + 1e-6) for name, amount in resources.items())

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        coming = [kind.resources for kind in self.context.spec.cluster.nodes.values() for _ in range(kind.max)]
        limit = max(sum(room(node) for node in nodes), sum(room(node) for node in coming))
        if own or self.tried:
            limit = min(limit, room(ray.available_resources()) + own)
        if self.tried:
            limit = min(limit, self.tried - 1)
        # Where nothing is free, a group waits for the fewest.
        return next((n for n in counts if n <= limit), counts[-1])


def _preempted(error: Exception) -> bool:
    """Whether the group died of its node being taken away, which is not its job's fault."""
    if isinstance(error, PreemptionError):
        return True
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return any(getattr(failure, "preempted", False) for failure in failures)
