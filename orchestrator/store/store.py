"""Where stage results lie: `<root>/<stage>/<key>/`, each published whole and computed once.

Single flight rests on an advisory file lock that the kernel releases when its holder dies, however it dies: the next
waiter then takes over. A result is written beside the store's entries, brought to the disk and renamed into place, so
that a half-written one can never be read. An entry whose `meta.json` cannot be read all the same (a disk may lie about
what it has written) is torn: it counts as absent, and the next computation replaces it.
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
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from orchestrator.errors import FullDiskError, disk_full
from orchestrator.store.users import announce, used_since

META = "meta.json"
TORN: dict[str, Any] = {"reads": None, "about": {}, "forwards": 0, "seconds": 0.0, "created": 0.0, "files": {}}
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One published result.

    Attributes:
        stage, key: its address.
        path: its folder.
        meta: `reads` (what its key hashes), `about` (facts that are not in the key), `seconds` (what it cost),
            `forwards` (teacher images it cost), `files` (name -> bytes and SHA-256); `TORN` if it cannot be read.
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
        min_free_gb: a computation is refused where less than this is free, or would be left (`check_room`).
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
        meta = read_meta(folder)
        if meta is None:
            return None
        self._announce()  # first: what is used from then on is spared by `collect`
        try:
            os.utime(folder / META)  # the time of last use
        except FileNotFoundError:
            return None  # removed since it was read
        except OSError:
            pass  # a store that this user may only read
        return Entry(stage, key, folder, meta)

    def find(self, stage: str, key: str, *, wait: bool = True) -> Entry | None:
        """The published entry if every node finds it, or None.

        Args:
            stage, key: its address.
            wait: for another process that is making it so; else raise `BusyError`.
        """
        return self.get(stage, key)

    def _announce(self) -> None:
        """Tells `collect` in other processes that this one uses the store."""
        announce(self.root)

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
        self._announce()
        found = self.find(stage, key, wait=wait)
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
        started = time.perf_counter()
        # This process holds the lock, so their writer is dead; of another machine only where locks hold among machines.
        for abandoned in temporary.parent.glob(f"{stage}-{key}-{machine}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            self.check_room()
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
            found = self._place(temporary, stage, key)
        except Exception as error:
            if disk_full(error):
                raise FullDiskError(
                    f"The disk of the store {str(self.root)!r} is full while writing {stage}/{key}."
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if found is not None:
            return found
        shutil.rmtree(self.scratch(stage, key), ignore_errors=True)
        return Entry(stage, key, self._folder(stage, key), meta, computed=True)

    def _place(self, whole: Path, stage: str, key: str) -> Entry | None:
        """Renames a whole folder to where its entry belongs. After a loss of power it is there whole, or not at all.

        Returns:
            Another's entry that lies there: where locks hold on one node only, another may have been faster.

        Raises:
            OSError: of any kind; a disk may be found to be full only now.
        """
        target = self._folder(stage, key)
        with ThreadPoolExecutor() as threads:  # what is waited for at once reaches the disk in half the time
            list(threads.map(to_disk, [*whole.iterdir(), whole]))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(whole, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            found = Store.get(self, stage, key)
            if found is not None:
                return found
            self._bury(target)  # torn
            os.replace(whole, target)
        return None

    def _share(self, stage: str, key: str, folder: Path, meta: dict[str, Any]) -> None:
        """Hands a whole result on before it is published here; whatever this raises, it is not."""

    def check_room(self, size: int = 0) -> None:
        """Refuses to write so many bytes more where they would leave less than `min_free_gb`.

        Raises:
            FullDiskError: with what is free.
        """
        free = shutil.disk_usage(self.root).free
        if free - size < self.min_free_gb * 1e9:
            more = f"and {size / 1e9:.2f} GB that are to be written would leave less" if size else "less"
            raise FullDiskError(
                f"The store {str(self.root)!r} has {free / 1e9:.2f} GB of free disk, {more} than "
                f"store.min_free_gb = {self.min_free_gb:g}: free some, or run `orchestrator store gc`."
            )

    def mirror(self, folder: Path) -> Mirror | None:
        """Where files of a folder are kept for other nodes; None where these see the folder itself."""
        return None

    def entries(self) -> list[Entry]:
        """Every published entry, by stage and key, and with `TORN` for its `meta` each torn one."""
        found = []
        for folder in sorted(self.root.glob("[!.]*/*/")):
            meta = read_meta(folder)
            if meta is not None or folder.is_dir():  # else it was removed just now
                found.append(Entry(folder.parent.name, folder.name, folder, TORN if meta is None else meta))
        return found

    def damaged(self, entry: Entry) -> list[str]:
        """Files of an entry that are missing or differ from what was published."""
        wrong = [META] if read_meta(entry.path) is None else []
        for name, fact in entry.meta["files"].items():
            path = entry.path / name
            if not path.is_file() or path.stat().st_size != fact["bytes"] or file_hash(path) != fact["sha256"]:
                wrong.append(name)
        return wrong

    def remove(self, entry: Entry) -> None:
        """Takes an entry away at once, then deletes its files."""
        self._bury(entry.path)

    def _bury(self, folder: Path) -> None:
        grave = self.root / ".tmp" / f"removed-{uuid.uuid4().hex[:8]}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, grave)
        shutil.rmtree(grave, ignore_errors=True)

    def collect(self, max_bytes: int | None = None) -> tuple[int, int]:
        """Deletes what dead processes left, torn entries, and the least recently used ones beyond `max_bytes`.

        What has another link, as a sweep's students have, is not counted: it would not be freed.
        What was used since the oldest living process that uses the store began to is spared, with a warning that says
        how much was to go and stays.

        Returns:
            (bytes freed, entries removed). Work in flight is left alone: its lock is held.
        """
        freed, removed = self._clear_torn()
        spared = used_since(self.root)
        for leftover in [*self.root.glob(".tmp/*"), *self.root.glob(".partial/*")]:
            stage, _, rest = leftover.name.partition("-")
            with contextlib.suppress(BusyError), self.lock(stage, rest[:20], wait=False):
                freed += size_of(leftover)
                shutil.rmtree(leftover, ignore_errors=True)
        if max_bytes is not None:
            less, fewer = self._shrink(max_bytes, spared)
            freed, removed = freed + less, removed + fewer
        return freed, removed

    def _clear_torn(self) -> tuple[int, int]:
        """Removes torn entries of this disk; returns (bytes freed, entries removed)."""
        freed = removed = 0
        for entry in Store.entries(self):
            if entry.meta is not TORN:
                continue
            with contextlib.suppress(BusyError, FileNotFoundError), self._sole(entry.stage, entry.key):
                if read_meta(entry.path) is None:
                    size = size_of(entry.path)
                    self._bury(entry.path)
                    freed, removed = freed + size, removed + 1
        return freed, removed

    def _sole(self, stage: str, key: str) -> contextlib.AbstractContextManager[None]:
        """Whatever keeps others from putting an entry in place; raises `BusyError` if another holds it."""
        return self.lock(stage, key, wait=False)

    def _by_use(self) -> list[tuple[float, Entry]]:
        """The whole entries of this disk with the times of their last use, the longest unused first."""
        found = []
        for entry in Store.entries(self):
            with contextlib.suppress(FileNotFoundError):  # removed just now
                if entry.meta is not TORN:
                    found.append(((entry.path / META).stat().st_mtime, entry))
        return sorted(found, key=lambda one: one[0])

    def _shrink(self, max_bytes: int, spared: float) -> tuple[int, int]:
        """Removes the entries beyond `max_bytes` that are unused for longest, none that was used since `spared`.

        Returns:
            (bytes freed, entries removed).
        """
        entries = self._by_use()
        sizes = [own_bytes(entry) for _, entry in entries]
        over, removed = sum(sizes) - max_bytes, 0
        before = over
        for size, (used, entry) in zip(sizes, entries, strict=True):
            if over <= 0 or used >= spared:
                break
            with contextlib.suppress(FileNotFoundError):  # another `gc` was faster
                if (entry.path / META).stat().st_mtime == used:  # else somebody has just asked for it
                    self.remove(entry)
                    over, removed = over - size, removed + 1
        if over > 0:
            tell_spared(over)
        return before - over, removed


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What an entry's `meta.json` says; None if there is none, or one that a loss of power has cut off or emptied."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return meta


def to_disk(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems cannot, for a folder
            raise
    finally:
        os.close(descriptor)


def tell_spared(size: float) -> None:
    """Warns that `collect` has left more than was asked for."""
    warnings.warn(
        f"{size / 1e6:.1f} MB more than asked for stay in the store: processes that are running may read them. Run "
        "`store gc` again when these have ended.",
        stacklevel=4,
    )


def own_bytes(entry: Entry) -> int:
    """What is freed when an entry goes: its published files but those that have another link, as a sweep's students."""
    size = 0
    for name, fact in entry.meta["files"].items():
        with contextlib.suppress(OSError):  # gone meanwhile
            size += int(fact["bytes"]) if (entry.path / name).stat().st_nlink == 1 else 0
    return size


def size_of(folder: Path) -> int:
    """Bytes that are freed when a folder goes, counted like `own_bytes`."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if file.is_file() and (facts := file.stat()).st_nlink == 1:
                size += facts.st_size
    return size


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
