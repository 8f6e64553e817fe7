"""One training stage as a picklable job, run in this process or by every rank of a group."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from methods.contract import Deployed, Feed, Given, Learner, TrainStage, trainable_parameters
from methods.outputs import Output
from methods.parts.dense import segmenter
from orchestrator.data.corpus import corpus_at
from orchestrator.data.labels import open_labels, plain_labels
from orchestrator.data.memory import stream_limit, stream_memory
from orchestrator.data.outputs import open_outputs, open_pool_outputs
from orchestrator.data.pixels import Pixels, RenderedPixels, StoredPixels, open_pixels, stored_pixels
from orchestrator.data.pool import JoinedImages, PoolShard
from orchestrator.data.stream import Plan, Stream, blocks_of, decoding_threads, read_on_ray, read_on_threads
from orchestrator.data.task import ImageSet, Split, TaskData, load_task
from orchestrator.data.views import Policy
from orchestrator.errors import WorkError
from orchestrator.models import Network, build_network, load_network, save_student
from orchestrator.models.load import Preprocessing, describe, tuned_network
from orchestrator.models.texts import save_text_tower
from orchestrator.spec import SweepSpec, Train
from orchestrator.store import Entry, JoinedRecords, OpenFiles, Store, store_at
from orchestrator.train.feed import Feeder, LiveTeacher, StreamFeeder, TextFeed, TokenFeeder
from orchestrator.train.loop import Checkpoint, Report, fit


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank needs to run one training stage; the data and the teacher's outputs are read from the store.

    Attributes:
        spec: the sweep file.
        store_root: the store that every rank can read.
        stage: what to train.
        teacher, student: positions in the sweep file, or None.
        outputs: store addresses of teacher outputs, by output key, one for each view (of a corpus, for each shard);
            empty for a live teacher.
        inputs: store addresses of earlier stages' results by stage name.
        of: store address of the tuned teacher whose outputs are read; None for the teacher itself.
        pool: store addresses of the shards of generated images that come along.
        pool_outputs: store addresses of teacher outputs on these, by output key, for each view one for each shard.
        captions: store addresses of the embeddings of its captions, one for each shard.
        texts: store addresses of the embeddings of the texts that come along, joined.
        tokens: store addresses of texts that are read instead of images, by name: of their embeddings, of their tokens.
        stream_here: decode in this process, where no Ray runs.
        steps, seed, device: for how long, from where, on what.
        scratch: folder of the checkpoint.
        policy: how views are drawn.
    """

    spec: SweepSpec
    store_root: str
    stage: TrainStage
    teacher: int | None
    student: int | None
    outputs: dict[str, list[str]]
    inputs: dict[str, str]
    steps: int
    seed: int
    device: str
    scratch: str
    policy: Policy
    of: str | None = None
    pool: list[str] = field(default_factory=list)
    pool_outputs: dict[str, list[list[str]]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    stream_here: bool = True


@dataclass(frozen=True)
class Networks:
    """The networks of a trial as its stages see them."""

    teacher: Network | None
    student: Network | None

    def trained(self, which: str) -> Network:
        network = self.teacher if which == "teacher" else self.student
        assert network is not None
        return network


def networks_of(spec: SweepSpec, teacher: int | None, student: int | None) -> Networks:
    """Loads what a cell names, once a process."""
    return Networks(
        load_network(spec.teachers[teacher], "teacher") if teacher is not None else None,
        load_network(spec.students[student], "student") if student is not None else None,
    )


def given_for(
    reads: tuple[str, ...],
    networks: Networks,
    task: TaskData,
    store: Store,
    seed: int,
    results: dict[str, dict[str, torch.Tensor]],
    outputs: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
) -> Given:
    """What a stage declared, and nothing else. Seeds torch, so that new layers are drawn from `seed`.

    Masks are given at the teacher's input size, since whoever reads labels reads the teacher's outputs too.
    """
    torch.manual_seed(seed)
    classes = len(task.classes)
    decoder = task.spec.decoder if task.spec.kind == "segmentation" else None
    values: dict[str, Any] = dict(texts or {})
    if "teacher" in reads:
        values["teacher"] = _thawed(networks.trained("teacher").module)
    if "student" in reads:
        values["student"] = fresh_student(networks.trained("student"), classes, decoder)
    if "labels" in reads:
        size = networks.teacher.preprocessing.size if networks.teacher is not None else 0
        values["labels"] = plain_labels(store, task, task.train, task.labelled, size)
    return Given(values=values, num_classes=classes, results=results, outputs=outputs, kind=task.info.kind)


def _thawed(module: torch.nn.Module) -> torch.nn.Module:
    module = copy.deepcopy(module).cpu()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def fresh_student(network: Network, classes: int, decoder: str | None = None) -> torch.nn.Module:
    """A network with `classes` outputs: its pre-trained weights, or else (a student) ones drawn from torch's seed.

    Args:
        network: as loaded.
        classes: of the task.
        decoder: `linear` or `conv` for `classes` outputs a pixel.
    """
    from orchestrator.models.names import wants_weights

    if decoder is not None:
        return segmenter(fresh_student(network, 0), classes, decoder)
    if network.role == "teacher" or wants_weights(network.entry, "student"):
        module = _thawed(network.module)
        module.reset_classifier(classes)  # type: ignore[operator]
        return module
    return build_network(network.entry, num_classes=classes)


def entry_at(store: Store, address: str) -> Entry:
    """The published entry at `stage/key`."""
    stage, _, key = address.partition("/")
    entry = store.get(stage, key)
    if entry is None:
        raise LookupError(f"The store has lost {address}.")
    return entry


def stage_results(store: Store, inputs: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of earlier stages by stage name."""
    return {name: load_file(entry_at(store, address).path / "model.safetensors") for name, address in inputs.items()}


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


def opened(
    job: TrainJob, *, rank: int = 0, world: int = 1, device: str = "cpu"
) -> tuple[Learner, Feeder | StreamFeeder | TokenFeeder]:
    """What the loop needs of a job: its learner as it is before the first step, and the batches of this rank."""
    spec, stage = job.spec, job.stage
    store = store_at(job.store_root)
    task = load_task(spec.task, store)
    networks = networks_of(spec, job.teacher, job.student)
    given = given_for(stage.reads, networks, task, store, job.seed, stage_results(store, job.inputs))
    learner = stage.learner(stage.params, given)
    if stage.feed.tokens:
        tables = [tuple(joined_records(store, found) for found in job.tokens[name]) for name in stage.feed.tokens]
        return learner, TokenFeeder(tables, batch=spec.train.batch, seed=job.seed, rank=rank, world=world)  # type: ignore[arg-type]
    if spec.corpus.streams(stage.feed.images):
        return learner, _streamed(job, store, networks, rank=rank, world=world)
    return learner, _feeder(job, store, task, networks, rank=rank, world=world, device=device)


def pool_batch(train: Train, feed: Feed) -> int:
    """Generated images of a global batch: what the ratio asks for, or the nearest number that every rank can share."""
    shares = train.workers * train.accumulate
    return max(1, round(train.batch * feed.pool_ratio / shares)) * shares


class UnlikeError(WorkError):
    """A rank would train something else than the first one."""


def identity_of(job: TrainJob) -> dict[str, str]:
    """What all ranks must agree on."""
    stage = job.stage
    try:
        code = inspect.getsource(stage.learner)
    except (OSError, TypeError):
        code = ""  # typed in a notebook, and sent to the ranks as it is
    what = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in ("spec", "stage", "device")}
    resolved = repr([job.spec.model_dump_json(), stage.learner.__qualname__, repr(stage), sorted(what.items())])
    return {
        "configuration": hashlib.sha256(resolved.encode()).hexdigest()[:16],
        "learner": hashlib.sha256(code.encode()).hexdigest()[:16],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm")},
    }


def check_alike(own: dict[str, str], rank: int, world: int) -> None:
    """Compares what the ranks have resolved; every rank must call it.

    Raises:
        UnlikeError: on every rank alike, naming the first rank that differs and rank 0.
    """
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (platform.node(), own))
    node, first = found[0]
    for other, (there, theirs) in enumerate(found):
        for name in first:
            if theirs.get(name) != first[name]:
                raise UnlikeError(
                    f"The {name} of rank {other} (node {there}) is {theirs.get(name)}, and that of rank 0 (node "
                    f"{node}) is {first[name]}: all nodes must have the same sweep file, code and libraries."
                )


def joined_records(store: Store, addresses: Sequence[str]) -> JoinedRecords:
    """The tables at these addresses as one."""
    entries = [entry_at(store, address) for address in addresses]
    if not all("rows" in entry.meta["about"] for entry in entries):
        return JoinedRecords(open_outputs(entries))
    files = OpenFiles([entry.path / "records.arrow" for entry in entries])
    return JoinedRecords(files, [entry.meta["about"]["rows"] for entry in entries])


def _texts(job: TrainJob, store: Store) -> TextFeed | None:
    feed = job.stage.feed
    if not feed.texts:
        return None
    rows = None
    if feed.text_rows:
        rows = stage_results(store, {feed.text_rows: job.inputs[feed.text_rows]})[feed.text_rows]["rows"].numpy()
    return TextFeed(joined_records(store, job.texts), rows, feed.text_batch or job.spec.train.batch, job.seed)


def _streamed(job: TrainJob, store: Store, networks: Networks, *, rank: int, world: int) -> StreamFeeder:
    spec, corpus = job.spec, job.spec.corpus
    assert corpus.images is not None
    opened = corpus_at(corpus.images, "images")
    trained = networks.trained(job.stage.trains).preprocessing
    batch = spec.train.batch // world
    here = job.stream_here or corpus.readers == 0
    readers = decoding_threads() if here else corpus.readers
    memory = stream_memory(
        corpus.window,
        int(opened.manifest["row_group"]),
        trained.size,
        batch,
        readers,
        stream_limit(corpus.memory_gb, spec.train.threads),
    )
    reader = read_on_threads(readers, memory.ahead) if here else read_on_ray(readers, memory.ahead, memory.block)
    return StreamFeeder(
        Stream(
            Plan(blocks_of(opened.shards), job.seed, rank, world, corpus.window),
            opened.shards,
            job.policy,
            trained,
            reader,
        ),
        trained,
        {key: joined_records(store, addresses) for key, addresses in job.outputs.items()},
        captions=joined_records(store, job.captions) if job.captions else None,
        texts=_texts(job, store),
        batch=batch,
    )


def _feeder(
    job: TrainJob, store: Store, task: TaskData, networks: Networks, *, rank: int, world: int, device: str
) -> Feeder:
    spec, feed = job.spec, job.stage.feed
    trained = networks.trained(job.stage.trains).preprocessing
    views = None if spec.train.fresh else spec.train.views
    common: dict[str, Any] = {"views": views, "seed": job.seed, "rank": rank, "world": world}

    def pixels_of(preprocessing: Preprocessing) -> Pixels:
        return open_pixels(store, task, task.train, job.policy, views, preprocessing, spec.store.pixels_gb)

    def live_teacher(images: ImageSet, split: Split, outputs: tuple[Output, ...]) -> LiveTeacher | None:
        if not (outputs and spec.train.fresh):
            return None
        base = networks.trained("teacher")
        network = tuned_network(entry_at(store, job.of).path, job.of, base) if job.of is not None else base
        return LiveTeacher(network, RenderedPixels(images, split, job.policy, network.preprocessing), outputs, device)

    generated = None
    if job.pool:
        shards = [PoolShard(entry_at(store, address)) for address in job.pool]
        joined = JoinedImages(shards, feed.pool_size)
        if views is None:
            pixels: Pixels = RenderedPixels(joined, joined.split, job.policy, trained)
        else:
            stored = [[stored_pixels(store, s, s.split, job.policy, v, trained) for s in shards] for v in range(views)]
            pixels = StoredPixels([JoinedRecords(tables) for tables in stored])
        generated = Feeder(
            Feed("all", outputs=feed.pool_outputs),
            len(joined.split),
            pixels,
            trained,
            tables={
                key: open_pool_outputs([[entry_at(store, a) for a in shards] for shards in addresses])
                for key, addresses in job.pool_outputs.items()
            },
            live=live_teacher(joined, joined.split, feed.pool_outputs),
            batch=pool_batch(spec.train, feed),
            stream=8,
            **common,
        )
    theirs = networks.trained("teacher").preprocessing if feed.teacher_images else None
    labels = None
    if feed.labels:
        limit = spec.store.pixels_gb
        labels = open_labels(store, task, task.train, task.labelled, job.policy, views, trained.size, limit)
    return Feeder(
        feed,
        len(task.train),
        pixels_of(trained),
        trained,
        labelled=task.labelled,
        labels=labels.batch if labels is not None else None,
        tables={key: open_outputs([entry_at(store, a) for a in found]) for key, found in job.outputs.items()},
        live=live_teacher(task, task.train, () if feed.plain else feed.outputs),
        teacher=(pixels_of(theirs), theirs) if theirs is not None else None,
        generated=generated,
        texts=_texts(job, store),
        batch=spec.train.batch,
        **common,
    )


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
