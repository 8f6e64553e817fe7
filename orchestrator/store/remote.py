"""A store on object storage: what is published there is copied once to each node that needs it.

    <address>/<stage>/<key>/meta.json         written last: what it names is there, whole
    <address>/<stage>/<key>/<attempt>/<file>  each attempt has files of its own, so that none is ever overwritten
    <address>/.leases  .partial  .used        who works on what; checkpoints; when an entry was last copied to a node

A copy is compared with the hashes of `meta.json` before anybody on the node can see it. On one node the kernel's lock
decides who computes or copies, among nodes a lease (`lease.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import FullDiskError, disk_full
from orchestrator.store.bucket import Bucket, BucketMirror, RemoteError, bucket_at
from orchestrator.store.cache import VARIABLE, cache_of, limit_of_cache
from orchestrator.store.lease import Lease, at_work
from orchestrator.store.store import META, BusyError, Entry, Store, file_hash, own_bytes, tell_spared

IN_USE_S = 3600.0  # a copy that a process asked for so lately may still be opened by it
COPIES = 3  # of a file whose copy does not match its hash
_SEEN: set[tuple[str, str, str]] = set()  # (address, stage, key) of what this process knows to be on object storage


class RemoteStore(Store):
    """A store at an address of object storage, with a cache on the disk of each node.

    It is `$ORCHESTRATOR_CACHE`, or a folder of the user in the node's temporary one. A node's processes share it. Where
    a copy would take it beyond `$ORCHESTRATOR_CACHE_GB`, or the disk below `min_free_gb`, those that were not asked for
    during the last hour go first, the least recently used before others.

    Args:
        address: such as `s3://bucket/prefix`.
        min_free_gb: a computation or a copy is refused where less than this is free on the node.

    Raises:
        UserError: if the address cannot be opened, the cache belongs to somebody else, or its limit is no number.
    """

    def __init__(self, address: str, *, min_free_gb: float = 0.0) -> None:
        super().__init__(cache_of(address), min_free_gb=min_free_gb)
        self._address, self._limit = address, limit_of_cache()

    @property
    def address(self) -> str:
        return self._address

    @property
    def bucket(self) -> Bucket:
        return bucket_at(self._address)

    def _announce(self) -> None:
        """Nothing: other nodes do not see this one's files, and leases tell them who works."""

    def get(self, stage: str, key: str) -> Entry | None:
        here = super().get(stage, key)
        if here is not None:
            return here
        if self._published(stage, key) is None:
            return None
        with super().lock("copy", key):
            found = super().get(stage, key)
            while found is None and (published := self._published(stage, key)) is not None:
                found = self._copied(stage, key, published)
        return found

    def find(self, stage: str, key: str, *, wait: bool = True) -> Entry | None:
        """As `get`; but a copy of what `store gc` took from the object storage is published again, for other nodes.

        A process looks there once for each entry: a request takes longer than all else that a look-up does.

        Raises:
            BusyError: if another process is publishing it, or computing it anew (only with `wait=False`).
            RemoteError: if the object storage stays away.
        """
        found = self.get(stage, key)
        if found is None or (self._address, stage, key) in _SEEN:
            return found
        if not self.bucket.has(f"{stage}/{key}/{META}") and not self._restored(found, wait):
            return None
        _SEEN.add((self._address, stage, key))
        return found

    def _restored(self, copy: Entry, wait: bool) -> bool:
        """Sees to it that an entry is published again; False if its copy is damaged, and was removed."""
        with self.lock(copy.stage, copy.key, wait=wait):
            if self.bucket.has(f"{copy.stage}/{copy.key}/{META}"):
                return True  # another node was faster
            if not Store.damaged(self, copy):
                self._upload(copy.stage, copy.key, copy.path, copy.meta)
                return True
        with contextlib.suppress(FileNotFoundError):  # another process has found it too
            Store.remove(self, copy)
        return False

    def _published(self, stage: str, key: str) -> dict[str, Any] | None:
        content = self.bucket.read(f"{stage}/{key}/{META}")
        return json.loads(content) if content is not None else None

    def _copied(self, stage: str, key: str, meta: dict[str, Any]) -> Entry | None:
        temporary = self.root / ".tmp" / f"copy-{key}-{uuid.uuid4().hex[:8]}"
        size = sum(int(f["bytes"]) for f in meta["files"].values())
        for abandoned in temporary.parent.glob(f"copy-{key}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)  # this process holds the lock, so its writer is dead
        try:
            temporary.mkdir(parents=True)
            self._make_room(size)
            free = shutil.disk_usage(temporary).free - size
            if free < self.min_free_gb * 1e9:
                raise FullDiskError(
                    f"{stage}/{key} ({size / 1e9:.2f} GB) would leave {free / 1e9:.2f} GB free in {str(self.root)!r}, "
                    f"less than store.min_free_gb = {self.min_free_gb:g}: free some, or set {VARIABLE} to another disk."
                )
            for name, fact in meta["files"].items():
                if not self._copy(f"{stage}/{key}/{meta['attempt']}/{name}", temporary / name, fact["sha256"]):
                    return None  # removed meanwhile, or published again
            (temporary / META).write_text(json.dumps(meta), encoding="utf-8")
            found = self._place(temporary, stage, key)
        except OSError as error:
            if disk_full(error):
                raise FullDiskError(f"The disk of the cache {str(self.root)!r} is full.") from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(RemoteError):  # it only tells `gc` what is in use
            self.bucket.write(f".used/{stage}/{key}", b"x")
        _SEEN.add((self._address, stage, key))
        return found or Entry(stage, key, self._folder(stage, key), meta)

    def _make_room(self, size: int) -> None:
        """Removes copies that nobody has asked for lately, as far as `size` bytes more need it."""
        over = size - shutil.disk_usage(self.root).free + self.min_free_gb * 1e9
        if self._limit is None and over <= 0:
            return  # without looking at every copy
        copies = [(used, copy, own_bytes(copy)) for used, copy in self._by_use()]
        if self._limit is not None:
            over = max(over, sum(own for _, _, own in copies) + size - self._limit)
        for used, copy, own in copies:
            if over <= 0 or time.time() - used < IN_USE_S:
                break
            with contextlib.suppress(BusyError, FileNotFoundError), super().lock("copy", copy.key, wait=False):
                Store.remove(self, copy)
                over -= own

    def _copy(self, name: str, file: Path, sha256: str) -> bool:
        for _ in range(COPIES):
            if not self.bucket.download(name, file):
                return False
            if file_hash(file) == sha256:
                return True
        raise RemoteError(f"{name} in {self.bucket.shown} differs from what was published; see `store verify`.")

    @contextlib.contextmanager
    def lock(self, stage: str, key: str, *, wait: bool = True) -> Iterator[None]:
        """Holds the entry's lock on this node, and its lease among nodes."""
        with super().lock(stage, key, wait=wait):
            lease = Lease(self.bucket, f"{stage}-{key}", self._node())
            if not lease.acquire(wait=wait):
                raise BusyError(f"{stage}/{key}")
            try:
                yield
            finally:
                lease.release()

    @contextlib.contextmanager
    def _sole(self, stage: str, key: str) -> Iterator[None]:
        with super().lock("copy", key, wait=False), self.lock(stage, key, wait=False):
            yield

    def _node(self) -> str:
        """Names this cache among all caches of the store."""
        path = self.root / ".node"
        if not path.is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".node-{uuid.uuid4().hex}")
            temporary.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # unlike a rename, never over another's
            temporary.unlink()
        return path.read_text(encoding="utf-8")

    def _publish(self, stage: str, key: str, write: Callable[[Path], dict[str, Any] | None], reads: Any) -> Entry:
        entry = super()._publish(stage, key, write, reads)
        for one in self.bucket.list(f".partial/{stage}-{key}"):
            self.bucket.delete(one.name)
        return entry

    def _share(self, stage: str, key: str, folder: Path, meta: dict[str, Any]) -> None:
        meta["attempt"] = uuid.uuid4().hex[:12]
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")
        self._upload(stage, key, folder, meta)
        _SEEN.add((self._address, stage, key))

    def _upload(self, stage: str, key: str, folder: Path, meta: dict[str, Any]) -> None:
        """Writes an entry to object storage: nobody sees any of it before the last line."""
        for name in meta["files"]:
            self.bucket.upload(folder / name, f"{stage}/{key}/{meta['attempt']}/{name}")
        self.bucket.write(f"{stage}/{key}/{META}", json.dumps(meta).encode())

    def mirror(self, folder: Path) -> BucketMirror:
        return BucketMirror(self.bucket, f".partial/{folder.name}")

    def entries(self) -> list[Entry]:
        found = []
        for one in self.bucket.list():
            stage, _, rest = one.name.partition("/")
            key, _, name = rest.partition("/")
            if name == META and not stage.startswith("."):
                meta = self._published(stage, key)
                if meta is not None:
                    found.append(Entry(stage, key, self._folder(stage, key), meta))
        return found

    def damaged(self, entry: Entry) -> list[str]:
        where, files = f"{entry.stage}/{entry.key}/{entry.meta['attempt']}", entry.meta["files"]
        return [name for name in files if self.bucket.hash(f"{where}/{name}") != files[name]["sha256"]]

    def remove(self, entry: Entry) -> None:
        folder = f"{entry.stage}/{entry.key}"
        self.bucket.delete(f"{folder}/{META}")  # first: what is not named is not there
        for one in self.bucket.list(folder):
            self.bucket.delete(one.name)
        self.bucket.delete(f".used/{folder}")
        _SEEN.discard((self._address, entry.stage, entry.key))
        if entry.path.exists():
            super().remove(entry)

    def collect(self, max_bytes: int | None = None) -> tuple[int, int]:
        """Deletes what dead processes left here and there, and the least recently used entries beyond `max_bytes`.

        An entry counts as used when it is published, and when it is copied to a node. Since a node that reads its copy
        tells nobody, none goes while some node works on anything; a warning says then how much was to go and stays.
        """
        freed = super().collect(None)[0]  # on this node
        objects = self.bucket.list()
        entries = {(e.stage, e.key): e for e in self.entries()}
        used: dict[tuple[str, str], int] = {}
        for one in objects:
            head, _, rest = one.name.partition("/")
            if head == ".leases":
                continue
            if head == ".used":
                stage, _, key = rest.partition("/")
                used[stage, key] = max(used.get((stage, key), 0), one.stamp or 0)
                continue
            if head == ".partial":
                stage, _, key = rest.partition("/")[0].partition("-")
            else:
                stage, key = head, rest.partition("/")[0]
                entry = entries.get((stage, key))
                if entry is not None:
                    if one.name.endswith(f"/{META}"):
                        used[stage, key] = max(used.get((stage, key), 0), one.stamp or 0)
                    if one.name.endswith(f"/{META}") or f"/{entry.meta['attempt']}/" in one.name:
                        continue
            with contextlib.suppress(BusyError), self.lock(stage, key[:20], wait=False):
                latest = self._published(stage, key)
                if latest is None or f"/{latest['attempt']}/" not in one.name:
                    self.bucket.delete(one.name)
                    freed += one.size
        if max_bytes is None:
            return freed, 0
        oldest_first = [entries[address] for address in sorted(entries, key=lambda a: used.get(a, 0))]
        less, removed = self._shrink_to(max_bytes, oldest_first)
        return freed + less, removed

    def _shrink_to(self, max_bytes: int, oldest_first: list[Entry]) -> tuple[int, int]:
        """Removes the first entries beyond `max_bytes` from object storage; returns (bytes freed, entries removed)."""
        over, removed = sum(e.bytes for e in oldest_first) - max_bytes, 0
        before = over
        if over > 0 and at_work(self.bucket):
            tell_spared(over)
            return 0, 0
        for entry in oldest_first:
            if over <= 0:
                break
            with contextlib.suppress(BusyError), self.lock(entry.stage, entry.key, wait=False):
                self.remove(entry)
                over, removed = over - entry.bytes, removed + 1
        return before - over, removed
