"""Teacher outputs in the store: one pass of the teacher over one view of the images gives every output asked for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.outputs import Output, read_outputs
from orchestrator.data.pixels import rendered_view
from orchestrator.data.task import ImageSet, Split
from orchestrator.data.views import Policy, stored_view, view_parameters
from orchestrator.models.load import Network, describe
from orchestrator.store import Entry, JoinedRecords, Records, Store, key_of, write_records
from orchestrator.store.records import TYPES
from orchestrator.store.store import BusyError

VERSION = 1
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
        if entry.computed:
            self.misses += 1
            self.forwards_paid += forwards
            self.seconds_paid += seconds
        else:
            self.hits += 1
            # Whoever reads any output of a pass would have had to make the whole pass.
            about = entry.meta["about"]
            self.forwards_shared += int(about.get("pass_forwards", forwards))
            self.seconds_saved += float(about.get("pass_seconds", seconds))
        return entry


def output_reads(teacher: Network, parameters_key: str, output: Output, dtype: str = DTYPE) -> dict[str, Any]:
    """What the address of one output of one view hashes."""
    return {
        "weights": teacher.weights_hash,
        "preprocessing": describe(teacher.preprocessing),
        "parameters": parameters_key,
        "output": asdict(output),
        "dtype": dtype,
        "version": VERSION,
    }


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
    the teacher sees each view once. Views that another trial is computing are left to it while others remain.

    Args:
        store, images, split: what is read, and where results go.
        teacher: loaded; its module is run in inference mode.
        policy, views: which views.
        wanted, also: see above. `also` is in no key.
        device: where the teacher runs.
        bill: counts what was paid and what was shared.
        dtype: of the stored values: `float16`, `bfloat16` or `float32`.

    Returns:
        By `Output.key`, one entry for each view, in the order of `views`.
    """
    wanted = list(dict.fromkeys(wanted))
    bill = bill if bill is not None else Bill()
    entries: dict[int, dict[str, Entry]] = {}
    waiting = list(views)
    while waiting:
        before = len(waiting)
        for view in list(waiting):
            last_resort = before == len(waiting) and view == waiting[-1]
            found = _ensure_view(
                store, images, split, teacher, policy, view, wanted, also, device, dtype, wait=last_resort
            )
            if found is not None:
                entries[view] = found
                waiting.remove(view)
    for view in views:
        # One pass gave all outputs of a view, so its forwards are counted once, with the first of them.
        paid = [e for e in entries[view].values() if e.computed]
        for number, entry in enumerate(paid or entries[view].values()):
            if number == 0:
                bill.add(entry)
    return {o.key: [entries[v][o.key] for v in views] for o in wanted}


def _ensure_view(
    store: Store,
    images: ImageSet,
    split: Split,
    teacher: Network,
    policy: Policy,
    view: int,
    wanted: list[Output],
    also: Iterable[Output],
    device: str,
    dtype: str,
    *,
    wait: bool,
) -> dict[str, Entry] | None:
    parameters = stored_view(store, split, policy, view)

    def lookup() -> dict[str, Entry]:
        found = {}
        for output in wanted:
            entry = store.get("outputs", key_of(output_reads(teacher, parameters.key, output, dtype)))
            if entry is not None:
                found[output.key] = entry
        return found

    found = lookup()
    if len(found) == len(wanted):
        return found
    flight = key_of({"weights": teacher.weights_hash, "parameters": parameters.key, "size": teacher.preprocessing.size})
    try:
        with store.lock("pass", flight, wait=wait):
            found = lookup()
            if len(found) == len(wanted):
                return found
            missing = [
                o
                for o in dict.fromkeys([*wanted, *also])
                if store.get("outputs", key_of(output_reads(teacher, parameters.key, o, dtype))) is None
            ]
            folder = store.scratch("pass", flight)
            shutil.rmtree(folder, ignore_errors=True)  # of a pass that was killed
            try:
                found.update(_pass(store, images, split, teacher, parameters, view, missing, device, dtype, folder))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return {o.key: found[o.key] for o in wanted}
    except BusyError:
        return None


def _pass(
    store: Store,
    images: ImageSet,
    split: Split,
    teacher: Network,
    parameters: Entry,
    view: int,
    outputs: list[Output],
    device: str,
    dtype: str,
    folder: Path,
) -> dict[str, Entry]:
    started = time.perf_counter()
    folder.mkdir(parents=True)
    module = teacher.module.to(device)
    raw = {o.key: (folder / f"{o.key}.raw").open("wb") for o in outputs}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for pixels in rendered_view(images, split, view_parameters(parameters), teacher.preprocessing):
            results = live_outputs(teacher, module, pixels.to(device), outputs)
            for key, value in results.items():
                stored = value.to(TYPES[dtype]).cpu().contiguous()
                shapes[key] = tuple(stored.shape[1:])
                raw[key].write(stored.flatten().view(torch.uint8).numpy().tobytes())
    finally:
        for file in raw.values():
            file.close()
    seconds = time.perf_counter() - started
    entries = {}
    for number, output in enumerate(outputs):
        reads = output_reads(teacher, parameters.key, output, dtype)

        def write(target: Path, output: Output = output, number: int = number) -> dict[str, Any]:
            values = np.memmap(folder / f"{output.key}.raw", dtype=np.uint8, mode="c")
            table = torch.from_numpy(np.asarray(values)).view(TYPES[dtype]).view(len(split), *shapes[output.key])
            step = 256
            batches = (table[i : i + step] for i in range(0, len(split), step))
            write_records(target / "records.arrow", len(split), batches, dtype)
            return {
                # The pass is paid once, whatever the number of outputs that it gave.
                "forwards": len(split) if number == 0 else 0,
                "seconds": seconds if number == 0 else 0.0,
                "pass_forwards": len(split),
                "pass_seconds": seconds,
                "teacher": teacher.entry.model_dump(mode="json"),
                **images.identity(),
                "view": view,
                "output": asdict(output),
            }

        entries[output.key] = store.compute("outputs", key_of(reads), write, reads=reads)
        (folder / f"{output.key}.raw").unlink()
    return entries


def live_outputs(
    teacher: Network, module: torch.nn.Module, pixels: Tensor, outputs: Sequence[Output]
) -> dict[str, Tensor]:
    """Teacher outputs of uint8 pixels [B, 3, S, S] at the teacher's size, computed now."""
    with torch.inference_mode():
        results = read_outputs(module, teacher.preprocessing.normalise(pixels), outputs)
    return {key: value.detach().clone() for key, value in results.items()}


def open_outputs(entries: Sequence[Entry]) -> list[Records]:
    """The memory maps of the entries of one output, one for each view."""
    return [Records(entry.path / "records.arrow") for entry in entries]


def open_pool_outputs(views: Sequence[Sequence[Entry]]) -> list[JoinedRecords]:
    """The same for a pool, whose views have an entry for each shard."""
    return [JoinedRecords(open_outputs(shards)) for shards in views]
