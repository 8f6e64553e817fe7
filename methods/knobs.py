"""Knobs: the fields of a method's configuration, each with its bounds and its default search range."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Range(BaseModel):
    """An interval to search: `low` to `high`, uniform, or log-uniform with `log`; whole numbers with `int`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    log: bool = False
    int: bool = False


class Choice(BaseModel):
    """A finite set to search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[Any, ...] = Field(min_length=1)


class MethodConfig(BaseModel):
    """The base of every method's configuration: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


def knob(default: Any, description: str, *, search: Range | Choice | None = None, **bounds: Any) -> Any:
    """A field of a `MethodConfig`.

    Args:
        default: the value that is used when nothing is searched or fixed.
        description: one sentence; the command line and the documentation show it.
        search: what an empty method block in a sweep file searches; None keeps the default.
        bounds: pydantic bounds (`ge`, `gt`, `le`, `lt`).
    """
    extra: dict[str, Any] = {"search": search.model_dump(mode="json")} if search is not None else {}
    return Field(default=default, description=description, json_schema_extra=extra, **bounds)


def default_space(config: type[MethodConfig]) -> dict[str, Range | Choice]:
    """The search ranges that the fields of `config` declare, by field name."""
    space: dict[str, Range | Choice] = {}
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and isinstance(extra.get("search"), dict):
            search: dict[str, Any] = dict(extra["search"])  # type: ignore[arg-type]
            space[name] = Choice(**search) if "values" in search else Range(**search)
    return space
