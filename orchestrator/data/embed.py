"""A corpus under the teacher: outputs of its images, embeddings of its texts, one entry of the store for each shard."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.contract import Texts
from methods.outputs import Output
from orchestrator.data.corpus import Corpus, CorpusShard, Shard, corpus_at, is_there
from orchestrator.data.images import decoders
from orchestrator.data.passes import fitting, live_outputs, off_device
from orchestrator.data.pixels import rendered_view
from orchestrator.data.pool import Mapper, Resources, ShardJob, ensure_shards
from orchestrator.data.task import TaskData
from orchestrator.data.views import Policy, draw_all
from orchestrator.models.clip import TextTower, text_tower
from orchestrator.models.load import Network, describe, load_network
from orchestrator.models.names import wants_weights
from orchestrator.spec import Model, SweepSpec
from orchestrator.store import Entry, Store, key_of, write_records

VERSION = 1
STAGES = {"images": "corpus_outputs", "sentences": "text_embeddings", "captions": "text_embeddings"}
PLAIN = Policy(1.0, 0.0)  # view 0 is the same under every policy


def text_tower_of(entry: Model) -> TextTower:
    """The text tower beside a teacher."""
    return text_tower(entry, weights=wants_weights(entry, "teacher"))


@dataclass(frozen=True)
class EmbedJob(ShardJob):
    """Everything that a process needs to embed any shard of a corpus. Picklable.

    Attributes:
        teacher: position in the sweep file.
        what: the corpus's images under the teacher, or texts under its text tower.
        output: of the images.
        device: where the teacher runs.
    """

    teacher: int
    what: str
    output: Output
    device: str

    @property
    def resources(self) -> Resources:
        corpus = self.spec.corpus
        return Resources(corpus.min_actors, corpus.actors, corpus.cpus, corpus.gpus)

    @property
    def corpus(self) -> Corpus:
        if self.what == "sentences":
            assert self.spec.corpus.sentences is not None
            return corpus_at(self.spec.corpus.sentences, "sentences")
        assert self.spec.corpus.images is not None
        return corpus_at(self.spec.corpus.images, "images")

    def reads(self, shard: Shard) -> dict[str, Any]:
        """What the address of a shard's entry hashes; the shard's file is not opened for it."""
        entry = self.spec.teachers[self.teacher]
        common = {"shard": shard.hash, "dtype": self.spec.corpus.dtype, "version": VERSION}
        if self.what == "images":
            network = load_network(entry, "teacher")
            preprocessing = describe(network.preprocessing)
            output = asdict(self.output)
            return common | {"weights": network.identity, "preprocessing": preprocessing, "output": output}
        return common | {"weights": text_tower_of(entry).identity, "column": column_of(self.what)}

    def worker(self) -> ShardEmbedder:
        return ShardEmbedder(self)


def column_of(what: str) -> str:
    """Of a corpus's shards: where its texts are."""
    return "text" if what == "sentences" else "caption"


class ShardEmbedder:
    """Embeds shards of one corpus; the teacher is loaded once."""

    def __init__(self, job: EmbedJob) -> None:
        self.job = job
        torch.set_num_threads(job.spec.train.threads)
        self.shards = job.corpus.shards
        entry = job.spec.teachers[job.teacher]
        self.teacher: Network | None = load_network(entry, "teacher") if job.what == "images" else None
        self.texts: TextTower | None = None if job.what == "images" else text_tower_of(entry).to(job.device)
        network = self.texts if self.teacher is None else self.teacher.module
        assert network is not None
        # Where a trial embeds by itself, its process goes on, and keeps the network.
        weakref.finalize(self, off_device, network, job.device).atexit = False

    def __call__(self, number: int) -> Entry:
        """The shard's entry in the store, made here if nobody has made it."""
        shard, job = self.shards[number], self.job
        reads = job.reads(shard)
        return job.store.compute(STAGES[job.what], key_of(reads), lambda f: self._write(f, shard), reads=reads)

    def _write(self, folder: Path, shard: Shard) -> dict[str, Any]:
        began = time.perf_counter()
        batches = self._images(shard) if self.teacher is not None else self._texts(shard)
        write_records(folder / "records.arrow", shard.rows, batches, self.job.spec.corpus.dtype)
        about: dict[str, Any] = {"seconds": time.perf_counter() - began, "rows": shard.rows}
        about |= {"corpus": shard.address, "shard": shard.file, "hash": shard.hash}
        if self.teacher is not None:
            about |= {"forwards": shard.rows, "output": asdict(self.job.output)}
            about |= {"teacher": self.teacher.entry.model_dump(mode="json")}
        return about

    def _images(self, shard: Shard) -> Iterator[Tensor]:
        assert self.teacher is not None
        module, output = self.teacher.module.to(self.job.device), self.job.output
        images = CorpusShard(shard)
        threads = decoders(self.job.spec.corpus.cpus)
        views = plain_views(images)
        for pixels in rendered_view(images, images.split, views, self.teacher.preprocessing, threads=threads):
            values = live_outputs(self.teacher, module, pixels.to(self.job.device), [output])[output.key]
            yield fitting(values, self.job.spec.corpus.dtype, output, self.teacher, "set corpus.dtype to float32")

    def _texts(self, shard: Shard) -> Iterator[Tensor]:
        assert self.texts is not None
        column = column_of(self.job.what)
        for group in range(len(shard.row_groups)):
            yield self.texts.embed([text or "" for text in shard.read(group, [column])[column].to_pylist()])


def plain_views(images: CorpusShard) -> np.ndarray:
    """[N, 8] the parameters of view 0 of a shard's images."""
    split = images.split
    return draw_all(PLAIN, split.ids, split.sizes, 0)


def prompts_of(task: TaskData) -> list[str]:
    """Every class's words in every template, class by class."""
    words = [task.spec.names.get(name, name).replace("_", " ") for name in task.classes]
    return [template.format(word) for word in words for template in task.spec.templates]


def embedded_prompts(store: Store, task: TaskData, entry: Model, device: str) -> Entry:
    """The teacher's embeddings [C · T, d] of the task's prompts, float32."""
    texts = prompts_of(task)
    tower = text_tower_of(entry)
    reads = {"weights": tower.identity, "texts": key_of(texts), "version": VERSION}

    def write(folder: Path) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            embeddings = tower.to(device).embed(texts)
        finally:
            off_device(tower, device)
        write_records(folder / "records.arrow", len(texts), [embeddings], "float32")
        return {"texts": texts, "seconds": time.perf_counter() - began}

    return store.compute("text_embeddings", key_of(reads), write, reads=reads)


def texts_identity(spec: SweepSpec, task: TaskData, name: Texts) -> str:
    """What identifies the texts of that name; not what embeds them."""
    if name == "prompts":
        return key_of(prompts_of(task))
    address = spec.corpus.sentences if name == "sentences" else spec.corpus.images
    assert address is not None
    return corpus_at(address).identity


def absent(spec: SweepSpec) -> tuple[str, ...]:
    """Which corpora are not here but described by `corpus.expect`: `images`, `sentences`."""
    named = {"images": spec.corpus.images, "sentences": spec.corpus.sentences}
    expected = {name for name in named if getattr(spec.corpus.expect, name)}
    return tuple(n for n, address in named.items() if address is not None and n in expected and not is_there(address))


def kinds_of_texts(spec: SweepSpec) -> tuple[Texts, ...]:
    """Which texts a sweep file brings."""
    found: list[Texts] = ["prompts"]
    if spec.corpus.sentences is not None:
        found.append("sentences")
    if spec.corpus.images is not None and "images" in absent(spec):
        if spec.corpus.expect.captions:
            found.append("captions")
    elif spec.corpus.images is not None:
        counts = corpus_at(spec.corpus.images, "images").manifest["counts"]
        if counts["captions"].get("kept", 0):
            found.append("captions")
    return tuple(found)


def class_vectors(prompts: Tensor, classes: int) -> Tensor:
    """[C, d] at length 1: the mean of the normalised embeddings [C · T, d] of each class's prompts (as CLIP does)."""
    rows = torch.nn.functional.normalize(prompts.float(), dim=-1).view(classes, -1, prompts.shape[-1])
    return torch.nn.functional.normalize(rows.mean(1), dim=-1)


def ensure_embedded(job: EmbedJob, mapper: Mapper) -> list[Entry]:
    """Entries of all shards of the job's corpus, in order; see `ensure_shards`."""
    keys = [key_of(job.reads(shard)) for shard in job.corpus.shards]
    return ensure_shards(job, STAGES[job.what], keys, mapper)
