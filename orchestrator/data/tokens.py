"""Texts as a teacher's tokenizer sees them, kept in the store like their embeddings and row by row beside these."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.data.corpus import Corpus, Shard, corpus_at
from orchestrator.data.embed import column_of, prompts_of, text_tower_of
from orchestrator.data.pool import Mapper, Resources, ShardJob, ensure_shards
from orchestrator.data.task import TaskData
from orchestrator.spec import Model
from orchestrator.store import Entry, Store, key_of, write_records

STAGE = "text_tokens"
VERSION = 1


@dataclass(frozen=True)
class TokenJob(ShardJob):
    """Everything that a process needs to tokenize any shard of a corpus. Picklable.

    Attributes:
        teacher: position in the sweep file.
        what: `sentences`, or the `captions` of the corpus's images.
    """

    teacher: int
    what: str

    @property
    def resources(self) -> Resources:
        corpus = self.spec.corpus
        return Resources(corpus.min_actors, corpus.actors, corpus.cpus, 0)

    @property
    def corpus(self) -> Corpus:
        sentences = self.what == "sentences"
        address = self.spec.corpus.sentences if sentences else self.spec.corpus.images
        assert address is not None
        return corpus_at(address, "sentences" if sentences else "images")

    def reads(self, shard: Shard) -> dict[str, Any]:
        """What the address of a shard's entry hashes."""
        tokenizer = text_tower_of(self.spec.teachers[self.teacher]).tokenizer_hash
        return {"shard": shard.hash, "tokenizer": tokenizer, "column": column_of(self.what), "version": VERSION}

    def worker(self) -> _Tokenizer:
        return _Tokenizer(self)


class _Tokenizer:
    def __init__(self, job: TokenJob) -> None:
        self.job, self.shards = job, job.corpus.shards
        torch.set_num_threads(job.spec.train.threads)

    def __call__(self, number: int) -> Entry:
        """The shard's entry in the store, made here if nobody has made it."""
        shard, job = self.shards[number], self.job
        reads = job.reads(shard)
        return job.store.compute(STAGE, key_of(reads), lambda f: self._write(f, shard), reads=reads)

    def _write(self, folder: Path, shard: Shard) -> dict[str, Any]:
        began = time.perf_counter()
        write_records(folder / "records.arrow", shard.rows, self._tokens(shard), "int32")
        about = {"rows": shard.rows, "corpus": shard.address, "shard": shard.file}
        return {"seconds": time.perf_counter() - began, **about}

    def _tokens(self, shard: Shard) -> Iterator[Tensor]:
        tower, column = text_tower_of(self.job.spec.teachers[self.job.teacher]), column_of(self.job.what)
        for group in range(len(shard.row_groups)):
            yield tower.tokenize([text or "" for text in shard.read(group, [column])[column].to_pylist()])


def tokenized_prompts(store: Store, task: TaskData, entry: Model) -> Entry:
    """The tokens [C · T, L] of the task's prompts, int32."""
    texts, tower = prompts_of(task), text_tower_of(entry)
    reads = {"tokenizer": tower.tokenizer_hash, "texts": key_of(texts), "version": VERSION}

    def write(folder: Path) -> dict[str, Any]:
        write_records(folder / "records.arrow", len(texts), [tower.tokenize(texts)], "int32")
        return {"rows": len(texts)}

    return store.compute(STAGE, key_of(reads), write, reads=reads)


def ensure_tokenized(job: TokenJob, mapper: Mapper) -> list[Entry]:
    """Entries of all shards of the job's corpus, in order; see `ensure_shards`."""
    return ensure_shards(job, STAGE, [key_of(job.reads(shard)) for shard in job.corpus.shards], mapper)
