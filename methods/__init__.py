"""Transfer methods in plain PyTorch: usable in a notebook, without Ray and without `orchestrator`.

Every concrete `Method` in a module of this package is found by itself. Other packages add theirs through the
entry point group `transfer_orchestrator.methods`, each entry naming a `Method` class.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methods.contract import Method

ENTRY_POINT_GROUP = "transfer_orchestrator.methods"


@functools.cache
def method_packages() -> frozenset[str]:
    """Top-level packages whose code is trusted, for it brings methods: this one, and those of entry points."""
    return frozenset([__name__, *(e.module.partition(".")[0] for e in entry_points(group=ENTRY_POINT_GROUP))])


@functools.cache
def discover() -> dict[str, type[Method]]:
    """Every method that can be found, by name, in alphabetical order.

    Raises:
        ValueError: if two classes claim one name.
    """
    from methods.contract import Method

    found: dict[str, type[Method]] = {}
    candidates: list[type] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        candidates += [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    candidates += [entry.load() for entry in entry_points(group=ENTRY_POINT_GROUP)]
    for candidate in candidates:
        if not issubclass(candidate, Method) or inspect.isabstract(candidate) or "name" not in vars(candidate):
            continue  # a base that methods share has no name of its own
        known = found.setdefault(candidate.name, candidate)
        if known is not candidate:
            raise ValueError(
                f"Two methods are called {candidate.name!r}: {known.__module__} and {candidate.__module__}."
            )
    return dict(sorted(found.items()))


@functools.cache
def method_names() -> tuple[str, ...]:
    """The keys of `discover()`, where it can be without importing torch, which takes seconds.

    Names of this package's methods are read from their files as they are written; those of other packages' are known
    only to their classes.
    """
    if entry_points(group=ENTRY_POINT_GROUP):
        return tuple(discover())
    found = set()
    for info in pkgutil.iter_modules(__path__):
        if info.ispkg:
            continue
        module = ast.parse((Path(__path__[0]) / f"{info.name}.py").read_bytes())
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        for statement in (statement for node in classes for statement in node.body):
            match statement:
                case ast.Assign(targets=[ast.Name(id="name")], value=ast.Constant(value=str(name))):
                    found.add(name)
    return tuple(sorted(found))
