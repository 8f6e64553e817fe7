"""What can be said of the methods that are found."""

from __future__ import annotations

import inspect
from typing import Any

from methods import discover
from methods.contract import Method
from methods.knobs import Choice, Range, default_space
from orchestrator.trial.plan import method_named


def method_facts(name: str | None = None) -> list[dict[str, Any]]:
    """Facts of one method, or of all.

    Raises:
        UserError: naming the nearest method, if there is none of that name.
    """
    chosen = [method_named(name)] if name is not None else list(discover().values())
    return [_facts(method) for method in chosen]


def _facts(method: type[Method]) -> dict[str, Any]:
    needs = []
    if method.uses_teacher:
        kinds = method.teacher_kinds
        needs.append("a teacher" if len(kinds) == 3 else f"a {' or '.join(kinds)} teacher")
    if method.deploys == "student":
        needs.append("a student")
    needs.append("labelled images" if method.needs_labels else "images without labels; labels for the probe only")
    space = default_space(method.Config)
    return {
        "name": method.name,
        "family": method.family,
        "paper": method.paper,
        "summary": (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " "),
        "needs": ", ".join(needs),
        "tasks": list(method.tasks),
        "deploys": "a student of the sweep file" if method.deploys == "student" else "a network made from the teacher",
        "knobs": [
            {
                "knob": knob,
                "default": field.get_default(call_default_factory=True),
                "search": _shown(space.get(knob)),
                "allowed": _bounds(field),
                "description": field.description or "",
            }
            for knob, field in method.Config.model_fields.items()
        ],
    }


def _shown(domain: Range | Choice | None) -> str:
    if domain is None:
        return "-"
    if isinstance(domain, Choice):
        return ", ".join(str(v) for v in domain.values)
    return f"{domain.low:g} to {domain.high:g}{' (log)' if domain.log else ''}"


def _bounds(field: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [f"{signs[s]} {getattr(m, s):g}" for m in field.metadata for s in signs if hasattr(m, s)]
    values = getattr(field.annotation, "__args__", None)
    if not parts and values and all(isinstance(v, str | int) for v in values):
        return ", ".join(str(v) for v in values)
    return " and ".join(parts) or getattr(field.annotation, "__name__", str(field.annotation))
