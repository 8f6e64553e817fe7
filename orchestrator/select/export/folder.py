"""Writing a student so that it loads without this package: for plain timm, or as ONNX.

What is written is read back and compared with the student before it gets its name, so a folder that exists is a
folder that works.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from orchestrator.errors import UserError, WorkError, listed, nearest
from orchestrator.models.texts import StudentTexts
from orchestrator.select.export.card import agree, card, text_card
from orchestrator.select.export.config import config_of, kind_of
from orchestrator.select.export.texts import write_texts
from orchestrator.select.export.write import write_onnx_folder, write_timm
from orchestrator.spec import Model

FORMATS = ("safetensors", "onnx")
TOLERANCE = {"safetensors": 1e-5, "onnx": 1e-4}  # largest difference of a logit


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
    config = config_of(plain, meta)
    kind = kind_of(meta)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"The output folder {str(out)!r} is not empty; name one that does not exist yet.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"The output folder {str(out)!r} cannot be written: {error.strerror or error}.") from error
    try:
        write = write_timm if format == "safetensors" else write_onnx_folder
        run = write(partial, plain, config, kind)
        batches = sorted({1, min(3, len(images)), len(images)})
        difference = _compare(plain, run, images, batches, format)
        beside = write_texts(partial, *texts) if texts is not None else {}
        text = card(meta, config, kind, format, difference) + (text_card(beside) if beside else "")
        (partial / "README.md").write_text(text, encoding="utf-8")
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


def _images(meta: Mapping[str, Any], sample: Tensor | None) -> Tensor:
    """At least three images, to compare on."""
    size = int(meta["preprocessing"]["size"])
    if sample is None or len(sample) == 0:
        return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    sample = sample.detach().cpu().float()
    return sample if len(sample) >= 3 else torch.cat([sample, sample.flip(-1), sample.flip(-2)])[:3]


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
    sentences = [f"Wrote {out} ({size / 1e6:.1f} MB); logits of {how} {agree(difference)} the student's."]
    if timm_loads:
        sentences.append(f'In Python: timm.create_model("local-dir:{out}", pretrained=True)')
    sentences.append(f"On an image: python {out / 'load.py'} IMAGE")
    return sentences
