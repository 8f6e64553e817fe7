"""How a process of ours begins and ends.

Python looks for garbage every few hundred new objects. While torch, timm and Ray are imported it finds none, a million
objects stay, and the looking takes a quarter of the time. At the end it takes every module apart, which takes seconds
and frees what the system frees at once.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable

USUAL = gc.get_threshold()
SELDOM = (50_000, 10, 10)
_settled = False


def beginning() -> Callable[[], None]:
    """What a process begins with, so that it looks for garbage more seldom until it calls `settle`.

    Not a function of this module: Ray sends it to workers by value, so that they import this package when their work
    does, the driver's copy of it.
    """

    def begin() -> None:
        gc.set_threshold(*SELDOM)

    return begin


def settle() -> None:
    """Looks as often as Python does, and never again at what is loaded by now, which would take a quarter of a second.

    For processes of ours that have imported what they need and go on for long; again, it does nothing.
    """
    global _settled
    gc.set_threshold(*USUAL)
    if not _settled:  # Python 3.12 begins with some hundred frozen objects, so their number does not tell
        gc.freeze()
        _settled = True


def run(main: Callable[[], None]) -> None:
    """Runs a program's `main`, whose end is the end of this process.

    Threads are waited for, and what is registered from now on for the end is done, as ever; what was registered before,
    and modules, are left to the system. The exit code is what it would have been, and 1 where the output's last words
    cannot be written.
    """
    status = 1

    def end() -> None:
        code = status
        logging.shutdown()
        if sys.stdout is not None and not sys.stdout.closed:
            try:
                sys.stdout.flush()
            except BrokenPipeError:  # whoever has read us has had enough
                pass
            except OSError as error:
                print(f"Failed: the output cannot be written ({error.strerror}).", file=sys.stderr)
                code = code or 1
        os._exit(code)

    beginning()()
    atexit.register(end)  # before others do, and so called after them
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code & 0xFF if isinstance(stop.code, int) else 1
        raise
