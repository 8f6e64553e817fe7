"""What the loop needs of a job: its learner before the first step, and the batches of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from methods.contract import Feed, Learner
from methods.outputs import Output
from orchestrator.data.corpus import corpus_at
from orchestrator.data.labels import open_labels
from orchestrator.data.memory import AHEAD, stream_limit, stream_memory
from orchestrator.data.outputs import open_outputs, open_pool_outputs
from orchestrator.data.pixels import Pixels, RenderedPixels, StoredPixels, open_pixels, stored_pixels
from orchestrator.data.pool import JoinedImages, PoolShard
from orchestrator.data.stream import Plan, Stream, blocks_of, decoding_threads, read_on_ray, read_on_threads
from orchestrator.data.task import ImageSet, Split, TaskData, load_task
from orchestrator.models.load import Preprocessing, tuned_network
from orchestrator.store import JoinedRecords, OpenFiles, Store, store_at
from orchestrator.train.feed import Feeder, LiveTeacher, StreamFeeder, TextFeed, TokenFeeder
from orchestrator.train.given import Networks, entry_at, given_for, networks_of, stage_results
from orchestrator.train.job import TrainJob, pool_batch
from orchestrator.train.loop import memory_told


def opened(
    job: TrainJob, *, rank: int = 0, world: int = 1, device: str = "cpu"
) -> tuple[Learner, Feeder | StreamFeeder | TokenFeeder]:
    """What the loop needs of a job: its learner as it is before the first step, and the batches of this rank.

    Raises:
        DeviceMemoryError: if a teacher that sees fresh views does not fit into the device's memory.
    """
    spec, stage = job.spec, job.stage
    store = store_at(job.store_root)
    task = load_task(spec.task, store, listing=job.listing)
    networks = networks_of(spec, job.teacher, job.student)
    given = given_for(stage.reads, networks, task, store, job.seed, stage_results(store, job.inputs))
    learner = stage.learner(stage.params, given)
    if stage.feed.tokens:
        tables = [tuple(joined_records(store, found) for found in job.tokens[name]) for name in stage.feed.tokens]
        return learner, TokenFeeder(tables, batch=spec.train.batch, seed=job.seed, rank=rank, world=world)  # type: ignore[arg-type]
    if spec.corpus.streams(stage.feed.images):
        return learner, _streamed(job, store, networks, rank=rank, world=world, device=device)
    with memory_told(lambda: "out of device memory before the first step, for the teacher that sees fresh views"):
        return learner, _feeder(job, store, task, networks, rank=rank, world=world, device=device)


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


def _streamed(job: TrainJob, store: Store, networks: Networks, *, rank: int, world: int, device: str) -> StreamFeeder:
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
        1 if device == "cpu" else AHEAD,
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
