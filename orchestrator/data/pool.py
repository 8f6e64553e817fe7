"""Pools of generated images: made in shards, each an entry of the store, and read like a split of the user's data."""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.contract import Given, ImageStage, Maker
from orchestrator.data.pixels import rendered_view
from orchestrator.data.task import Split, TaskData, load_task
from orchestrator.data.views import Policy, stored_view, view_parameters
from orchestrator.models.load import Preprocessing
from orchestrator.spec import SweepSpec
from orchestrator.store import Entry, JoinedRecords, Records, Store, key_of, store_at, write_records

SHARD = 64  # images: the unit of work, of resuming, and of sharing between budgets
BATCH = 32
UPSTREAM = ("vq", "diffusion", "pipeline")


@dataclass(frozen=True)
class Resources:
    """Actors that work on shards: from `least` to `most` of them, and what each reserves."""

    least: int
    most: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class ShardJob(ABC):
    """Work on numbered shards, each published as soon as it is done. Picklable.

    Attributes:
        spec: the sweep file.
        store_root: the store that every process can read.
    """

    spec: SweepSpec
    store_root: str

    @property
    def store(self) -> Store:
        return store_at(self.store_root, min_free_gb=self.spec.store.min_free_gb)

    @property
    @abstractmethod
    def resources(self) -> Resources: ...

    @property
    def unreserved(self) -> bool:
        """Whether it computes on a GPU of which its actors reserve nothing: only whoever holds one can do it."""
        return getattr(self, "device", "cpu") != "cpu" and not self.resources.gpus

    @abstractmethod
    def worker(self) -> Callable[[int], Entry]:
        """What does one shard after another in one process."""


@dataclass(frozen=True)
class PoolJob(ShardJob):
    """Everything that a process needs to make any shard of a pool. Picklable.

    Attributes:
        stage: what makes the images.
        key: of the pool, whatever its size.
        inputs: tensors of earlier stages by stage name.
        seed: of the trial.
        device: where the generator runs.
        listing: of the task's images, as in `load_task`.
    """

    stage: ImageStage
    key: str
    inputs: dict[str, dict[str, Tensor]]
    seed: int
    device: str
    listing: str = ""

    @property
    def resources(self) -> Resources:
        generate = self.spec.generate
        return Resources(1, generate.actors, generate.cpus, generate.gpus)

    def worker(self) -> ShardMaker:
        return ShardMaker(self)

    def shard_key(self, shard: int) -> str:
        """The address of one shard below the stage's name."""
        return key_of({"pool": self.key, "shard": shard, "images": SHARD})


# Makes the shards of these numbers; returns those that it made itself: another trial may have been faster.
Mapper = Callable[[ShardJob, list[int]], list[int]]


class Sources:
    """The training images that an image stage works from, view 0, at its size."""

    def __init__(self, task: TaskData, stage: ImageStage, store: Store) -> None:
        self._task = task
        self.split = task.train.take(task.labelled) if stage.images == "labelled" else task.train
        self.preprocessing = Preprocessing(stage.size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
        self._parameters = view_parameters(stored_view(store, self.split, Policy(1.0, 0.0), 0))

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """uint8 [n, 3, S, S]."""
        chosen = self.split.take(rows)
        parameters = self._parameters[np.asarray(rows)]
        return next(rendered_view(self._task, chosen, parameters, self.preprocessing, len(rows)))


class ShardMaker:
    """Makes shards of one pool; the generator is loaded once."""

    def __init__(self, job: PoolJob) -> None:
        from orchestrator.models.upstream import upstream_of  # brings diffusers, which most trials do not need

        self.job = job
        torch.set_num_threads(job.spec.train.threads)
        stage = job.stage
        task = load_task(job.spec.task, job.store, listing=job.listing)
        self.sources = Sources(task, stage, job.store)
        values: dict[str, Any] = {}
        for name in (n for n in UPSTREAM if n in stage.reads):
            module = upstream_of(job.spec.upstream, name).module
            values[name] = module.to(job.device) if hasattr(module, "to") else module
        torch.manual_seed(job.seed)
        given = Given(values=values, num_classes=len(task.classes), results=job.inputs, kind=task.info.kind)
        self.maker: Maker = stage.maker(stage.params, given)

    def __call__(self, shard: int) -> Entry:
        """The shard's entry in the store, made here if nobody has made it."""
        job = self.job
        reads = {"pool": job.key, "shard": shard, "images": SHARD}
        return job.store.compute(job.stage.name, job.shard_key(shard), lambda f: self._write(f, shard), reads=reads)

    def _write(self, folder: Path, shard: int) -> dict[str, Any]:
        began = time.perf_counter()
        numbers = np.arange(shard * SHARD, (shard + 1) * SHARD)
        batches = (self._make(numbers[i : i + BATCH]) for i in range(0, SHARD, BATCH))
        write_records(folder / "images.arrow", SHARD, batches, "uint8")
        return {"seconds": time.perf_counter() - began, "generated": SHARD}

    @torch.inference_mode()
    def _make(self, numbers: np.ndarray) -> Tensor:
        rows = (numbers % len(self.sources.split)).tolist()
        images = self.sources.preprocessing.normalise(self.sources.pixels(rows)).to(self.job.device)
        made = self.maker(images, [_seed(self.job.seed, int(i)) for i in numbers])
        if made.shape != images.shape:
            raise ValueError(f"The maker gives images of shape {list(made.shape)} for {list(images.shape)}.")
        return ((made.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little")


def make_here(job: ShardJob, shards: list[int]) -> list[int]:
    """Makes shards in this process, one after another."""
    work = job.worker()
    return [shard for shard in shards if work(shard).computed]


def ensure_shards(job: ShardJob, stage: str, keys: Sequence[str], mapper: Mapper) -> list[Entry]:
    """The entries at these keys of a stage, one for each shard, made by `mapper` where they are missing.

    Each entry says with `computed` whether this call made it.

    Raises:
        LookupError: if one is missing after that.
    """
    found = [job.store.get(stage, key) for key in keys]
    missing = [number for number, entry in enumerate(found) if entry is None]
    made = set(mapper(job, missing)) if missing else set()
    for number in missing:
        entry = job.store.get(stage, keys[number])
        found[number] = replace(entry, computed=number in made) if entry is not None else None
    entries = [entry for entry in found if entry is not None]
    if len(entries) < len(keys):
        raise LookupError(f"Of {len(keys)} shards of {stage}, {len(keys) - len(entries)} were not made.")
    return entries


def ensure_pool(job: PoolJob, count: int, mapper: Mapper) -> list[Entry]:
    """The shards that hold the first `count` images; see `ensure_shards`."""
    keys = [job.shard_key(shard) for shard in range(math.ceil(count / SHARD))]
    return ensure_shards(job, job.stage.name, keys, mapper)


class PoolShard:
    """One shard, read by views, pixels and teacher outputs like a split of the user's data."""

    def __init__(self, entry: Entry) -> None:
        self.address = f"{entry.stage}/{entry.key}"
        self._table = Records(entry.path / "images.arrow")
        size, count = int(self._table.shape[-1]), len(self._table)
        ids = tuple(f"{self.address}:{i}" for i in range(count))
        self.split = Split(ids, tuple(str(i) for i in range(count)), (0,) * count, ((size, size),) * count)

    def image(self, split: Split, row: int) -> Tensor:
        """uint8 [3, S, S]."""
        return self._table.rows([int(split.where[row])])[0]

    def identity(self) -> dict[str, Any]:
        """What finds these images again."""
        return {"pool": self.address}


def pool_images(entries: Sequence[Entry], rows: Sequence[int]) -> Tensor:
    """uint8 [n, 3, S, S] the images `rows` of a pool."""
    return JoinedRecords([Records(e.path / "images.arrow") for e in entries]).rows(list(rows))


class JoinedImages:
    """The first `count` images of several shards as one set; all of them if 0."""

    def __init__(self, shards: Sequence[PoolShard], count: int = 0) -> None:
        self._shards = shards
        numbered = [(f"{n}:{i}", s.split, i) for n, s in enumerate(shards) for i in range(len(s.split))]
        numbered = numbered[: count or None]
        ids = tuple(split.ids[i] for _, split, i in numbered)
        sizes = tuple(split.sizes[i] for _, split, i in numbered)
        self.split = Split(ids, tuple(where for where, _, _ in numbered), (0,) * len(ids), sizes)

    def image(self, split: Split, row: int) -> Tensor:
        """uint8 [3, S, S]."""
        number, _, index = split.where[row].partition(":")
        shard = self._shards[int(number)]
        return shard.image(shard.split, int(index))

    def identity(self) -> dict[str, Any]:
        """What finds these images again."""
        return {"pools": [shard.address for shard in self._shards]}
