"""Exports load without this package and give the student's logits."""

from __future__ import annotations

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from orchestrator.data.images import decode
from orchestrator.data.views import Policy, draw, render
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import Preprocessing, build_network
from orchestrator.select.export import export_student
from orchestrator.spec import Model

CLASSES = ["cat", "dog", "größer | stork"]


def student(
    model: dict[str, Any], changes: dict[str, Any] | None = None, role: str = "student"
) -> tuple[nn.Module, dict[str, Any]]:
    """An untrained network with moved batch statistics, and the `student.json` that goes with it."""
    torch.manual_seed(0)
    entry = Model.model_validate(model)
    network = build_network(entry, num_classes=len(CLASSES), changes=changes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    nn.init.normal_(network.get_classifier().weight, std=0.1)  # type: ignore[operator]
    config = timm.data.resolve_model_data_config(network)
    return network, {
        "model": entry.model_dump(mode="json"),
        "role": role,
        "changes": changes or {},
        "num_classes": len(CLASSES),
        "classes": CLASSES,
        "preprocessing": {
            "size": entry.image_size or config["input_size"][-1],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
        },
        "method": "kd",
        "trial_id": "t0007",
        "val_metric": 0.8125,
        "task": {},
        "teacher": "timm/vit_base_patch16_224.augreg",
    }


CNN: dict[str, Any] = {"model": "timm/test_resnet.r160_in1k", "pretrained": False, "image_size": 96}
VIT: dict[str, Any] = {"model": "timm/test_vit", "image_size": 96, "kwargs": {"class_token": True}}
CLIPART: dict[str, Any] = {"model": "packaged/vit_clipart"}
HIERA: dict[str, Any] = {  # is built for a size, which its patch embedding does not tell
    "model": "timm/hiera_tiny_224",
    "pretrained": False,
    "image_size": 96,
    "kwargs": {"embed_dim": 16, "stages": [1, 1, 1, 1]},
}
GMLP: dict[str, Any] = {"model": "timm/gmlp_ti16_224", "pretrained": False, "image_size": 96}


def images_for(meta: dict[str, Any], count: int = 3) -> Tensor:
    size = meta["preprocessing"]["size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def logits(network: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return network.eval()(images)


@pytest.mark.parametrize(
    ("model", "changes", "role"),
    [
        (CNN, None, "student"),
        (VIT, {"depth": 3}, "teacher"),
        ({"model": "local:weights.safetensors", "architecture": "timm/test_efficientnet"}, None, "student"),
        ({"model": "packaged/efficientnet_lite0", "image_size": 64}, None, "student"),
        (HIERA, None, "student"),
    ],
    ids=["cnn", "shallower vit at another size", "local", "packaged cnn", "hiera at another size"],
)
def test_timm_loads_the_folder_and_gives_equal_logits(
    tmp_path: Path, model: dict[str, Any], changes: dict[str, Any] | None, role: str
) -> None:
    network, meta = student(model, changes, role)
    images = images_for(meta)
    report = export_student(network, meta, tmp_path / "out", "safetensors", images)
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(logits(loaded, images), logits(network, images))
    assert report["max_abs_difference"] == 0
    assert report["timm_loads"]
    assert sorted(report["files"]) == ["README.md", "config.json", "load.py", "model.safetensors"]
    assert json.loads(json.dumps(report)) == report
    config = timm.data.resolve_model_data_config(loaded)
    assert list(config["input_size"]) == [3, *images.shape[-2:]]
    assert list(config["mean"]) == meta["preprocessing"]["mean"]
    assert config["crop_pct"] == 1.0
    assert loaded.pretrained_cfg["label_names"] == CLASSES


def picture(path: Path) -> Path:
    """Neither square nor opaque."""
    pixels = np.random.default_rng(0).integers(0, 256, (13, 19, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").resize((190, 130), Image.Resampling.BICUBIC).save(path)
    return path


def shares_by_protocol(network: nn.Module, meta: dict[str, Any], path: Path) -> list[tuple[float, str]]:
    """What the sweep's own evaluation makes of the image."""
    image = decode(path.read_bytes())
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["preprocessing"].items()}
    preprocessing = Preprocessing(**fields)
    view = draw(Policy(1.0, 0.0), "x", (image.shape[1], image.shape[2]), 0)
    pixels = render(image, view, preprocessing.size, preprocessing.interpolation)
    shares = logits(network, preprocessing.normalise(pixels[None])).softmax(1)[0].tolist()
    return sorted(zip(shares, CLASSES, strict=True), reverse=True)


def run_load(folder: Path, image: Path, *blocked: str) -> list[tuple[float, str]]:
    """Runs `load.py` isolated from the environment; `blocked` modules cannot be imported."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({['orchestrator', 'methods', *blocked]})); "
        "script = sys.argv.pop(1); runpy.run_path(script, run_name='__main__')"
    )
    command = [sys.executable, "-I", "-X", "utf8", "-c", code, str(folder / "load.py"), str(image)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return [(float(line[:6]), line[7:]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("model", [CNN, CLIPART], ids=["timm model", "packaged vit"])
def test_load_py_classifies_as_the_protocol_does_without_this_package(tmp_path: Path, model: dict[str, Any]) -> None:
    network, meta = student(model, {"depth": 2} if model is CLIPART else None)
    export_student(network, meta, tmp_path / "out", "safetensors", images_for(meta))
    image = picture(tmp_path / "image.png")
    want = shares_by_protocol(network, meta, image)
    got = run_load(tmp_path / "out", image)
    assert [label for _, label in got] == [label for _, label in want]
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) <= 1e-4
    assert want[0][0] - want[-1][0] > 1e-3


def wide_picture(path: Path) -> Path:
    """Greyscale of 16 bits, or, by the name, of floating-point numbers below zero too; neither fills its range."""
    rows, columns = np.mgrid[0:130, 0:190]
    values = 3000 + 1500 * np.sin(rows / 20) + 1400 * np.cos(columns / 30)
    values = (values / 1000 - 2).astype(np.float32) if path.suffix == ".tif" else values.astype(np.uint16)
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_load_py_opens_images_as_the_protocol_does(tmp_path: Path, form: str) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", form)
    opened = runpy.run_path(str(tmp_path / "out" / "load.py"))["opened"]
    images = [picture(tmp_path / "image.png"), wide_picture(tmp_path / "wide.png"), wide_picture(tmp_path / "wide.tif")]
    for image in images:
        want = decode(image.read_bytes()).permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(opened(image)), want), image.name
        assert want.min() < 250 < want.max()
    values = np.ones((20, 20), np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "broken.tif")
    with pytest.raises(ValueError, match=r"broken\.tif: values that are not finite"):
        opened(tmp_path / "broken.tif")


def test_the_packaged_vit_is_rebuilt_from_timms_parts_with_equal_logits(tmp_path: Path) -> None:
    network, meta = student(CLIPART, {"depth": 4}, "teacher")
    report = export_student(network, meta, tmp_path / "out", "safetensors", images_for(meta))
    assert report["max_abs_difference"] == 0
    assert not report["timm_loads"]
    script = (tmp_path / "out" / "load.py").read_text(encoding="utf-8")
    assert "orchestrator" not in script
    assert "methods" not in script


@pytest.mark.parametrize("model", [CNN, VIT, CLIPART], ids=["cnn", "vit", "packaged vit"])
def test_onnx_gives_the_students_logits_at_any_batch(
    tmp_path: Path, model: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    network, meta = student(model, {"depth": 2} if model is not CNN else None)
    images = images_for(meta, 5)
    capfd.readouterr()
    report = export_student(network, meta, tmp_path / "out", "onnx", images)
    noise = capfd.readouterr()
    assert noise.out + noise.err == ""
    assert report["batches"] == [1, 3, 5]
    assert report["max_abs_difference"] <= 1e-4
    assert sorted(report["files"]) == ["README.md", "config.json", "load.py", "model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        (got,) = session.run(["logits"], {"images": images[:batch].numpy()})
        assert np.abs(np.asarray(got) - logits(network, images[:batch]).numpy()).max() <= 1e-4
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == CLASSES


def test_load_py_of_onnx_needs_no_torch(tmp_path: Path) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "onnx")
    image = picture(tmp_path / "image.png")
    want = shares_by_protocol(network, meta, image)
    got = run_load(tmp_path / "out", image, "torch", "timm", "torchvision")
    assert [label for _, label in got] == [label for _, label in want]
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) <= 5e-3  # another resampler, a grey level


def test_the_card_says_what_it_is_and_names_no_path(tmp_path: Path) -> None:
    model = {"model": "local:/secret/place/weights.safetensors", "architecture": "timm/test_resnet"}
    network, meta = student(model)
    meta["teacher"] = "local:/secret/place/teacher.pth"
    export_student(network, meta, tmp_path / "out", "safetensors")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for part in (
        "| Method | kd |",
        "| Teacher | teacher (not inside) |",
        "0.8125",
        "bilinear",
        "2. größer | stork",
        "load.py",
    ):
        assert part in card, part
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_the_student_is_not_changed(tmp_path: Path) -> None:
    network, meta = student(CNN)
    network.train()
    before = copy.deepcopy(network.state_dict())
    export_student(network, meta, tmp_path / "out", "safetensors")
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_weights_are_plain_safetensors(tmp_path: Path) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "safetensors")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(network.state_dict())


def test_a_taken_folder_is_refused_and_kept(tmp_path: Path) -> None:
    network, meta = student(CNN)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty"):
        export_student(network, meta, out, "safetensors")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="cannot be written"):
        export_student(network, meta, out / "mine.txt" / "below", "safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    network, meta = student(CNN)
    (tmp_path / "out").mkdir()
    export_student(network, meta, tmp_path / "out", "safetensors")
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    network, meta = student(CNN)
    with pytest.raises(
        UserError, match=r"Unknown format 'onxx'; allowed: safetensors, onnx and pt2\. Did you mean 'onnx'"
    ):
        export_student(network, meta, tmp_path / "out", "onxx")


class Doubled(nn.Module):
    """Loads the same weights but computes something else than timm's network would."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.patch_embed = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.state_dict(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.inner(images)


def test_what_does_not_give_the_students_logits_is_not_written(tmp_path: Path) -> None:
    network, meta = student(CNN)
    with pytest.raises(WorkError, match=r"logits differ from the student's by .*; nothing was written"):
        export_student(Doubled(network), meta, tmp_path / "out", "safetensors")
    meta["changes"] = {"layers": [1, 1, 1, 2]}
    with pytest.raises(WorkError, match="timm cannot rebuild"):
        export_student(network, meta, tmp_path / "out", "safetensors")
    with torch.no_grad():
        network.get_classifier().bias.fill_(float("nan"))  # type: ignore[operator]
    meta["changes"] = {}
    with pytest.raises(WorkError, match="not finite"):
        export_student(network, meta, tmp_path / "out", "safetensors")
    assert list(tmp_path.iterdir()) == []
