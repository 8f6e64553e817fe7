"""Running one training stage, in this process or as a rank of a group."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from methods.contract import Deployed, trainable_parameters
from orchestrator.models.load import Network, describe, save_student
from orchestrator.models.texts import save_text_tower
from orchestrator.store import store_at
from orchestrator.train.alike import check_alike, identity_of
from orchestrator.train.batches import opened
from orchestrator.train.compiled import compiled
from orchestrator.train.given import networks_of
from orchestrator.train.job import TrainJob, pool_batch
from orchestrator.train.loop import Checkpoint, Report, fit


def run_job(
    job: TrainJob,
    folder: Path,
    report: Callable[[Report], None] | None = None,
    *,
    notice: Callable[[], bool] | None = None,
    rank: int = 0,
    world: int = 1,
    device: str | None = None,
) -> dict[str, Any]:
    """Trains one stage and (rank 0) writes its deployed network to `folder`; returns what the ledger needs.

    Args:
        report, notice: see `fit`.
        rank, world, device: this process; with `world > 1` the process group must exist.

    Raises:
        UnlikeError: on every rank, if one of them has another job or other libraries.
        CompileError: if `train.compile` cannot be had here.
        DivergedError, DeviceMemoryError: see `fit`.
    """
    began = time.perf_counter()
    spec, stage = job.spec, job.stage
    if world > 1:
        check_alike(identity_of(job), rank, world)
    device = device or job.device
    torch.set_num_threads(spec.train.threads)
    learner, feeder = opened(job, rank=rank, world=world, device=device)
    store = store_at(job.store_root)
    trained = networks_of(spec, job.teacher, job.student).trained(stage.trains)
    with compiled(learner, spec.train.compile):
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
            accumulate=spec.train.accumulate,
            checkpoint=Checkpoint(
                Path(job.scratch) / "checkpoint.pt",
                spec.train.checkpoint_s,
                spec.train.checkpoint_steps,
                store.mirror(Path(job.scratch)),
            ),
            notice=notice,
            report=report,
        )
    images = spec.train.batch + (pool_batch(spec.train, stage.feed) if job.pool else 0)
    images_seen = job.steps * images * (not stage.feed.tokens)
    about = {
        "optimizer_steps": job.steps,
        "images_seen": images_seen,
        "params_trained": trainable_parameters(learner),
        "live_forwards": feeder.live_forwards * world + (images_seen if stage.live_teacher else 0),
        "loop_seconds": history.loop_seconds,
        "history": history.points,
        "accumulate": spec.train.accumulate,
        "facts": learner.facts(),
        "seconds": time.perf_counter() - began,
    }
    if rank == 0 and stage.publishes == "texts":
        save_text_tower(folder, stage.params["tower"], learner.tensors())
        (folder / "history.json").write_text(json.dumps(about), encoding="utf-8")
    elif rank == 0 and stage.publishes == "tensors":
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in learner.tensors().items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "history.json").write_text(json.dumps(about), encoding="utf-8")
    elif rank == 0:
        write_deployed(folder, learner.deployed(), trained, about)
    return about


def write_deployed(folder: Path, deployed: Deployed, base: Network, about: dict[str, Any]) -> None:
    """Writes a trained network so that a fresh process can rebuild it."""
    classifier = deployed.network.get_classifier()  # type: ignore[operator]
    outputs = getattr(classifier, "out_features", None) or getattr(classifier, "out_channels", 0)
    meta = {
        "model": base.entry.model_dump(mode="json"),
        "role": base.role,
        "changes": dict(deployed.changes),
        "num_classes": int(outputs or 0),
        "preprocessing": describe(base.preprocessing),
    }
    deployed.network.cpu()
    save_student(folder, deployed, meta)
    (folder / "history.json").write_text(json.dumps(about), encoding="utf-8")
