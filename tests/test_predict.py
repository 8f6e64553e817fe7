"""`predict` says what the sweep's own evaluation would, of a student, of its export, and in onnxruntime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_export import CLIPART, CNN, VIT, images_for, picture, shares_by_protocol, student
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import UserError
from orchestrator.select.export import export_student
from orchestrator.select.predict import ask, find_images


def told(answer: dict[str, Any]) -> list[tuple[float, str]]:
    (image,) = answer["images"]
    return [(c["probability"], c["label"]) for c in image["classes"]]


@pytest.mark.parametrize(("model", "depth"), [(CNN, None), (VIT, 2), (CLIPART, 2)], ids=["cnn", "vit", "packaged vit"])
def test_an_export_predicts_what_the_protocol_does(tmp_path: Path, model: dict[str, Any], depth: int | None) -> None:
    network, meta = student(model, {"depth": depth} if depth else None)
    image = picture(tmp_path / "image.png")
    want = shares_by_protocol(network, meta, image)
    for form in ("safetensors", "onnx"):
        export_student(network, meta, tmp_path / form, form, images_for(meta))
        answer = ask(str(tmp_path / form), [image], onnx=form == "onnx")
        assert answer["runtime"] == ("onnxruntime" if form == "onnx" else "torch")
        got = told(answer)
        assert [label for _, label in got] == [label for _, label in want]
        assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) <= 1e-5


def test_a_corrupt_image_is_told_and_passed_over_and_the_exit_code_is_2(tmp_path: Path) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "safetensors")
    (tmp_path / "images" / "deep").mkdir(parents=True)
    picture(tmp_path / "images" / "deep" / "good.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "out"), str(tmp_path / "images"), "--json", "--top", "2"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "1 of 2 images cannot be used; see above."
    answer = json.loads(done.stdout)
    assert [Path(i["image"]).name for i in answer["images"]] == ["good.png"]
    assert len(told(answer)) == 2
    assert answer["skipped"] == [{"image": str(tmp_path / "images" / "bad.png"), "reason": "cannot be decoded"}]


def test_no_code_that_comes_with_a_model_is_run(tmp_path: Path) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "safetensors")
    image = picture(tmp_path / "image.png")
    (tmp_path / "out" / "load.py").write_text("raise SystemExit(7)", encoding="utf-8")
    assert len(told(ask(str(tmp_path / "out"), [image]))) == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    structure = {"build": "methods.parts.side:attach", "arguments": {}}
    for change, message in (
        ({"structure": structure | {"build": "os:system"}}, "nothing else is run"),
        ({"structure": {"build": "methods.parts.dense:segmenter", "arguments": {"num_classes": 3}}}, "is not run"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "may not hold checkpoint_path"),
        ({"architecture": "hf-hub:somebody/model"}, "timm has no architecture 'hf-hub:somebody/model'"),
    ):
        (tmp_path / "out" / "structure.py").write_text("raise SystemExit(8)", encoding="utf-8")
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            ask(str(tmp_path / "out"), [image])


def test_what_cannot_be_asked_is_refused_in_a_sentence(tmp_path: Path) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "safetensors")
    image, model = picture(tmp_path / "image.png"), str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for message, args, options in (
        ("neither an export's folder", (str(tmp_path / "empty"), [image]), {}),
        ("Did you mean 'image.png'", (model, [tmp_path / "imag.png"]), {}),
        ("there is no image below", (model, [tmp_path / "empty"]), {}),
        ("has no model.onnx", (model, [image]), {"onnx": True}),
        ("--trial is for a sweep", (model, [image]), {"trial": "t0000"}),
        ("is for classification", (model, [image]), {"masks": tmp_path / "masks"}),
        ("it has a trained head", (model, [image]), {"classes": ["a", "b"]}),
        ("--prompt needs --class", (model, [image]), {"prompts": ["a {}"]}),
        ("at least two different names", (model, [image]), {"classes": ["a", "a"]}),
    ):
        with pytest.raises(UserError, match=message):
            ask(*args, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "masks").exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="needs a file system whose names are bytes")
def test_names_that_are_no_text_are_printed_with_their_bytes_escaped(tmp_path: Path) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "safetensors")
    folder = tmp_path / "images"
    folder.mkdir()
    good, bad = folder / os.fsdecode(b"caf\xe9.png"), folder / os.fsdecode(b"th\xe9.png")
    picture(folder / "plain.png").rename(good)
    bad.write_bytes(b"no picture")

    def printed(*options: str) -> str:
        command = [sys.executable, "-m", "orchestrator", "predict", str(tmp_path / "out"), str(folder), *options]
        strict = os.environ | {"PYTHONIOENCODING": "utf-8"}  # as of a terminal: what cannot be written is an error
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False, env=strict)
        assert done.returncode == 2, done.stderr
        skipped, error = done.stderr.splitlines()
        assert skipped == f"Skipped {folder}/th\\udce9.png: cannot be decoded."
        assert error == "Error: 1 of 2 images cannot be used; see above."
        return done.stdout

    assert "caf\\udce9.png" in printed("--top", "1")
    answer = json.loads(printed("--json"))
    assert Path(answer["images"][0]["image"]) == good  # whole: the file can be found by it


@contextmanager
def nobody() -> Iterator[None]:
    """Where these tests are run by root, who may read everything: as a user who may not."""
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"this root cannot become another user ({error})")
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_looked_at_is_a_sentence(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    image = picture(closed / "image.png")
    closed.chmod(0)
    try:
        for path in (image, closed, closed / "imag.png"):
            with (
                nobody(),
                pytest.raises(UserError, match=r"^IMAGES: '.*closed.*' cannot be read: Permission denied\.$"),
            ):
                find_images([path])
    finally:
        closed.chmod(0o700)
    with pytest.raises(UserError, match=r"^IMAGES: '.*x\.png' cannot be read: File name too long\.$"):
        find_images([tmp_path / f"{'x' * 300}.png"])
