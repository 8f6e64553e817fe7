"""Upstream packages by name: `packaged/NAME` or `local:FOLDER`, a folder with `config.json` and `model.safetensors`.

`config.json` holds `kind` (`vq` or `diffusion`), `config` (what `build` of that kind's class takes), `weights` (SHA-256
of the other file) and `facts` about the training. There is no image in either, which makes such a folder publishable.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from methods.generators import read_config
from methods.generators.diffusion import DiffusionConfig, DiffusionPackage
from methods.generators.vq import VQConfig, VQPackage
from orchestrator.errors import UserError, first_lines, listed, nearest
from orchestrator.models.pipelines import pipeline_hash, pipeline_package
from orchestrator.spec import Upstream

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS: dict[str, Any] = {"vq": VQPackage, "diffusion": DiffusionPackage}
CONFIGS: dict[str, Any] = {"vq": VQConfig, "diffusion": DiffusionConfig}


@dataclass(frozen=True)
class UpstreamPackage:
    """A loaded generator.

    Attributes:
        name: as in the sweep file.
        kind: `vq`, `diffusion` or `pipeline`.
        module: a `VQPackage` or `DiffusionPackage` (in evaluation mode; copy it before you change it), or a
            `PipelinePackage`.
        weights_hash: of its configuration and weights, for keys of the store.
        facts: what is known of its training.
    """

    name: str
    kind: str
    module: Any
    weights_hash: str
    facts: Mapping[str, Any]


def check_section(section: Upstream) -> None:
    """Checks every generator that a sweep file names, without loading weights.

    Raises:
        UserError: as `check_upstream` and `pipeline_package`.
    """
    for kind in section.given:
        entry = getattr(section, kind)
        if kind == "pipeline":
            pipeline_package(entry)
        else:
            check_upstream(entry, kind)


def upstream_of(section: Upstream, kind: str) -> UpstreamPackage:
    """The generator that a sweep file names under `upstream.KIND`; a pipeline is loaded when it is first used."""
    entry = getattr(section, kind)
    if kind != "pipeline":
        return load_upstream(entry, kind)
    package = pipeline_package(entry)
    return UpstreamPackage(package.model, kind, package, pipeline_hash(package), {})


def check_upstream(entry_model: str, kind: str) -> dict[str, Any]:
    """Checks a package's name and what its `config.json` says, without loading weights; returns its content.

    Args:
        entry_model: `packaged/NAME` or `local:FOLDER`.
        kind: `vq` or `diffusion`: which key of the sweep file's `upstream` section names it.

    Raises:
        UserError: naming the key, what was found, what is allowed and the nearest name.
    """
    key = f"upstream.{kind}"
    if kind not in KINDS:
        raise UserError(
            f"There is no upstream package of kind {kind!r}; there are {listed(KINDS)}.{nearest(kind, KINDS)}"
        )
    folder = _folder(entry_model, key)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found, config, _ = content["kind"], content["config"], content["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}: {str(folder / CONFIG)!r} is no readable upstream package: {first_lines(error, 2)}"
        ) from None
    if found != kind:
        better = f" Name it under `upstream.{found}`." if found in KINDS else ""
        raise UserError(f"{key}: {entry_model!r} is a package of kind {found!r}, and {kind!r} is needed.{better}")
    try:
        read_config(CONFIGS[kind], config)
    except ValueError as error:
        raise UserError(
            f"{key}: the configuration in {str(folder / CONFIG)!r} is wrong: {first_lines(error, 2)}"
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{key}: {str(folder)!r} has no {WEIGHTS}.")
    return content


def load_upstream(entry_model: str, kind: str) -> UpstreamPackage:
    """The package with its weights, loaded once a process (again if its files change).

    Raises:
        UserError: as `check_upstream`, and if the weights cannot be read or do not fit.
    """
    check_upstream(entry_model, kind)
    folder = _folder(entry_model, f"upstream.{kind}")
    stamp = tuple((folder / name).stat().st_mtime_ns for name in (CONFIG, WEIGHTS))
    return _load(entry_model, kind, folder, stamp)


@functools.lru_cache(maxsize=4)
def _load(entry_model: str, kind: str, folder: Path, stamp: tuple[int, ...]) -> UpstreamPackage:
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    module: nn.Module = KINDS[kind].build(content["config"])
    data = (folder / WEIGHTS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != content["weights"]:
        raise UserError(
            f"upstream.{kind}: {str(folder / WEIGHTS)!r} is not the file that its {CONFIG} was written for."
        )
    try:
        module.load_state_dict({name: tensor.float() for name, tensor in load(data).items()}, strict=True)
    except Exception as error:  # safetensors' errors and torch's share no base class
        raise UserError(
            f"upstream.{kind}: the weights in {str(folder / WEIGHTS)!r} cannot be read or do not fit its {CONFIG}: "
            f"{first_lines(error, 2)}"
        ) from None
    module.requires_grad_(False)
    about = json.dumps([kind, content["config"], digest], sort_keys=True)
    weights_hash = hashlib.sha256(about.encode()).hexdigest()
    return UpstreamPackage(entry_model, kind, module.eval(), weights_hash, content.get("facts", {}))


def save_upstream(
    folder: Path, module: nn.Module, config: Mapping[str, Any], facts: Mapping[str, Any], *, half: bool = False
) -> None:
    """Writes a package's two files beside their folder, then renames them into place.

    Args:
        folder: must not exist, be empty, or be an upstream package, whose two files are then replaced.
        module: a `VQPackage` or `DiffusionPackage`.
        config: what `build` of its class takes.
        facts: plain JSON values about its training.
        half: store the weights in 16 bits; they are loaded as float32.

    Raises:
        UserError: if the folder exists and is no upstream package.
    """
    folder = Path(folder)
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        dtype = torch.float16 if half else torch.float32
        state = {k: v.detach().cpu().to(dtype).contiguous().clone() for k, v in module.state_dict().items()}
        data = save(state)
        (temporary / WEIGHTS).write_bytes(data)
        content = {
            "kind": module.kind,
            "config": dict(config),
            "weights": hashlib.sha256(data).hexdigest(),
            "facts": dict(facts),
        }
        (temporary / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if folder.is_dir():  # a model card may lie beside them; `weights` tells a torn pair
            for name in (WEIGHTS, CONFIG):
                os.replace(temporary / name, folder / name)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Refuses to write a package where something else is.

    Raises:
        UserError: if the folder exists, is not empty and is no upstream package.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise UserError(f"{str(folder)!r} exists and is no upstream package; name a folder that does not exist yet.")


def _folder(entry_model: str, key: str) -> Path:
    if entry_model.startswith("packaged/"):
        name = entry_model.removeprefix("packaged/")
        root = Path(str(files("orchestrator") / "packaged"))
        known = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
        if name not in known:
            raise UserError(
                f"{key}: there is no packaged upstream package {entry_model!r}; there is "
                f"{listed(f'packaged/{k}' for k in known)}.{nearest(name, known)}"
            )
        return root / name
    if not entry_model.startswith("local:") or entry_model == "local:":
        raise UserError(f"{key}: {entry_model!r} is no upstream package; allowed: packaged/NAME and local:FOLDER.")
    folder = Path(entry_model.removeprefix("local:")).expanduser()
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"{key}: there is no folder {str(folder)!r}.{nearest(folder.name, near)}")
    return folder
