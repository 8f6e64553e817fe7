"""The items of a source in order, each with its place, read and cleaned on threads."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from orchestrator.data.corpus.clean import clean_image, clean_sentence
from orchestrator.data.corpus.settings import Settings
from orchestrator.data.corpus.sources import CorpusSource, Raw
from orchestrator.data.images import CorruptError
from orchestrator.errors import WorkError

AGAIN = "The same command goes on after the shards that are finished."
AHEAD = 4  # items a worker that are read before their turn


class Place(NamedTuple):
    """How far a source was read.

    Attributes:
        piece: its number.
        items: how many of its items.
        stamps: hash of the stamps of all pieces up to it.
    """

    piece: int
    items: int
    stamps: str


class Cleaned(NamedTuple):
    """An item after cleaning.

    Attributes:
        row: what is stored; None if it is skipped.
        digest: of its content.
        reasons: why it was converted; why it is skipped.
        caption: what became of the caption; empty if there was none.
    """

    row: dict[str, Any] | None
    digest: bytes
    reasons: tuple[str, ...]
    caption: str = ""


def chained(before: str, stamp: str) -> str:
    """Hash of all stamps until here: that of those before, and of one more."""
    return hashlib.sha256(f"{before} {stamp}".encode()).hexdigest()


def items_after(source: CorpusSource, after: Place | None) -> Iterator[tuple[Place, Raw]]:
    """Every item after a place, with the place that is reached by it.

    Raises:
        WorkError: if a piece cannot be read.
    """
    stamps = ""
    for number, piece in enumerate(source.pieces()):
        stamps = chained(stamps, piece.stamp)
        skip = 0
        if after is not None and number <= after.piece:
            if number < after.piece:
                continue
            skip = after.items
        try:
            for count, raw in enumerate(islice(source.read(piece), skip, None), skip + 1):
                yield Place(number, count, stamps), raw
        except (OSError, pa.ArrowException) as error:
            raise WorkError(f"{piece.name} cannot be read: {error}. {AGAIN}") from None


def in_order(
    function: Callable[[Raw], Cleaned], items: Iterator[tuple[Place, Raw]], workers: int
) -> Generator[tuple[Place, Cleaned], None, None]:
    """Maps on threads, in order; at most `AHEAD` items a worker are in memory."""
    if workers == 1:
        for place, raw in items:
            yield place, function(raw)
        return
    pool = ThreadPoolExecutor(workers)  # decoders, encoders and hashing release the interpreter lock
    waiting: deque[tuple[Place, Future[Cleaned]]] = deque()
    try:
        for place, raw in items:
            waiting.append((place, pool.submit(function, raw)))
            if len(waiting) > AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def cleaned(raw: Raw, settings: Settings) -> Cleaned:
    """What is stored of an item, or why it is skipped; see `clean.py`."""
    try:
        data = raw.load()
        if settings.kind == "sentences":
            text = clean_sentence(data, settings.longest)
            digest = hashlib.sha256(text.encode())
            return Cleaned({"id": digest.hexdigest(), "text": text}, digest.digest(), ())
        image = clean_image(data, settings.rules)
    except CorruptError as reason:
        return Cleaned(None, b"", (str(reason),))
    caption, told = None, ""
    if raw.caption is not None:
        try:
            caption, told = clean_sentence(raw.caption, settings.longest), "kept"
        except CorruptError as reason:
            told = str(reason)
    digest = hashlib.sha256(image.data)
    row = {"id": digest.hexdigest(), "image": image.data, "height": image.height, "width": image.width}
    return Cleaned({**row, "caption": caption}, digest.digest(), image.converted, told)
