"""Who works on something, among nodes that share nothing but object storage.

A lease is an object that its holder writes again every few seconds. Taking one is: write yours, then list; if another
live one is there, take yours away and try later. Object storage lists what was written before (S3, GCS and MinIO all
promise this), so of two that come at once at least one sees the other: two never hold at the same time while both live.
A holder whose object has not changed for `DEAD_S`, by the watcher's own clock, counts as dead. So one that was only
stopped for so long may wake up beside its successor: then something is computed twice, and published once.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid

from orchestrator.store.bucket import Bucket

FOLDER = ".leases"
HEARTBEAT_S = 5.0
DEAD_S = 30.0
POLL_S = 1.0


class Lease:
    """The right to work on `name`.

    Args:
        bucket: where the leases lie.
        name: of what is worked on; letters, digits, `-`, `_`, `.`.
        node: tells apart the nodes. On one node at most one process at a time may try for a name: whoever does so
            knows that another lease of its node is of a dead process.
    """

    def __init__(self, bucket: Bucket, name: str, node: str) -> None:
        self.bucket, self.folder, self.node = bucket, f"{FOLDER}/{name}", node
        self.own = f"{self.folder}/{node}-{uuid.uuid4().hex[:12]}"
        self._seen: dict[str, tuple[object, float]] = {}  # stamp of another's lease, and since when it is so
        self._done = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Takes the lease; with `wait=False` False if another holds it.

        Raises:
            RemoteError: if the object storage stays away.
        """
        while True:
            if not self._held():
                self.bucket.write(self.own, b"x")
                if not self._held():
                    self._beating = threading.Thread(target=self._beat, daemon=True)
                    self._beating.start()
                    return True
                self.bucket.delete(self.own)
            if not wait:
                return False
            time.sleep(POLL_S * random.uniform(0.5, 1.5))

    def release(self) -> None:
        """Gives it back; what cannot be deleted dies by itself."""
        self._done.set()
        if self._beating is not None:
            self._beating.join()
        with contextlib.suppress(Exception):
            self.bucket.delete(self.own)

    def _held(self) -> bool:
        """Whether another lives; takes away the leases of the dead."""
        now, alive = time.monotonic(), False
        for one in self.bucket.list(self.folder):
            if one.name == self.own:
                continue
            stamp = (one.stamp, one.size)
            before, since = self._seen.get(one.name, (None, now))
            self._seen[one.name] = (stamp, since if stamp == before else now)
            mine = one.name.startswith(f"{self.folder}/{self.node}-")
            if mine or now - self._seen[one.name][1] > DEAD_S:
                self.bucket.delete(one.name)
            else:
                alive = True
        return alive

    def _beat(self) -> None:
        count = 1
        while not self._done.wait(HEARTBEAT_S):
            count = count % 64 + 1
            with contextlib.suppress(Exception):  # the next one may arrive
                self.bucket.write_once(self.own, b"x" * count)  # the size changes where a time has whole seconds only


def at_work(bucket: Bucket) -> bool:
    """Whether some node holds a lease, or takes or gives back one within `DEAD_S`.

    Raises:
        RemoteError: if the object storage stays away.
    """
    before = bucket.list(FOLDER)
    deadline = time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        if bucket.list(FOLDER) != before:
            return True
    return False
