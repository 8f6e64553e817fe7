"""Which processes use a store on a disk: each holds a lock on a file of its own for as long as it lives.

The kernel releases the lock when its holder ends, however it ends; among machines, where locks hold among them.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = ".users"
CLOCKS_S = 60.0  # by which the clocks of two nodes, or of a node and its file server, may differ
PROBE_S = 5.0  # in which whoever looks whether a lock is held has let go of it again
_HELD: dict[tuple[int, Path], FileLock] = {}  # by process, since a fork inherits the table and not the locks


def announce(root: Path) -> None:
    """Tells that this process uses the store below `root`, from now until it ends."""
    me = (os.getpid(), root)
    if me in _HELD:
        return
    file = root / FOLDER / f"{time.time():.0f}-{uuid.uuid4().hex[:12]}.lock"
    with contextlib.suppress(OSError):  # a store that this user may only read
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=PROBE_S, thread_local=False)
        lock.acquire()
        _HELD[me] = lock


def used_since(root: Path) -> float:
    """When the first of the other living processes that use a store began to; infinity if there is none.

    The files of the dead are removed.
    """
    held = _HELD.get((os.getpid(), root))
    began = [math.inf]
    for file in (root / FOLDER).glob("*.lock"):
        if held is not None and file == Path(held.lock_file):
            continue
        start = float(file.name.partition("-")[0])
        try:
            with FileLock(file, timeout=0):
                if time.time() - start > CLOCKS_S:  # its process may be about to lock a younger one
                    file.unlink(missing_ok=True)
        except (Timeout, OSError):  # held; or another user's, who may be alive
            began.append(start - CLOCKS_S)
    return min(began)
