"""Teacher outputs in the store, and what trials pay for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from methods.outputs import Output
from orchestrator.data.passes import Pass, off_device
from orchestrator.data.task import ImageSet, Split
from orchestrator.data.views import Policy, stored_view
from orchestrator.models.load import Network
from orchestrator.store import Entry, JoinedRecords, Records, Store, in_turns

DTYPE = "float16"


@dataclass
class Bill:
    """What a trial paid for in the store, and what others had paid for it.

    Attributes:
        forwards_paid, forwards_shared: teacher images.
        seconds_paid, seconds_saved: of computing.
        hits, misses: entries that were found, and that had to be computed.
    """

    forwards_paid: int = 0
    forwards_shared: int = 0
    seconds_paid: float = 0.0
    seconds_saved: float = 0.0
    hits: int = 0
    misses: int = 0

    def add(self, entry: Entry) -> Entry:
        """Counts one entry; returns it."""
        forwards, seconds = int(entry.meta["forwards"]), float(entry.meta["seconds"])
        paid = (forwards, seconds) if entry.computed else (0, 0.0)
        self.pay(*paid)
        self.share(entry, *paid)
        return entry

    def pay(self, forwards: int, seconds: float) -> None:
        """Counts what this trial has computed."""
        self.forwards_paid += forwards
        self.seconds_paid += seconds

    def share(self, entry: Entry, forwards: int, seconds: float) -> None:
        """Counts one entry for which this trial has paid so much, and others the rest."""
        about = entry.meta["about"]
        if entry.computed or forwards:
            self.misses += 1
        else:
            self.hits += 1
        # Whoever reads any output of a pass would have had to make the whole pass.
        self.forwards_shared += max(0, int(about.get("pass_forwards", entry.meta["forwards"])) - forwards)
        self.seconds_saved += max(0.0, float(about.get("pass_seconds", entry.meta["seconds"])) - seconds)


def ensure_outputs(
    store: Store,
    images: ImageSet,
    split: Split,
    teacher: Network,
    policy: Policy,
    views: Sequence[int],
    wanted: Iterable[Output],
    *,
    also: Iterable[Output] = (),
    device: str = "cpu",
    bill: Bill | None = None,
    dtype: str = DTYPE,
) -> dict[str, list[Entry]]:
    """Entries of `wanted` outputs for each of `views`, computed where missing.

    A pass over a view computes everything that is missing of `wanted` and of `also` (what other trials will want):
    the teacher sees each view once. Trials that need a view at the same time share the pass (`Pass`).

    Args:
        store, images, split: what is read, and where results go.
        teacher: loaded; its module is run in inference mode.
        policy, views: which views.
        wanted, also: see above. `also` is in no key.
        device: where the teacher runs; afterwards it is on the CPU again.
        bill: counts what was paid and what was shared.
        dtype: of the stored values: `float16`, `bfloat16` or `float32`.

    Returns:
        By `Output.key`, one entry for each view, in the order of `views`.
    """
    wanted = list(dict.fromkeys(wanted))
    bill = bill if bill is not None else Bill()
    passes = {
        view: Pass(
            store, images, split, teacher, stored_view(store, split, policy, view), view, wanted, also, device, dtype
        )
        for view in views
    }
    try:
        entries = in_turns(passes, lambda view, wait: passes[view].entries(wait))
    finally:
        for done in passes.values():  # what is done stays, whatever came after it
            bill.pay(done.forwards, done.seconds)
        off_device(teacher.module, device)
    for view, done in passes.items():
        if wanted:
            bill.share(entries[view][wanted[0].key], done.forwards, done.seconds)
    return {o.key: [entries[v][o.key] for v in views] for o in wanted}


def open_outputs(entries: Sequence[Entry]) -> list[Records]:
    """The memory maps of the entries of one output, one for each view."""
    return [Records(entry.path / "records.arrow") for entry in entries]


def open_pool_outputs(views: Sequence[Sequence[Entry]]) -> list[JoinedRecords]:
    """The same for a pool, whose views have an entry for each shard."""
    return [JoinedRecords(open_outputs(shards)) for shards in views]
