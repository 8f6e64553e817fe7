"""What the corpora of a sweep hold: by their manifests, or as the sweep file expects them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.data.corpus import corpus_at
from orchestrator.data.corpus.settings import ROW_GROUP, ROWS_PER_SHARD
from orchestrator.data.embed import absent
from orchestrator.spec import SweepSpec

ROW_BYTES = 84  # of an image beside its bytes in a shard: id, height, width, offsets


@dataclass(frozen=True)
class Holdings:
    """What the corpora hold.

    Attributes:
        image_shards, sentence_shards: rows of each shard.
        image_bytes, sentence_bytes: of all shards.
        captions: images that have one.
        row_group: images that are decoded together.
    """

    image_shards: tuple[int, ...] = ()
    sentence_shards: tuple[int, ...] = ()
    image_bytes: int = 0
    sentence_bytes: int = 0
    captions: int = 0
    row_group: int = ROW_GROUP["images"]

    @property
    def images(self) -> int:
        return sum(self.image_shards)

    @property
    def sentences(self) -> int:
        return sum(self.sentence_shards)


def shards_of(rows: int, rows_per_shard: int) -> tuple[int, ...]:
    """Rows of each shard of a corpus."""
    return tuple(min(rows_per_shard, rows - start) for start in range(0, rows, rows_per_shard))


def holdings_of(spec: SweepSpec) -> Holdings:
    """From the manifests, or as `corpus.expect` says where they are not here."""
    corpus, expect = spec.corpus, spec.corpus.expect
    facts: dict[str, Any] = {}
    gone = absent(spec)
    if corpus.images is not None and "images" in gone:
        facts["image_shards"] = shards_of(expect.images, ROWS_PER_SHARD["images"])
        facts["image_bytes"] = expect.images * (expect.image_bytes + ROW_BYTES)
        facts["captions"] = expect.captions
    elif corpus.images is not None:
        opened = corpus_at(corpus.images, "images")
        facts["image_shards"] = tuple(s.rows for s in opened.shards)
        facts["image_bytes"] = sum(s.bytes for s in opened.shards)
        facts["captions"] = opened.manifest["counts"]["captions"].get("kept", 0)
        facts["row_group"] = int(opened.manifest["row_group"])
    if corpus.sentences is not None and "sentences" in gone:
        facts["sentence_shards"] = shards_of(expect.sentences, ROWS_PER_SHARD["sentences"])
        facts["sentence_bytes"] = expect.sentences * expect.sentence_bytes
    elif corpus.sentences is not None:
        opened = corpus_at(corpus.sentences, "sentences")
        facts["sentence_shards"] = tuple(s.rows for s in opened.shards)
        facts["sentence_bytes"] = sum(s.bytes for s in opened.shards)
    return Holdings(**facts)
