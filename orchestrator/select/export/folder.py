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

from orchestrator.errors import UserError, WorkError
from orchestrator.models.onnx import onnx_runner
from orchestrator.models.texts import StudentTexts
from orchestrator.select.export.card import agree, card, text_card
from orchestrator.select.export.config import config_of, kind_of
from orchestrator.select.export.evidence import Evidence
from orchestrator.select.export.int8 import int8_sentences, one_by_one, quantise
from orchestrator.select.export.prepared import (
    compare_preprocessing,
    prepared_runner,
    preprocessing_sentence,
    put_preprocessing,
)
from orchestrator.select.export.scripts import onnx_script
from orchestrator.select.export.texts import write_texts
from orchestrator.select.export.wanted import Wanted
from orchestrator.select.export.write import write_json, write_onnx_folder, write_program, write_timm
from orchestrator.spec import Kind, Model

TOLERANCE = {"safetensors": 1e-5, "onnx": 1e-4, "pt2": 1e-5}  # largest difference of a logit
WRITERS = {"safetensors": write_timm, "onnx": write_onnx_folder, "pt2": write_program}
WHOLE = 32  # val images on which preprocessing inside the graph is compared


def export_student(
    network: nn.Module,
    meta: Mapping[str, Any],
    out_dir: str | Path,
    format: str,
    sample: Tensor | None = None,
    texts: tuple[StudentTexts, Model] | None = None,
    *,
    wanted: Wanted | None = None,
    evidence: Evidence | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a folder with the network, `config.json` (labels, preprocessing), `load.py` and a model card.

    Args:
        network: the student; not changed.
        meta: its `student.json`.
        out_dir: a folder that does not exist yet, or is empty. It appears complete or not at all.
        format: see `Wanted`.
        sample: [B, 3, S, S] normalised images for the comparison; None compares on random numbers.
        texts: a text tower that was trained beside it, with the teacher whose tokenizer it uses: comes into `text/`.
        wanted: format and options; None: `format` alone.
        evidence: the task's images; needed with `with_preprocessing` and `int8`.
        provenance: for the card, see `provenance.provenance_of`; with `reproduce`, the text of `reproduce.yaml`.

    Returns:
        As plain JSON: `folder`, `format`, `files`, `bytes`, `max_abs_difference` of the float logits, `batches`
        compared, `timm_loads` (whether `timm.create_model("local-dir:...")` reads it), `preprocessing` and `int8` with
        what was measured, `sentences`.

    Raises:
        UserError: if the format is unknown, or the folder is taken or cannot be written.
        WorkError: if what was written does not give the student's logits.
    """
    wanted = wanted or Wanted(format)
    format = wanted.format
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
        run = WRITERS[format](partial, plain, config, kind)
        batches = sorted({1, min(3, len(images)), len(images)})
        difference = _compare(plain, run, images, batches, format)
        found = _changed(partial, plain, config, wanted, evidence, kind)
        beside = write_texts(partial, *texts) if texts is not None else {}
        facts = {"format": format, "max_abs_difference": difference, **found}
        text = card(meta, config, kind, facts, wanted, provenance) + (text_card(beside) if beside else "")
        (partial / "README.md").write_text(text, encoding="utf-8")
        if provenance:
            (partial / "reproduce.yaml").write_text(provenance["reproduce"], encoding="utf-8")
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
        **found,
        **beside,
        "sentences": _sentences(out, format, timm_loads, difference, sum(files.values()), found, kind),
    }


def _changed(
    folder: Path, plain: nn.Module, config: dict[str, Any], wanted: Wanted, evidence: Evidence | None, kind: Kind
) -> dict[str, Any]:
    """Makes the ONNX file that was written, and compared, smaller or one of whole images; returns what was measured."""
    found: dict[str, Any] = {}
    if not wanted.int8 and not wanted.with_preprocessing:
        return found
    assert evidence is not None
    path = folder / "model.onnx"
    if wanted.int8:
        found["int8"] = quantise(path, kind, evidence, wanted.max_loss)
        config["quantized"] = found["int8"]
    if wanted.with_preprocessing:
        cfg = config["pretrained_cfg"]
        whole = evidence.whole(WHOLE)
        inner = one_by_one(onnx_runner(path))
        measured: dict[str, Any] = compare_preprocessing(cfg, whole, folder)
        put_preprocessing(path, cfg)
        with torch.inference_mode():
            got = prepared_runner(path)(whole)
            want = inner(evidence.val(WHOLE)) if wanted.int8 else plain(evidence.val(WHOLE))
        if got.shape != want.shape or not bool(torch.isfinite(got).all()):
            raise WorkError(
                "The graph with its preprocessing gives no finite logits of that shape; nothing was written."
            )
        agreed = (got.argmax(1) == want.argmax(1)).float().mean()
        measured |= {"images": len(whole), "logits_max": float((got - want).abs().max()), "same_answer": float(agreed)}
        found["preprocessing"] = measured
        config["preprocessing_inside"] = True
    write_json(folder, {k: v for k, v in config.items() if k not in ("structure", "open_clip")})
    (folder / "load.py").write_text(onnx_script(kind, whole=wanted.with_preprocessing), encoding="utf-8")
    return found


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


def _sentences(
    out: Path, format: str, timm_loads: bool, difference: float, size: int, found: Mapping[str, Any], kind: Kind
) -> list[str]:
    how = "onnxruntime" if format == "onnx" else "a fresh load"
    how = f"the float network in {how}" if "int8" in found else how
    limit = f" (allowed: {TOLERANCE[format]:g})" if difference else ""
    sentences = [f"Wrote {out} ({size / 1e6:.1f} MB); logits of {how} {agree(difference)} the student's{limit}."]
    if "int8" in found:
        sentences += int8_sentences(found["int8"], kind)
    if "preprocessing" in found:
        sentences.append(preprocessing_sentence(found["preprocessing"]))
    if timm_loads:
        sentences.append(f'In Python: timm.create_model("local-dir:{out}", pretrained=True)')
    sentences.append(f"On an image: python {out / 'load.py'} IMAGE")
    if format != "pt2":
        sentences.append(f"Or, on many: python -m orchestrator predict {out} IMAGES...")
    return sentences
