"""A sweep file as text: YAML, and `--set` overrides of its keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from orchestrator.errors import UserError, nearest

MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everybody expects; PyYAML's own rule wants `1.0e-3`.

    A key that stands twice in a mapping is an error, as YAML has it; PyYAML takes the last. Merge keys (`<<`) are none.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            if (key.tag, key.value) in lines:
                problem = (
                    f"the key {key.value!r} stands there a second time (first in line {lines[key.tag, key.value]})"
                )
                raise ComposerError(problem=problem, problem_mark=key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def to_yaml(value: Any) -> str:
    """Plain values as YAML that reads as them."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def read_mapping(path: Path, what: str, hint: str = "") -> dict[str, Any]:
    """The keys of a YAML file that a person wrote.

    Args:
        path: of the file.
        what: it is called in errors.
        hint: how to go on where it is empty.

    Raises:
        UserError: if the file is missing, is not YAML, is empty, or holds no mapping.
    """
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"There is no {what} {str(path)!r}.{nearest(path.name, known)}") from None
    except IsADirectoryError:
        raise UserError(f"The {what} {str(path)!r} is a folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The {what} {str(path)!r} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"The {what} {str(path)!r} is not valid YAML{where}: {_problem(error)}.") from None
    if raw is None:
        raise UserError(f"The {what} {str(path)!r} is empty{hint}.")
    if not isinstance(raw, dict):
        raise UserError(f"The {what} {str(path)!r} holds a {type(raw).__name__}, not a mapping of keys.")
    return raw


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or "it cannot be parsed"


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` pairs by key, read as in a sweep file."""
    raw: dict[str, Any] = {}
    for pair in overrides:
        override(raw, pair)
    return raw


def override(raw: dict[str, Any], pair: str) -> None:
    """Sets the key of a `key.path=value` pair.

    Raises:
        UserError: if it is none, or the file has no such place.
    """
    path, equals, text = pair.partition("=")
    if not equals or not path:
        raise UserError(f"--set {pair!r} is not of the form key.path=value.")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path}: {text!r} is not a YAML value: {_problem(error)}.") from None
    node: Any = raw
    *parents, last = path.split(".")
    for i, key in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, key, path)]
        else:
            if key not in node or node[key] is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise UserError(f"--set {path}: {'.'.join(parents[: i + 1])} is {node!r}, which has no keys below it.")
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    else:
        node[last] = value


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"--set {path}: {key!r} is not a position in a list of {len(node)} (0 to {len(node) - 1}).")
    return int(key)
