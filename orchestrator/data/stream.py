"""A corpus streamed into training: which images in which order is decided beforehand, by numbers alone.

Blocks (row groups of shards) come in a new order each epoch, and the rows of a window of blocks in an order of their
own. Both depend on the seed, the epoch and the number of workers only. So a run that is resumed goes on with the very
next image, and what is decoded, where and how far ahead does not matter.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.corpus import Shard
from orchestrator.data.images import decode
from orchestrator.data.views import Policy, draw, render
from orchestrator.models.load import Preprocessing

SPREAD = 4  # blocks for each worker, below which every block is divided among the workers
AHEAD = 4  # blocks that a thread decodes ahead


@dataclass(frozen=True)
class Block:
    """A row group: its shard's number, its own number there, its first row in the shard, and its rows."""

    shard: int
    group: int
    start: int
    rows: int


@dataclass(frozen=True)
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


def blocks_of(shards: Sequence[Shard]) -> list[Block]:
    """Every row group of every shard."""
    found = []
    for number, shard in enumerate(shards):
        starts = np.cumsum([0, *shard.row_groups])
        found += [Block(number, g, int(starts[g]), rows) for g, rows in enumerate(shard.row_groups)]
    return found


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
        self.blocks, self.seed, self.rank, self.world, self.window = list(blocks), seed, rank, world, window
        self.divided = len(self.blocks) < SPREAD * world

    def pieces(self, epoch: int) -> list[Piece]:
        """What this worker reads in an epoch, in order."""
        order = np.random.default_rng([self.seed, 11, epoch]).permutation(len(self.blocks))
        if self.divided:
            pieces = [Piece(self.blocks[i], self.rank, self.world) for i in order]
            return [p for p in pieces if p.block.rows > self.rank]
        return [Piece(self.blocks[i]) for i in order[self.rank :: self.world]]

    def windows(self, position: int = 0) -> Iterator[tuple[Window, int]]:
        """Windows from the image at `position` of this worker's stream on, with how many of the first are done."""
        epoch = 0
        while True:
            pieces = self.pieces(epoch)
            rows = sum(len(p.rows) for p in pieces)
            if rows == 0:
                raise ValueError(f"The corpus has too few images for {self.world} workers.")
            if position < rows:
                for number, (start, count, part) in enumerate(self._split(pieces)):
                    if position >= start + count:
                        continue
                    shuffled = np.random.default_rng([self.seed, 12, epoch, self.rank, number]).permutation(count)
                    yield Window(epoch, tuple(part), shuffled), max(0, position - start)
                position = 0
            else:
                position -= rows
            epoch += 1

    def _split(self, pieces: list[Piece]) -> Iterator[tuple[int, int, list[Piece]]]:
        """(first image, images, pieces) of each window of an epoch."""
        start, count, part = 0, 0, list[Piece]()
        for piece in pieces:
            part.append(piece)
            count += len(piece.rows)
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
    rows = request.piece.rows
    pixels = np.empty((len(rows), 3, size, size), dtype=np.uint8)
    ids, images = table["id"], table["image"]
    heights, widths = table["height"].to_numpy(), table["width"].to_numpy()
    for place, row in enumerate(rows):
        shape = (int(heights[row]), int(widths[row]))
        view = draw(request.policy, ids[int(row)].as_py(), shape, request.epoch + 1)
        pixels[place] = render(decode(images[int(row)].as_py()), view, size, mode).numpy()
    return {"pixels": pixels}


Reader = Callable[[Iterator[Request]], Iterator[dict[str, Any]]]


def read_on_ray(readers: int) -> Reader:
    """Decodes in Ray Data tasks, on whatever node has room."""
    from orchestrator.data.actors import stream_blocks

    return lambda requests: stream_blocks(requests, decoded, readers)


def read_on_threads(threads: int) -> Reader:
    """Decodes on threads of this process; decoders let others run meanwhile."""

    def read(requests: Iterator[Request]) -> Iterator[dict[str, Any]]:
        waiting: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
            try:
                for request in requests:
                    waiting.append(pool.submit(decoded, request))
                    if len(waiting) > threads * AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    return read


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
        while True:
            if not planned:
                first = next(blocks)
                window, done = planned.popleft()
                parts = [first["pixels"], *(next(blocks)["pixels"] for _ in window.pieces[1:])]
            else:
                window, done = planned.popleft()
                parts = [next(blocks)["pixels"] for _ in window.pieces]
            joined = np.concatenate(parts)
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
                    yield np.concatenate(pixels), np.concatenate(numbers)
                    pixels, numbers, have = [], [], 0


def decoding_threads() -> int:
    """How many threads decode: the CPUs that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
