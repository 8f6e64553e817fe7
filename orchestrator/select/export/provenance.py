"""Where an exported student comes from: data, teacher, configuration, seeds, metrics, licences, commands."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from timm.models import get_pretrained_cfg

from orchestrator.data.task import TaskData
from orchestrator.errors import UserError
from orchestrator.models.hub import hub_repository, is_hub
from orchestrator.models.load import load_network
from orchestrator.models.names import timm_name, wants_weights
from orchestrator.spec import Model, SweepSpec
from orchestrator.trial.plan import TrialConfig

UNKNOWN = "unknown"
DATA = {
    "packaged/clipart": "public domain (Creative Commons Public Domain Dedication)",
    "packaged/icons": "by font: Apache-2.0, CC-BY-4.0, OFL-1.1, MIT; see the data's PROVENANCE.md",
}
WEIGHTS = {
    "packaged/vit_clipart": "apache-2.0",
    "packaged/clip_icons": "apache-2.0; its training icons by font: Apache-2.0, CC-BY-4.0, OFL-1.1",
}
KEPT: tuple[str, ...] = ("task", "train", "upstream", "generate", "corpus")  # what decides the result
PACKAGES = ("transfer-orchestrator", "torch", "timm", "open_clip_torch", "onnx", "onnxruntime")


def provenance_of(
    spec: SweepSpec, task: TaskData, row: Mapping[str, Any], test: Mapping[str, Any] | None, out_name: str
) -> dict[str, Any]:
    """What the card says of a trial's origin; plain JSON without a path of this machine.

    Args:
        spec: of the sweep.
        task: its data.
        row: the trial's, as the ledger has it.
        test: what it scored on test, if `best` has read that; test is not read for a card.
        out_name: of the export's folder.
    """
    config = TrialConfig.from_json(row["config"])
    teacher = spec.teachers[config.cell.teacher] if config.cell.teacher is not None else None
    student = spec.students[config.cell.student] if config.cell.student is not None else None
    repeats = int(row["repeats"])
    val = f"{float(row['val_metric']):.4f}, one run on {len(task.val):,} images"
    if repeats > 1:
        values = ", ".join(f"{v:.4f}" for v in json.loads(row["val_values"]))
        val = f"{float(row['val_metric']):.4f} ± {float(row['val_sd']):.4f} over {repeats} repeats ({values})"
        val += f" on {len(task.val):,} images; the network is the first one's"
    seeds = f"trial {config.seed}" + (f" to {config.seed + repeats - 1}" if repeats > 1 else "")
    return {
        "data": {
            "name": _shortened(spec.task.data),
            "images": {name: len(task.split(name)) for name in ("train", "val", "test")},
            "labelled": len(task.labelled),
            "hashes": {name: task.split(name).images_hash for name in ("train", "val", "test")}
            | {"labels": task.labels_hash},
        },
        "teacher": {
            "name": _shortened(teacher.model) if teacher else "",
            "weights": _weights_hash(teacher) if teacher else "",
            "hub": _hub(teacher) if teacher else "",
        },
        "run": {
            "method": config.cell.method,
            "knobs": config.knobs,
            "seeds": f"{seeds}; split {spec.task.seed}; draw of the labels {spec.task.draw}",
            "steps": int(row["optimizer_steps"]),
            "images_seen": int(row["images_seen"]),
            "parameters": int(row["params_total"]),
            "flops": int(row["flops"]),
        },
        "metrics": {"val": val, "test": _tested(test)},
        "licences": {
            "data": DATA.get(spec.task.data, UNKNOWN),
            "teacher": _licence(teacher, "teacher"),
            "student": _licence(student, "student"),
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "reproduce": _reproduce(spec, config),
        "commands": [
            "python -m orchestrator check reproduce.yaml",
            "python -m orchestrator sweep reproduce.yaml --storage runs",
            f"python -m orchestrator export runs/{_name(spec, config)} {out_name}",
        ],
    }


def _tested(test: Mapping[str, Any] | None) -> str:
    if not test:
        return "not read; `best` reads the test images once"
    return f"{test['value']:.4f} on {test['images']:,} images (standard error {test['standard_error']:.4f})"


def _shortened(name: str) -> str:
    """A model or data source without the folders of this machine."""
    kind, colon, path = name.partition(":")
    return f"{kind}:{Path(path).name}" if colon and kind in ("folder", "parquet", "local") else name


def _weights_hash(teacher: Model) -> str:
    try:
        return load_network(teacher, "teacher").weights_hash
    except UserError:  # its file is gone or the hub is out of reach: the export does not depend on it
        return ""


def _hub(entry: Model) -> str:
    """Its name on the hub: the repository that it names, or where timm knows one."""
    if is_hub(entry):
        return hub_repository(entry)
    cfg = _pretrained_cfg(entry)
    repository = str(cfg.hf_hub_id or "") if cfg is not None else ""
    return f"timm/{timm_name(entry)}" if repository == "timm/" else repository


def _pretrained_cfg(entry: Model) -> Any:
    try:
        return get_pretrained_cfg(timm_name(entry)) if entry.model.startswith("timm/") else None
    except (UserError, RuntimeError):
        return None


def _licence(entry: Model | None, role: Any) -> str:
    if entry is None or not wants_weights(entry, role):
        return "none (no weights were loaded)"
    if entry.model in WEIGHTS:
        return WEIGHTS[entry.model]
    cfg = _pretrained_cfg(entry)
    return str((cfg.license if cfg is not None else None) or UNKNOWN)


def _name(spec: SweepSpec, config: TrialConfig) -> str:
    return f"{spec.name}-{config.trial_id}"[-64:].lstrip("._-")


def _reproduce(spec: SweepSpec, config: TrialConfig) -> str:
    """A sweep file of this trial alone: its method with fixed knobs, its networks, its budget and data."""
    cell = config.cell
    one = {
        "teachers": [spec.teachers[cell.teacher]] if cell.teacher is not None else [],
        "students": [spec.students[cell.student]] if cell.student is not None else [],
    }
    raw: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    kept: dict[str, Any] = {key: raw[key] for key in KEPT if key in raw}
    for key, entries in one.items():
        kept[key] = [entry.model_dump(mode="json", exclude_defaults=True) for entry in entries]
    kept["methods"] = {cell.method: config.knobs}
    kept["search"] = {"trials": 1, "seed": config.seed, "repeats": spec.search.repeats}
    return yaml.safe_dump({"name": _name(spec, config), **_without_folders(kept)}, sort_keys=False, allow_unicode=True)


def _without_folders(value: Any) -> Any:
    """The same with every path of this machine shortened to its last part."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    short = _shortened(value)
    return Path(short).name if Path(short).is_absolute() else short
