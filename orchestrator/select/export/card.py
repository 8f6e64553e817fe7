"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.select.export.config import OPEN_CLIP, STRUCTURE_FILE
from orchestrator.select.results import short_name
from orchestrator.spec import METRIC_NAMES, Kind, Model

OUTPUT: dict[Kind, str] = {
    "multilabel": "A logit's sigmoid is the probability of its class; an image may have several classes, or none.",
    "segmentation": "The logits are [B, C, S, S], one class a pixel of the input.",
}


def agree(difference: float) -> str:
    """The middle of a sentence about logits."""
    return f"are within {difference:.1g} of" if difference else "equal"


def card(meta: Mapping[str, Any], config: Mapping[str, Any], kind: Kind, format: str, difference: float) -> str:
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
        f"Checked after writing: the logits {agree(difference)} the trained network's.",
        *("", "## Classes", "", labels, ""),
    ]
    return "\n".join(lines)


def text_card(beside: Mapping[str, Any]) -> str:
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
