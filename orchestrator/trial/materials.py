"""What the stages of a trial read: teacher outputs, embeddings, tokens and pools, made where the store lacks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from methods.contract import TEACHER, Texts
from methods.outputs import Output
from methods.vision_language import EMBEDDING
from orchestrator.data.embed import EmbedJob, embedded_prompts, ensure_embedded
from orchestrator.data.outputs import Bill, ensure_outputs
from orchestrator.data.pool import SHARD, Mapper, PoolShard, make_here
from orchestrator.data.task import TaskData, load_task
from orchestrator.data.tokens import TokenJob, ensure_tokenized, tokenized_prompts
from orchestrator.models.load import Network, tuned_network
from orchestrator.store import Entry
from orchestrator.train.given import Networks, entry_at, networks_of
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig, policy_of

# Does a picklable piece of work in a process that holds a device, and gives what it gives or raises.
Elsewhere = Callable[[Callable[[], Any]], Any]


def address_of(entry: Entry) -> str:
    """Where an entry lies in the store."""
    return f"{entry.stage}/{entry.key}"


def still_there(found: Mapping[str, Sequence[Entry]]) -> bool:
    """Whether there are entries, none of which was removed since."""
    return bool(found) and all(entry.path.is_dir() for entries in found.values() for entry in entries)


def joined(bill: Bill, other: Bill) -> None:
    """Adds what another process has paid and shared for the same trial."""
    for column, value in asdict(other).items():
        setattr(bill, column, getattr(bill, column) + value)


@dataclass
class Materials:
    """What one run of a configuration reads, with the bill for it.

    Attributes:
        mapper: embeds, tokenizes and generates.
        elsewhere: where what is missing is made, if this process has no device: it then finds all of it in the store.
        addresses: of finished stages, by name.
        pools: shards of finished image stages, by name.
    """

    context: SweepContext
    config: TrialConfig
    bill: Bill
    mapper: Mapper
    elsewhere: Elsewhere | None = None
    addresses: dict[str, str] = field(default_factory=dict)
    pools: dict[str, list[Entry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec, self.store = self.context.spec, self.context.store
        self.task: TaskData = load_task(self.spec.task, self.store, listing=self.context.listing)
        cell = self.config.cell
        self.networks: Networks = networks_of(self.spec, cell.teacher, cell.student)

    def teacher(self, of: str) -> Network:
        """The teacher, or what an earlier stage made of it."""
        base = self.networks.trained("teacher")
        if of == TEACHER:
            return base
        address = self.addresses[of]
        return tuned_network(entry_at(self.store, address).path, address, base)

    def outputs(self, outputs: tuple[Output, ...], of: str, views: int) -> dict[str, list[Entry]]:
        """Entries of teacher outputs on train, by key, one for each view."""
        if not outputs:
            return {}
        bill, device = self._made("outputs", outputs, of, views)
        teacher = self.config.cell.teacher
        also = self.context.prefetch.get(teacher, ()) if of == TEACHER and teacher is not None else ()
        return ensure_outputs(
            self.store,
            self.task,
            self.task.train,
            self.teacher(of),
            policy_of(self.spec),
            range(views),
            outputs,
            also=also,
            device=device,
            bill=bill,
        )

    def corpus_outputs(self, outputs: tuple[Output, ...]) -> dict[str, list[str]]:
        """Addresses of teacher outputs on the corpus, by key, one for each shard; without a corpus on train."""
        if self.spec.corpus.images is None:
            return {key: [address_of(one[0])] for key, one in self.outputs(outputs, TEACHER, 1).items()}
        return {output.key: self._embedded("images", output) for output in outputs}

    def text_addresses(self, name: Texts) -> list[str]:
        """Addresses of the teacher's embeddings of texts."""
        if name != "prompts":
            return self._embedded(name)
        bill, device = self._made("text_addresses", name)
        teacher = self.networks.trained("teacher").entry
        entry = embedded_prompts(self.store, self.task, teacher, device)
        return [address_of(bill.add(entry))]

    def token_addresses(self, name: Texts) -> list[str]:
        """Addresses of what the teacher's tokenizer makes of texts."""
        teacher = self.config.cell.teacher
        assert teacher is not None
        if name == "prompts":
            return [address_of(self.bill.add(tokenized_prompts(self.store, self.task, self.spec.teachers[teacher])))]
        job = TokenJob(self.spec, self.store.address, teacher, name)
        return [address_of(self.bill.add(entry)) for entry in ensure_tokenized(job, self.mapper)]

    def _embedded(self, what: str, output: Output = EMBEDDING) -> list[str]:
        """Addresses of what the teacher makes of every shard of a corpus, made where it is missing."""
        cell = self.config.cell
        assert cell.teacher is not None
        job = EmbedJob(self.spec, self.store.address, cell.teacher, what, output, self.context.device)
        return [address_of(self.bill.add(entry)) for entry in ensure_embedded(job, self.mapper)]

    def pool_outputs(
        self, pool: str, outputs: tuple[Output, ...], of: str, views: int, count: int = 0
    ) -> dict[str, list[list[Entry]]]:
        """Entries of teacher outputs on a pool, by key, for each view one for each shard."""
        if not outputs:
            return {}
        bill, device = self._made("pool_outputs", pool, outputs, of, views, count)
        result: dict[str, list[list[Entry]]] = {o.key: [[] for _ in range(views)] for o in outputs}
        teacher = self.teacher(of)
        for entry in self.shards(pool, count):
            shard = PoolShard(entry)
            policy = policy_of(self.spec)
            found = ensure_outputs(
                self.store,
                shard,
                shard.split,
                teacher,
                policy,
                range(views),
                outputs,
                device=device,
                bill=bill,
            )
            for key, entries in found.items():
                for view, one in enumerate(entries):
                    result[key][view].append(one)
        return result

    def _made(self, name: str, *wanted: Any) -> tuple[Bill, str]:
        """Has a method of this class called where a device is, if that is elsewhere.

        Returns:
            The bill of the call in this process and where it computes. After a call elsewhere it only looks up what
            that one has made and paid for; if anything has been removed since, the CPU makes it again.
        """
        if self.elsewhere is None:
            return self.bill, self.context.device
        pools = {pool: [address_of(entry) for entry in entries] for pool, entries in self.pools.items()}
        made = self.elsewhere(partial(_make, self.context, self.config, self.addresses, pools, name, wanted))
        joined(self.bill, made)
        return Bill(), "cpu"

    def shards(self, pool: str, count: int) -> list[Entry]:
        """Those that hold the first `count` images of a pool; 0 for all."""
        entries = self.pools[pool]
        return entries[: math.ceil(count / SHARD)] if count else entries


def _make(
    context: SweepContext,
    config: TrialConfig,
    addresses: dict[str, str],
    pools: dict[str, list[str]],
    name: str,
    wanted: tuple[Any, ...],
) -> Bill:
    """Calls a method of the materials of a trial in this process; returns what it has paid and shared.

    Entries come as addresses, since each node has a store of its own beside object storage.
    """
    torch.set_num_threads(context.spec.train.threads)
    found = {pool: [entry_at(context.store, one) for one in listed] for pool, listed in pools.items()}
    materials = Materials(context, config, Bill(), make_here, addresses=addresses, pools=found)
    getattr(materials, name)(*wanted)
    return materials.bill
