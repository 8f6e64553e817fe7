"""Training on a group of workers: the only module that knows Ray Train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import WorkError
from orchestrator.train.job import TrainJob, run_job
from orchestrator.train.loop import Gauge, Report, Reporter
from orchestrator.trial.context import SweepContext

RESULT = "group.json"


def _worker(config: dict[str, Any]) -> None:
    job: TrainJob = config["job"]
    gauge: Gauge | None = config["gauge"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = str(ray.train.torch.get_device()) if job.device == "cuda" else "cpu"

    def report(state: Report) -> None:
        # A report is a barrier, so every rank makes it; the first one's numbers are told.
        if gauge is not None and gauge.due(state.step):
            metric = gauge.measure(state) if rank == 0 else 0.0
            ray.train.report({"progress": gauge.share(state.step) * 100, "val_metric": metric})

    folder = Path(config["folder"])
    about = run_job(job, folder, report, rank=rank, world=world, device=device)
    if rank == 0:
        (folder / RESULT).write_text(json.dumps(about), encoding="utf-8")
    torch.distributed.barrier()  # no rank leaves before the result is written


class GroupRunner:
    """Runs training jobs of one trial under DDP, on `train.workers` processes: gloo on CPUs, NCCL on GPUs.

    Args:
        context: the sweep's.
        trial_id: names the group's run, always alike, so that Ray Train finds its own state again.
        callbacks: hear what the group reports: `progress` in percent and `val_metric`.
    """

    def __init__(self, context: SweepContext, trial_id: str, callbacks: Sequence[UserCallback] = ()) -> None:
        self.context, self.trial_id, self.callbacks = context, trial_id, list(callbacks)

    def __call__(self, job: TrainJob, folder: Path, report: Reporter | None = None) -> dict[str, Any]:
        train = self.context.spec.train
        gpu = job.device == "cuda"
        resources = {"CPU": float(train.threads)} | ({"GPU": train.gpus_per_worker} if gpu else {})
        gauge = report.gauge if report is not None else None
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"job": job, "folder": str(folder), "gauge": gauge},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=train.workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=f"{self.trial_id}-{job.stage.name}-{folder.name[-8:]}",
                storage_path=str(Path(self.context.folder) / ".train"),
                failure_config=FailureConfig(max_failures=2),
                callbacks=self.callbacks,  # type: ignore[arg-type]
            ),
        )
        result = trainer.fit()
        if result.error is not None:
            raise WorkError(f"The worker group of {self.trial_id} failed: {result.error}")
        about = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        (folder / RESULT).unlink()
        return about
