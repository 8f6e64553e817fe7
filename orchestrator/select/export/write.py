"""The files of each format; each is read back by what a user would read it with."""

from __future__ import annotations

import ast
import importlib
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator.errors import WorkError, first_lines, listed
from orchestrator.models.onnx import onnx_runner, quiet, write_onnx
from orchestrator.select.export.config import OPEN_CLIP, STRUCTURE_FILE
from orchestrator.select.export.scripts import onnx_script, torch_script
from orchestrator.spec import Kind


def _state(network: nn.Module, architecture: str) -> dict[str, Tensor]:
    state = {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
    if architecture == "vit_clipart":  # its stem's batch norms are rebuilt frozen, and those count no batches
        stem = "patch_embed.backbone."
        state = {k: v for k, v in state.items() if not (stem in k and k.endswith("num_batches_tracked"))}
    return state


def write_json(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_timm(folder: Path, network: nn.Module, config: dict[str, Any], kind: Kind) -> Callable[[Tensor], Tensor]:
    """Writes `model.safetensors`, and reads it back by the `load.py` beside it."""
    architecture, structure = config["architecture"], config.get("structure")
    save_file(_state(network, architecture), folder / "model.safetensors", metadata={"format": "pt"})
    if structure is not None:
        (folder / STRUCTURE_FILE).write_bytes(_source(structure["build"].partition(":")[0]))
    write_json(folder, {k: v for k, v in config.items() if k != "open_clip"})
    script = folder / "load.py"
    base: Any = {"vit_clipart": "clipart", OPEN_CLIP: "clip"}.get(architecture, "timm")
    if base == "clip":
        facts = config["pretrained_cfg"]
        fed = {"size": facts["input_size"][-1], **{key: facts[key] for key in ("mean", "std", "interpolation")}}
        described = {"model_cfg": config["open_clip"], "preprocess_cfg": fed}
        (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    text = torch_script(kind, base=base, structured=structure is not None)
    script.write_text(text, encoding="utf-8")
    try:
        loaded = runpy.run_path(str(script))["network"]()
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise WorkError(f"timm cannot rebuild the student from what was exported: {first_lines(error)}") from error
    return loaded


def _source(module: str) -> bytes:
    """The file of a module that builds parts of a network; it must need torch and timm only.

    Raises:
        WorkError: if it imports something else, so that a copy of it would not run elsewhere.
    """
    path = importlib.import_module(module).__file__
    assert path is not None
    source = Path(path).read_bytes()
    roots: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add("." if node.level else (node.module or "").partition(".")[0])
    foreign = sorted(roots - {"torch", "timm"} - set(sys.stdlib_module_names))
    if foreign:
        raise WorkError(f"{module} cannot be copied into an export: it imports {listed(foreign)}.")
    return source


def write_onnx_folder(
    folder: Path, network: nn.Module, config: dict[str, Any], kind: Kind
) -> Callable[[Tensor], Tensor]:
    """Writes `model.onnx`, and reads it back by onnxruntime."""
    path = folder / "model.onnx"
    facts = {
        "labels": json.dumps(config["label_names"], ensure_ascii=False),
        "preprocessing": json.dumps(config["pretrained_cfg"]),
    }
    write_onnx(network, config["pretrained_cfg"]["input_size"][-1], path, config["architecture"], facts)
    run = onnx_runner(path)
    write_json(folder, {k: v for k, v in config.items() if k not in ("structure", "open_clip")})
    (folder / "load.py").write_text(onnx_script(kind), encoding="utf-8")
    return run


def write_program(folder: Path, network: nn.Module, config: dict[str, Any], kind: Kind) -> Callable[[Tensor], Tensor]:
    """Writes `model.pt2`, a program of torch.export that needs torch alone: images [B, 3, S, S], any B, to logits."""
    size = config["pretrained_cfg"]["input_size"][-1]
    network.requires_grad_(False)
    try:
        with quiet():
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(network, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
            torch.export.save(program, folder / "model.pt2")
    except OSError:
        raise
    except Exception as error:  # the exporter's errors share no base class
        raise WorkError(f"{config['architecture']} is no program for torch.export: {first_lines(error)}") from error
    write_json(folder, {k: v for k, v in config.items() if k not in ("structure", "open_clip")})
    (folder / "load.py").write_text(torch_script(kind, base="program", structured=False), encoding="utf-8")
    with quiet():
        loaded: Callable[[Tensor], Tensor] = runpy.run_path(str(folder / "load.py"))["network"]()
    return loaded
