"""What a command that only plans is spared of importing."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
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


class _Sought(MetaPathFinder, Loader):
    """Whoever imports a module of the compiler (transformers does, for its text towers) gets the real one."""

    def __init__(self) -> None:
        self.own: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{COMPILER}.") or not isinstance(sys.modules.get(COMPILER), _Idle):
            return None
        _away()
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name)
        self.own[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own.pop(module.__name__)  # the import has put the finder's in its place


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
        torch._dynamo.__path__ = []  # else its modules are not looked for
    finder = _Sought()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _away()
