"""How a training process hears that it will be taken away: from its cluster, which drains a node, or by SIGTERM.

A node is drained when its machine is asked to go: `ray start --block` does so on SIGTERM (Kubernetes sends it before it
takes a pod away), an autoscaler or a person by `ray drain-node`. Its processes live on until the machine goes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

POLL_S = 2.0
SAVE_S = 20.0  # that the end of a process waits for the state to be saved


def draining() -> frozenset[str]:
    """Ids of the cluster's nodes that are being drained. Ray Train asks the same."""
    import ray._private.state

    return frozenset(ray._private.state.state.get_draining_nodes())


@contextlib.contextmanager
def watched(nodes: Iterable[str]) -> Iterator[Callable[[], bool]]:
    """Gives what says whether one of these nodes is being drained. To ask costs nothing, since a thread looks.

    Args:
        nodes: their ids.
    """
    wanted, found, done = frozenset(nodes), threading.Event(), threading.Event()

    def watch() -> None:
        while not found.is_set() and not done.is_set():
            with contextlib.suppress(Exception):  # the cluster does not answer; perhaps it does next time
                if wanted & draining():
                    found.set()
            done.wait(POLL_S)

    threading.Thread(target=watch, name="notice", daemon=True).start()
    try:
        yield found.is_set
    finally:
        done.set()


class Ending:
    """Hears SIGTERM while it lives, wherever it was made.

    In the main thread it is the signal's handler. A Ray worker trains in another thread, where none can be set, and
    Ray's own handler ends the process; Python's end then waits until the state is saved.

    Attributes:
        asked: whether it came.
    """

    def __init__(self) -> None:
        self.asked = False
        self.saved = threading.Event()
        self.before: Any = None
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self._hear)
        else:
            atexit.register(self._wait)

    def _hear(self, number: int, frame: Any) -> None:
        self.asked = True

    def _wait(self) -> None:
        self.asked = True
        self.saved.wait(SAVE_S)

    def close(self) -> None:
        """Gives the signal back to whoever heard it before, and ends the process if it came.

        Raises:
            SystemExit: in that case, where passing the signal on does not end it: what was begun must not be taken for
                done.
        """
        if not self.main:
            atexit.unregister(self._wait)
        elif self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            if self.asked:
                os.kill(os.getpid(), signal.SIGTERM)
        self.saved.set()
        if self.asked:
            raise SystemExit(128 + signal.SIGTERM)
