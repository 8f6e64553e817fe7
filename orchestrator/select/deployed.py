"""A student that is ready to be asked: an export's folder, or a student that lies in its sweep."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from methods.parts.zero_shot import Prototypes, ZeroShot
from orchestrator.data.embed import class_vectors, text_tower_of
from orchestrator.data.views import Policy, draw, render
from orchestrator.errors import UserError, first_lines
from orchestrator.evaluate.forward import device_here, whole_float32
from orchestrator.models.check import check_model
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.models.onnx import onnx_runner, write_onnx
from orchestrator.models.texts import StudentTexts, has_text_tower
from orchestrator.select.export.config import kind_of, network_of
from orchestrator.select.export.int8 import DYNAMIC, one_by_one
from orchestrator.select.export.prepared import prepared_runner, takes_whole_images
from orchestrator.select.export.texts import ExportedTexts
from orchestrator.select.subject import find_student
from orchestrator.spec import Kind, Model

CONFIG, WEIGHTS, ONNX = "config.json", "model.safetensors", "model.onnx"
Embed = Callable[[Sequence[str]], Tensor]


@dataclass
class Deployed:
    """A network with everything that it takes to ask it.

    Attributes:
        name: for people.
        runtime: `torch` or `onnxruntime`; torch runs on a GPU if there is one.
        kind: of its task.
        classes: names, in the order of its logits.
        preprocessing: its own.
        run: normalised images [B, 3, S, S] to logits.
        network: what runs in torch; None in onnxruntime.
        templates: sentences that a class's words are put into, of a network that embeds images.
        embed: gives the embeddings of texts in the same space; None where there is no text tower.
        no_texts: why there is none.
        whole: of a graph with its preprocessing inside: uint8 [3, H, W] each, to logits; in place of `run`.
    """

    name: str
    runtime: str
    kind: Kind
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    run: Callable[[Tensor], Tensor]
    network: nn.Module | None = None
    templates: tuple[str, ...] = ("{}",)
    embed: Callable[[], Embed] | None = field(default=None, repr=False)
    no_texts: str = ""
    whole: Callable[[Sequence[Tensor]], Tensor] | None = None

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] to uint8 [3, S, S]: the central square, as the student was evaluated; or the image itself."""
        if self.whole is not None:
            return image
        view = draw(Policy(1.0, 0.0), "", (image.shape[1], image.shape[2]), 0)
        return render(image, view, self.preprocessing.size, self.preprocessing.interpolation)

    @torch.inference_mode()
    def logits(self, pixels: Sequence[Tensor]) -> Tensor:
        """What `pixels` gave, of several images, to [B, C], or [B, C, S, S] of a segmentation."""
        if self.whole is not None:
            return self.whole(pixels).float()
        images = torch.stack(list(pixels))
        if self.network is None:
            return self.run(self.preprocessing.normalise(images)).float()
        images = images.to(next(self.network.parameters()).device)
        with whole_float32():
            return self.run(self.preprocessing.normalise(images)).float().cpu()

    def renamed(self, classes: Sequence[str], templates: Sequence[str]) -> Deployed:
        """The same network under other classes, told by their names alone.

        Raises:
            UserError: if it does not embed images, or there is no text tower for its space.
        """
        if not isinstance(self.network, ZeroShot):
            what = (
                "a network in onnxruntime has its classes inside" if self.network is None else "it has a trained head"
            )
            raise UserError(
                f"--class: {self.name!r} tells only the classes that it was made for ({what}); classes of your own "
                "need a student of a vision-language method (dime_fm and its like)."
            )
        if self.embed is None:
            raise UserError(f"--class: {self.no_texts}")
        sentences = [template.format(word) for word in classes for template in templates or self.templates]
        vectors = class_vectors(self.embed()(sentences), len(classes))
        width = self.network.prototypes.vectors.shape[1]
        if vectors.shape[1] != width:
            raise UserError(
                f"--texts: that text tower embeds into {vectors.shape[1]} dimensions and {self.name!r} into {width}: "
                "it is not the teacher that the student learned from."
            )
        prototypes = Prototypes(len(classes), width, self.network.prototypes.scale)
        prototypes.vectors.copy_(vectors)
        prototypes.to(self.network.prototypes.vectors.device)
        network = ZeroShot(self.network.backbone, prototypes).eval()
        return Deployed(
            self.name, self.runtime, self.kind, tuple(classes), self.preprocessing, network, network, self.templates
        )


def deployed(address: str, trial: str | None = None, onnx: bool = False, texts: str | None = None) -> Deployed:
    """What `address` names, loaded.

    Args:
        address: an export's folder, a student's folder, or `SWEEP_DIR[:TRIAL]` (the best trial if none is named).
        trial: of a sweep.
        onnx: run it in onnxruntime; a student that is not exported yet is written as ONNX first.
        texts: name of the dual encoder whose text tower tells classes; None: what comes with the student.

    Raises:
        UserError: if there is no such student, or it cannot be read.
    """
    folder = Path(address).expanduser()
    if (folder / CONFIG).is_file() and not (folder / "sweep.yaml").is_file():
        if trial is not None:
            raise UserError(
                f"--trial: {address!r} is an export, which has one student; --trial is for a sweep's folder."
            )
        return _exported(folder, onnx, texts)
    return _stored(find_student(address, trial), onnx, texts)


def _exported(folder: Path, onnx: bool, texts: str | None) -> Deployed:
    name = str(folder)
    there = [f for f in (WEIGHTS, ONNX) if (folder / f).is_file()]
    if not there or (onnx and ONNX not in there):
        if (folder / "model.pt2").is_file():
            raise UserError(f"MODEL: {name!r} is a program of torch: python {folder / 'load.py'} IMAGE runs it.")
        missing = f"has no {ONNX}; write one by `export --format onnx`" if there else f"has no {WEIGHTS} and no {ONNX}"
        raise UserError(f"MODEL: {name!r} {missing}.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        facts = config["pretrained_cfg"]
        kind, classes = config.get("task", "classification"), tuple(str(c) for c in config["label_names"])
        mean, std = (tuple(float(v) for v in facts[key]) for key in ("mean", "std"))
        preprocessing = Preprocessing(int(facts["input_size"][-1]), mean, std, str(facts["interpolation"]))
        if kind not in get_args(Kind) or len(classes) != config["num_classes"]:
            raise ValueError(f"task {kind!r}, {len(classes)} label_names, num_classes {config['num_classes']}")
        network, whole = None, None
        if onnx or WEIGHTS not in there:
            run: Callable[[Tensor], Tensor] = onnx_runner(folder / ONNX)
            if config.get("quantized", {}).get("way") == DYNAMIC:
                run = one_by_one(run)  # as it was scored
            if takes_whole_images(folder / ONNX):
                whole = prepared_runner(folder / ONNX)
        else:
            network = network_of(config, folder)
            network.load_state_dict(load_file(folder / WEIGHTS))
            run = network.eval().requires_grad_(False).to(device_here())
    except UserError:
        raise
    except Exception as error:  # a damaged folder fails in whatever way it likes: JSON, safetensors, timm
        raise UserError(f"MODEL: {name!r} is no readable export: {first_lines(error)}") from error
    about = config.get("zero_shot") or {}
    embed, why = None, f"{name!r} has no text tower; name the teacher's by --texts, as in --texts open_clip/NAME:TAG."
    if texts is None and (folder / "text").is_dir():
        embed = _exported_texts(folder / "text")
    elif texts or about.get("teacher"):
        embed = _named_texts(str(texts or about["teacher"]))
    runtime = "onnxruntime" if network is None else "torch"
    templates = tuple(about.get("templates") or ("{}",))
    return Deployed(name, runtime, kind, classes, preprocessing, run, network, templates, embed, why, whole)


def _exported_texts(folder: Path) -> Callable[[], Embed]:
    return lambda: ExportedTexts(folder).embed


def _named_texts(name: str) -> Callable[[], Embed]:
    def load() -> Embed:
        entry = Model.model_validate({"model": name})
        check_model(entry, "teacher")
        return text_tower_of(entry).embed

    if not name.startswith(("open_clip/", "packaged/", "local:")):
        raise UserError(
            f"--texts: {name!r} is no dual encoder; name one as open_clip/NAME:TAG, packaged/NAME or local:PATH."
        )
    return load


def _stored_texts(student: Path, teacher: Model) -> Callable[[], Embed]:
    def load() -> Embed:
        tower = text_tower_of(teacher)
        return StudentTexts(student, tower).embed if has_text_tower(student) else tower.embed

    return load


def _stored(student: Path, onnx: bool, texts: str | None) -> Deployed:
    network, meta = load_student(student)
    network.requires_grad_(False)
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    kind, classes = kind_of(meta), tuple(str(c) for c in meta["classes"])
    if onnx:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / ONNX
            write_onnx(network, preprocessing.size, path, str(student))
            run = onnx_runner(path)
        return Deployed(str(student), "onnxruntime", kind, classes, preprocessing, run)
    network.to(device_here())
    embed: Callable[[], Embed] | None = None
    why = f"the student.json in {str(student)!r} does not tell its teacher (`teacher_entry`); name it by --texts."
    if texts is not None:
        embed = _named_texts(texts)
    elif meta.get("teacher_entry"):
        teacher = Model.model_validate(meta["teacher_entry"])
        embed = _stored_texts(student, teacher)
    templates = tuple(meta.get("task", {}).get("templates") or ("{}",))
    return Deployed(str(student), "torch", kind, classes, preprocessing, network, network, templates, embed, why)
