"""The sweeps that are compared: read, refused where they do not compare, and those that are seeds of one told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.errors import UserError
from orchestrator.evaluate.details import FILE
from orchestrator.files import read_facts
from orchestrator.select.results import read_trials
from orchestrator.spec import SweepSpec, read_spec

VAL_KEYS = ("kind", "data", "splits", "ignore_index")  # of `task`: with `seed`, they say which images are in val
# What does not change a trial's result, and what makes another seed of the same sweep.
PLACES = ("name", "storage", "store", "cluster", "estimate", "generate")
STUDY_PLACES = ("search.study", "search.study_file", "search.study_patience_s")
SEEDS = ("search.seed", "task.seed", "task.draw")


@dataclass(frozen=True)
class Member:
    """One of the sweeps that are compared.

    Attributes:
        name: of its folder, with as much of the path as tells it from the others.
        folder: its own.
        spec: its file.
        frame: its trials.
        val: identity of its val images; empty if none was recorded.
        images: of val; 0 if not recorded.
    """

    name: str
    folder: Path
    spec: SweepSpec
    frame: pd.DataFrame
    val: str
    images: int

    @property
    def seed(self) -> tuple[int, int, int]:
        """What may differ between two sweeps that are seeds of one."""
        return self.spec.search.seed, self.spec.task.seed, self.spec.task.draw


def read_members(folders: Sequence[Path]) -> list[Member]:
    """The sweeps in `folders`.

    Raises:
        UserError: if one is no sweep, there are fewer than two, or one is given twice.
    """
    places = [folder.expanduser().absolute() for folder in folders]
    if len(places) < 2:
        raise UserError("Comparing takes two sweeps or more; give the folder of another one.")
    for at, place in enumerate(places):
        if place in places[:at]:
            raise UserError(f"The sweep {str(folders[at])!r} is given twice.")
    frames = [read_trials(folder) for folder in folders]
    names = _names(places)
    specs = [read_spec(place / "sweep.yaml") for place in places]
    return [
        Member(name, place, spec, frame, *_val_of(place, frame))
        for name, place, spec, frame in zip(names, places, specs, frames, strict=True)
    ]


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    depth = 1
    while True:
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _val_of(folder: Path, frame: pd.DataFrame) -> tuple[str, int]:
    """Identity and number of val images, as the first student that says it has it."""
    val, images = "", 0
    for path in frame["student_path"]:
        if not path:
            continue
        val = val or str(read_facts(folder / path / "student.json").get("val", ""))
        images = images or int(read_facts(folder / path / FILE).get("images", 0))
        if val and images:
            break
    return val, images


def check_comparable(members: Sequence[Member]) -> bool:
    """Whether all were scored on the same val images; False: each seed has its own, split from the same data.

    Raises:
        UserError: if their val metrics do not compare, naming the key that differs.
    """
    first, same = members[0], True
    for other in members[1:]:
        known = bool(first.val and other.val)
        if other.spec.task.kind == first.spec.task.kind and known and first.val == other.val:
            continue
        for key in VAL_KEYS:
            here, there = getattr(first.spec.task, key), getattr(other.spec.task, key)
            if here != there:
                raise UserError(
                    f"The sweeps {first.name!r} and {other.name!r} do not compare: task.{key} is {_plain(here)} in the "
                    f"one and {_plain(there)} in the other, so they were scored on different data."
                )
        if first.spec.task.seed != other.spec.task.seed:
            same = False
        elif known:
            raise UserError(
                f"The sweeps {first.name!r} and {other.name!r} do not compare: task.data is {first.spec.task.data!r} "
                "in both, but it held other val images or labels when the second one ran."
            )
    return same


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A mapping's leaves by dotted key; lists are leaves, and networks are their names where that says all."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
    return {prefix[:-1]: value}


def differing(members: Sequence[Member]) -> dict[str, list[Any]]:
    """Keys of the sweep files whose values differ, each with its value in every sweep (None: not there)."""
    files = [flat(m.spec.model_dump(mode="json", exclude={"name", "storage"})) for m in members]
    names = dict.fromkeys(name for file in files for name in file)
    found = {name: [file.get(name) for file in files] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def seeds_of_one(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Sweeps that differ only in their seeds, together, by a letter; in the order of their first ones."""
    found: dict[str, list[Member]] = {}
    for member in members:
        leaves = flat(member.spec.model_dump(mode="json", exclude=set(PLACES)))
        key = json.dumps({k: v for k, v in leaves.items() if k not in (*STUDY_PLACES, *SEEDS)}, sort_keys=True)
        found.setdefault(key, []).append(member)
    return {_letter(at): group for at, group in enumerate(found.values())}


def _letter(at: int) -> str:
    return ("" if at < 26 else _letter(at // 26 - 1)) + chr(ord("A") + at % 26)


def _plain(value: Any) -> str:
    text = json.dumps(value if not hasattr(value, "model_dump") else value.model_dump(mode="json"))
    return text.replace('"', "'")
