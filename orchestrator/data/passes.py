"""One pass of a teacher over one view of the images, for all who need it: in parts, which several processes share.

Whoever needs outputs of a view takes parts of it that nobody is working on: the trials with which a sweep begins
make its first pass together. What a part gives lies in its scratch folder until all parts are there; then they are
joined into the store's entries, which know nothing of parts. A part is held by a lock while it is computed: if its
holder dies, what is done stays, and another takes that part again. Where nodes do not see each other's folders (a store
on object storage), a pass is one part.

`store gc` in the middle of a pass may take parts that are done and that nobody holds: they are made again. So is a part
whose file is torn.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.outputs import Output, read_outputs
from orchestrator.data.pixels import rendered_view
from orchestrator.data.task import ImageSet, Split
from orchestrator.data.views import view_parameters
from orchestrator.errors import FullDiskError, UserError, WorkError
from orchestrator.files import at_once
from orchestrator.models.clip import TextTower
from orchestrator.models.load import Network, describe
from orchestrator.store import Entry, Store, key_of, write_records
from orchestrator.store.records import TYPES
from orchestrator.store.store import BusyError

VERSION = 1
LEAVE = "leave out the methods that read it"
FRESH = f"set train.fresh to true, which stores none, or {LEAVE}"
ROWS = 256  # of a part, at least
BATCH = 64  # images that the teacher sees at a time; fewer where its device lacks memory
PARTS = 64  # at most
ASKED_S = 3600.0  # after which nobody computes what another trial has asked for: it may be dead


def remedy(output: Output) -> str:
    """What helps where an output cannot be stored; a teacher's head is fitted on stored features in any case."""
    return LEAVE if output.kind in ("pooled", "dense") else FRESH


def output_reads(teacher: Network, parameters_key: str, output: Output, dtype: str) -> dict[str, Any]:
    """What the address of one output of one view hashes."""
    return {
        "weights": teacher.identity,
        "preprocessing": describe(teacher.preprocessing),
        "parameters": parameters_key,
        "output": asdict(output),
        "dtype": dtype,
        "version": VERSION,
    }


def live_outputs(
    teacher: Network, module: torch.nn.Module, pixels: Tensor, outputs: Sequence[Output]
) -> dict[str, Tensor]:
    """Teacher outputs of uint8 pixels [B, 3, S, S] at the teacher's size, computed now."""
    with torch.inference_mode(), teacher.cast(pixels.device.type):
        results = read_outputs(module, teacher.preprocessing.normalise(pixels), outputs)
    return {key: value.detach().float().clone() for key, value in results.items()}


def fitting(values: Tensor, dtype: str, output: Output, teacher: Network, otherwise: str) -> Tensor:
    """Outputs as they are stored: of this type, on the CPU.

    Args:
        values: float32 [B, ...].
        dtype: of the store.
        output, teacher: whose they are.
        otherwise: what to do where numbers of this type cannot hold them: the end of a sentence.

    Raises:
        UserError: if one of them is not finite. What is stored is stored for ever, and all who read it would fail.
    """
    stored = values.to(TYPES[dtype])
    if not bool(stored.isfinite().all()):
        whose, entry = f"the output {output.key!r} of the teacher {teacher.entry.model!r}", teacher.entry
        if bool(values.isfinite().all()):
            most, held = float(values.abs().max()), torch.finfo(TYPES[dtype]).max
            raise UserError(f"teachers: {whose} reaches {most:.3g}, and {dtype} holds {held:.3g} at most: {otherwise}.")
        remedy = "its weights are damaged, or do not fit its architecture"
        if entry.precision != "fp32":
            remedy = f"its precision is {entry.precision}: use {'bf16 or ' * (entry.precision == 'fp16')}fp32"
        raise UserError(f"teachers: {whose} has values that are not finite; {remedy}.")
    return stored.cpu().contiguous()


def off_device(network: torch.nn.Module | TextTower, device: str) -> None:
    """Brings a network back to the CPU: the process keeps it, and it would lie beside whatever is trained next."""
    if device == "cpu":
        return
    with contextlib.suppress(RuntimeError):  # of a device that fails whatever is asked of it; what it did first is told
        network.to("cpu")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@dataclass
class Part:
    """Some of a view's images.

    Attributes:
        key: its lock's and its folder's.
        folder: `OUTPUT.npy` for each output that is done: uint8 [rows, ..., bytes of a number]; `seconds.json`.
        rows: of the split.
    """

    key: str
    folder: Path
    rows: range

    def has(self, outputs: Iterable[Output]) -> bool:
        """Whether all of these are done."""
        return all(self.file(output).is_file() for output in outputs)

    def file(self, output: Output) -> Path:
        """Where an output is, or will be."""
        return self.folder / f"{output.key}.npy"

    @property
    def seconds(self) -> float:
        """What it has taken, by whomever."""
        with contextlib.suppress(OSError, ValueError):
            return float(json.loads((self.folder / "seconds.json").read_text(encoding="utf-8")))
        return 0.0

    @seconds.setter
    def seconds(self, value: float) -> None:
        at_once(self.folder / "seconds.json", lambda to: to.write_text(json.dumps(value), encoding="utf-8"))

    def forget(self, outputs: Iterable[Output]) -> None:
        """Removes these, and the folder if no others are left; whoever does that holds the part."""
        for output in outputs:
            self.file(output).unlink(missing_ok=True)
        if not any(self.folder.glob("*.npy")):  # else another trial has begun to add outputs of its own
            shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, output: Output, dtype: str, step: int = 256) -> Iterator[Tensor]:
        """Its values, [up to `step`, ...] at a time."""
        table = np.load(self.file(output), mmap_mode="c")
        for start in range(0, len(table), step):
            yield torch.from_numpy(table[start : start + step]).view(TYPES[dtype]).squeeze(-1)


class Pass:
    """A view as one trial needs it, and what this process has done for it.

    Args:
        store, images, split: what is read, and where results go.
        teacher: loaded; its module is run in inference mode.
        parameters: the view's entry.
        view: its number.
        wanted: outputs that this trial needs.
        also: what other trials will want: computed along with what is missing.
        device: where the teacher runs.
        dtype: of the stored values.

    Attributes:
        forwards, seconds: images that the teacher saw here for it, and the time that took.
    """

    def __init__(
        self,
        store: Store,
        images: ImageSet,
        split: Split,
        teacher: Network,
        parameters: Entry,
        view: int,
        wanted: Sequence[Output],
        also: Iterable[Output],
        device: str,
        dtype: str,
    ) -> None:
        self.store, self.images, self.split, self.teacher = store, images, split, teacher
        self.parameters, self.view, self.wanted, self.device, self.dtype = parameters, view, wanted, device, dtype
        self.mine = list(dict.fromkeys([*wanted, *also]))
        self.forwards, self.seconds = 0, 0.0
        self._torn = False
        self._batch = BATCH

    def entries(self, wait: bool) -> dict[str, Entry] | None:
        """Entries of what is wanted, by `Output.key`, computed as far as they are missing and nobody else is at it.

        Args:
            wait: for parts that others are computing; else None while there are such.
        """
        found = self._found()
        if len(found) == len(self.wanted):
            self._tidy()
            return found
        try:
            while len(found) < len(self.wanted):
                lacking = [output for output in self.wanted if output.key not in found]
                busy = [part for part in self._parts if not self._take(part, lacking)]
                if busy and wait:
                    with self.store.lock("pass", busy[0].key):
                        pass  # its holder is done, or dead
                elif busy or not self._join(lacking, wait):
                    return None
                found = self._found()
            return found
        finally:
            self._ask.unlink(missing_ok=True)

    def _reads(self, output: Output) -> dict[str, Any]:
        return output_reads(self.teacher, self.parameters.key, output, self.dtype)

    def _stored(self, output: Output) -> Entry | None:
        return self.store.get("outputs", key_of(self._reads(output)))

    def _found(self) -> dict[str, Entry]:
        return {o.key: entry for o in self.wanted if (entry := self._stored(o)) is not None}

    @cached_property
    def _parts(self) -> list[Part]:
        flight = {
            "weights": self.teacher.identity,
            "preprocessing": describe(self.teacher.preprocessing),
            "parameters": self.parameters.key,
            "dtype": self.dtype,
            "version": VERSION,
        }
        count = len(self.split)
        rows = max(ROWS, -(-count // (PARTS * ROWS)) * ROWS)
        if self.store.mirror(self.store.scratch("pass", key_of(flight))) is not None:
            rows = max(count, 1)
        found = []
        for start in range(0, count, rows):
            key = key_of(flight | {"start": start, "rows": rows})
            found.append(Part(key, self.store.scratch("pass", key), range(start, min(start + rows, count))))
        return found

    @cached_property
    def _ask(self) -> Path:
        return self._parts[0].folder / "asked" / f"{uuid.uuid4().hex}.json"

    def _asked(self) -> list[Output]:
        """What everybody wants who is at this view now; says it for this trial."""
        folder = self._ask.parent
        with contextlib.suppress(OSError):  # to know is worth a second pass at most, and a full disk is told elsewhere
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps([asdict(output) for output in self.mine])
            at_once(self._ask, lambda to: to.write_text(text, encoding="utf-8"))
        outputs = dict.fromkeys(self.mine)
        for file in sorted(folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):  # gone, being written, or of another version
                if time.time() - file.stat().st_mtime < ASKED_S:
                    outputs |= dict.fromkeys(Output(**one) for one in json.loads(file.read_text(encoding="utf-8")))
        return list(outputs)

    def _take(self, part: Part, lacking: Sequence[Output]) -> bool:
        """Computes what a part lacks; False if another process is at it."""
        if part.has(lacking):
            return True
        try:
            with self.store.lock("pass", part.key, wait=False):
                if not part.has(lacking) and len(self._found()) < len(self.wanted):
                    self._compute_asked(part)
                if len(self._parts) == 1:  # where a lock is a lease, whoever waits for it must find the entries
                    self._publish_all(lacking)
        except BusyError:
            return False
        return True

    def _compute_asked(self, part: Part) -> None:
        def missing(outputs: Sequence[Output]) -> list[Output]:
            return [o for o in outputs if not part.has([o]) and self._stored(o) is None]

        # That the network lacks what another trial asks for, or will, is that one's fault.
        asked = [missing(self._asked()), missing(self.mine), missing(self.wanted)]
        while True:
            outputs = asked.pop(0)
            try:
                self._compute(part, outputs)
                return
            except (
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
                RuntimeError,
                UserError,
                WorkError,
            ) as error:  # a network without it, or whose values cannot be stored; lack of memory
                asked = [fewer for fewer in asked if fewer != outputs]
                if not asked or isinstance(error, FullDiskError):
                    raise
                self._batch = BATCH  # what did not fit with more outputs may fit with fewer

    def _compute(self, part: Part, outputs: Sequence[Output]) -> None:
        if not outputs:
            return
        began = time.perf_counter()
        part.folder.mkdir(parents=True, exist_ok=True)
        module = self.teacher.module.to(self.device)
        parameters = view_parameters(self.parameters)
        sizes, rows = self.teacher.preprocessing, part.rows
        unfinished = {o: part.file(o).with_suffix(".tmp") for o in outputs}
        try:
            with contextlib.ExitStack() as files:
                raw = {o.key: files.enter_context(path.open("wb")) for o, path in unfinished.items()}
                left = len(rows)
                for pixels in rendered_view(self.images, self.split, parameters, sizes, BATCH, rows=rows):
                    for found in self._seen(module, pixels, outputs):
                        tables = {key: value.unsqueeze(-1).view(torch.uint8).numpy() for key, value in found.items()}
                        count = len(next(iter(tables.values())))
                        # At each batch, for others write too: what is left must not be eaten up by this part.
                        self.store.check_room(sum(table.nbytes for table in tables.values()) // count * left)
                        left -= count
                        for key, table in tables.items():
                            if raw[key].tell() == 0:
                                shape = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *table.shape[1:])}
                                np.lib.format.write_array_header_1_0(raw[key], shape)
                            raw[key].write(table.tobytes())
            for output, path in unfinished.items():
                os.replace(path, part.file(output))
            seconds = time.perf_counter() - began
            part.seconds += seconds
        finally:
            for path in unfinished.values():
                path.unlink(missing_ok=True)
        self.forwards += len(rows)
        self.seconds += seconds

    def _seen(self, module: torch.nn.Module, pixels: Tensor, outputs: Sequence[Output]) -> Iterator[dict[str, Tensor]]:
        """Outputs by key as they are stored, of as many of the images at a time as the device has memory for."""
        by_key = {output.key: output for output in outputs}
        done = 0
        while done < len(pixels):
            some, results = pixels[done : done + self._batch], None
            try:
                live = live_outputs(self.teacher, module, some.to(self.device), outputs)
                results = {
                    k: fitting(v, self.dtype, by_key[k], self.teacher, remedy(by_key[k])) for k, v in live.items()
                }
            except torch.OutOfMemoryError as error:
                if len(some) == 1:
                    raise WorkError(
                        f"The device has too little memory in a pass of the teacher {self.teacher.entry.model!r}, even "
                        "for one image at a time: use a bigger device, a smaller image_size, or another teacher."
                    ) from error
                self._batch = len(some) // 2
            if results is None:  # here, where the error no longer holds what was in memory
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                continue
            done += len(some)
            yield results

    def _join(self, lacking: Sequence[Output], wait: bool) -> bool:
        """Publishes what all parts have, if none of them lacks anything; False if others hold some."""
        try:
            with contextlib.ExitStack() as held:
                # From the last one on: who adds outputs of his own begins with the first, and is met once.
                for part in reversed(self._parts):
                    held.enter_context(self.store.lock("pass", part.key, wait=wait))
                self._publish_all(lacking)
        except BusyError:
            return False
        return True

    def _publish_all(self, lacking: Sequence[Output]) -> None:
        """The same, with every part held."""
        if not all(part.has(lacking) for part in self._parts):
            return  # published by another process, or collected
        outputs = [output for output in self._asked() if all(part.has([output]) for part in self._parts)]
        seconds = sum(part.seconds for part in self._parts)
        missing = [output for output in outputs if self._stored(output) is None]
        for number, output in enumerate(missing):
            try:
                self._publish(output, seconds, first=number == 0)
            except (ValueError, EOFError):  # a file is torn: a machine has lost its power
                if self._torn:
                    raise
                self._torn = True
                for part in self._parts:
                    part.forget([output])
                return
            for part in self._parts:
                part.file(output).unlink(missing_ok=True)
        for part in self._parts:
            part.forget(outputs)
            if part.folder.exists():
                part.seconds = 0.0  # they are in the entries

    def _tidy(self) -> None:
        """Removes parts whose outputs are published: whoever did that died before he could."""
        left = [part for part in self._parts if part.folder.exists()]
        with contextlib.suppress(BusyError), contextlib.ExitStack() as held:
            for part in reversed(left):
                held.enter_context(self.store.lock("pass", part.key, wait=False))
            for part in left:
                part.forget(self.wanted)

    def _publish(self, output: Output, seconds: float, *, first: bool) -> None:
        reads, count = self._reads(output), len(self.split)

        def write(target: Path) -> dict[str, Any]:
            # Beside the parts, twice: see `write_records`.
            self.store.check_room(2 * sum(part.file(output).stat().st_size for part in self._parts))
            batches = (batch for part in self._parts for batch in part.read(output, self.dtype))
            write_records(target / "records.arrow", count, batches, self.dtype)
            return {
                # The pass is paid once, whatever the number of outputs that it gave.
                "forwards": count if first else 0,
                "seconds": seconds if first else 0.0,
                "pass_forwards": count,
                "pass_seconds": seconds,
                "teacher": self.teacher.entry.model_dump(mode="json"),
                **self.images.identity(),
                "view": self.view,
                "output": asdict(output),
            }

        self.store.compute("outputs", key_of(reads), write, reads=reads)
