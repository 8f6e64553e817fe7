"""Memory of a process and its device: given back between two trainings, and what is raised when it does not suffice."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch

# cuBLAS, cuDNN, cuFFT, NCCL and the driver say it by text alone. The CPU's allocator uses none of these words.
SHORT = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "Failed to CUDA calloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not suffice: torch says so by a class of its own, libraries below it by text."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SHORT)


def device_lost() -> bool:
    """Whether this process can use its GPU no more: after an illegal access, say, whatever it asks of it fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return not is_out_of_memory(error)
    return False


def release_memory() -> None:
    """Gives what was freed back to the system and the device: glibc and torch keep it, and processes would grow."""
    gc.collect()
    if torch.cuda.is_initialized():
        # After an illegal access every call to the device raises; whoever ends this process has still a row to write.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
