"""Maps over a pool of actors, and streams of blocks: the only module that knows Ray Data."""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

from orchestrator.data.pool import ShardJob, make_here
from orchestrator.process import settle

Segment = tuple[Any, dict[str, Any] | None]  # the iterator of a running execution, and its first block
REST_S = 0.02  # at most, in a round of an execution
WAITED_S = 0.01  # a round that takes longer has waited for a task
SEGMENT = 512  # blocks of one Ray Data execution; the next one starts before it ends


class _ShardActor:
    """One actor of the pool: its model is loaded once, each shard is published as soon as it is made."""

    def __init__(self, job: ShardJob) -> None:
        self._make = job.worker()
        settle()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "computed": self._make(int(row["shard"])).computed}


def make_on_actors(job: ShardJob, shards: list[int]) -> list[int]:
    """Makes shards on the job's actors. After a death only what is missing is made again.

    Where these would compute on a GPU and reserve none, they would see none: this process, which holds one, makes them.
    """
    if job.unreserved:
        return make_here(job, shards)
    wanted = job.resources
    context = DataContext.get_current()
    context.enable_progress_bars = False
    resources: dict[str, Any] = {"num_cpus": wanted.cpus}
    if wanted.gpus:
        resources["num_gpus"] = wanted.gpus
    most = min(wanted.most, len(shards))
    rows = ray.data.from_items([{"shard": i} for i in shards], override_num_blocks=len(shards))
    made = rows.map(
        _ShardActor,  # type: ignore[arg-type]
        fn_constructor_args=[job],
        compute=ActorPoolStrategy(min_size=min(wanted.least, most), max_size=most),
        # Its trial's placement group has no room for a generator of its own, and ends at that trial's node.
        scheduling_strategy="SPREAD" if wanted.cpus or wanted.gpus else "DEFAULT",
        **resources,
    )
    return [int(row["shard"]) for row in made.iter_rows() if row["computed"]]


def stream_blocks(
    requests: Iterator[Any], decode: Callable[[Any], dict[str, Any]], readers: int, ahead: int, block_bytes: int
) -> Iterator[dict[str, Any]]:
    """`decode` of each request, in order, by Ray Data tasks that work ahead; a block may come in several parts.

    Args:
        requests: picklable; maybe endless, for they are handed to Ray Data in segments.
        decode: module-level; gives a mapping of numpy arrays.
        readers: tasks at a time, at most; each uses one CPU while it runs, beyond those of the trial.
        ahead: blocks that wait in the object store, at most.
        block_bytes: of one.
    """

    def start(segment: list[Any]) -> Segment:
        rows = ray.data.from_items([{"request": pickle.dumps(r)} for r in segment], override_num_blocks=len(segment))
        options = rows.context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(object_store_memory=(ahead + readers) * block_bytes)
        # Ray Data reckons with twice this for each task, whatever it gives: the limit would have room for one.
        rows.context.target_max_block_size = block_bytes
        rows.context.enable_progress_bars = False
        rows.context.custom_execution_callback_classes = [*rows.context.custom_execution_callback_classes, _Rest]
        mapped = rows.map_batches(
            _Decode(decode),
            batch_size=1,
            batch_format="numpy",
            compute=TaskPoolStrategy(size=readers),
            num_cpus=0,
            zero_copy_batch=True,
        )
        blocks = iter(mapped.iter_batches(batch_size=None, prefetch_batches=1, batch_format="numpy"))
        return blocks, next(blocks, None)  # nothing runs before the first one is asked for

    with ThreadPoolExecutor(1) as pool:
        segment = list(itertools.islice(requests, SEGMENT))
        waiting: list[Future[Segment]] = [pool.submit(start, segment)] if segment else []
        try:
            while waiting:
                blocks, first = waiting[0].result()
                left, following = len(segment), False
                for block in itertools.chain([first] if first is not None else [], blocks):
                    left -= 1
                    if left < ahead and not following:  # not earlier: it would fill the store as well
                        segment, following = list(itertools.islice(requests, SEGMENT)), True
                        waiting += [pool.submit(start, segment)] if segment else []
                    yield block
                waiting.pop(0)
        finally:
            for future in waiting:
                future.result()[0].close()  # ends its tasks


class _Rest(ExecutionCallback):
    """Pauses in the rounds of an execution's thread, the longer the oftener a round has not waited for a task.

    While readers are as far ahead as they may, Ray Data asks round after round whether they still are. That thread is
    one of the process that trains, whose steps took five times as long beside it.
    """

    def __init__(self) -> None:
        self._pause, self._since = 0.0, time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        waited = time.monotonic() - self._since > WAITED_S
        self._pause = 0.0 if waited else min(max(2 * self._pause, 0.001), REST_S)
        time.sleep(self._pause)
        self._since = time.monotonic()


class _Decode:
    """A request of a block to its arrays."""

    def __init__(self, decode: Callable[[Any], dict[str, Any]]) -> None:
        self._decode = decode

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._decode(pickle.loads(batch["request"][0]))
