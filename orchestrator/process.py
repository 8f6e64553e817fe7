"""How a process of ours begins and ends.

Python looks for garbage every few hundred new objects. While torch, timm and Ray are imported it finds none, a million
objects stay, and the looking takes a quarter of the time. At the end it takes every module apart, which takes seconds
and frees what the system frees at once.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable

USUAL = gc.get_threshold()
SELDOM = (50_000, 10, 10)


def begin() -> None:
    """Looks for garbage more seldom, for as long as modules are imported; see `settle`."""
    gc.set_threshold(*SELDOM)


def settle() -> None:
    """Looks as often as Python does, and never again at what is loaded by now, which would take a quarter of a second.

    For processes that train one thing after another, before the first; again, it does nothing.
    """
    if gc.get_freeze_count() == 0:
        gc.freeze()
        gc.set_threshold(*USUAL)


def run(main: Callable[[], None]) -> None:
    """Runs a program's `main`, whose end is the end of this process.

    Threads are waited for, and what others have registered for the end is done, as ever; modules are left to the
    system. The exit code is what it would have been.
    """
    status = 1

    def end() -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever has read us is gone
            sys.stdout.flush()
        logging.shutdown()
        os._exit(status)

    begin()
    atexit.register(end)  # before all others, and so called after them
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code & 0xFF if isinstance(stop.code, int) else 1
        raise
