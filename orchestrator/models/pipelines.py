"""Text-to-image pipelines by hub id or folder, as the sweep file's `upstream.pipeline` names them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from methods.generators.pipelines import PipelinePackage
from orchestrator.errors import UserError, listed, nearest

KEY = "upstream.pipeline"


def pipeline_package(entry: str | Mapping[str, Any]) -> PipelinePackage:
    """The package of an entry: `ID_OR_FOLDER`, or a mapping with `model` and the options of `PipelinePackage`.

    Raises:
        UserError: naming the key that is wrong; or the folder that is no pipeline.
    """
    options = {"model": entry} if isinstance(entry, str) else dict(entry)
    known = [f.name for f in fields(PipelinePackage)]
    for key in options:
        if key not in known:
            raise UserError(f"Unknown key {f'{KEY}.{key}'!r}; allowed here: {listed(known)}.{nearest(key, known)}")
    if not isinstance(options.get("model"), str) or not options["model"]:
        raise UserError(f"{KEY}: a model is missing: a hub id such as 'owner/name', or a folder.")
    options["model"] = options["model"].removeprefix("local:")
    folder = _folder(options["model"])
    if folder is not None and not (folder / "model_index.json").is_file():
        raise UserError(f"{KEY}: the folder {str(folder)!r} is no diffusers pipeline: it has no model_index.json.")
    try:
        return PipelinePackage(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{KEY}: {error}") from None


def pipeline_hash(package: PipelinePackage) -> str:
    """Of the options, and of a folder's files. A hub id stands for itself: pin it with `options: {revision: ...}`."""
    about = {f.name: getattr(package, f.name) for f in fields(package)}
    folders = [f for f in (_folder(package.model), _folder(package.ip_adapter or "")) if f is not None]
    about["files"] = [_contents(f, _stamp(f)) for f in folders]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _folder(name: str) -> Path | None:
    """The folder that a name means; None for a hub id."""
    path = Path(name).expanduser()
    return path if name and (path.is_dir() or path.is_absolute() or name.startswith((".", "~"))) else None


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return tuple((p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@functools.lru_cache(maxsize=8)
def _contents(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamp:
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(name.encode())
    return digest.hexdigest()
