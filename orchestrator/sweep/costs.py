"""What a sweep will store, and with a corpus read, hold in memory and compute: formulas, before anything is paid for.

Bytes follow from the formats. Seconds follow from FLOPs and from the rates that the sweep file states (`estimate`), and
are worth as much as these. `docs/scale.md` compares both with what was measured.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from methods.contract import TEACHER, FitStage, ImageStage, NetworkInfo, Stage, TrainStage
from methods.outputs import Output, read_outputs
from orchestrator.data.images import decoders
from orchestrator.data.memory import AHEAD, StreamMemory, stream_memory
from orchestrator.data.outputs import DTYPE
from orchestrator.data.task import TaskData
from orchestrator.models.load import plan_network
from orchestrator.spec import Estimate, Model, SweepSpec
from orchestrator.store import records_bytes
from orchestrator.sweep.holdings import Holdings, holdings_of
from orchestrator.sweep.space import Space, stage_lists
from orchestrator.sweep.streamed import DRAWS, Training, streamed_trainings
from orchestrator.trial.plan import Cell

BACKWARD = 3  # forward and backward pass together cost this many forward passes
STATES = 3  # a parameter in a checkpoint: its value and AdamW's two means
ALIVE = 5  # matrices of a divergence that exist at a time: both similarities, both logarithms, their product
PAGE = 4096  # bytes that a random read brings in, at least


def embedding_bytes(shards: Sequence[int], width: int, dtype: str) -> int:
    """Of the store's files with one embedding a row, one file a shard."""
    return sum(times * records_bytes(rows, (width,), dtype) for rows, times in Counter(shards).items())


@dataclass(frozen=True)
class OutputCosts:
    """What the teachers' outputs on the images of train take in the store. Those of tuned teachers come on top.

    Attributes:
        bytes: of all, once each trial has what it wants.
        images, views: of train; stored views of an image, at most.
        output: name of the one that takes most.
        output_bytes: what that one takes.
        free_bytes: of the store's disk, less what `store.min_free_gb` keeps; None on object storage.
    """

    bytes: int
    images: int
    views: int
    output: str
    output_bytes: int
    free_bytes: int | None

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def output_costs(
    spec: SweepSpec, task: TaskData, cells: Sequence[Cell], spaces: Mapping[str, Space]
) -> OutputCosts | None:
    """What a sweep stores of its teachers' outputs, as far as some draws tell; None if that is nothing."""
    wanted: dict[int, dict[Output, None]] = {}
    views: Counter[int] = Counter()
    for cell in cells:
        for output, times in _stored_by(spec, task, cell, spaces).items():
            assert cell.teacher is not None
            wanted.setdefault(cell.teacher, {})[output] = None
            views[cell.teacher] = max(views[cell.teacher], times)
    taken: Counter[str] = Counter()
    for teacher, outputs in wanted.items():
        shapes = _shapes(spec.teachers[teacher].model_dump_json(), tuple(outputs))
        for key, shape in shapes.items():  # a pass over a view computes all that any trial wants
            taken[key] += views[teacher] * records_bytes(len(task.train), shape, DTYPE)
    if not taken:
        return None
    free = None
    if spec.store.remote is None:
        address = Path(spec.store_address).absolute()
        disk = next(folder for folder in (address, *address.parents) if folder.exists())
        free = max(0, shutil.disk_usage(disk).free - int(spec.store.min_free_gb * 1e9))
    largest, most = taken.most_common(1)[0]
    return OutputCosts(taken.total(), len(task.train), max(views.values()), largest, most, free)


def _stored_by(spec: SweepSpec, task: TaskData, cell: Cell, spaces: Mapping[str, Space]) -> dict[Output, int]:
    """The teacher's outputs on train that a cell's trials read from the store, with how many views of an image."""
    found: dict[Output, int] = {}
    if cell.teacher is None:
        return found
    for draws in (1, DRAWS):
        for stages in stage_lists(spec, spaces, cell, task.info, draws):
            for stage in stages:
                for output, times in _stored_views(spec, stage).items():
                    found[output] = max(found.get(output, 0), times)
        if {output.kind for output in found} <= {"pooled", "logits", "embedding"}:
            break  # so it is with methods that tune the teacher, whose draws take seconds; and these are the small ones
    return found


def _stored_views(spec: SweepSpec, stage: Stage) -> dict[Output, int]:
    """The outputs on train that a stage reads from the store, each with how many views of an image."""
    if isinstance(stage, ImageStage):
        return {}
    feed = stage.feed if isinstance(stage, TrainStage) else stage
    if feed.of != TEACHER or spec.corpus.streams(feed.images) or (isinstance(feed, FitStage) and feed.pool):
        return {}
    once = isinstance(feed, FitStage) or feed.plain
    views = 1 if once else 0 if spec.train.fresh else spec.train.views
    return dict.fromkeys(feed.outputs, views) if views else {}


@functools.lru_cache(maxsize=32)
def _shapes(key: str, outputs: tuple[Output, ...]) -> dict[str, tuple[int, ...]]:
    """Of an image's outputs by key; no weights are loaded. Empty if the network cannot be run without them."""
    info, seen = plan_network(Model.model_validate_json(key), "teacher")
    known = {output.key: shape for output in outputs if (shape := _planned_shape(info, output)) is not None}
    if len(known) == len(outputs):  # a forward pass, even of no data, takes tenths of a second
        return known
    assert info.skeleton is not None
    first = next(info.skeleton.parameters())
    images = torch.zeros(1, 3, seen.size, seen.size, dtype=first.dtype, device=first.device)
    try:
        with torch.inference_mode():
            found = read_outputs(info.skeleton, images, outputs)
    except Exception:  # whatever a network lacks: this is an estimate, and refuses nothing
        return {}
    return {name: tuple(values.shape[1:]) for name, values in found.items()}


def _planned_shape(info: NetworkInfo, output: Output) -> tuple[int, ...] | None:
    """Of one image's output, where the plan alone tells."""
    if info.kind not in ("vit", "cnn"):
        return None
    if output.kind == "pooled":
        return (info.width,)
    if output.kind == "map" and output.grid:
        return (info.channels[output.layer], output.grid, output.grid)
    if output.kind == "tokens":
        patches = getattr(getattr(info.skeleton, "patch_embed", None), "num_patches", None)
        prefix = getattr(info.skeleton, "num_prefix_tokens", None)
        return (patches + prefix, info.channels[output.layer]) if patches and prefix is not None else None
    return None


@dataclass(frozen=True)
class Costs:
    """The estimate. Bytes and seconds; seconds rest on the sweep file's `estimate`.

    Attributes:
        corpus_bytes: shards of images and sentences.
        image_embedding_bytes, text_embedding_bytes: entries of the store, for all teachers.
        checkpoint_bytes: of the trials that run at a time.
        student_bytes: of all trials.
        read_bytes_per_epoch: of one trial's pass over the images: shards, embeddings, texts (each worker reads all of a
            step's texts, and a text costs a page of the disk at least).
        stream: memory of one worker's stream.
        stream_bytes_per_node: of all workers of a node, in processes and in Ray's object store.
        object_store_bytes_per_node: the part of it in the object store.
        loss_bytes: matrices of the loss on each GPU: every worker computes the loss of the global batch.
        embed_device_seconds: of all teachers, on all GPUs together.
        train_device_seconds: of one trial.
        embed_images_s, train_images_s: images a second and GPU, with what limits them.
        embed_hours, trial_hours, sweep_hours: wall time; trials run side by side where GPUs allow.
        outputs: of teachers on the images of the task, if there are any.
    """

    corpus_bytes: int
    image_embedding_bytes: int
    text_embedding_bytes: int
    checkpoint_bytes: int
    student_bytes: int
    read_bytes_per_epoch: int
    stream: StreamMemory
    stream_bytes_per_node: int
    object_store_bytes_per_node: int
    loss_bytes: int
    embed_device_seconds: float
    train_device_seconds: float
    embed_images_s: tuple[float, str]
    train_images_s: tuple[float, str]
    embed_hours: float
    trial_hours: float
    sweep_hours: float
    outputs: OutputCosts | None = None

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def rate_of(
    estimate: Estimate, flops_per_image: float, bytes_per_image: float, readers: float = math.inf
) -> tuple[float, str]:
    """Images a second and GPU, and what limits them: `compute`, `decoding` or `reading`.

    Args:
        estimate: the machines.
        flops_per_image, bytes_per_image: that are computed and read.
        readers: cores that decode for a GPU, at most.
    """
    limits = {
        "compute": estimate.tflops * 1e12 * estimate.utilisation / max(flops_per_image, 1),
        "decoding": min(readers, estimate.cores / estimate.gpus) * estimate.decode,
        "reading": estimate.read_gb_s * 1e9 / estimate.gpus / max(bytes_per_image, 1),
    }
    slowest = min(limits, key=lambda name: limits[name])
    return limits[slowest], slowest


def loss_flops(batch: int, texts: int, width: int) -> int:
    """Of the similarities of a global batch, on every worker: teacher's and student's, and the student's gradient."""
    return 2 * width * batch * (texts + batch) * (1 + BACKWARD)


def reckon(holdings: Holdings, trainings: Sequence[Training], spec: SweepSpec) -> Costs:
    """The whole estimate, for the costliest of the trainings.

    Args:
        holdings: of the corpora.
        trainings: of all cells, at least one.
        spec: the sweep file: batch, workers, window, and the machines of `estimate`.
    """
    train, corpus, machines = spec.train, spec.corpus, spec.estimate
    trials = spec.search.trials * spec.search.repeats
    gpus = machines.nodes * machines.gpus
    at_a_time = max(1, min(trials, int(gpus / (train.workers * train.gpus_per_worker))))
    of = max(trainings, key=lambda t: t.steps * t.student_flops)

    teachers: dict[int, Training] = {}
    for one in trainings:
        known = teachers.get(one.teacher)
        if known is None or len(one.embeds) > len(known.embeds):
            teachers[one.teacher] = one
    images = texts = 0
    embed_seconds = embed_wall = 0.0
    embed_rate = (math.inf, "compute")
    actors = min(corpus.actors, gpus)
    image_read = holdings.image_bytes / max(holdings.images, 1)
    for one in teachers.values():
        count = {"sentences": holdings.sentences, "captions": holdings.images}
        images += embedding_bytes(holdings.image_shards, one.width, corpus.dtype)
        for name, shards in (("sentences", holdings.sentence_shards), ("captions", holdings.image_shards)):
            if name in one.embeds:
                texts += embedding_bytes(shards, one.width, corpus.dtype)
        rate = rate_of(machines, one.image_flops, image_read, decoders(corpus.cpus))
        embed_rate = min(embed_rate, rate)
        text_rate = machines.tflops * 1e12 * machines.utilisation / max(one.text_flops, 1)
        seconds = holdings.images / rate[0] + sum(count[n] for n in one.embeds if n in count) / text_rate
        embed_seconds += seconds
        embed_wall += seconds / actors

    per_worker = train.batch // train.workers
    record = of.width * torch.finfo(getattr(torch, corpus.dtype)).bits // 8
    text_read = train.workers * of.text_batch * max(PAGE, record) if of.texts in ("sentences", "captions") else 0
    epoch_steps = holdings.images / train.batch
    read = holdings.image_bytes + holdings.images * record + round(epoch_steps * text_read)
    work = BACKWARD * of.student_flops + loss_flops(train.batch, of.text_batch, of.width) / per_worker
    train_rate = rate_of(machines, work, read / max(holdings.images, 1), corpus.readers or math.inf)
    train_seconds = of.steps * train.batch / train_rate[0]
    trial_hours = train_seconds / (train.workers * train.gpus_per_worker) / 3600

    readers = corpus.readers or machines.cores // machines.gpus
    workers_here = min(machines.gpus / train.gpus_per_worker, train.workers * at_a_time)
    limit = corpus.memory_gb * 1e9 if corpus.memory_gb else machines.memory_gb * 1e9 / 4 / max(workers_here, 1)
    stream = stream_memory(corpus.window, holdings.row_group, of.size, per_worker, readers, limit, AHEAD)
    return Costs(
        corpus_bytes=holdings.image_bytes + holdings.sentence_bytes,
        image_embedding_bytes=images,
        text_embedding_bytes=texts,
        checkpoint_bytes=STATES * 4 * of.student_parameters * at_a_time,
        student_bytes=4 * of.student_parameters * trials,
        read_bytes_per_epoch=read,
        stream=stream,
        stream_bytes_per_node=round(stream.total * workers_here),
        object_store_bytes_per_node=round(stream.waiting * workers_here) if corpus.readers else 0,
        loss_bytes=4 * ALIVE * train.batch * max(train.batch, of.text_batch),
        embed_device_seconds=embed_seconds,
        train_device_seconds=train_seconds,
        embed_images_s=embed_rate,
        train_images_s=train_rate,
        embed_hours=embed_wall / 3600,
        trial_hours=trial_hours,
        sweep_hours=embed_wall / 3600 + trial_hours * math.ceil(trials / at_a_time),
    )


def costs_of(
    spec: SweepSpec, task: TaskData, cells: Sequence[Cell], spaces: Mapping[str, Space]
) -> tuple[Holdings, list[Training], Costs | OutputCosts] | None:
    """The estimate of a sweep: `Costs` with a corpus of images, else `OutputCosts`, or None if nothing is stored."""
    outputs = output_costs(spec, task, cells, spaces)
    trainings = streamed_trainings(spec, task, cells, spaces)
    if not trainings:
        return None if outputs is None else (holdings_of(spec), trainings, outputs)
    holdings = holdings_of(spec)
    return holdings, trainings, replace(reckon(holdings, trainings, spec), outputs=outputs)


def gb(size: float) -> str:
    """For people."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def _stored_sentences(spec: SweepSpec, outputs: OutputCosts | None) -> list[str]:
    if outputs is None:
        return []
    told = [
        f"Stored: outputs of teachers on {outputs.images:,} images, views of each up to {outputs.views}: about "
        f"{gb(outputs.bytes)}, of which {outputs.output} {gb(outputs.output_bytes)}."
    ]
    if outputs.free_bytes is not None and outputs.bytes > outputs.free_bytes:
        told.append(
            f"Warning: {spec.store_address!r} has room for {gb(outputs.free_bytes)} of that: use fewer train.views, "
            f"train.fresh: true, no method that reads {outputs.output}, or another storage."
        )
    return told


def sentences_of(spec: SweepSpec, holdings: Holdings, costs: Costs | OutputCosts) -> list[str]:
    """The estimate, for people; without times where a sweep runs on CPUs."""
    if isinstance(costs, OutputCosts):
        return _stored_sentences(spec, costs)
    machines, train = spec.estimate, spec.train
    passes = f"{machines.tflops:g} TFLOP/s x {machines.utilisation:.0%}"
    stream = costs.stream
    told = [
        f"Corpus: {holdings.images:,} images and {holdings.sentences:,} sentences in "
        f"{len(holdings.image_shards) + len(holdings.sentence_shards):,} shards, {gb(costs.corpus_bytes)}.",
        f"Stored: embeddings of images {gb(costs.image_embedding_bytes)}, of texts {gb(costs.text_embedding_bytes)}, "
        f"checkpoints {gb(costs.checkpoint_bytes)}, students {gb(costs.student_bytes)}.",
        *_stored_sentences(spec, costs.outputs),
        f"Read: {gb(costs.read_bytes_per_epoch)} in each trial's pass over the images.",
        f"Memory of a worker's stream: window {gb(stream.window)}, batches {gb(stream.batches)}, {stream.ahead} blocks "
        f"ahead and {stream.readers} in work {gb(stream.waiting)}; of a node {gb(costs.stream_bytes_per_node)}, "
        f"of which {gb(costs.object_store_bytes_per_node)} in Ray's object store. The loss on each device: about "
        f"{gb(costs.loss_bytes)}.",
    ]
    if train.device == "cpu":  # the rates are a GPU's
        return told
    return [
        *told,
        f"Estimate for {machines.nodes} x {machines.gpus} GPUs of {passes} ({machines.decode:g} images/s a core, "
        f"{machines.read_gb_s:g} GB/s a node; stated in `estimate`, not measured there): embedding "
        f"{costs.embed_device_seconds / 3600:,.1f} device-hours, {costs.embed_hours:,.2f} h "
        f"({costs.embed_images_s[0]:,.0f} images/s a GPU, limited by {costs.embed_images_s[1]}); a trial "
        f"{costs.train_device_seconds / 3600:,.1f} device-hours on {train.workers} workers, {costs.trial_hours:,.2f} h "
        f"({costs.train_images_s[0]:,.0f} images/s a GPU, limited by {costs.train_images_s[1]}); the sweep "
        f"{costs.sweep_hours:,.1f} h.",
    ]
