"""What is wrong with a file, in one sentence."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.errors import UserError, listed, nearest


def explain(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    """The first problem of a pydantic error as one sentence with the key, what was found, and the nearest key."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "missing":  # most often another key's misspelling, which says more
        problem = next((p for p in problems if p["type"] == "extra_forbidden"), problem)
    more = len(problems) - 1
    tail = f" ({more} more problem{'s' if more > 1 else ''} after this one.)" if more else ""
    loc = [part for part in problem["loc"] if not str(part).startswith(("function-", "constrained-", "tagged-"))]
    key = ".".join(str(part) for part in loc)
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _keys_at(schema, loc[:-1])
        return f"Unknown key {key!r} in {where}; allowed here: {listed(known)}.{nearest(str(loc[-1]), known)}{tail}"
    if kind == "missing":
        return f"The key {key!r} is missing in {where}.{tail}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if kind == "value_error" else f"; found {_shown(found)}"
    prefix = f"{key}: " if key else ""
    end = "" if message.endswith(("?", ".")) and not shown else "."
    if kind != "value_error":
        message = message[0].lower() + message[1:]
    return f"In {where}, {prefix}{message}{shown}{end}{tail}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(schema: type[BaseModel], loc: list[Any]) -> list[str]:
    """Names of the keys of the section that `loc` leads to."""
    current: Any = schema
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        current = section_of(field.annotation) if field is not None else None
        if current is None:
            return []
    return list(current.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in a key's annotation, which may be a list or a mapping of it; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        section = section_of(argument)
        if section is not None:
            return section
    return None


def check_method(name: str, known: Collection[str]) -> None:
    """Refuses the name of a method that there is not.

    Raises:
        UserError: naming the nearest one.
    """
    if name not in known:
        raise UserError(f"methods: there is no method {name!r}; there are {listed(known)}.{nearest(name, known)}")
