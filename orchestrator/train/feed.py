"""Batches of a training stage: which images, which views, in an order that only the seed and the step decide."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.contract import Batch, Feed, Table
from methods.outputs import Output
from orchestrator.data.memory import AHEAD
from orchestrator.data.passes import live_outputs
from orchestrator.data.pixels import Pixels
from orchestrator.data.stream import Stream
from orchestrator.models.load import Network, Preprocessing
from orchestrator.store import JoinedRecords, Records

WHOLE = 1 << 22  # items up to which a permutation is kept: 34 MB
ROUNDS = 6  # of the Feistel network


@dataclass
class LiveTeacher:
    """The teacher run on each batch, where a configuration asks for fresh views."""

    network: Network
    pixels: Pixels
    outputs: tuple[Output, ...]
    device: str
    forwards: int = 0

    def __post_init__(self) -> None:
        self.module = self.network.module.to(self.device)

    def rows(self, rows: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """Outputs by key, one row an image."""
        self.forwards += len(rows)
        pixels = self.pixels.batch(rows, views).to(self.device)
        return live_outputs(self.network, self.module, pixels, self.outputs)


class Order:
    """An endless, seeded order over `count` items: a new permutation each epoch.

    Up to `WHOLE` items it is drawn and kept; beyond, each place of it is computed, and nothing is kept.
    """

    def __init__(self, count: int, seed: int, stream: int) -> None:
        self.count, self.seed, self.stream = count, seed, stream
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def take(self, start: int, amount: int) -> tuple[np.ndarray, np.ndarray]:
        """(items, epochs) at positions `start` to `start + amount` of the stream."""
        epochs, offsets = np.divmod(np.arange(start, start + amount), self.count)
        items = np.empty(amount, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            items[now] = self._items(epoch, offsets[now])
        return items, epochs

    def _items(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        if self.count > WHOLE:
            return scattered(offsets, self.count, [self.seed, self.stream, epoch])
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, self.stream, epoch]).permutation(self.count)
            self._epoch = epoch
        return self._permutation[offsets]


def scattered(places: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
    """Values at these places of a pseudo-random permutation of `count` items, which is nowhere kept.

    A Feistel network permutes the next power of four; what falls beyond `count` walks on along its cycle.
    """
    half = np.uint64(-(-(count - 1).bit_length() // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(list(seed)).generate_state(ROUNDS, np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class TextFeed:
    """Texts of each step, in an order that images play no part in; the same on every rank.

    Args:
        table: teacher embeddings [n, d].
        rows: which of them are drawn from; None for all.
        batch: texts of a step.
        seed: decides the order.
    """

    def __init__(self, table: Table, rows: np.ndarray | None, batch: int, seed: int) -> None:
        self.table, self.kept, self.batch = table, rows, batch
        self.order = Order(len(table) if rows is None else len(rows), seed, 20)

    def take(self, step: int) -> Tensor:
        """[M, d] as stored."""
        items, _ = self.order.take(step * self.batch, self.batch)
        return self.table.rows(items if self.kept is None else self.kept[items])


class ReadAhead:
    """Reads the batches of steps to come in a thread of its own, one after the other.

    Args:
        read: gives the batch of a step.
        device: where batches go. For the CPU they are made float32 here, for any other they are sent as they are
            stored, from pinned memory.
        ahead: batches that are read before they are asked for; on the CPU one.
    """

    def __init__(self, read: Callable[[int], Batch], device: str, ahead: int) -> None:
        here = device == "cpu"
        self.read, self.ready, self.ahead = read, _wide if here else _pinned, 1 if here else ahead
        self._reader = ThreadPoolExecutor(1)
        self._coming: deque[tuple[int, Future[Batch]]] = deque()

    def take(self, step: int) -> Batch:
        """The batch of `step`; those after it are read meanwhile. Any step but the next one begins anew."""
        if self._coming and self._coming[0][0] != step:
            for _, future in self._coming:
                future.cancel()
            self._coming.clear()
        if not self._coming:
            self._submit(step)
        _, future = self._coming.popleft()
        batch = future.result()
        while len(self._coming) < self.ahead:
            self._submit(step + 1 + len(self._coming))
        return batch

    def _submit(self, step: int) -> None:
        self._coming.append((step, self._reader.submit(lambda: self.ready(self.read(step)))))

    def close(self) -> None:
        """Waits for what is being read; nothing more is."""
        self._reader.shutdown(wait=True, cancel_futures=True)


Tables = Mapping[str, Sequence[Records | JoinedRecords]]
Labels = Callable[[np.ndarray, np.ndarray], Tensor]


class Feeder:
    """Batches by step. Rank r of w reads every w-th row of the global batch, so that all ranks together read it once.

    Args:
        feed: what the stage declared.
        count: images that there are.
        pixels: of these, at the trained network's size.
        preprocessing: the trained network's.
        labelled: which of them are labelled.
        labels: gives the labels of (rows, views); rows without one included.
        tables: by output key, one table for each stored view; or
        live: the teacher, for fresh views.
        teacher: pixels and preprocessing of the teacher, if its own images are asked for.
        generated: feeds what comes along from a pool.
        texts: feeds the texts that come along.
        batch: global batch size.
        views: stored views; None for fresh ones, a new view each epoch.
        seed: decides order and views.
        stream: tells the draws of two feeders of one stage apart.
        rank, world: this process among how many.
    """

    def __init__(
        self,
        feed: Feed,
        count: int,
        pixels: Pixels,
        preprocessing: Preprocessing,
        *,
        labelled: Sequence[int] = (),
        labels: Labels | None = None,
        tables: Tables | None = None,
        live: LiveTeacher | None = None,
        teacher: tuple[Pixels, Preprocessing] | None = None,
        generated: Feeder | None = None,
        texts: TextFeed | None = None,
        batch: int,
        views: int | None,
        seed: int,
        stream: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.feed, self.pixels, self.preprocessing, self.labels = feed, pixels, preprocessing, labels
        self.tables, self.live, self.teacher, self.generated = tables or {}, live, teacher, generated
        self.texts = texts
        self.batch, self.views, self.seed, self.rank, self.world = batch, views, seed, rank, world
        known = np.asarray(labelled, dtype=np.int64)
        everything = np.arange(count, dtype=np.int64)
        unlabelled = np.setdiff1d(everything, known)
        if feed.images == "labelled":
            self.pools = [(known, batch)]
        elif feed.labels and len(unlabelled):
            # A multiple of this unit gives every rank of 2, 4 or 8 as many labelled rows, where the batch allows it.
            unit = math.gcd(max(batch // 2, 1), 8)
            share = min(max(round(batch * feed.labelled_fraction / unit), 1), batch // unit - 1) * unit
            self.pools = [(known, share), (unlabelled, batch - share)]
        else:
            self.pools = [(everything, batch)]
        self.orders = [Order(len(pool), seed, stream + i) for i, (pool, _) in enumerate(self.pools)]
        self._ahead: ReadAhead | None = None

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of train, views) of this rank's part of the global batch of `step`."""
        rows, views = [], []
        for (pool, amount), order in zip(self.pools, self.orders, strict=True):
            items, epochs = order.take(step * amount, amount)
            if self.views is None:
                chosen = epochs + 1
            else:
                chosen = np.random.default_rng([self.seed, order.stream, step, 1]).integers(0, self.views, amount)
            rows.append(pool[items])
            views.append(chosen)
        return np.concatenate(rows)[self.rank :: self.world], np.concatenate(views)[self.rank :: self.world]

    def even(self, parts: int) -> bool:
        """Whether every rank has as many rows with a label, in each of so many parts of its batch."""
        return all(amount % (self.world * parts) == 0 for _, amount in self.pools)

    def _read(self, step: int) -> Batch:
        rows, views = self.rows(step)
        outputs: dict[str, Tensor] = {}
        for key, tables in self.tables.items():
            if self.feed.plain:
                outputs[key] = tables[0].rows(rows)
                continue
            values = torch.empty((len(rows), *tables[0].shape), dtype=tables[0].dtype)
            for view in np.unique(views):
                where = np.flatnonzero(views == view)
                values[torch.from_numpy(where)] = tables[int(view)].rows(rows[where])
            outputs[key] = values
        if self.live is not None:
            outputs |= self.live.rows(rows, views)
        labels = self.labels(rows, views) if self.feed.labels and self.labels is not None else None
        theirs = self.teacher[0].batch(rows, views) if self.teacher is not None else None
        more = self.generated._read(step) if self.generated is not None else None
        texts = self.texts.take(step) if self.texts is not None else None
        return Batch(self.pixels.batch(rows, views), labels, outputs, theirs, more, texts)

    def __call__(self, step: int, device: str) -> Batch:
        """The batch of `step` on `device`; the next one is read meanwhile, on a GPU the next few."""
        if self._ahead is None:
            self._ahead = ReadAhead(self._read, device, 1 if self._live else AHEAD)
        return self._prepared(self._ahead.take(step), device)

    @property
    def _live(self) -> bool:
        """Whether a teacher runs on what is read, which then takes room on its device."""
        return self.live is not None or (self.generated is not None and self.generated._live)

    def _prepared(self, batch: Batch, device: str) -> Batch:
        """On `device`, pixels normalised."""

        return Batch(
            self.preprocessing.normalise(_move(batch.images, device)),
            _indices(_move(batch.labels, device)) if batch.labels is not None else None,
            {k: _move(v, device).float() for k, v in batch.outputs.items()},
            self.teacher[1].normalise(_move(batch.teacher_images, device))
            if self.teacher is not None and batch.teacher_images is not None
            else None,
            self.generated._prepared(batch.generated, device)
            if self.generated is not None and batch.generated is not None
            else None,
            _move(batch.texts, device).float() if batch.texts is not None else None,
        )

    @property
    def live_forwards(self) -> int:
        """Images that this rank's live teacher has seen."""
        own = self.live.forwards if self.live is not None else 0
        return own + (self.generated.live_forwards if self.generated is not None else 0)

    def close(self) -> None:
        """Waits for the read-ahead and stops it."""
        if self._ahead is not None:
            self._ahead.close()


class StreamFeeder:
    """Batches by step of a corpus that is streamed. Rank r of w has a stream of its own.

    Args:
        stream: this rank's images.
        preprocessing: the trained network's.
        tables: by output key, teacher outputs of the plain images, one row an image of the corpus.
        captions: embeddings of the images' captions, one row an image, if they are asked for.
        texts: feeds the texts that come along.
        batch: images of a step of this rank.
    """

    live_forwards = 0

    def __init__(
        self,
        stream: Stream,
        preprocessing: Preprocessing,
        tables: Mapping[str, Table],
        *,
        captions: Table | None = None,
        texts: TextFeed | None = None,
        batch: int,
    ) -> None:
        self.stream, self.preprocessing, self.tables = stream, preprocessing, tables
        self.captions, self.texts, self.batch = captions, texts, batch
        self._next = -1  # that is read
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
        self._ahead: ReadAhead | None = None

    def _read(self, step: int) -> Batch:
        if step != self._next:
            self._batches = self.stream.batches(step * self.batch, self.batch)
        pixels, rows = next(self._batches)
        self._next = step + 1
        return Batch(
            torch.from_numpy(pixels),
            outputs={key: table.rows(rows) for key, table in self.tables.items()},
            texts=self.texts.take(step) if self.texts is not None else None,
            captions=self.captions.rows(rows) if self.captions is not None else None,
        )

    def __call__(self, step: int, device: str) -> Batch:
        """The batch of `step` on `device`; the next ones are read meanwhile. Any other step restarts the stream."""
        if self._ahead is None:
            self._ahead = ReadAhead(self._read, device, AHEAD)
        batch = self._ahead.take(step)
        return Batch(
            self.preprocessing.normalise(_move(batch.images, device)),
            None,
            {k: _move(v, device).float() for k, v in batch.outputs.items()},
            texts=_move(batch.texts, device).float() if batch.texts is not None else None,
            captions=_move(batch.captions, device).float() if batch.captions is not None else None,
        )

    def close(self) -> None:
        """Waits for the read-ahead and stops the stream."""
        if self._ahead is not None:
            self._ahead.close()
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class TokenFeeder:
    """Texts by step, without images. Rank r of w reads every w-th row of the global batch.

    Args:
        tables: teacher embeddings [n, d] of each kind of texts, and their tokens [n, L].
        batch: texts of a step, over all ranks.
        seed: decides the order.
        rank, world: this process among how many.
    """

    live_forwards = 0

    def __init__(
        self, tables: Sequence[tuple[Table, Table]], *, batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.tables, self.batch, self.rank, self.world = tables, batch, rank, world
        self.starts = np.cumsum([0, *(len(embeddings) for embeddings, _ in tables)])
        self.order = Order(int(self.starts[-1]), seed, 20)

    def __call__(self, step: int, device: str) -> Batch:
        """The batch of `step` on `device`; it has no images."""
        items, _ = self.order.take(step * self.batch, self.batch)
        items = items[self.rank :: self.world]
        owners = np.searchsorted(self.starts, items, side="right") - 1
        texts: Tensor | None = None
        tokens: Tensor | None = None
        for owner in np.unique(owners).tolist():
            where = torch.from_numpy(np.flatnonzero(owners == owner))
            rows = items[where.numpy()] - self.starts[owner]
            u, t = (table.rows(rows) for table in self.tables[owner])
            if texts is None or tokens is None:
                texts, tokens = torch.empty(len(items), u.shape[1]), torch.empty(len(items), t.shape[1]).long()
            texts[where], tokens[where] = u.float(), t.long()
        assert texts is not None
        assert tokens is not None
        if device != "cpu":
            texts, tokens = texts.pin_memory(), tokens.pin_memory()
        return Batch(torch.empty(0, device=device), texts=_move(texts, device), tokens=_move(tokens, device))

    def close(self) -> None:
        """Nothing is read ahead."""


def _move(tensor: Tensor, device: str) -> Tensor:
    """On `device`; a copy from pinned memory does not wait for what the device has still to do."""
    return tensor.to(device, non_blocking=True)


def _wide(batch: Batch) -> Batch:
    """The same batch with what a teacher gave as float32."""
    return replace(
        batch,
        outputs={key: value.float() for key, value in batch.outputs.items()},
        generated=_wide(batch.generated) if batch.generated is not None else None,
        texts=batch.texts.float() if batch.texts is not None else None,
        captions=batch.captions.float() if batch.captions is not None else None,
    )


def _pinned(batch: Batch) -> Batch:
    """The same batch with its tensors of the CPU in memory from which a device copies by itself."""

    def pinned(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.pin_memory() if value.device.type == "cpu" else value
        if isinstance(value, dict):
            return {key: pinned(one) for key, one in value.items()}
        return _pinned(value) if isinstance(value, Batch) else value

    return Batch(**{name: pinned(value) for name, value in vars(batch).items()})


def _indices(labels: Tensor) -> Tensor:
    """Masks are bytes until they are where the loss is computed."""
    return labels.long() if labels.dtype == torch.uint8 else labels
