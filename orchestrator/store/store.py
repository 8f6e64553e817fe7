"""Where stage results lie: `<root>/<stage>/<key>/`, each published whole and computed once.

Single flight rests on an advisory file lock that the kernel releases when its holder dies, however it dies: the next
waiter then takes over. A result is written beside the store's entries and renamed into place, so that a half-written
one can never be read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from orchestrator.errors import FullDiskError, disk_full

META = "meta.json"
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One published result.

    Attributes:
        stage, key: its address.
        path: its folder.
        meta: `reads` (what its key hashes), `about` (facts that are not in the key), `seconds` (what it cost),
            `forwards` (teacher images it cost), `files` (name -> bytes and SHA-256).
        computed: whether this call computed it, rather than found it.
    """

    stage: str
    key: str
    path: Path
    meta: dict[str, Any]
    computed: bool = False

    @property
    def bytes(self) -> int:
        return sum(int(f["bytes"]) for f in self.meta["files"].values())


class Mirror(Protocol):
    """Copies of single files of a folder, for whoever continues on another node."""

    def put(self, file: Path) -> None:
        """Keeps a file under its name."""

    def get(self, file: Path) -> bool:
        """Brings a kept file of that name, if there is one."""


class BusyError(Exception):
    """Another process is computing this entry (only with `wait=False`)."""


def in_turns(keys: Iterable[K], attempt: Callable[[K, bool], T | None]) -> dict[K, T]:
    """What `attempt(key, wait)` gives for each key; those that others are computing are left to them while any remain.

    Args:
        keys: what is needed.
        attempt: with `wait` False it gives None, or raises `BusyError`, where another process is at it.
    """
    found: dict[K, T] = {}
    waiting = list(keys)
    stuck = False
    while waiting:
        before = len(waiting)
        for key in list(waiting):
            with contextlib.suppress(BusyError):
                result = attempt(key, stuck)
                if result is not None:
                    found[key] = result
                    waiting.remove(key)
                    stuck = False
        stuck = len(waiting) == before
    return found


class Store:
    """A store below `root`, on a disk that every process of the sweep shares.

    Args:
        root: its folder; created on first use.
        min_free_gb: a computation is refused where less than this is free.
    """

    def __init__(self, root: str | Path, *, min_free_gb: float = 0.0) -> None:
        self.root = Path(root)
        self.min_free_gb = min_free_gb

    @property
    def address(self) -> str:
        """What `store_at` opens again, in any process."""
        return str(self.root)

    def _folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def get(self, stage: str, key: str) -> Entry | None:
        """The published entry, or None."""
        folder = self._folder(stage, key)
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / META)  # the time of last use, for `gc`
        return Entry(stage, key, folder, meta)

    def compute(
        self,
        stage: str,
        key: str,
        write: Callable[[Path], dict[str, Any] | None],
        *,
        reads: Any = None,
        wait: bool = True,
    ) -> Entry:
        """The published entry; if there is none, `write(folder)` makes it, in one process at a time.

        Args:
            stage, key: its address.
            write: fills an empty folder; returns facts for `meta.json`'s `about`.
            reads: what the key hashes, kept for people and for `verify`.
            wait: wait for another process that is computing it; else raise `BusyError`.

        Raises:
            BusyError: see `wait`.
            FullDiskError: see there.
        """
        found = self.get(stage, key)
        if found is not None:
            if self.scratch(stage, key).exists():  # its writer died after it had published, and before it tidied up
                shutil.rmtree(self.scratch(stage, key), ignore_errors=True)
            return found
        with self.lock(stage, key, wait=wait):
            found = self.get(stage, key)
            if found is not None:
                return found
            return self._publish(stage, key, write, reads)

    @contextlib.contextmanager
    def lock(self, stage: str, key: str, *, wait: bool = True) -> Iterator[None]:
        """Holds the entry's lock; the kernel releases it if this process dies."""
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{stage}-{key}.lock", timeout=-1 if wait else 0, thread_local=False)
        try:
            lock.acquire(poll_interval=0.1)
        except Timeout:
            raise BusyError(f"{stage}/{key}") from None
        try:
            yield
        finally:
            lock.release()

    def scratch(self, stage: str, key: str) -> Path:
        """A folder for partial work on an entry (checkpoints); whoever holds its lock owns it. Removed on publish."""
        return self.root / ".partial" / f"{stage}-{key}"

    def _publish(self, stage: str, key: str, write: Callable[[Path], dict[str, Any] | None], reads: Any) -> Entry:
        machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
        temporary = self.root / ".tmp" / f"{stage}-{key}-{machine}-{uuid.uuid4().hex[:8]}"
        target = self._folder(stage, key)
        started = time.perf_counter()
        # This process holds the lock, so their writer is dead; of another machine only where locks hold among machines.
        for abandoned in temporary.parent.glob(f"{stage}-{key}-{machine}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
            if free < self.min_free_gb * 1e9:
                raise FullDiskError(
                    f"The store {str(self.root)!r} has {free / 1e9:.2f} GB of free disk, less than "
                    f"store.min_free_gb = {self.min_free_gb:g}: free some, or run `orchestrator store gc`."
                )
            about = write(temporary) or {}
            files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(temporary.iterdir())}
            meta = {
                "reads": reads,
                "about": about,
                "forwards": int(about.get("forwards", 0)),
                "seconds": float(about.get("seconds", time.perf_counter() - started)),
                "created": time.time(),
                "files": files,
            }
            (temporary / META).write_text(json.dumps(meta), encoding="utf-8")
            self._share(stage, key, temporary, meta)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                found = self.get(stage, key)  # the lock holds on one node only here, and another's was faster
                if found is not None:
                    return found
            if disk_full(error):
                raise FullDiskError(
                    f"The disk of the store {str(self.root)!r} is full while writing {stage}/{key}."
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(self.scratch(stage, key), ignore_errors=True)
        return Entry(stage, key, target, meta, computed=True)

    def _share(self, stage: str, key: str, folder: Path, meta: dict[str, Any]) -> None:
        """Hands a whole result on before it is published here; whatever this raises, it is not."""

    def mirror(self, folder: Path) -> Mirror | None:
        """Where files of a folder are kept for other nodes; None where these see the folder itself."""
        return None

    def entries(self) -> list[Entry]:
        """Every published entry, by stage and key."""
        found = []
        for meta in sorted(self.root.glob(f"[!.]*/*/{META}")):
            with contextlib.suppress(OSError, ValueError):
                content = json.loads(meta.read_text(encoding="utf-8"))
                found.append(Entry(meta.parent.parent.name, meta.parent.name, meta.parent, content))
        return found

    def damaged(self, entry: Entry) -> list[str]:
        """Files of an entry that are missing or differ from what was published."""
        wrong = []
        for name, fact in entry.meta["files"].items():
            path = entry.path / name
            if not path.is_file() or path.stat().st_size != fact["bytes"] or file_hash(path) != fact["sha256"]:
                wrong.append(name)
        return wrong

    def remove(self, entry: Entry) -> None:
        """Takes an entry away at once, then deletes its files."""
        grave = self.root / ".tmp" / f"removed-{uuid.uuid4().hex[:8]}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        os.replace(entry.path, grave)
        shutil.rmtree(grave, ignore_errors=True)

    def collect(self, max_bytes: int | None = None) -> tuple[int, int]:
        """Deletes what dead processes left, and the least recently used entries beyond `max_bytes`.

        Returns:
            (bytes freed, entries removed). Work in flight is left alone: its lock is held.
        """
        freed = 0
        removed = 0
        for leftover in [*self.root.glob(".tmp/*"), *self.root.glob(".partial/*")]:
            stage, _, rest = leftover.name.partition("-")
            with contextlib.suppress(BusyError), self.lock(stage, rest[:20], wait=False):
                for file in leftover.rglob("*"):
                    with contextlib.suppress(OSError):  # gone meanwhile
                        freed += file.stat().st_size if file.is_file() else 0
                shutil.rmtree(leftover, ignore_errors=True)
        if max_bytes is not None:
            entries = sorted(self.entries(), key=lambda e: (e.path / META).stat().st_mtime)
            total = sum(e.bytes for e in entries)
            for entry in entries:
                if total <= max_bytes:
                    break
                self.remove(entry)
                total -= entry.bytes
                freed += entry.bytes
                removed += 1
        return freed, removed


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
