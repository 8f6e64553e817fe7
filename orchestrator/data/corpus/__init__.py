"""Corpora without labels, for distillation at scale: cleaned images or sentences in Parquet shards."""

from orchestrator.data.corpus.build import build_corpus
from orchestrator.data.corpus.clean import ImageRules
from orchestrator.data.corpus.corpus import (
    Corpus,
    CorpusShard,
    Shard,
    corpus_at,
    is_there,
    open_corpus,
    shard_of,
    verify_corpus,
)
from orchestrator.data.corpus.sources import Kind

__all__ = [
    "Corpus",
    "CorpusShard",
    "ImageRules",
    "Kind",
    "Shard",
    "build_corpus",
    "corpus_at",
    "is_there",
    "open_corpus",
    "shard_of",
    "verify_corpus",
]
