"""Priming as a command: upstream images to a folder that can be published."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import UserError, listed, nearest
from orchestrator.models.check import check_model
from orchestrator.models.load import load_network
from orchestrator.models.upstream import KINDS, check_free, save_upstream
from orchestrator.spec import Model, explain, read_overrides
from orchestrator.store import Store, open_store
from orchestrator.train.prime import DiffusionSettings, VQSettings, prime_diffusion, prime_vq

SETTINGS: dict[str, Any] = {"vq": VQSettings, "diffusion": DiffusionSettings}


def prime(
    where: str,
    data: str,
    kind: str,
    size: int,
    steps: int,
    out: Path,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains an upstream package through the store and writes its folder, which holds no image.

    Args:
        where: a storage folder, a sweep's folder or a store; made if there is none.
        data: `folder:PATH`, `parquet:PATH` or `packaged/NAME`; labels and splits are not looked at.
        kind: `vq` or `diffusion`.
        size: side of the images, in pixels.
        steps: of training; a VQ's prior has as many unless `prior_steps` says otherwise.
        out: the folder to write.
        overrides: `key=value`, keys of `VQSettings` or `DiffusionSettings`.
        tell: takes lines of progress.

    Raises:
        UserError: if something of that is wrong.
    """
    if kind not in KINDS:
        raise UserError(f"--kind: {kind!r} is none of {listed(KINDS)}.{nearest(kind, KINDS)}")
    if steps < 1:
        raise UserError(f"--steps: {steps} is below 1.")
    settings = read_settings(kind, size, overrides)
    check_free(out)
    features = None
    if kind == "vq" and settings.feature_weight > 0:
        entry = Model(model=settings.feature_network)
        check_model(entry, "teacher")
        features = load_network(entry, "teacher")
    store = store_for(where)
    package: Any
    if kind == "vq":
        package, facts = prime_vq(store, data, settings, steps, features, tell)
    else:
        package, facts = prime_diffusion(store, data, settings, steps, tell)
    save_upstream(out, package, package.config.model_dump(mode="json"), facts, half=settings.half)
    sentence = f"{out} holds the package: name it `local:{out}` under `upstream.{kind}`."
    return {"out": str(out), "kind": kind, **facts, "sentence": sentence}


def read_settings(kind: str, size: int, overrides: Sequence[str]) -> Any:
    """The settings of `--size` and `--set`.

    Raises:
        UserError: naming the key, what was found, what is allowed and the nearest key.
    """
    raw = read_overrides(overrides)
    if "size" in raw:
        raise UserError("--set size: the side of the images is given by --size.")
    try:
        return SETTINGS[kind].model_validate_json(json.dumps(raw | {"size": size}))
    except ValidationError as error:
        raise UserError(explain(error, SETTINGS[kind], "--set").replace("In --set, size:", "--size:")) from None


def store_for(where: str | Path) -> Store:
    """The store there; a new one if there is none."""
    try:
        return open_store(where)
    except UserError:
        if "://" in str(where):
            raise
        path = Path(where)
        return Store(path if path.name == "store" else path / "store")
