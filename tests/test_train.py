"""The training loop in one process and under DDP, and what a trial leaves in the store."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small import small_spec
from torch import Tensor

from methods.contract import Batch, Deployed, Feed, Given, Learner, Recipe
from methods.finetune import FineTuneLearner
from orchestrator.data.task import load_task
from orchestrator.errors import UserError, WorkError, disk_full, told_at
from orchestrator.spec import SweepSpec
from orchestrator.store import Store
from orchestrator.train.feed import Feeder
from orchestrator.train.job import TrainJob
from orchestrator.train.loop import fit
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext
from orchestrator.trial.limits import InfeasibleError
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

FINETUNE = Cell("finetune", None, 0)
KD = Cell("kd", 0, 0)


def context_of(spec: SweepSpec) -> SweepContext:
    return SweepContext(spec, f"{spec.storage}/{spec.name}")


def trial(cell: Cell, **knobs: Any) -> TrialConfig:
    return TrialConfig("t0000", 0, cell, knobs, 0)


def history(spec: SweepSpec, stage: str) -> list[float]:
    (entry,) = [e for e in Store(Path(spec.storage) / "store").entries() if e.stage == stage]
    return [point["loss"] for point in entry.meta["about"]["history"]]


def weights(spec: SweepSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.storage) / spec.name / "students" / "t0000" / "model.safetensors")


def test_same_seed_gives_the_same_weights_and_another_seed_others(colours: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((0, 0, 1)):
        spec = small_spec(colours, tmp_path / str(number))
        row = run_trial(context_of(spec), TrialConfig("t0000", 0, FINETUNE, {}, seed))
        assert row["status"] == "complete", row["reason"]
        found.append(weights(spec))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert any(not torch.equal(found[0][k], found[2][k]) for k in found[0])


@pytest.mark.parametrize(
    ("labelled", "batch", "world", "parts"),
    [(24, 16, 2, 1), (24, 16, 2, 2), (5, 12, 2, 1), (5, 20, 4, 1), (24, 6, 3, 2)],
)
def test_ranks_that_are_said_to_have_as_many_labels_have(labelled: int, batch: int, world: int, parts: int) -> None:
    def counts(rank: int) -> tuple[bool, list[list[int]]]:
        feeder = Feeder(
            Feed("all", labels=True, labelled_fraction=0.4),
            40,
            None,  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            labelled=range(labelled),
            batch=batch,
            views=2,
            seed=0,
            rank=rank,
            world=world,
        )
        rows = [feeder.rows(step)[0] for step in range(5)]
        return feeder.even(parts), [[int((r[p::parts] < labelled).sum()) for p in range(parts)] for r in rows]

    said, seen = zip(*(counts(rank) for rank in range(world)), strict=True)
    alike = all(len({n for rank in seen for n in rank[step]}) == 1 for step in range(5))
    assert set(said) == {alike}


def test_a_killed_and_resumed_stage_ends_with_the_same_weights_bit_for_bit(colours: Path, tmp_path: Path) -> None:
    train = {"steps": 10, "batch": 12, "views": 2, "checkpoint_s": 1e-9}
    whole = small_spec(colours, tmp_path / "whole", train=train)
    run_trial(context_of(whole), trial(KD))
    broken = small_spec(colours, tmp_path / "broken", train=train)

    def dies(job: Any, folder: Path, report: Any) -> dict[str, Any]:
        def report_once(state: Any) -> None:
            if state.step == 7:
                raise KeyboardInterrupt

        return run_job(job, folder, report_once)

    with pytest.raises(KeyboardInterrupt):
        run_trial(context_of(broken), trial(KD), runner=dies)
    checkpoints = list((tmp_path / "broken" / "store" / ".partial").rglob("checkpoint.pt"))
    assert [torch.load(p, weights_only=True)["step"] for p in checkpoints] == [6]
    assert run_trial(context_of(broken), trial(KD))["status"] == "complete"
    assert all(torch.equal(value, weights(broken)[name]) for name, value in weights(whole).items())
    assert not list((tmp_path / "broken" / "store" / ".partial").iterdir())


def test_fresh_views_run_the_teacher_on_every_batch_and_the_row_says_so(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, train={"steps": 6, "batch": 12, "views": 2, "fresh": True})
    row = run_trial(context_of(spec), trial(KD))
    assert row["status"] == "complete", row["reason"]
    train = len(load_task(spec.task, Store(tmp_path / "store")).train)
    # View 0 once for the teacher's head, then 6 batches of 12 and the one that was read ahead.
    assert row["teacher_forwards"] in (train + 6 * 12, train + 7 * 12)


def test_a_diverging_trial_fails_with_a_reason_and_leaves_no_student(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)

    def diverges(job: Any, folder: Path, report: Any) -> dict[str, Any]:
        raise WorkError("The loss is nan at step 3 of 6: try a smaller learning rate.")

    row = run_trial(context_of(spec), trial(FINETUNE), runner=diverges)
    assert (row["status"], row["student_path"]) == ("failed", "")
    assert row["reason"] == "The loss is nan at step 3 of 6: try a smaller learning rate."
    assert not [e for e in Store(tmp_path / "store").entries() if e.stage == "finetune"]


def test_the_second_run_of_a_trial_trains_nothing_and_forwards_nothing(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    first = run_trial(context_of(spec), trial(KD))
    again = run_trial(context_of(spec), TrialConfig("t0009", 9, KD, {}, 0))
    assert first["status"] == again["status"] == "complete"
    assert first["store_misses"] > 0
    assert (again["store_misses"], again["teacher_forwards"]) == (0, 0)
    assert again["val_metric"] == first["val_metric"]


def test_two_trials_that_differ_in_temperature_share_everything_before_the_student(
    colours: Path, tmp_path: Path
) -> None:
    spec = small_spec(colours, tmp_path)
    first = run_trial(context_of(spec), trial(KD, temperature=2.0))
    second = run_trial(context_of(spec), TrialConfig("t0001", 1, KD, {"temperature": 5.0}, 0))
    assert first["teacher_forwards"] > 0
    assert second["teacher_forwards"] == 0
    assert second["store_misses"] == 2  # the student and its evaluation


class Pull(Learner):
    """Constant gradients on four tensors; those named fast move ten times as far, those named kept do not decay."""

    def __init__(self) -> None:
        super().__init__({}, Given(values={}, num_classes=2))
        self.student = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("slow", "fast", "slow_kept", "fast_kept")}
        )

    def loss(self, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        return {"loss": sum((p * p.detach().sign()).sum() for p in self.student.values())}

    def deployed(self) -> Deployed:
        return Deployed(self.student, "student")

    def lr_scale(self, name: str) -> float:
        return 10.0 if "fast" in name else 1.0

    def decays(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return "kept" not in name


class NoImages:
    def __call__(self, step: int, device: str) -> Batch:
        return Batch(torch.empty(0))

    def close(self) -> None: ...


def test_a_learner_decides_by_parameter_how_fast_it_moves_and_whether_it_decays() -> None:
    learner = Pull()
    recipe = Recipe(lr=1e-3, weight_decay=0.5, optimizer="sgd", warmup=0.0)
    fit(learner, NoImages(), recipe, 1)  # type: ignore[arg-type]
    moved = {name: 1 - p[0, 0].item() for name, p in learner.student.items()}
    # One step of SGD: lr x scale x (gradient 1 + decay 0.5 x weight 1).
    assert moved == pytest.approx({"slow": 1.5e-3, "fast": 1.5e-2, "slow_kept": 1e-3, "fast_kept": 1e-2}, rel=1e-3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from orchestrator.sweep.cluster import start_ray

    start_ray(1)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def group(colours: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[Any]:
    """Two gloo workers, kept from test to test."""
    from orchestrator.train.group import GroupRunner

    spec = small_spec(colours, tmp_path_factory.mktemp("group"), train={"batch": 12, "workers": 2})
    with GroupRunner(context_of(spec)) as runner:
        yield runner


@pytest.mark.ray
@pytest.mark.parametrize("cell", [FINETUNE, KD], ids=lambda c: c.method)
def test_two_gloo_workers_give_the_losses_of_one(colours: Path, tmp_path: Path, group: Any, cell: Cell) -> None:
    stage = "distil" if cell.method == "kd" else "finetune"
    losses = []
    for workers in (1, 2):
        train = {"steps": 20, "batch": 12, "views": 2, "workers": workers}
        spec = small_spec(colours, tmp_path / str(workers), train=train)
        row = run_trial(context_of(spec), trial(cell), runner=run_job if workers == 1 else group)
        assert row["status"] == "complete", row["reason"]
        losses.append(history(spec, stage))
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def ranks() -> set[int]:
    """Process ids of the workers that live."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    found = list_actors(address, [("state", "=", "ALIVE"), ("class_name", "=", "RayTrainWorker")], detail=True)
    return {actor.pid for actor in found}


@pytest.mark.ray
def test_a_kept_group_trains_as_a_fresh_one_bit_for_bit_and_a_killed_rank_ends_it(
    colours: Path, tmp_path: Path, group: Any
) -> None:
    train = {"steps": 6, "batch": 12, "views": 2, "workers": 2}
    norms = [{"model": "timm/test_resnet", "image_size": 32}]  # batch norm has buffers
    found: list[dict[str, torch.Tensor]] = []

    def runs(name: str, runner: Any) -> set[int]:
        spec = small_spec(colours, tmp_path / name, train=train, students=norms)
        row = run_trial(context_of(spec), trial(FINETUNE), runner=runner)
        assert row["status"] == "complete", row["reason"]
        found.append(weights(spec))
        return ranks()

    kept = runs("cold", group)
    assert runs("warm", group) == kept
    assert len(kept) == 2

    def bereft(job: TrainJob, folder: Path, report: Any = None) -> dict[str, Any]:
        os.kill(min(kept), signal.SIGKILL)  # as its next job comes
        return dict(group(job, folder, report))

    fresh = runs("fresh", bereft)
    assert len(fresh) == 2
    assert not fresh & kept
    assert all(torch.equal(one[name], value) for one in found for name, value in found[-1].items())


def fail(error: Exception) -> None:
    raise error


class OddError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def raise_odd() -> None:
    raise OddError("one", "two")


def fill_the_disk() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise ValueError("not written") from error


@pytest.mark.ray
def test_errors_of_a_groups_errand_arrive_and_do_not_end_it(group: Any) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker finds the module of a test
    first = group.elsewhere(os.getpid)
    assert first in ranks()
    with pytest.raises(UserError, match=r"task: wrong\.") as told:
        group.elsewhere(partial(fail, UserError("task: wrong.")))
    assert str(told.value) == "task: wrong."
    with pytest.raises(InfeasibleError, match="too slow") as caught:
        group.elsewhere(partial(fail, InfeasibleError("too slow", {"latency_ms": 3.0})))
    assert caught.value.facts == {"latency_ms": 3.0}
    with pytest.raises(torch.OutOfMemoryError):
        group.elsewhere(partial(fail, torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(RuntimeError, match="OddError: one two") as odd:
        group.elsewhere(raise_odd)
    assert told_at(odd.value).startswith("test_train.py:")
    with pytest.raises(OSError, match="ValueError: not written") as full:
        group.elsewhere(fill_the_disk)
    assert disk_full(full.value)
    assert group.elsewhere(os.getpid) == first


class CrampedLearner(FineTuneLearner):
    """Rank 1 has room for three images."""

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        if dist.get_rank() == 1 and len(batch.images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().loss(batch, progress)


def cramped(colours: Path, storage: Path, group: Any, **train: Any) -> dict[str, Any]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker finds the module of a test
    spec = small_spec(colours, storage, train={"steps": 4, "batch": 12, "views": 2, "workers": 2} | train)

    def runner(job: TrainJob, folder: Path, report: Any = None) -> dict[str, Any]:
        return dict(group(replace(job, stage=replace(job.stage, learner=CrampedLearner)), folder, report))

    return run_trial(context_of(spec), trial(Cell("finetune", None, 0)), runner=runner)


@pytest.mark.slow  # a minute; of one process it is in test_resume.py, a group that loses a rank is above
@pytest.mark.ray
def test_one_ranks_lack_of_memory_ends_the_group_and_is_tried_once_more_where_allowed(
    colours: Path, tmp_path: Path, group: Any
) -> None:
    row = cramped(colours, tmp_path / "no", group)
    assert row["status"] == "failed"
    assert row["reason"].startswith("out of device memory at step 1 of 4 with train.batch 12: 6 images at a time")
    row = cramped(colours, tmp_path / "yes", group, oom_retry=True)
    assert row["status"] == "complete", row["reason"]


def test_garbage_of_a_trial_goes_and_what_was_loaded_before_it_is_looked_through_no_more() -> None:
    code = """
import gc, weakref
import orchestrator.trial.run
from orchestrator.process import beginning, settle
from orchestrator.train.memory import release_memory

class Node: pass

usual = gc.get_threshold()
beginning()()
seldom = gc.get_threshold()
settle()
loaded = gc.get_freeze_count()
settle()
node = Node()
node.itself, seen = node, weakref.ref(node)
del node
release_memory()
print(loaded > 100_000, gc.get_freeze_count() == loaded, len(gc.get_objects()) < loaded / 10, seen() is None)
print(seldom[0] > usual[0], gc.get_threshold() == usual)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 6
