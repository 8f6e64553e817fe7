"""Maps over a pool of actors: the only module that knows Ray Data."""

from __future__ import annotations

from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from orchestrator.data.pool import PoolJob, ShardMaker


class _ShardActor:
    """One actor of the pool: its generator is loaded once, each shard is published as soon as it is made."""

    def __init__(self, job: PoolJob) -> None:
        self._make = ShardMaker(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self._make(int(row["shard"]))
        return row


def make_on_actors(job: PoolJob, shards: list[int]) -> None:
    """Makes shards on at most `generate.actors` actors. After a death only what is missing is made again."""
    generate = job.spec.generate
    context = DataContext.get_current()
    context.enable_progress_bars = False
    resources: dict[str, Any] = {"num_cpus": generate.cpus}
    if generate.gpus:
        resources["num_gpus"] = generate.gpus
    rows = ray.data.from_items([{"shard": i} for i in shards], override_num_blocks=len(shards))
    made = rows.map(
        _ShardActor,  # type: ignore[arg-type]
        fn_constructor_args=[job],
        compute=ActorPoolStrategy(min_size=1, max_size=min(generate.actors, len(shards))),
        # Its trial's placement group has no room for a generator of its own, and ends at that trial's node.
        scheduling_strategy="SPREAD" if generate.cpus or generate.gpus else "DEFAULT",
        **resources,
    )
    for _ in made.iter_rows():
        pass
