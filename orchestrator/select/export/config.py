"""What an export's `config.json` says, in timm's hub format, and the network that it describes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from methods.parts.zero_shot import ZeroShot
from orchestrator.errors import UserError, listed
from orchestrator.models.clip import clip_config, image_tower, is_clip
from orchestrator.models.load import entry_of, structure_of
from orchestrator.spec import Kind, Model

STRUCTURE_FILE = "structure.py"
OPEN_CLIP = "open_clip"  # in place of an architecture of timm


def kind_of(meta: Mapping[str, Any]) -> Kind:
    """Of the task that a `student.json` is for."""
    return meta.get("task", {}).get("kind", "classification")


def config_of(network: nn.Module, meta: Mapping[str, Any]) -> dict[str, Any]:
    """timm's hub format: what `local-dir:` needs to build the network, and what a user needs to feed it."""
    entry = entry_of(meta)
    preprocessing = meta["preprocessing"]
    size, classes = int(preprocessing["size"]), int(meta["num_classes"])
    arguments: dict[str, Any] = {**entry.kwargs, **meta["changes"]}
    if entry.model == "packaged/vit_clipart":
        from orchestrator.packaged.models import VIT_DEPTH, VIT_DIM, VIT_HEADS, VIT_SIDE

        architecture = "vit_clipart"
        fixed = {"img_size": VIT_SIDE, "patch_size": 1, "embed_dim": VIT_DIM, "num_heads": VIT_HEADS}
        arguments = {"depth": VIT_DEPTH, **fixed, "num_classes": classes, "global_pool": "token", **arguments}
    elif is_clip(entry):
        architecture, arguments = OPEN_CLIP, {}
    else:
        architecture = _architecture(entry)
        arguments.pop("num_classes", None)
        if entry.image_size is not None and _takes_size(architecture, entry.image_size, arguments):
            arguments["img_size"] = entry.image_size
    source = getattr(network, "pretrained_cfg", None) or {}
    mode = str(preprocessing["interpolation"])
    structure = meta.get("structure")
    added: dict[str, Any] = {}
    if architecture == OPEN_CLIP:
        described = clip_config(entry)
        added["open_clip"] = {**described, "vision_cfg": {**described["vision_cfg"], "image_size": size}}
    if structure:
        described = {"file": STRUCTURE_FILE, "function": structure["build"].partition(":")[2]}
        added["structure"] = {**described, "build": structure["build"], "arguments": structure["arguments"]}
    if isinstance(network, ZeroShot):
        teacher = str(meta.get("teacher") or "")
        known = None if not teacher or teacher.startswith("local:") else teacher
        added["zero_shot"] = {"templates": list(meta.get("task", {}).get("templates", ["{}"])), "teacher": known}
    return {
        "architecture": architecture,
        "task": kind_of(meta),
        "num_classes": classes,
        "num_features": int(getattr(getattr(network, "backbone", network), "num_features", 0)),
        "label_names": [str(c) for c in meta["classes"]],
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, size, size],
            "fixed_input_size": bool(source.get("fixed_input_size", False)),
            "interpolation": mode if mode in ("bilinear", "bicubic") else "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [float(v) for v in preprocessing["mean"]],
            "std": [float(v) for v in preprocessing["std"]],
            "first_conv": source.get("first_conv"),
            "classifier": source.get("classifier"),
        },
        **added,
    }


def _architecture(entry: Model) -> str:
    """timm's name of the network, without a tag."""
    if entry.model == "packaged/efficientnet_lite0":
        return "tf_efficientnet_lite0"
    name = entry.architecture if entry.model.startswith("local:") else entry.model
    return str(name).removeprefix("timm/").partition(".")[0]


def _takes_size(architecture: str, size: int, arguments: Mapping[str, Any]) -> bool:
    """Whether timm builds the network for images of a size.

    Then it was built so, and may fit no other: `build_network` asks for it, and does without where that is refused.
    """
    try:
        try:
            with torch.device("meta"):
                timm.create_model(architecture, img_size=size, **arguments)
        except (NotImplementedError, RuntimeError):  # a few constructors compute with their tensors
            timm.create_model(architecture, img_size=size, **arguments)
    except TypeError:
        return False
    return True


NOT_OURS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def network_of(config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The network that an export's `config.json` describes, with fresh weights; no code of its folder is run.

    Raises:
        UserError: if timm has no such architecture, or `structure.py` is not this installation's own file.
    """
    architecture, arguments = str(config["architecture"]), dict(config["model_args"])
    odd = sorted(set(arguments) & set(NOT_OURS))
    if odd:
        raise UserError(f"config.json in {str(folder)!r}: model_args may not hold {listed(odd)}.")
    classes = int(config["num_classes"])
    network: nn.Module
    if architecture == "vit_clipart":
        from orchestrator.packaged.models import vit_clipart

        own = {"depth": arguments.pop("depth"), "num_classes": arguments.pop("num_classes")}
        fixed = ("img_size", "patch_size", "embed_dim", "num_heads", "global_pool")
        network = vit_clipart(pretrained=False, **own, **{k: v for k, v in arguments.items() if k not in fixed})
    elif architecture == OPEN_CLIP:
        network = image_tower(Model(model=f"local:{folder}"), weights=False, num_classes=classes)
    elif timm.is_model(architecture):
        network = timm.create_model(architecture, num_classes=classes, **arguments)
    else:
        raise UserError(f"config.json in {str(folder)!r}: timm has no architecture {architecture!r}.")
    structure = structure_of(config)
    if structure is None:
        return network
    module = structure.build.partition(":")[0]
    source = importlib.import_module(module).__file__
    assert source is not None
    if (folder / STRUCTURE_FILE).read_bytes() != Path(source).read_bytes():
        raise UserError(
            f"{str(folder / STRUCTURE_FILE)!r} is not this installation's {module}, and code that "
            f"comes with a model is not run; if you trust it: python {folder / 'load.py'} IMAGE."
        )
    return structure.apply(network)
