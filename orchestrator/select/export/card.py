"""The model card of an export: a page that the hub reads, and that says where a network comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from orchestrator.select.export.config import OPEN_CLIP, STRUCTURE_FILE
from orchestrator.select.export.int8 import int8_sentences
from orchestrator.select.export.prepared import preprocessing_sentence
from orchestrator.select.export.wanted import Wanted
from orchestrator.select.results import short_name
from orchestrator.spec import METRIC_NAMES, Kind, Model

UNKNOWN = "unknown"
DYNAMIC = (
    "Activations are quantised by the range of each call, so an image's logits depend a little on the others of its "
    "batch; the above was measured one image at a time."
)
OUTPUT: dict[Kind, str] = {
    "multilabel": "A logit's sigmoid is the probability of its class; an image may have several classes, or none.",
    "segmentation": "The logits are [B, C, S, S], one class a pixel of the input.",
}
METRIC_IDS: dict[Kind, str] = {"classification": "accuracy", "multilabel": "roc_auc", "segmentation": "mean_iou"}


def agree(difference: float) -> str:
    """The middle of a sentence about logits."""
    return f"are within {difference:.1g} of" if difference else "equal"


def card(
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    kind: Kind,
    facts: Mapping[str, Any],
    wanted: Wanted,
    provenance: Mapping[str, Any] | None,
) -> str:
    """The text of `README.md`.

    Args:
        meta: the `student.json`.
        config: the `config.json`.
        kind: of the task.
        facts: `format`, `max_abs_difference`, and what was measured of `int8` and `preprocessing`.
        wanted: licences as the user states them.
        provenance: see `provenance.provenance_of`; None: nothing more is known than `meta`.
    """
    format, difference = facts["format"], facts["max_abs_difference"]
    cfg = config["pretrained_cfg"]
    labels = "\n".join(f"{i}. {label}" for i, label in enumerate(config["label_names"]))
    size = cfg["input_size"][1]
    square = (
        f"the image's central square, resized to {size} pixels ({cfg['interpolation']}, with antialiasing), "
        "transparency on white, scaled to 0 to 1, normalised by mean and std."
    )
    lines = [
        *("---", _front(meta, config, kind, facts, wanted, provenance).rstrip(), "---", ""),
        *(f"# {config['architecture']}, {config['num_classes']} classes", ""),
        *(_table(_rows(meta, config, kind)), ""),
        f"Preprocessing: {square}",
        *("", "## Use", "", _use(config, format), ""),
        *([f"{OUTPUT[kind]}", ""] if kind in OUTPUT else []),
        f"Checked after writing: the logits {agree(difference)} the trained network's.",
        *(["", "## Whole images", "", *_whole(facts["preprocessing"])] if "preprocessing" in facts else []),
        *(["", "## int8", "", *int8_sentences(facts["int8"], kind)] if "int8" in facts else []),
        *(["", DYNAMIC] if facts.get("int8", {}).get("way") == "dynamic" else []),
        *("", "## Licences", "", _table(_licences(wanted, provenance)), ""),
        "`unknown` means that nobody told: ask whoever made it before you pass this network on.",
        *(_provenance(provenance, kind) if provenance else []),
        *("", "## Classes", "", labels, ""),
    ]
    return "\n".join(lines)


def text_card(beside: Mapping[str, Any]) -> str:
    """What is said of a text tower beside the network."""
    return (
        f"\n## Texts\n\n`text/` holds a text tower of {beside['text_parameters']:,} parameters for the same space, so "
        "that classes of your own need no teacher: `python text/load.py TEXT ...` prints an embedding for each text. "
        "It needs open_clip_torch, for the tokenizer.\n"
    )


def _front(
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    kind: Kind,
    facts: Mapping[str, Any],
    wanted: Wanted,
    provenance: Mapping[str, Any] | None,
) -> str:
    """The hub's metadata: only what is known."""
    task = f"image-{'segmentation' if kind == 'segmentation' else 'classification'}"
    licence = (wanted.licence or UNKNOWN).strip().lower().replace(" ", "-")
    front: dict[str, Any] = {
        "license": licence,
        "library_name": _library(config, facts["format"]),
        "pipeline_tag": task,
    }
    front["tags"] = ["transfer-orchestrator", *([str(meta["method"])] if meta.get("method") else [])]
    if provenance and provenance["teacher"].get("hub"):
        front["base_model"] = provenance["teacher"]["hub"]
    val = facts["int8"]["val_int8"] if "int8" in facts else meta.get("val_metric")
    if val is not None:
        front["metrics"] = [METRIC_IDS[kind]]
        data = provenance["data"]["name"] if provenance else UNKNOWN
        metric = {"type": METRIC_IDS[kind], "name": f"{METRIC_NAMES[kind]} on val", "value": round(float(val), 6)}
        dataset = {"name": data, "type": data.replace("/", "-").replace(":", "-"), "split": "val"}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": [metric]}
        front["model-index"] = [{"name": config["architecture"], "results": [result]}]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _rows(meta: Mapping[str, Any], config: Mapping[str, Any], kind: Kind) -> list[tuple[str, Any]]:
    entry = Model.model_validate(meta["model"])
    teacher, student = short_name(meta.get("teacher")), short_name(entry.model)
    cfg = config["pretrained_cfg"]
    changes = ", ".join(f"{k} {v}" for k, v in meta["changes"].items())
    itself = meta.get("role") == "teacher"
    network = f"{student}{' (the adapted teacher)' if itself else ''}{f', with {changes}' if changes else ''}"
    val = meta.get("val_metric")
    whole, before = config.get("preprocessing_inside"), " (before int8)" if "quantized" in config else ""
    shape = (
        "[B, H, W, 3], uint8, any B, H and W"
        if whole
        else f"[B, 3, {cfg['input_size'][1]}, {cfg['input_size'][2]}], any B"
    )
    return [
        ("Method", meta.get("method") or "-"),
        ("Teacher", f"{teacher} (not inside)" if teacher and not itself else teacher or "none"),
        ("Network", network),
        ("Architecture", config["architecture"]),
        *([("Added to it", _added(config["structure"]))] if "structure" in config else []),
        (
            f"{'Accuracy' if kind == 'classification' else METRIC_NAMES[kind]} on val{before}",
            "-" if val is None else f"{float(val):.4f}",
        ),
        ("Trial", meta.get("trial_id") or "-"),
        ("Input", shape),
        ("Mean, std", f"{cfg['mean']}, {cfg['std']}, of pixels in 0 to 1"),
    ]


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {n} | {str(v).replace('|', '/')} |" for n, v in rows)])


def _whole(measured: Mapping[str, Any]) -> list[str]:
    return [
        "The graph takes whole upright RGB images, uint8 [B, H, W, 3], those of one call at one size. It cuts the "
        "central square, resizes it with antialiasing, across and then down, rounded to grey levels after each (as "
        "Pillow does), and normalises. Pillow reckons with fixed-point weights, which may round to the next grey "
        "level. Transparency and EXIF rotation are left to whoever decodes.",
        "",
        preprocessing_sentence(measured),
    ]


def _licences(wanted: Wanted, provenance: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    known = provenance["licences"] if provenance else {}
    return [
        ("This network", wanted.licence or UNKNOWN),
        ("Data", wanted.data_licence or known.get("data", UNKNOWN)),
        ("Teacher's weights", known.get("teacher", UNKNOWN)),
        ("Student's initial weights", known.get("student", UNKNOWN)),
    ]


def _provenance(provenance: Mapping[str, Any], kind: Kind) -> list[str]:
    data, teacher, run, metric = (provenance[key] for key in ("data", "teacher", "run", "metrics"))
    counts = ", ".join(f"{data['images'][name]:,} {name}" for name in ("train", "val", "test"))
    rows: list[tuple[str, Any]] = [
        ("Data", f"{data['name']}: {counts} ({data['labelled']:,} of train labelled)"),
        *((f"Images of {name}, hash", f"`{data['hashes'][name]}`") for name in ("train", "val", "test")),
        ("Labels that were seen, hash", f"`{data['hashes']['labels']}`"),
        ("Teacher", teacher["name"] or "none"),
        *([("Teacher's weights, SHA-256", f"`{teacher['weights']}`")] if teacher["weights"] else []),
        ("Method", run["method"]),
        ("Knobs", f"`{json.dumps(run['knobs'], sort_keys=True)}`"),
        ("Seeds", run["seeds"]),
        ("Steps, images seen", f"{run['steps']:,}, {run['images_seen']:,}"),
        ("Parameters, FLOPs an image", f"{run['parameters']:,}, {run['flops']:,}"),
        (f"{METRIC_NAMES[kind]} on val", metric["val"]),
        (f"{METRIC_NAMES[kind]} on test", metric["test"]),
        ("Made with", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())),
    ]
    return [
        *("", "## Provenance", "", _table(rows), "", "## Reproduce", ""),
        "`reproduce.yaml` is a sweep of this one trial. Paths of the data and of local weights are shortened to their "
        "last part: put yours in.",
        *("", "```", *provenance["commands"], "```"),
    ]


def _library(config: Mapping[str, Any], format: str) -> str:
    if format == "onnx":
        return "onnxruntime"
    return "pytorch" if format == "pt2" or "structure" in config or config["architecture"] == OPEN_CLIP else "timm"


def _added(structure: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{k} {v}" for k, v in structure["arguments"].items())
    return f"{structure['function']} ({arguments})" if arguments else str(structure["function"])


def _use(config: Mapping[str, Any], format: str) -> str:
    command = "```\npython load.py IMAGE\n```"
    if format == "onnx":
        name = "image" if config.get("preprocessing_inside") else "images"
        code = (
            f'session = onnxruntime.InferenceSession("model.onnx")\n(logits,) = session.run(None, {{"{name}": images}})'
        )
        what = "a uint8 array [B, H, W, 3]" if name == "image" else "a float32 array [B, 3, S, S]"
        return f"{command}\n\nor, with `images` {what}:\n\n```python\nimport onnxruntime\n\n{code}\n```"
    if format == "pt2":
        code = 'network = torch.export.load("model.pt2").module()'
        how = "or, with torch alone (of the version below, or maybe a newer one)"
        return f"{command}\n\n{how}:\n\n```python\nimport torch\n\n{code}\n```"
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
