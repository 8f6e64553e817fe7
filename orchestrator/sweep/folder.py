"""A sweep's file and folder: paths that mean the same everywhere, and the folder made and taken away. No torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import method_names
from orchestrator.data.sources import open_source
from orchestrator.errors import UserError, listed
from orchestrator.models.files import check_files
from orchestrator.spec import SweepSpec, check_method
from orchestrator.sweep.capacity import known_cluster

BEGUN = ".sweep.yaml"  # until it has been written whole
RAY_DASHBOARD = ".ray-dashboard"  # where it is, while a sweep runs


def resolved(spec: SweepSpec) -> SweepSpec:
    """The same sweep with absolute paths: workers, and whoever resumes it, have other working folders."""
    if "://" in spec.storage:
        raise UserError(f"storage: {spec.storage!r} is not a folder; give a path that every node can read and write.")
    raw = spec.model_dump(mode="json")
    raw["storage"] = _absolute(spec.storage)
    if spec.search.warm_start is not None:
        raw["search"]["warm_start"] = _absolute(spec.search.warm_start)
    raw["task"]["data"] = _absolute(spec.task.data, ("folder:", "parquet:"))
    for model in (*raw["teachers"], *raw["students"]):
        model["model"] = _absolute(model["model"], ("local:",))
    for name, value in raw["upstream"].items():
        if isinstance(value, str):
            raw["upstream"][name] = _absolute(value, ("local:",))
        elif isinstance(value, dict) and isinstance(value.get("model"), str):
            value["model"] = _absolute(value["model"], ("local:",))
    if raw["search"]["study_file"] is not None:
        raw["search"]["study_file"] = _absolute(raw["search"]["study_file"])
    for name in ("images", "sentences"):
        if raw["corpus"][name] is not None:
            raw["corpus"][name] = _absolute(raw["corpus"][name])
    raw["cluster"] = known_cluster(spec.cluster).model_dump(mode="json")
    return SweepSpec.model_validate(raw)


def _absolute(address: str, prefixes: tuple[str, ...] = ("",)) -> str:
    """An address with its path made absolute, if it begins with one of `prefixes`; no URI and nothing packaged."""
    prefix = next((p for p in prefixes if address.startswith(p)), None)
    if prefix is None or "://" in address or address.startswith("packaged/"):
        return address
    return prefix + str(Path(address.removeprefix(prefix)).expanduser().absolute())


def check_places(spec: SweepSpec) -> None:
    """Refuses methods, data and models' files that are not there, and storage that cannot be written; makes nothing.

    Raises:
        UserError: naming the key.
    """
    for name in spec.methods:
        check_method(name, method_names())
    for entry in (*spec.teachers, *spec.students):
        check_files(entry)
    open_source(spec.task.data, spec.task.kind)
    check_storage(spec)


def check_storage(spec: SweepSpec) -> None:
    """Refuses a storage folder, or object storage for the store, that cannot be written; makes nothing."""
    folder = Path(spec.storage)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"storage: the folder {str(folder)!r} cannot be written ({str(existing)!r} is a file).")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"storage: the folder {str(folder)!r} cannot be written (no permission in {str(existing)!r}).")
    if spec.store.remote is not None:
        from orchestrator.store import check_remote  # and with it torch

        check_remote(spec.store.remote)


def check_new(spec: SweepSpec) -> Path:
    """Where the sweep's folder will be; makes nothing.

    Raises:
        UserError: if there is a sweep of that name already, or a folder with something else in it.
    """
    folder = Path(spec.storage) / spec.name
    if (folder / "sweep.yaml").exists():
        raise UserError(
            f"There is a sweep {spec.name!r} in {spec.storage!r} already: continue it with "
            f"`orchestrator resume {folder}`, or give this one another --name."
        )
    other = _first_in(folder)
    if other is not None:
        raise UserError(
            f"name: the folder {str(folder)!r} of the sweep {spec.name!r} is there already and holds {other!r}; "
            "give the sweep another --name, or other storage."
        )
    return folder


def check_same(spec: SweepSpec, begun: SweepSpec, flags: Sequence[str] = ()) -> str:
    """What a sweep file says otherwise than the one that its sweep began with, and goes on with; "" for nothing.

    Where things lie may have changed.

    Args:
        spec: the file of now.
        begun: that of the begin.
        flags: keys that the command line gives.

    Raises:
        UserError: if one of these would be ignored.
    """
    from orchestrator.select.members import PLACES, flat

    new, old = (flat(s.model_dump(mode="json", exclude=set(PLACES))) for s in (spec, begun))
    changed = [key for key in {**old, **new} if new.get(key) != old.get(key)]
    folder = Path(spec.storage) / spec.name
    for key in changed:
        if any(f"{key}.".startswith(f"{flag}.") or f"{flag}.".startswith(f"{key}.") for flag in flags):
            raise UserError(
                f"--resume: {key} is {json.dumps(new.get(key))} here, and {str(folder)!r} began with "
                f"{json.dumps(old.get(key))}; continue it as it is with `orchestrator resume {folder}`, or give this "
                "sweep another --name."
            )
    different = [key for key in changed if _elsewhere(new.get(key)) != _elsewhere(old.get(key))]
    kept = listed(f"{key} {json.dumps(old.get(key))} (the file now: {json.dumps(new.get(key))})" for key in different)
    return f"It goes on with the file that it began with: {kept}." if different else ""


def _elsewhere(value: Any) -> Any:
    """With the last part alone of each path: the same file lies elsewhere for a job that was sent again."""
    if isinstance(value, dict):
        return {key: _elsewhere(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_elsewhere(inner) for inner in value]
    return value.rpartition("/")[2] if isinstance(value, str) else value


def _first_in(folder: Path) -> str | None:
    """What a folder holds that no sweep left there; None of an empty one, or where there is none."""
    try:
        found = sorted(path.name for path in folder.iterdir() if path.name != BEGUN)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return folder.name
    return found[0] if found else None


def create(spec: SweepSpec) -> Path:
    """Makes the sweep's folder with its `sweep.yaml`.

    Raises:
        UserError: as `check_new`.
    """
    folder = check_new(spec)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / BEGUN
    temporary.write_text(spec.to_yaml(), encoding="utf-8")
    os.replace(temporary, folder / "sweep.yaml")
    return folder


def discard(folder: Path) -> None:
    """Takes away the folder of a sweep that was refused before anything was proposed, so that its name is free."""
    from orchestrator.sweep.study_storage import has_study

    if not has_study(folder):
        shutil.rmtree(folder, ignore_errors=True)
