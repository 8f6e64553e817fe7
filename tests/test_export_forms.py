"""What an export can be besides plain: whole images in, 8-bit integers, a program of torch; and what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from onnxruntime.quantization.calibrate import HistogramCollector
from PIL import Image
from safetensors.torch import load_file
from small import small_spec
from test_export import (
    CNN,
    GMLP,
    HIERA,
    VIT,
    images_for,
    logits,
    picture,
    run_load,
    shares_by_protocol,
    student,
    wide_picture,
)
from typer.testing import CliRunner

from methods.parts.dense import segmenter
from orchestrator.cli import app
from orchestrator.data.task import load_task
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import Preprocessing, load_network
from orchestrator.select.export import Evidence, Wanted, export_student, int8
from orchestrator.select.export.config import network_of
from orchestrator.select.export.prepared import compare_preprocessing
from orchestrator.select.predict import ask
from orchestrator.spec import SweepSpec, parse_spec, read_spec
from orchestrator.store import Store
from orchestrator.sweep.export import export_trial
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.run import run_trial


def evidence_of(colours: Path, folder: Path, meta: dict[str, Any]) -> Evidence:
    store = Store(folder / "store")
    return Evidence(
        load_task(small_spec(colours, folder).task, store), store, Preprocessing.from_json(meta["preprocessing"])
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_graphs_preprocessing_is_the_protocols_up_or_down_to_a_grey_level(
    tmp_path: Path, interpolation: str
) -> None:
    draw = np.random.default_rng(0).integers
    images = [torch.from_numpy(draw(0, 256, (3, *s), dtype=np.uint8)) for s in ((37, 211), (96, 50), (230, 333))]
    facts = {"input_size": [3, 96, 96], "interpolation": interpolation, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    measured = compare_preprocessing(facts, images, tmp_path)
    assert measured["pixels_max"] <= 2  # noise is the worst there is
    assert measured["pixels_mean"] < 0.02
    assert measured["pixels_equal"] > 0.98
    assert list(tmp_path.iterdir()) == []


def test_whole_images_go_into_a_graph_with_preprocessing(colours: Path, tmp_path: Path) -> None:
    network, meta = student(CNN)
    evidence = evidence_of(colours, tmp_path, meta)
    wanted = Wanted("onnx", with_preprocessing=True)
    report = export_student(network, meta, tmp_path / "out", "onnx", wanted=wanted, evidence=evidence)
    assert report["preprocessing"]["same_answer"] == 1
    assert report["preprocessing"]["pixels_max"] <= 2
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    image = picture(tmp_path / "image.png")
    want = shares_by_protocol(network, meta, image)
    rgba = Image.open(image)
    whole = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    (got,) = session.run(["logits"], {"image": np.stack([whole, whole[::-1], whole])})
    assert np.asarray(got).shape == (3, 3)
    assert np.asarray(got)[0].tolist() == pytest.approx(np.asarray(got)[2].tolist(), abs=1e-4)
    wide = wide_picture(tmp_path / "wide.png")
    for share, label in run_load(tmp_path / "out", wide):
        assert share == pytest.approx({b: a for a, b in shares_by_protocol(network, meta, wide)}[label], abs=2e-3)
    (told,) = ask(str(tmp_path / "out"), [image])["images"]
    for shares in (
        [(c["probability"], c["label"]) for c in told["classes"]],
        run_load(tmp_path / "out", image, "torch", "timm", "torchvision"),
    ):
        assert [label for _, label in shares] == [label for _, label in want]
        assert max(abs(a - b) for (a, _), (b, _) in zip(shares, want, strict=True)) <= 2e-3


def test_int8_halves_the_size_at_least_and_its_loss_is_measured_on_val(colours: Path, tmp_path: Path) -> None:
    network, meta = student(VIT)
    evidence = evidence_of(colours, tmp_path, meta)
    wanted = Wanted("onnx", int8=True, max_loss=1)
    report = export_student(network, meta, tmp_path / "out", "onnx", wanted=wanted, evidence=evidence)
    facts = report["int8"]
    assert facts["bytes"] < 0.5 * facts["bytes_float"]
    assert facts["way"] == min(facts["apart"], key=facts["apart"].get)
    assert facts["apart"][facts["way"]] < 0.05  # of a probability
    assert facts["loss"] == pytest.approx(facts["val_float"] - facts["val_int8"])
    images = evidence.val(len(evidence.task.val))
    right = logits(network, images).argmax(1).tolist()
    truth = [int(label) for label in evidence.task.val.labels]
    assert facts["val_float"] == pytest.approx(np.mean([a == b for a, b in zip(right, truth, strict=True)]))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"accuracy on val {facts['val_int8']:.4f} instead of {facts['val_float']:.4f}" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantized"]["way"] == facts["way"]


class Uneven(Evidence):
    """30 train images: 10 are held back, and the others are no multiple of a batch."""

    def train(self, count: int) -> torch.Tensor:
        return torch.randn(30, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def int8_of(model: dict[str, Any], colours: Path, folder: Path) -> dict[str, Any]:
    """The report of an export into `folder/out`."""
    network, meta = student(model)
    plain = evidence_of(colours, folder, meta)
    evidence = Uneven(plain.task, plain.store, plain.preprocessing)
    wanted = Wanted("onnx", int8=True, max_loss=1)
    return export_student(network, meta, folder / "out", "onnx", wanted=wanted, evidence=evidence)


def test_all_ways_to_int8_work_where_the_last_batch_is_smaller(colours: Path, tmp_path: Path) -> None:
    facts = int8_of(VIT, colours, tmp_path)["int8"]
    assert facts["calibration_images"] == 20
    assert set(facts["apart"]) == {"static, min-max", "static, percentile", "dynamic"}
    assert facts["problems"] == []


def test_calibration_keeps_activations_of_few_images_at_a_time_and_looks_at_all(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[int, int]] = []
    collect = HistogramCollector.collect

    def heard(self: HistogramCollector, arrays: dict[str, list[np.ndarray]]) -> None:
        kept.append((sum(len(a) for a in arrays["images"]), sum(a.nbytes for parts in arrays.values() for a in parts)))
        collect(self, arrays)

    monkeypatch.setattr(HistogramCollector, "collect", heard)
    monkeypatch.setattr(int8, "PASS_BYTES", 14_000_000)
    int8_of(CNN, colours, tmp_path)
    assert [images for images, _ in kept] == [3, 3, 3, 3, 3, 3, 2]
    assert max(size for _, size in kept) <= 14_000_000 / 2


@pytest.mark.parametrize(
    ("model", "limit", "told"),
    [
        (CNN, 2_000_000_000, "Other ways do not work here: dynamic leaves 100% of the file."),
        (VIT, 1_000_000, "static, percentile fails (activations of one image take 0.0027 GB, more than 0.001)."),
    ],
    ids=["too large a file", "too much memory"],
)
def test_a_way_to_int8_that_does_not_work_is_told_though_another_does(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], limit: int, told: str
) -> None:
    monkeypatch.setattr(int8, "PASS_BYTES", limit)
    sentences = int8_of(model, colours, tmp_path)["sentences"]
    assert told in " ".join(sentences)
    assert told in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_image_gets_the_logits_that_were_scored_whatever_is_asked_beside_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = int8._ways
    monkeypatch.setattr(int8, "_ways", lambda images: {"dynamic": ways(images)["dynamic"]})
    network, meta = student(VIT)
    images = [picture(tmp_path / "image.png"), wide_picture(tmp_path / "wide.png")]
    evidence = evidence_of(colours, tmp_path, meta)
    for inside in (False, True):
        out = tmp_path / f"out{inside}"
        wanted = Wanted("onnx", with_preprocessing=inside, int8=True, max_loss=1)
        export_student(network, meta, out, "onnx", wanted=wanted, evidence=evidence)
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["quantized"]["way"] == "dynamic"
        together = ask(str(out), images)["images"]
        assert together == [ask(str(out), [image])["images"][0] for image in images]


class Harsh(Evidence):
    """Lets the float network be right about everything, and the other one wrong."""

    def score(self, run: Any, outcomes: Path) -> float:
        from orchestrator.evaluate.outcomes import write_outcomes

        right = outcomes.name == "float"
        outcomes.mkdir()
        one, truth = torch.eye(3)[[0, 1, 2] * 8], torch.tensor([0, 1, 2] * 8)
        write_outcomes(outcomes, "classification", one if right else one.roll(1, 1), truth)
        return float(right)


def test_int8_that_loses_more_than_noise_is_not_written(colours: Path, tmp_path: Path) -> None:
    network, meta = student(CNN)
    plain = evidence_of(colours, tmp_path, meta)
    harsh = Harsh(plain.task, plain.store, plain.preprocessing)
    with pytest.raises(WorkError, match=r"loses 1\.0000 .*more than noise; nothing was written"):
        export_student(network, meta, tmp_path / "out", "onnx", wanted=Wanted("onnx", int8=True), evidence=harsh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_a_program_of_torch_runs_without_timm_at_any_batch(tmp_path: Path) -> None:
    network, meta = student(CNN)
    images = images_for(meta, 5)
    report = export_student(network, meta, tmp_path / "out", "pt2", images)
    assert report["max_abs_difference"] <= 1e-5
    assert report["batches"] == [1, 3, 5]
    image = picture(tmp_path / "image.png")
    want = shares_by_protocol(network, meta, image)
    got = run_load(tmp_path / "out", image, "timm", "onnxruntime")
    assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) <= 1e-4
    with pytest.raises(UserError, match="is a program of torch"):
        ask(str(tmp_path / "out"), [image])


def test_a_network_that_is_built_for_a_size_is_asked_at_its_own(tmp_path: Path) -> None:
    network, meta = student(HIERA)
    export_student(network, meta, tmp_path / "out", "safetensors", images_for(meta))
    image = picture(tmp_path / "image.png")
    (told,) = ask(str(tmp_path / "out"), [image])["images"]
    got = [(c["probability"], c["label"]) for c in told["classes"]]
    assert [label for _, label in got] == [label for _, label in shares_by_protocol(network, meta, image)]
    assert [share for share, _ in got] == pytest.approx(
        [s for s, _ in shares_by_protocol(network, meta, image)], abs=1e-5
    )


def test_a_network_that_is_built_for_a_size_is_exported_under_a_decoder(tmp_path: Path) -> None:
    network, meta = student(GMLP)
    network = segmenter(network, 3).eval()
    structure = {"build": "methods.parts.dense:segmenter", "arguments": {"num_classes": 3}}
    meta |= {"structure": structure, "task": {"kind": "segmentation"}}
    images = images_for(meta)
    assert export_student(network, meta, tmp_path / "out", "safetensors", images)["max_abs_difference"] == 0
    found = network_of(json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")), tmp_path / "out")
    found.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(logits(found, images), logits(network, images))


@pytest.mark.parametrize("options", [{"with_preprocessing": True}, {"int8": True}, {"format": "onnx", "max_loss": 0.1}])
def test_an_option_that_does_not_fit_the_format_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"is for (--format onnx|--int8)"):
        Wanted(**options)


@pytest.fixture(scope="module")
def sweep(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepSpec, Path]:
    """A distilled student and a teacher with adapters."""
    storage = tmp_path_factory.mktemp("runs")
    spec = small_spec(colours, storage, methods={"kd": {}, "lora": {}})
    folder = create(spec)
    context = SweepContext(spec, str(folder))
    for number, cell in enumerate(prepare(spec).cells):
        Ledger(folder).write(run_trial(context, TrialConfig(f"t{number:04}", number, cell, {}, 3)))
    Ledger(folder).publish()
    return read_spec(folder / "sweep.yaml"), folder


def test_adapters_are_merged_and_the_teacher_is_never_inside(sweep: tuple[SweepSpec, Path], tmp_path: Path) -> None:
    spec, folder = sweep
    teacher = load_network(spec.teachers[0], "teacher").module.state_dict()
    for row in Ledger(folder).rows():
        assert row["status"] == "complete", row["reason"]
        out = tmp_path / row["method"]
        export_trial(folder, out, row["trial_id"], "safetensors")
        state = load_file(out / "model.safetensors")
        name = json.loads((out / "config.json").read_text())["architecture"]
        plain = timm.create_model(name, num_classes=3, **({"img_size": 32} if row["method"] == "lora" else {}))
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in plain.state_dict().items()}
        assert sum(v.numel() for v in plain.parameters()) == row["params_total"]
        if row["method"] == "kd":
            kept = [v for v in state.values() if v.ndim > 1]
            assert not any(k.shape == t.shape and torch.equal(k, t) for k in kept for t in teacher.values())
        sizes = sum(p.stat().st_size for p in out.iterdir())
        assert sizes < 4 * sum(v.numel() for v in state.values()) + 60_000


def test_the_card_tells_the_origin_in_the_hubs_words_and_reproduces_the_trial(
    sweep: tuple[SweepSpec, Path], tmp_path: Path
) -> None:
    spec, folder = sweep
    (row,) = (r for r in Ledger(folder).rows() if r["method"] == "kd")
    tested = {row["trial_id"]: {"metric": "accuracy", "value": 0.625, "images": 15, "standard_error": 0.125}}
    (folder / "test.json").write_text(json.dumps(tested), encoding="utf-8")
    export_trial(folder, tmp_path / "out", row["trial_id"], "safetensors", licence="cc-by-4.0")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.license == "cc-by-4.0"
    assert data.eval_results[0].metric_value == pytest.approx(row["val_metric"], abs=1e-6)
    task = load_task(spec.task, Store(folder.parent / "store"))
    weights = load_network(spec.teachers[0], "teacher").weights_hash
    for part in (
        task.val.images_hash,
        task.labels_hash,
        weights,
        "| Data | unknown |",
        "0.6250 on 15 images",
        "trial 3; split 0",
    ):
        assert part in text, part
    assert str(folder.parent) not in text
    raw = (tmp_path / "out" / "reproduce.yaml").read_text(encoding="utf-8")
    assert str(folder.parent) not in raw
    source = str(spec.task.data).removeprefix("folder:")
    again = yaml.safe_load(raw.replace(Path(source).name, source))
    repeated = parse_spec(again | {"storage": str(folder.parent)})
    context = SweepContext(repeated, str(create(repeated)))
    (cell,) = prepare(repeated).cells
    knobs = dict(repeated.methods["kd"])
    found = run_trial(context, TrialConfig("t0000", 0, cell, knobs, repeated.search.seed))
    assert found["val_metric"] == row["val_metric"]
    assert found["store_misses"] == 0  # the same addresses: the same computation


def test_the_command_takes_the_options(sweep: tuple[SweepSpec, Path], tmp_path: Path) -> None:
    _, folder = sweep
    command = ["export", str(folder), str(tmp_path / "out"), "--json", "--format", "onnx", "--trial", "t0000"]
    done = CliRunner().invoke(app, [*command, "--with-preprocessing", "--int8", "--max-loss", "1"])
    assert done.exit_code == 0, done.exception
    assert {"int8", "preprocessing"} <= set(json.loads(done.stdout))
