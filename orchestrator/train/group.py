"""Training on a group of workers: the only module that knows Ray Train.

While a group trains, the trial's own process hears how far it is and what it scores on val, and may stop it. Ray's own
way from a group to Tune reports only, and leaves a stopped group to be cleaned up after its controller's death; here
rank 0 asks whether to go on, and if not, every rank leaves its loop at the same step and the group ends as any other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import FullDiskError, WorkError, disk_full
from orchestrator.train.job import TrainJob, UnlikeError, run_job
from orchestrator.train.line import Line
from orchestrator.train.loop import DeviceMemoryError, DivergedError, Gauge, Report, Reporter, Tell
from orchestrator.train.notice import watched
from orchestrator.trial.context import SweepContext

RESULT = "group.json"
FULL = "memory.txt"  # why a rank ran out of device memory
ENDINGS: dict[str, type[WorkError]] = {"diverged": DivergedError, "unlike": UnlikeError, "memory": DeviceMemoryError}
POLL_S = 0.5
RESTARTS = 2  # of a group whose worker died


class _StoppedError(Exception):
    """Raised on every rank where the trial has been stopped."""


def _worker(config: dict[str, Any]) -> None:
    job: TrainJob = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = str(ray.train.torch.get_device()) if job.device == "cuda" else "cpu"
    folder = Path(config["folder"])
    report = _asking(config["gauge"], config["line"], rank, device) if config["line"] is not None else None
    full = folder / FULL
    try:
        if full.exists():  # found out by a rank of the group before this one
            about: dict[str, Any] = {"memory": full.read_text(encoding="utf-8")}
        else:
            nodes: list[Any] = [None] * world
            dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
            with watched(nodes) as notice:  # to lose any of them is to begin anew from what the first rank has saved
                about = run_job(job, folder, report, notice=notice, rank=rank, world=world, device=device)
    except _StoppedError:
        return
    except DivergedError as error:  # would be so again: no reason to start the group anew
        about = {"diverged": str(error)}
    except UnlikeError as error:
        about = {"unlike": str(error)}
    except DeviceMemoryError as error:
        # Of this rank alone: the others wait for it in vain, so that only the end of the group frees them.
        temporary = full.with_suffix(f".{rank}")
        temporary.write_text(str(error), encoding="utf-8")
        os.replace(temporary, full)
        raise
    if rank == 0:
        (folder / RESULT).write_text(json.dumps(about), encoding="utf-8")
    dist.barrier()  # no rank leaves before the result is written


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


class GroupRunner:
    """Runs training jobs of one trial under DDP, on `train.workers` processes: gloo on CPUs, NCCL on GPUs.

    Args:
        context: the sweep's.
        trial_id: names the group's run, always alike, so that Ray Train finds its own state again.
    """

    def __init__(self, context: SweepContext, trial_id: str) -> None:
        self.context, self.trial_id = context, trial_id

    def __call__(self, job: TrainJob, folder: Path, report: Reporter | None = None) -> dict[str, Any]:
        """Whatever `report` raises stops the group, and is raised once the group has ended."""
        train = self.context.spec.train
        gpu = job.device == "cuda"
        resources = {"CPU": float(train.threads)} | ({"GPU": train.gpus_per_worker} if gpu else {})
        stops = report is not None and self.context.spec.search.scheduler != "none"
        line = ray.remote(num_cpus=0)(Line).remote() if stops else None
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "job": job,
                "folder": str(folder),
                "line": line,
                "gauge": report.gauge if report is not None else None,
            },
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=train.workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=f"{self.trial_id}-{job.stage.name}-{folder.name[-8:]}",
                storage_path=str(Path(self.context.folder) / ".train"),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        (folder / FULL).unlink(missing_ok=True)  # of an earlier try with larger micro batches
        with ThreadPoolExecutor(1) as pool:  # leaving it waits for the group's end
            running = pool.submit(trainer.fit)
            if line is not None and report is not None:
                _listen(line, running, report.tell)
        try:
            running.result()
        except TrainingFailedError as error:
            if disk_full(error):
                raise FullDiskError(f"The disk of {self.context.folder!r} is full.") from error
            last = str(error).strip().splitlines()[-1]
            raise WorkError(f"The worker group failed {RESTARTS + 1} times, the last time so: {last}") from error
        about = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        (folder / RESULT).unlink()
        for name, kind in ENDINGS.items():
            if name in about:
                raise kind(about[name])
        return about


def _listen(line: Any, running: Future[Any], tell: Tell) -> None:
    """Passes on what the group says until it has ended."""
    question = line.hear.remote()
    while not running.done():
        heard, _ = ray.wait([question], timeout=POLL_S)
        if not heard:
            continue
        number, share, metric = ray.get(question)
        try:
            tell(share, metric)
        except BaseException:  # how a stopped trial leaves its function: SystemExit
            ray.get(line.answer.remote(number, False))
            raise
        question = line.hear.remote()
        line.answer.remote(number, True)
