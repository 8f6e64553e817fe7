"""Memory between two trainings of one process."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch


def release_memory() -> None:
    """Gives what was freed back to the system and the device: glibc and torch keep it, and processes would grow."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
