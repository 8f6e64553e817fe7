"""The store as a person looks at it: what lies there, whether it is still right, and making room."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.outputs import Output
from orchestrator.data.corpus import CorpusShard, shard_of
from orchestrator.data.embed import plain_views
from orchestrator.data.outputs import open_outputs
from orchestrator.data.passes import live_outputs
from orchestrator.data.pool import PoolShard
from orchestrator.data.task import ImageSet, load_task
from orchestrator.data.views import render, view_parameters
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import load_network, tuned_network
from orchestrator.spec import Model, Task, read_spec
from orchestrator.store import Entry, Records, Store, open_store

SAMPLE = 16
RECORDS = "records.arrow"  # of outputs, embeddings and tokens
CHUNK = 1 << 25  # bytes of a table that are looked at together
TOLERANCE = {"fp32": 2e-3, "fp16": 3e-2, "bf16": 0.15}  # of the largest value: 11 bits are stored, bfloat16 has 8


def inventory(where: str) -> list[dict[str, Any]]:
    """One row a stage: entries, bytes, and the seconds that they cost."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in open_store(where).entries():
        row = rows.setdefault(entry.stage, {"stage": entry.stage, "entries": 0, "bytes": 0, "seconds": 0.0})
        row["entries"] += 1
        row["bytes"] += entry.bytes
        row["seconds"] += entry.meta["seconds"]
    return [rows[stage] for stage in sorted(rows)]


def collect(where: str, max_gb: float | None) -> dict[str, Any]:
    """Deletes leftovers of dead processes, and the least recently used entries beyond the limit."""
    store = open_store(where)
    if max_gb is None and (Path(where) / "sweep.yaml").is_file():
        max_gb = read_spec(Path(where) / "sweep.yaml").store.max_gb
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        freed, removed = store.collect(None if max_gb is None else int(max_gb * 1e9))
    spared = "".join(f" {warning.message}" for warning in told)
    sentence = f"Freed {freed / 1e6:.1f} MB; {removed} entries removed.{spared}"
    return {"freed": freed, "removed": removed, "sentence": sentence}


def verify(where: str, remove: bool = False) -> dict[str, Any]:
    """Compares every file with its published hash, and a sample of each teacher output with the live teacher.

    A table of what teachers gave in which a number is not finite is damaged, whatever its hash.

    Args:
        where: a sweep's folder, a storage folder, a store, or its address.
        remove: take damaged entries away.
    """
    store = open_store(where)
    damaged: list[str] = []
    bad: list[Entry] = []
    worst = 0.0
    compared = 0
    entries = store.entries()
    for entry in entries:
        address = f"{entry.stage}/{entry.key}"
        wrong = store.damaged(entry)
        if wrong:
            damaged.append(f"{address}: {', '.join(wrong)} differs from what was published")
            bad.append(entry)
        elif RECORDS in entry.meta["files"] and not _finite(Records(entry.path / RECORDS)):
            damaged.append(f"{address}: has values that are not finite")
            bad.append(entry)
        elif entry.stage in ("outputs", "corpus_outputs"):
            difference = _against_live(store, entry)
            if difference is None:
                continue
            compared += 1
            worst = max(worst, difference)
            # NaN is more than nothing and less than nothing: only what is known to be near enough is good.
            if not difference <= TOLERANCE[entry.meta["about"]["teacher"].get("precision", "fp32")]:
                damaged.append(f"{address}: differs from the live teacher by {difference:.2g} of the largest value")
                bad.append(entry)
    for entry in bad if remove else ():
        store.remove(entry)
    sentences = [*damaged, f"{len(entries)} entries, {len(damaged)} damaged{' and removed' * bool(remove and bad)}."]
    if compared:
        sentences.append(
            f"{compared} tables of teacher outputs compared with the live teacher on {SAMPLE} images each: "
            f"largest difference {worst:.1e} of the largest value."
        )
    return {"entries": len(entries), "damaged": damaged, "compared": compared, "worst": worst, "sentences": sentences}


def _finite(table: Records) -> bool:
    """Whether all numbers of a table are finite: a sample would find few of the rows that are not."""
    if not table.dtype.is_floating_point:
        return True
    step = max(1, CHUNK // max(1, math.prod(table.shape) * table.dtype.itemsize))
    starts = range(0, len(table), step)
    return all(bool(table.rows(np.arange(s, min(s + step, len(table)))).isfinite().all()) for s in starts)


def _against_live(store: Store, entry: Entry) -> float | None:
    """Largest difference to the live teacher, relative to the largest value; None if the data or teacher is gone."""
    about, reads = entry.meta["about"], entry.meta["reads"]
    images: ImageSet
    if "pool" in about:
        made = store.get(*about["pool"].split("/"))
        if made is None:
            return None
        images = PoolShard(made)
        split = images.split
    elif "corpus" in about:
        shard = shard_of(about)
        if shard is None:
            return None
        images, split = shard, shard.split
    else:
        try:
            images = load_task(Task.model_validate(about["task"]), store)
        except (UserError, WorkError):
            return None
        split = images.train
    teacher = load_network(Model.model_validate(about["teacher"]), "teacher")
    weights = reads["weights"].partition("@")[0]
    if "/" in weights:  # of a tuned teacher: the address of the stage that tuned it
        tuned = store.get(*weights.split("/"))
        if tuned is None:
            return None
        teacher = tuned_network(tuned.path, weights, teacher)
    stored = open_outputs([entry])[0]
    if "parameters" in reads:
        views = store.get("views", reads["parameters"])
        parameters = view_parameters(views) if views is not None else None
    else:
        assert isinstance(images, CorpusShard)
        parameters = plain_views(images)
    if parameters is None or teacher.identity != reads["weights"] or len(stored) != len(split):
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(stored), generator=generator)[:SAMPLE].numpy()
    size, mode = teacher.preprocessing.size, teacher.preprocessing.interpolation
    pixels = torch.stack([render(images.image(split, int(i)), parameters[i], size, mode) for i in rows])
    output = Output(**about["output"])
    live = live_outputs(teacher, teacher.module, pixels, [output])[output.key]
    return float((live - stored.rows(rows).float()).abs().max() / live.abs().max().clamp_min(1e-9))
