"""Training on a group of workers: the only module that knows Ray Train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.errors import WorkError
from orchestrator.train.job import TrainJob, run_job
from orchestrator.train.loop import Report
from orchestrator.trial.context import SweepContext

RESULT = "group.json"


def _worker(config: dict[str, Any]) -> None:
    job: TrainJob = config["job"]
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device()) if job.device == "cuda" else "cpu"
    folder = Path(config["folder"])
    about = run_job(job, folder, rank=context.get_world_rank(), world=context.get_world_size(), device=device)
    if context.get_world_rank() == 0:
        (folder / RESULT).write_text(json.dumps(about), encoding="utf-8")
    ray.train.report({"loss": about["history"][-1]["loss"]})  # a barrier: no rank leaves before the result is written


class GroupRunner:
    """Runs training jobs of one trial under DDP, on `train.workers` processes: gloo on CPUs, NCCL on GPUs.

    Args:
        context: the sweep's.
        trial_id: names the group's run, always alike, so that Ray Train finds its own state again.
    """

    def __init__(self, context: SweepContext, trial_id: str) -> None:
        self.context, self.trial_id = context, trial_id

    def __call__(self, job: TrainJob, folder: Path, report: Callable[[Report], None] | None = None) -> dict[str, Any]:
        train = self.context.spec.train
        gpu = job.device == "cuda"
        resources = {"CPU": float(train.threads)} | ({"GPU": train.gpus_per_worker} if gpu else {})
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"job": job, "folder": str(folder)},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=train.workers, use_gpu=gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=f"{self.trial_id}-{job.stage.name}-{folder.name[-8:]}",
                storage_path=str(Path(self.context.folder) / ".train"),
                failure_config=FailureConfig(max_failures=2),
            ),
        )
        result = trainer.fit()
        if result.error is not None:
            raise WorkError(f"The worker group of {self.trial_id} failed: {result.error}")
        about = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        (folder / RESULT).unlink()
        return about
