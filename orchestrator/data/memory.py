"""What a stream of images holds in memory: known before it starts, and the same for a corpus of any size."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

SHARE = 0.25  # of a machine's memory, for the streams of all trials on it
AHEAD = 3  # batches that are read before they are asked for where the device is not the CPU, which reads one itself
BATCHES = 2  # beside those that are read ahead: the one in use, and the parts that the next is joined from
CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class StreamMemory:
    """Bytes that the stream of one worker takes at most.

    Attributes:
        window: decoded images that are shuffled together, in the worker's process.
        batches: in the worker's process.
        block: of a decoded row group.
        ahead: how many of these are decoded before their turn: in the process if threads decode, in Ray's object store
            if its tasks do.
        readers: how many more are being decoded.
    """

    window: int
    batches: int
    block: int
    ahead: int
    readers: int

    @property
    def waiting(self) -> int:
        """Bytes of blocks that wait or are being decoded: Ray Data's limit."""
        return (self.ahead + self.readers) * self.block

    @property
    def total(self) -> int:
        return self.window + self.batches + self.waiting


def stream_memory(
    window: int, row_group: int, size: int, batch: int, readers: int, limit: float, read_ahead: int = 1
) -> StreamMemory:
    """How far ahead a worker's stream may decode.

    One window ahead, so that the next is there when this one is used up; fewer blocks where `limit` leaves no room, but
    always one. Window and batch are never made smaller: they decide what is trained on.

    Args:
        window: images that are shuffled together.
        row_group: images of a block.
        size: side of a decoded image, in pixels.
        batch: images of a step of this worker.
        readers: threads or tasks that decode.
        limit: bytes that this worker may take.
        read_ahead: batches that are read before they are asked for: `AHEAD` where it trains on a GPU.
    """
    image = 3 * size * size
    window_bytes, block = (window + row_group - 1) * image, row_group * image  # a window ends with a whole block
    batches = (BATCHES + read_ahead) * batch * image
    fits = (limit - window_bytes - batches) // block - readers
    ahead = int(max(1, min(math.ceil(window / row_group) + readers, fits)))
    return StreamMemory(window_bytes, batches, block, ahead, readers)


def machine_memory() -> int:
    """Bytes that the processes of this machine, or of this container, may use."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(there, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit
        return there


def stream_limit(memory_gb: float | None, threads: int) -> float:
    """Bytes that one worker's stream may take here.

    Args:
        memory_gb: as configured; None for an equal part of `SHARE` of the memory, for each worker that the CPUs allow.
        threads: CPUs of a worker.
    """
    if memory_gb is not None:
        return memory_gb * 1e9
    return SHARE * machine_memory() / max(1, (os.cpu_count() or 1) // threads)
