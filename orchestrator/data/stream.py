"""A corpus streamed into training: which images in which order is decided beforehand, by numbers alone.

Blocks (row groups of shards) come in a new order each epoch, and the rows of a window of blocks in an order of their
own. Both depend on the seed, the epoch and the number of workers only. So a run that is resumed goes on with the very
next image, and what is decoded, where and how far ahead does not matter.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.corpus import Shard
from orchestrator.data.images import decode, read_ahead
from orchestrator.data.views import Policy, draw_all, render
from orchestrator.models.load import Preprocessing

SPREAD = 4  # blocks for each worker, below which every block is divided among the workers
AHEAD = 4  # blocks that a thread decodes ahead, where nobody says how many
# Pixels of a block's images, and of their views, below which threads that decode hand Python's lock to each other for
# longer than they decode: one at a time is sooner done than two.
SMALL = 112 * 112
_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class Block:
    """A row group: its shard's number, its own number there, its first row in the shard, and its rows."""

    shard: int
    group: int
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of a block that one worker reads: every `step`-th one from `first` on."""

    block: Block
    first: int = 0
    step: int = 1

    @property
    def rows(self) -> np.ndarray:
        """Numbers within the block."""
        return np.arange(self.first, self.block.rows, self.step)


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together.

    Attributes:
        epoch: which.
        pieces: what is decoded, in this order.
        order: permutation of all their rows, joined.
    """

    epoch: int
    pieces: tuple[Piece, ...]
    order: np.ndarray


class Blocks(Sequence[Block]):
    """Row groups, 32 bytes each in memory: a corpus of 40 million images has 156 250.

    Args:
        table: int64 [n, 4], the fields of each `Block`.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: Any) -> Any:
        return Block(*self.table[number].tolist())


def blocks_of(shards: Sequence[Shard]) -> Blocks:
    """Every row group of every shard."""
    parts = [np.empty((0, 4), dtype=np.int64)]
    for number, shard in enumerate(shards):
        rows = np.array(shard.row_groups, dtype=np.int64)
        groups = np.arange(len(rows))
        parts.append(np.stack([np.full_like(rows, number), groups, rows.cumsum() - rows, rows], 1))
    return Blocks(np.concatenate(parts))


class Plan:
    """The order in which one worker of several sees the images of a corpus; endless.

    Each epoch every image is read once, by one worker. Workers need not get equally many: each goes on with its next
    epoch when its own part ends.

    Args:
        blocks: of the corpus.
        seed: of the run.
        rank, world: which worker of how many.
        window: about how many images are shuffled together.
    """

    def __init__(self, blocks: Sequence[Block], seed: int, rank: int, world: int, window: int) -> None:
        fields = [[b.shard, b.group, b.start, b.rows] for b in blocks] if not isinstance(blocks, Blocks) else []
        self.blocks = blocks if isinstance(blocks, Blocks) else Blocks(np.array(fields, dtype=np.int64).reshape(-1, 4))
        self.seed, self.rank, self.world, self.window = seed, rank, world, window
        self.divided = len(self.blocks) < SPREAD * world

    def pieces(self, epoch: int) -> list[Piece]:
        """What this worker reads in an epoch, in order."""
        return [self._piece(number) for number in self._order(epoch)[0].tolist()]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the blocks of which this worker reads something, in order; how many rows of each)."""
        order = np.random.default_rng([self.seed, 11, epoch]).permutation(len(self.blocks))
        if not self.divided:
            order = order[self.rank :: self.world]
            return order, self.blocks.table[order, 3]
        rows = np.maximum(0, -(-(self.blocks.table[order, 3] - self.rank) // self.world))
        return order[rows > 0], rows[rows > 0]

    def _piece(self, number: int) -> Piece:
        return Piece(self.blocks[number], self.rank, self.world) if self.divided else Piece(self.blocks[number])

    def windows(self, position: int = 0) -> Iterator[tuple[Window, int]]:
        """Windows from the image at `position` of this worker's stream on, with how many of the first are done."""
        epoch = 0
        while True:
            order, counts = self._order(epoch)
            rows = int(counts.sum())
            if rows == 0:
                raise ValueError(f"The corpus has too few images for {self.world} workers.")
            if position < rows:
                for number, (start, count, part) in enumerate(self._split(order.tolist(), counts.tolist())):
                    if position >= start + count:
                        continue
                    shuffled = np.random.default_rng([self.seed, 12, epoch, self.rank, number]).permutation(count)
                    yield Window(epoch, tuple(map(self._piece, part)), shuffled), max(0, position - start)
                position = 0
            else:
                position -= rows
            epoch += 1

    def _split(self, order: list[int], counts: list[int]) -> Iterator[tuple[int, int, list[int]]]:
        """(first image, images, numbers of blocks) of each window of an epoch."""
        start, count, part = 0, 0, list[int]()
        for number, rows in zip(order, counts, strict=True):
            part.append(number)
            count += rows
            if count >= self.window:
                yield start, count, part
                start, count, part = start + count, 0, []
        if part:
            yield start, count, part


@dataclass(frozen=True)
class Request:
    """What a reader needs to decode one piece. Picklable."""

    shard: Shard
    piece: Piece
    epoch: int
    policy: Policy
    preprocessing: Preprocessing


def decoded(request: Request) -> dict[str, Any]:
    """`pixels` uint8 [n, 3, S, S] of a piece's images, each under the view of its epoch (never the plain one)."""
    size, mode = request.preprocessing.size, request.preprocessing.interpolation
    table = request.shard.read(request.piece.block.group, ["id", "image", "height", "width"])
    if request.piece.step > 1:
        table = table.take(request.piece.rows)
    heights, widths = table["height"].to_numpy(), table["width"].to_numpy()
    sizes = list(zip(heights.tolist(), widths.tolist(), strict=True))
    pixels = np.empty((len(sizes), 3, size, size), dtype=np.uint8)
    small = max(size * size, (heights * widths).mean()) < SMALL
    with _ALONE if small else contextlib.nullcontext():
        views = draw_all(request.policy, table["id"].to_pylist(), sizes, request.epoch + 1)
        for place, (image, view) in enumerate(zip(table["image"], views, strict=True)):
            pixels[place] = render(decode(image.as_py()), view, size, mode).numpy()
    return {"pixels": pixels}


Reader = Callable[[Iterator[Request]], Iterator[dict[str, Any]]]


def read_on_ray(readers: int, ahead: int, block_bytes: int) -> Reader:
    """Decodes in Ray Data tasks, on whatever node has room.

    Args:
        readers: tasks at a time.
        ahead: decoded blocks that wait in the object store.
        block_bytes: of one.
    """
    from orchestrator.data.actors import stream_blocks

    return lambda requests: stream_blocks(requests, decoded, readers, ahead, block_bytes)


def read_on_threads(threads: int, ahead: int | None = None) -> Reader:
    """Decodes on threads of this process, `ahead` blocks before their turn; decoders let others run meanwhile."""
    waits = threads * AHEAD if ahead is None else ahead

    return lambda requests: read_ahead(decoded, requests, threads, waits)


class Stream:
    """One worker's images, by position.

    Args:
        plan: the order.
        shards: of the corpus.
        policy, preprocessing: how views are drawn and rendered.
        reader: decodes ahead.
    """

    def __init__(
        self, plan: Plan, shards: Sequence[Shard], policy: Policy, preprocessing: Preprocessing, reader: Reader
    ) -> None:
        self.plan, self.shards, self.reader = plan, shards, reader
        self.policy, self.preprocessing = policy, preprocessing

    def batches(self, position: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From `position` on: (pixels uint8 [size, 3, S, S], numbers [size] of the images in the corpus), endless."""
        planned: deque[tuple[Window, int]] = deque()

        def requests() -> Iterator[Request]:
            for window, done in self.plan.windows(position):
                planned.append((window, done))
                for piece in window.pieces:
                    yield Request(self.shards[piece.block.shard], piece, window.epoch, self.policy, self.preprocessing)

        starts = np.cumsum([0, *(s.rows for s in self.shards)])
        blocks = self.reader(requests())
        pixels, numbers = list[np.ndarray](), list[np.ndarray]()
        have = 0
        for block in (b["pixels"] for b in blocks):
            window, done = planned.popleft()  # the reader has asked for it, or there would be no block
            joined = np.empty((len(window.order), *block.shape[1:]), dtype=np.uint8)
            filled = 0
            while True:  # one block after another, so that no window is in memory twice
                joined[filled : filled + len(block)] = block
                filled += len(block)
                if filled == len(joined):
                    break
                block = next(blocks)["pixels"]
            del block
            places = np.concatenate([starts[p.block.shard] + p.block.start + p.rows for p in window.pieces])
            order = window.order[done:]
            begin = 0
            while begin < len(order):
                chosen = order[begin : begin + size - have]
                pixels.append(joined[chosen])
                numbers.append(places[chosen])
                have += len(chosen)
                begin += len(chosen)
                if have == size:
                    yield (pixels[0] if len(pixels) == 1 else np.concatenate(pixels)), np.concatenate(numbers)
                    pixels, numbers, have = [], [], 0
            del joined


def decoding_threads() -> int:
    """How many threads decode: the CPUs that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
