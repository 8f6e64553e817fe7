"""What a training stage does when its process dies, when memory runs out, and when its ranks differ."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small import small_spec
from torch import Tensor, nn

from methods.contract import Batch, Deployed, Given, Learner, Recipe
from methods.finetune import FineTuneLearner
from orchestrator.store import Store
from orchestrator.train.alike import UnlikeError, check_alike
from orchestrator.train.loop import Checkpoint, fit
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

STEPS = 12
BATCH = 8
RECIPE = Recipe(lr=1e-2, clip=1.0)


class Small(Learner):
    """Whatever a checkpoint could forget: batch statistics, dropout, moments, a part of the loss that comes late."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__({}, Given(values={}, num_classes=3))
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU()]
        self.student = nn.Sequential(*layers, nn.Dropout(0.2 if norm else 0.0), nn.Linear(16, 3))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        loss = self.student(batch.images).square().mean()
        return {"loss": loss} if progress < 0.5 else {"loss": loss, "late": loss.detach()}

    def deployed(self) -> Deployed:
        return Deployed(self.student, "student")


class Drawn:
    """Rows of a rank; at the step `dies` this process sends itself a signal."""

    live_forwards = 0

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        dies: int | None = None,
        how: int = signal.SIGKILL,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.world, self.dies, self.how, self.dtype = rank, world, dies, how, dtype

    def __call__(self, step: int, device: str) -> Batch:
        if step == self.dies:
            os.kill(os.getpid(), self.how)
        rows = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
        return Batch(rows[self.rank :: self.world].to(self.dtype))

    def close(self) -> None: ...


def train(rank: int, world: int, folder: Path, dies: int | None, how: int = signal.SIGKILL) -> None:
    """Trains to the end, or until the last rank ends itself before the step `dies`."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(folder / f"meet{dies}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    learner = Small()
    feeder: Any = Drawn(rank, world, dies if rank == world - 1 else None, how)
    kept = Checkpoint(folder / "checkpoint.pt", math.inf, 2)
    fit(learner, feeder, RECIPE, STEPS, rank=rank, world=world, checkpoint=kept)
    if rank == 0:
        torch.save(learner.state_dict(), folder / "end.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["orchestrator.train.loop"])


def group(world: int, *arguments: Any, target: Any = train) -> list[int | None]:
    """Exit codes of a group of processes; once one of them is dead, the others are ended as well."""
    ranks = [PROCESSES.Process(target=target, args=(rank, world, *arguments)) for rank in range(world)]
    for one in ranks:
        one.start()
    ranks[-1].join(60)
    if ranks[-1].exitcode:
        for one in ranks:
            one.kill()
    for one in ranks:
        one.join(60)
    return [one.exitcode for one in ranks]


def ends(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_a_random_step_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, world: int) -> None:
    dies = random.Random(os.urandom(8)).randrange(1, STEPS)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert group(world, whole, None) == [0] * world
    assert group(world, broken, dies)[-1] == -signal.SIGKILL
    assert (broken / "checkpoint.pt").exists() == (dies >= 2), dies
    assert group(world, broken, None) == [0] * world
    for name, value in ends(whole).items():
        assert torch.equal(value, ends(broken)[name]), (name, dies)


def test_sigterm_saves_the_step_that_it_met_and_ends_the_process(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train(0, 1, whole, None)
    assert group(1, broken, 6, signal.SIGTERM) == [-signal.SIGTERM]
    assert torch.load(broken / "checkpoint.pt", weights_only=True)["step"] == 7
    train(0, 1, broken, None)
    for name, value in ends(whole).items():
        assert torch.equal(value, ends(broken)[name]), name


def test_a_notice_saves_once_and_training_goes_on(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "checkpoint.pt", math.inf)
    asked = []

    def notice() -> bool:
        asked.append(kept.path.exists())
        return len(asked) >= 5

    fit(Small(), Drawn(), RECIPE, STEPS, checkpoint=kept, notice=notice)  # type: ignore[arg-type]
    assert asked == [False] * 5
    assert torch.load(kept.path, weights_only=True)["step"] == 5


def test_micro_batches_take_the_step_of_the_whole_batch() -> None:
    ends = []
    for parts in (1, 2, 4):
        learner = Small(norm=False).double()
        feeder: Any = Drawn(dtype=torch.float64)
        history = fit(learner, feeder, RECIPE, STEPS, accumulate=parts, report_every=1)
        ends.append([point["loss"] for point in history.points] + [learner.student[0].weight.sum().item()])
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)
    assert ends[0] == pytest.approx(ends[2], abs=1e-6)


def unlike(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        check_alike({"configuration": "same", "torch": f"2.{rank}"}, rank, world)
    except UnlikeError as error:
        (folder / str(rank)).write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_that_differ_say_so_on_every_rank_and_name_both(tmp_path: Path) -> None:
    assert group(2, tmp_path, target=unlike) == [0, 0]
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("The torch of rank 1 (node ")
    assert ") is 2.1, and that of rank 0 (node " in said[0]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device on which `images` fit at a time."""
    room = {"images": 6}
    whole = FineTuneLearner.loss

    def loss(self: FineTuneLearner, batch: Batch, progress: float) -> dict[str, Tensor]:
        if len(batch.images) > room["images"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, batch, progress)

    monkeypatch.setattr(FineTuneLearner, "loss", loss)
    return room


def out_of_memory(colours: Path, tmp_path: Path, **train: Any) -> dict[str, Any]:
    spec = small_spec(colours, tmp_path, train={"steps": 4, "batch": 12, "views": 2} | train)
    config = TrialConfig("t0000", 0, Cell("finetune", None, 0), {}, 0)
    return run_trial(SweepContext(spec, f"{spec.storage}/{spec.name}"), config)


def test_out_of_memory_names_the_batch_that_was_tried(colours: Path, tmp_path: Path, small_memory: Any) -> None:
    row = out_of_memory(colours, tmp_path)
    assert (row["status"], row["student_path"]) == ("failed", "")
    assert row["reason"] == (
        "out of device memory at step 1 of 4 with train.batch 12: 12 images at a time (1 x 12 a step, accumulate 1); "
        "train.oom_retry or train.accumulate: 2 may help"
    )


def test_out_of_memory_is_tried_once_more_with_half_as_many_images_where_allowed(
    colours: Path, tmp_path: Path, small_memory: Any
) -> None:
    row = out_of_memory(colours, tmp_path, oom_retry=True)
    assert row["status"] == "complete", row["reason"]
    assert row["facts"] == '{"accumulate": 2}'
    (entry,) = [e for e in Store(tmp_path / "store").entries() if e.stage == "finetune"]
    assert entry.meta["reads"]["accumulate"] == 2
    small_memory["images"] = 2
    row = out_of_memory(colours, tmp_path / "again", oom_retry=True)
    assert row["status"] == "failed"
    assert "12 images at a time" in row["reason"]
    assert "; then out of device memory" in row["reason"]
    assert "6 images at a time (1 x 12 a step, accumulate 2)" in row["reason"]
