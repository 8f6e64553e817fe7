"""What needs a GPU runs where one is reserved, counts what it reserves, and ends with a device that is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from small import small_spec
from test_held import spec_of

from orchestrator.data import actors
from orchestrator.data.pool import Resources
from orchestrator.errors import UserError
from orchestrator.evaluate.cost import Latency
from orchestrator.spec import SweepSpec
from orchestrator.sweep import tune
from orchestrator.sweep.capacity import check_actors, check_gpus, check_shape, concurrency
from orchestrator.sweep.ledger import Ledger
from orchestrator.train import memory
from orchestrator.train.job import TrainJob
from orchestrator.train.memory import device_lost, is_out_of_memory, release_memory
from orchestrator.train.work import run_job
from orchestrator.trial import limits, materials, run
from orchestrator.trial.context import SweepContext
from orchestrator.trial.limits import latency_of
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.row import blank_row

KD = TrialConfig("t0000", 0, Cell("kd", 0, 0), {}, 0)
COUNTED = (
    "status",
    "reason",
    "val_metric",
    "teacher_forwards",
    "teacher_forwards_shared",
    "store_misses",
    "store_hits",
)


def context_of(spec: SweepSpec, device: str = "cpu") -> SweepContext:
    return SweepContext(spec, f"{spec.storage}/{spec.name}", device)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("ncclUnhandledCudaError: Last error: Cuda failure 2 'out of memory'"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_lack_of_device_memory_is_known_by_all_its_names(error: Exception, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_a_lack_of_memory_in_a_library_is_told_in_the_row_as_torchs_own(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*about: Any) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(run, "check_before", short)
    row = run.run_trial(context_of(small_spec(colours, tmp_path)), KD)
    assert (row["status"], row["reason"]) == ("failed", "out of device memory with train.batch 12; try 6")


@pytest.mark.parametrize(
    ("said", "lost"), [("an illegal memory access was encountered", True), ("out of memory", False), (None, False)]
)
def test_a_lost_device_is_known_and_does_not_hinder_the_end_of_a_trial(
    monkeypatch: pytest.MonkeyPatch, said: str | None, lost: bool
) -> None:
    def answer() -> None:
        if said is not None:
            raise torch.AcceleratorError(f"CUDA error: {said}")

    asked = SimpleNamespace(is_initialized=lambda: True, synchronize=answer, empty_cache=answer)
    monkeypatch.setattr(memory.torch, "cuda", asked)
    assert device_lost() is lost
    release_memory()


def test_a_process_whose_device_is_lost_ends_once_its_row_is_written(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(small_spec(colours, tmp_path))
    told: list[dict[str, Any]] = []

    def end(code: int) -> None:
        assert code
        raise SystemExit(code)

    def failed(context: SweepContext, trial: TrialConfig, *about: Any) -> dict[str, Any]:
        return blank_row(context.spec, trial) | {"status": "failed", "reason": "illegal memory access"}

    here = SimpleNamespace(get_node_id=lambda: "a", get_node_labels=dict)
    monkeypatch.setattr(tune, "ray", SimpleNamespace(get_runtime_context=lambda: here))
    monkeypatch.setattr(tune, "settle", lambda: None)
    monkeypatch.setattr(tune.tune, "report", told.append)
    monkeypatch.setattr(tune, "run_repeats", failed)
    monkeypatch.setattr(tune.os, "_exit", end)
    monkeypatch.setattr(tune, "device_lost", lambda: True)
    with pytest.raises(SystemExit):
        tune._trainable({"trial": KD.to_json()}, context)
    assert told == []
    (row,) = Ledger(context.folder).rows()
    assert (row["status"], row["reason"]) == ("failed", "illegal memory access")
    tune._trainable({"trial": KD.to_json()}, context)  # in the process that Tune begins it in again
    assert [report["progress"] for report in told] == [100]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"gpus_per_worker": 1.5}, r"gpus_per_worker: 1\.5 is no whole number"),
        ({"gpus_per_worker": 0.5, "workers": 2}, r"gpus_per_worker: 0\.5 and workers: 2"),
    ],
)
def test_gpus_that_no_group_can_have_are_refused(
    colours: Path, tmp_path: Path, train: dict[str, Any], words: str
) -> None:
    budget = {"steps": 6, "batch": 12}
    with pytest.raises(UserError, match=words):
        small_spec(colours, tmp_path, train=budget | train | {"device": "cuda"})
    small_spec(colours, tmp_path, train=budget | train | {"device": "cpu"})
    spec = small_spec(colours, tmp_path, train=budget | train)
    check_gpus(spec, "cpu")
    with pytest.raises(UserError, match=words):
        check_gpus(spec, "cuda")
    small_spec(colours, tmp_path, train=budget | {"gpus_per_worker": 0.5})
    small_spec(colours, tmp_path, train=budget | {"gpus_per_worker": 2, "workers": 2})


def test_trials_leave_the_gpus_of_actors_free(tmp_path: Path) -> None:
    def most(gpus: list[float], workers: int = 1, **sections: Any) -> int:
        sections = {"upstream": {"vq": "packaged/vq_clipart"}, **sections}
        spec = small_spec(tmp_path, tmp_path, train={"steps": 1, "batch": 12, "workers": workers}, **sections)
        return concurrency(spec, "cuda", [{"CPU": 16.0, "GPU": gpu} for gpu in gpus])

    assert most([4.0]) == 4
    assert most([4.0], generate={"gpus": 1}, upstream={}) == 4, "nothing generates"
    assert most([4.0], generate={"gpus": 1, "actors": 1}) == 3
    assert most([4.0, 4.0], generate={"gpus": 0.5, "actors": 3}) == 6
    assert most([4.0], generate={"gpus": 1, "actors": 2}, search={"trials": 9, "concurrency": 4}) == 2
    assert most([2.0], generate={"gpus": 1, "actors": 8}) == 1, "fewer actors then work beside one trial"
    assert most([4.0], corpus={"gpus": 1}) == 4, "without a corpus there are none"
    assert most([4.0], corpus={"gpus": 1, "actors": 3, "images": "packaged/icons/images"}) == 1
    assert most([4.0], workers=2, generate={"gpus": 1, "actors": 2}) == 2, "a group ends before its actors begin"


def test_actors_for_which_there_is_never_a_gpu_are_refused(tmp_path: Path) -> None:
    def check(gpus: float, device: str = "cuda", workers: int = 1, **sections: Any) -> None:
        sections = {"upstream": {"vq": "packaged/vq_clipart"}, **sections}
        spec = small_spec(tmp_path, tmp_path, train={"steps": 1, "batch": 12, "workers": workers}, **sections)
        check_actors(spec, device, [[], [{"CPU": 16.0, "GPU": gpus}]])

    check(2, generate={"gpus": 1})
    check(1, workers=2, generate={"gpus": 1})
    check(1)
    check(1, generate={"gpus": 1}, upstream={})
    words = r"generate\.gpus: 1 GPUs for actors beside the 1 of a trial are never free: the cluster has 1 GPUs"
    with pytest.raises(UserError, match=words):
        check(1, generate={"gpus": 1})
    with pytest.raises(UserError, match=r"generate\.gpus: 1 GPUs for actors are never free: the cluster has 0 GPUs"):
        check(0, device="cpu", generate={"gpus": 1})
    with pytest.raises(UserError, match=r"corpus\.gpus: 3 x 1 GPUs for actors"):
        check(3, corpus={"gpus": 1, "actors": 3, "min_actors": 3, "images": "packaged/icons/images"})
    with pytest.raises(UserError, match=r"generate\.gpus: 3 GPUs for actors beside the 1 of a trial"):
        check_shape(
            spec_of(tmp_path, train={"steps": 1}, generate={"gpus": 3}, upstream={"vq": "packaged/vq_clipart"}),
            "cuda",
            [],
        )


class Shards:
    """What `make_on_actors` needs to know of a job."""

    unreserved = actors.ShardJob.unreserved

    def __init__(self, device: str, gpus: float) -> None:
        self.device, self.resources = device, Resources(1, 1, 0, gpus)


def test_shards_on_a_gpu_that_no_actor_reserves_are_made_by_whoever_holds_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[str, list[int]]] = []

    class Runner:
        def elsewhere(self, work: Callable[[], Any]) -> Any:
            made.append(("elsewhere", []))
            return work()

        def end(self) -> None:
            made.append(("end", []))

    def here(job: Any, shards: list[int]) -> list[int]:
        made.append(("here", shards))
        return shards

    monkeypatch.setattr(tune, "make_here", here)
    monkeypatch.setattr(actors, "make_here", here)
    alone: Any = Shards("cuda", 0)
    assert actors.make_on_actors(alone, [3, 4]) == [3, 4]
    assert made == [("here", [3, 4])]
    made.clear()
    make = tune._made_by(Runner())  # type: ignore[arg-type]
    assert make(alone, [5]) == [5]
    assert made == [("elsewhere", []), ("here", [5])]
    made.clear()
    monkeypatch.setattr(actors, "make_on_actors", lambda job, shards: made.append(("actors", shards)) or shards)
    for others in (Shards("cpu", 0), Shards("cuda", 1)):
        made.clear()
        tune._made_by(Runner())(others, [6])  # type: ignore[arg-type]
        assert made == [("end", []), ("actors", [6])]


def test_a_latency_beside_neighbours_is_kept_apart_and_says_so(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(limits.torch.cuda, "get_device_name", lambda: "H")
    taken: list[int] = []

    def latency(*about: Any, **options: Any) -> Latency:
        taken.append(1)
        return Latency(**dict.fromkeys(Latency.__dataclass_fields__, 1))  # type: ignore[arg-type]

    monkeypatch.setattr(limits, "latency", latency)
    setups = []
    for share in (1.0, 0.5, 0.5):
        spec = small_spec(colours, tmp_path, train={"steps": 6, "batch": 12, "gpus_per_worker": share})
        blueprint = limits.base_blueprint(spec, KD.cell, 2)
        assert blueprint is not None
        setups.append(latency_of(context_of(spec, "cuda"), blueprint)["latency_setup"])
    assert len(taken) == 2
    assert setups[0] == "cuda (H), 1 thread, batch 1"
    assert setups[1:] == ["cuda (H), 1 thread, batch 1, on 0.5 of a GPU that other trials share"] * 2


class FakeGroup:
    """A worker group in this process: what it is given is pickled, and on its way it is known to be inside."""

    def __init__(self) -> None:
        self.inside, self.errands = False, 0

    def __call__(self, job: TrainJob, folder: Path, report: Any = None) -> dict[str, Any]:
        assert job.device == "cuda"
        return run_job(replace(job, device="cpu"), folder, report)

    def elsewhere(self, work: Callable[[], Any]) -> Any:
        assert not self.inside
        self.inside, self.errands = True, self.errands + 1
        try:
            return cloudpickle.loads(cloudpickle.dumps(cloudpickle.loads(cloudpickle.dumps(work))()))
        finally:
            self.inside = False


LIMITED = {"limits": {"latency_ms": 1e6}, "train": {"steps": 6, "batch": 12, "views": 2, "workers": 2}}


def test_what_needs_a_gpu_is_done_where_the_group_has_one_and_counted_as_ever(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run.run_trial(context_of(small_spec(colours, tmp_path / "plain", **LIMITED)), KD)
    group, seen = FakeGroup(), []
    ensure, measured = materials.ensure_outputs, limits._measured

    def outputs(*about: Any, device: str, **options: Any) -> Any:
        seen.append(("outputs", group.inside))
        assert device == ("cuda" if group.inside else "cpu")
        return ensure(*about, device="cpu", **options)

    def timed(context: SweepContext, *about: Any) -> Any:
        seen.append(("latency", group.inside))
        return measured(replace(context, device="cpu"), *about)

    monkeypatch.setattr(materials, "ensure_outputs", outputs)
    monkeypatch.setattr(limits, "_measured", timed)
    spec = small_spec(colours, tmp_path / "group", **LIMITED)
    row = run.run_trial(context_of(spec, "cuda"), KD, runner=group)
    assert {name: row[name] for name in COUNTED} == {name: plain[name] for name in COUNTED}
    passes = [("outputs", True), ("outputs", False)]  # made there, then found here
    assert seen == [("latency", True), *passes, *passes, ("latency", True)]
    assert group.errands == 4
    slow = small_spec(colours, tmp_path / "group", **(LIMITED | {"limits": {"latency_ms": 1e-6}}))
    row = run.run_trial(context_of(slow, "cuda"), replace(KD, trial_id="t0001"), runner=group)
    assert row["status"] == "infeasible"
    assert "nothing was trained" in row["reason"]
    assert row["latency_ms"] > 0


@pytest.fixture(scope="module")
def group(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two gloo workers."""
    import ray

    from orchestrator.sweep.cluster import start_ray
    from orchestrator.train.group import GroupRunner

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker finds the module of a test
    start_ray(1)
    spec = small_spec(colours, tmp_path_factory.mktemp("group"), **LIMITED)
    with GroupRunner(context_of(spec)) as runner:
        yield runner
    ray.shutdown()


@pytest.mark.slow  # a minute; without Ray it is above
@pytest.mark.ray
def test_a_trial_all_of_whose_work_is_the_groups_has_the_row_of_any_other(
    colours: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for where in (None, group.elsewhere):
        monkeypatch.setattr(run, "elsewhere_of", lambda context, runner, where=where: where)
        spec = small_spec(colours, tmp_path / str(len(rows)), **LIMITED)
        rows.append(run.run_trial(context_of(spec), KD, runner=group))
    assert rows[0]["status"] == "complete", rows[0]["reason"]
    assert {name: rows[1][name] for name in COUNTED} == {name: rows[0][name] for name in COUNTED}
    assert (Path(spec.storage) / spec.name / rows[1]["student_path"] / "student.json").is_file()


def die_once(mark: Path) -> int:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


@pytest.mark.slow  # a minute; an errand's errors are in test_train.py
@pytest.mark.ray
def test_a_worker_that_is_killed_at_an_errand_is_replaced_and_does_it(tmp_path: Path, group: Any) -> None:
    first = group.elsewhere(os.getpid)
    assert group.elsewhere(partial(die_once, tmp_path / "mark")) not in (first, os.getpid())
