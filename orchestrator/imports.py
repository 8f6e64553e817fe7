"""What a command that only plans is spared of importing."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
STANDING = (COMPILER, f"{COMPILER}.utils")


class _Idle(ModuleType):
    """Stands for torch's compiler, or a module of it."""

    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        """What marks a function that the compiler must leave alone; nothing compiles it."""
        return self.disable if function is None else function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def later(*args: Any, **kwargs: Any) -> Any:
            _away()
            return getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)

        return later


def _away() -> None:
    import torch

    for name in STANDING:
        if isinstance(sys.modules.get(name), _Idle):
            del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _Idle):
        del torch._dynamo


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keeps torch's compiler, with SymPy, from being imported while a command plans.

    torchvision, timm and torch's own initial values on the meta device import it only to mark functions that it must
    leave alone, or to ask later whether it serves a device. That is a quarter of what `check` takes. Trials use it:
    every optimiser does.
    """
    import torch

    if COMPILER not in sys.modules:
        for name in STANDING:
            sys.modules[name] = _Idle(name)
        torch._dynamo = sys.modules[COMPILER]
    try:
        yield
    finally:
        _away()
