"""Writing a student so that it loads without this package: for plain timm, or as ONNX.

What is written is read back and compared with the student before it gets its name, so a folder that exists is a
folder that works.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator.errors import UserError, WorkError, listed, nearest
from orchestrator.models.clip import clip_config, is_clip
from orchestrator.models.onnx import first_line, onnx_runner, write_onnx
from orchestrator.models.texts import StudentTexts
from orchestrator.select.export_texts import write_texts
from orchestrator.select.results import short_name
from orchestrator.select.scripts import onnx_script, torch_script
from orchestrator.spec import METRIC_NAMES, Kind, Model

FORMATS = ("safetensors", "onnx")
TOLERANCE = {"safetensors": 1e-5, "onnx": 1e-4}  # largest difference of a logit
STRUCTURE_FILE = "structure.py"
OPEN_CLIP = "open_clip"  # in place of an architecture of timm
OUTPUT: dict[Kind, str] = {
    "multilabel": "A logit's sigmoid is the probability of its class; an image may have several classes, or none.",
    "segmentation": "The logits are [B, C, S, S], one class a pixel of the input.",
}


def export_student(
    network: nn.Module,
    meta: Mapping[str, Any],
    out_dir: str | Path,
    format: str,
    sample: Tensor | None = None,
    texts: tuple[StudentTexts, Model] | None = None,
) -> dict[str, Any]:
    """Writes a folder with the network, `config.json` (labels, preprocessing), `load.py` and a model card.

    Args:
        network: the student; not changed.
        meta: its `student.json`.
        out_dir: a folder that does not exist yet, or is empty. It appears complete or not at all.
        format: `safetensors` (timm's own folder format, unless the network has modules that timm does not build: then
            with a copy of the file that does, `structure.py`) or `onnx`.
        sample: [B, 3, S, S] normalised images for the comparison; None compares on random numbers.
        texts: a text tower that was trained beside it, with the teacher whose tokenizer it uses: comes into `text/`.

    Returns:
        As plain JSON: `folder`, `format`, `files`, `bytes`, `max_abs_difference` of the logits, `batches` compared,
        `timm_loads` (whether `timm.create_model("local-dir:...")` reads it), `sentences`.

    Raises:
        UserError: if the format is unknown, or the folder is taken or cannot be written.
        WorkError: if what was written does not give the student's logits.
    """
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}; allowed: {listed(FORMATS)}.{nearest(format, FORMATS)}")
    out = Path(out_dir)
    plain = copy.deepcopy(network).cpu().float().eval()
    images = _images(meta, sample)
    config = _config(plain, meta)
    kind = kind_of(meta)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"The output folder {str(out)!r} is not empty; name one that does not exist yet.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"The output folder {str(out)!r} cannot be written: {error.strerror or error}.") from error
    try:
        write = _write_timm if format == "safetensors" else _write_onnx
        run = write(partial, plain, config, kind)
        batches = sorted({1, min(3, len(images)), len(images)})
        difference = _compare(plain, run, images, batches, format)
        beside = write_texts(partial, *texts) if texts is not None else {}
        card = _card(meta, config, kind, format, difference) + (_text_card(beside) if beside else "")
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(partial / "__pycache__", ignore_errors=True)
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        files = {p.relative_to(partial).as_posix(): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"The output folder {str(out)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    timm_loads = format == "safetensors" and timm.is_model(config["architecture"]) and "structure" not in config
    return {
        "folder": str(out),
        "format": format,
        "files": list(files),
        "bytes": sum(files.values()),
        "max_abs_difference": difference,
        "batches": batches,
        "timm_loads": timm_loads,
        **beside,
        "sentences": _sentences(out, format, timm_loads, difference, sum(files.values())),
    }


def kind_of(meta: Mapping[str, Any]) -> Kind:
    """Of the task that a `student.json` is for."""
    return meta.get("task", {}).get("kind", "classification")


def _images(meta: Mapping[str, Any], sample: Tensor | None) -> Tensor:
    """At least three images, to compare on."""
    size = int(meta["preprocessing"]["size"])
    if sample is None or len(sample) == 0:
        return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    sample = sample.detach().cpu().float()
    return sample if len(sample) >= 3 else torch.cat([sample, sample.flip(-1), sample.flip(-2)])[:3]


def _config(network: nn.Module, meta: Mapping[str, Any]) -> dict[str, Any]:
    """timm's hub format: what `local-dir:` needs to build the network, and what a user needs to feed it."""
    entry = Model.model_validate(meta["model"])
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
        patches = next((m for n, m in network.named_modules() if n.rpartition(".")[2] == "patch_embed"), None)
        if entry.image_size is not None and hasattr(patches, "img_size"):
            arguments["img_size"] = size
    source = getattr(network, "pretrained_cfg", None) or {}
    mode = str(preprocessing["interpolation"])
    structure = meta.get("structure")
    added: dict[str, Any] = {}
    if architecture == OPEN_CLIP:
        described = clip_config(entry)
        added["open_clip"] = {**described, "vision_cfg": {**described["vision_cfg"], "image_size": size}}
    if structure:
        module, _, function = structure["build"].partition(":")
        added |= {"structure": {"file": STRUCTURE_FILE, "function": function, "arguments": structure["arguments"]}}
        added["structure"]["module"] = module
    return {
        "architecture": architecture,
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


def _state(network: nn.Module, architecture: str) -> dict[str, Tensor]:
    state = {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
    if architecture == "vit_clipart":  # its stem's batch norms are rebuilt frozen, and those count no batches
        stem = "patch_embed.backbone."
        state = {k: v for k, v in state.items() if not (stem in k and k.endswith("num_batches_tracked"))}
    return state


def _write_json(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _write_timm(folder: Path, network: nn.Module, config: dict[str, Any], kind: Kind) -> Callable[[Tensor], Tensor]:
    architecture, structure = config["architecture"], config.get("structure")
    save_file(_state(network, architecture), folder / "model.safetensors", metadata={"format": "pt"})
    if structure is not None:
        (folder / STRUCTURE_FILE).write_bytes(_source(structure.pop("module")))
    _write_json(folder, {k: v for k, v in config.items() if k != "open_clip"})
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
        raise WorkError(f"timm cannot rebuild the student from what was exported: {first_line(error)}") from error
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


def _write_onnx(folder: Path, network: nn.Module, config: dict[str, Any], kind: Kind) -> Callable[[Tensor], Tensor]:
    path = folder / "model.onnx"
    facts = {
        "labels": json.dumps(config["label_names"], ensure_ascii=False),
        "preprocessing": json.dumps(config["pretrained_cfg"]),
    }
    write_onnx(network, config["pretrained_cfg"]["input_size"][-1], path, config["architecture"], facts)
    run = onnx_runner(path)
    _write_json(folder, {k: v for k, v in config.items() if k not in ("structure", "open_clip")})
    (folder / "load.py").write_text(onnx_script(kind), encoding="utf-8")
    return run


@torch.inference_mode()
def _compare(
    network: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, batches: list[int], format: str
) -> float:
    """The largest difference of a logit, over batches of several sizes."""
    largest = 0.0
    for batch in batches:
        want, got = network(images[:batch]), run(images[:batch])
        if want.shape != got.shape:
            shapes = f"{tuple(got.shape)} instead of {tuple(want.shape)}"
            raise WorkError(f"The exported network gives logits of shape {shapes}; nothing was written.")
        # NaN must not pass: max() would drop it.
        if not bool(torch.isfinite(want).all() and torch.isfinite(got).all()):
            raise WorkError("The student or its export gives logits that are not finite; nothing was written.")
        largest = max(largest, float((want - got).abs().max()))
    if largest > TOLERANCE[format]:
        raise WorkError(
            f"The exported network's logits differ from the student's by {largest:.2g}, more than "
            f"{TOLERANCE[format]:g}; nothing was written."
        )
    return largest


def _sentences(out: Path, format: str, timm_loads: bool, difference: float, size: int) -> list[str]:
    how = "onnxruntime" if format == "onnx" else "a fresh load"
    sentences = [f"Wrote {out} ({size / 1e6:.1f} MB); logits of {how} {_agree(difference)} the student's."]
    if timm_loads:
        sentences.append(f'In Python: timm.create_model("local-dir:{out}", pretrained=True)')
    sentences.append(f"On an image: python {out / 'load.py'} IMAGE")
    return sentences


def _agree(difference: float) -> str:
    return f"are within {difference:.1g} of" if difference else "equal"


def _card(meta: Mapping[str, Any], config: Mapping[str, Any], kind: Kind, format: str, difference: float) -> str:
    entry = Model.model_validate(meta["model"])
    teacher, student = short_name(meta.get("teacher")), short_name(entry.model)
    cfg = config["pretrained_cfg"]
    changes = ", ".join(f"{k} {v}" for k, v in meta["changes"].items())
    itself = meta.get("role") == "teacher"
    network = f"{student}{' (the adapted teacher)' if itself else ''}{f', with {changes}' if changes else ''}"
    val = meta.get("val_metric")
    shown = "-" if val is None else f"{float(val):.4f}"
    rows = [
        ("Method", meta.get("method") or "-"),
        ("Teacher", teacher or "none"),
        ("Network", network),
        ("Architecture", config["architecture"]),
        *([("Added to it", _added(config["structure"]))] if "structure" in config else []),
        (f"{'Accuracy' if kind == 'classification' else METRIC_NAMES[kind]} on val", shown),
        ("Trial", meta.get("trial_id") or "-"),
        ("Input", f"[B, 3, {cfg['input_size'][1]}, {cfg['input_size'][2]}], any B"),
        ("Mean, std", f"{cfg['mean']}, {cfg['std']}, of pixels in 0 to 1"),
    ]
    labels = "\n".join(f"{i}. {label}" for i, label in enumerate(config["label_names"]))
    lines = [
        *("---", f"library_name: {_library(config, format)}"),
        *(f"pipeline_tag: image-{'segmentation' if kind == 'segmentation' else 'classification'}", "---", ""),
        *(f"# {config['architecture']}, {config['num_classes']} classes", ""),
        *("| | |", "| --- | --- |", *(f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows), ""),
        f"Preprocessing: the image's central square, resized to {cfg['input_size'][1]} pixels ({cfg['interpolation']}, "
        "with antialiasing), transparency on white, scaled to 0 to 1, normalised by mean and std.",
        *("", "## Use", "", _use(config, format), ""),
        *([f"{OUTPUT[kind]}", ""] if kind in OUTPUT else []),
        f"Checked after writing: the logits {_agree(difference)} the trained network's.",
        *("", "## Classes", "", labels, ""),
    ]
    return "\n".join(lines)


def _text_card(beside: Mapping[str, Any]) -> str:
    return (
        f"\n## Texts\n\n`text/` holds a text tower of {beside['text_parameters']:,} parameters for the same space, so "
        "that classes of your own need no teacher: `python text/load.py TEXT ...` prints an embedding for each text. "
        "It needs open_clip_torch, for the tokenizer.\n"
    )


def _library(config: Mapping[str, Any], format: str) -> str:
    if format == "onnx":
        return "onnxruntime"
    return "pytorch" if "structure" in config or config["architecture"] == OPEN_CLIP else "timm"


def _added(structure: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{k} {v}" for k, v in structure["arguments"].items())
    return f"{structure['function']} ({arguments})" if arguments else str(structure["function"])


def _use(config: Mapping[str, Any], format: str) -> str:
    command = "```\npython load.py IMAGE\n```"
    if format == "onnx":
        code = 'session = onnxruntime.InferenceSession("model.onnx")\n(logits,) = session.run(None, {"images": images})'
        head = "or, with `images` a float32 array [B, 3, S, S]:"
        return f"{command}\n\n{head}\n\n```python\nimport onnxruntime\n\n{code}\n```"
    if "structure" in config:
        return (
            f"{command}\n\n`network()` in `load.py` builds timm's network and puts the modules of `{STRUCTURE_FILE}` "
            "into it or around it."
        )
    if config["architecture"] == OPEN_CLIP:
        return f"{command}\n\n`network()` in `load.py` builds open_clip's image tower and puts a head on it."
    if config["architecture"] == "vit_clipart":
        return (
            f"{command}\n\ntimm has no registered model of this architecture: `network()` in `load.py` builds it "
            "from timm's parts."
        )
    code = 'import timm\n\nnetwork = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()'
    return f"{command}\n\nor\n\n```python\n{code}\n```"
