"""One class a pixel, from images and masks to an exported network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from pixel_data import INK, mask_folder
from small import small_spec
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.data.labels import open_labels
from orchestrator.data.pixels import open_pixels
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy, draw, render
from orchestrator.errors import UserError
from orchestrator.evaluate.metrics import mean_iou, overlaps, score
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.select import predict
from orchestrator.select.export import export_student
from orchestrator.select.predict import ask, square_mask
from orchestrator.spec import SweepSpec, Task, read_spec
from orchestrator.store import Store
from orchestrator.sweep.choice import recommend
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.run import run_trial

METHODS = ("finetune", "linear_probe", "kd", "wecolora")
CLASSES = ("background", *INK)
POLICY = Policy(crop_scale=0.35, color=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return mask_folder(tmp_path_factory.mktemp("pixels") / "scenes")


def task_of(folder: Path, **changes) -> Task:
    return Task(**{"data": f"folder:{folder}", "kind": "segmentation", "shots": 4, **changes})


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# Metric


def test_iou_of_a_hand_made_mask_with_ignored_pixels():
    masks = torch.tensor([[[0, 0, 1], [1, 2, 255], [255, 255, 2]]])
    guess = torch.tensor([[[0, 1, 1], [1, 0, 0], [2, 1, 2]]])
    both, either = overlaps(guess, masks, 4)
    assert both.tolist() == [[1, 2, 1, 0]]
    assert either.tolist() == [[3, 3, 2, 0]]
    assert mean_iou(both.numpy(), either.numpy()) == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)


def test_iou_adds_up_over_images_before_it_divides():
    masks = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 1]]])
    guess = torch.tensor([[[1, 1, 1, 1]], [[0, 0, 0, 0]]])
    both, either = overlaps(guess, masks, 2)
    assert mean_iou(both.numpy(), either.numpy()) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_a_class_that_is_guessed_but_never_there_counts_as_zero_and_one_that_is_neither_does_not():
    both, either = overlaps(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]), 4)
    assert mean_iou(both.numpy(), either.numpy()) == pytest.approx((1 / 2 + 0) / 2)
    assert np.isnan(mean_iou(*(t.numpy() for t in overlaps(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 255), 3))))


class Told(torch.nn.Module):
    """Reads the class off the colour."""

    def __init__(self) -> None:
        super().__init__()
        self.ink = torch.nn.Parameter(torch.tensor([(128, 128, 128), *INK.values()]).float() / 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -(images[:, None] - self.ink[None, :, :, None, None]).square().sum(2)


def test_a_network_that_knows_the_colours_scores_high_at_any_size(folder, store):
    task = load_task(task_of(folder), store)
    found = []
    for size in (48, 72):
        preprocessing = Preprocessing(size, (0, 0, 0), (1, 1, 1), "bilinear")
        pixels = open_pixels(store, task, task.val, POLICY, 1, preprocessing, 1)
        count = len(task.val)
        labels = open_labels(store, task, task.val, range(count), POLICY, 1, size, 1)
        found.append(score(Told(), preprocessing, pixels, labels, count, "segmentation", 4, with_error=True))
    assert all(s.value > 0.85 for s in found)
    assert abs(found[0].value - found[1].value) < 0.05
    assert all(0 < s.error < 0.1 for s in found)


# Whole trials


def spec_of(folder: Path, storage: Path, methods: tuple[str, ...] = METHODS, **task) -> SweepSpec:
    raw = {"data": f"folder:{folder}", "kind": "segmentation", "shots": 4, **task}
    return small_spec(
        folder,
        storage,
        task=raw,
        methods={name: {} for name in methods},
        teachers=[{"model": "timm/test_vit", "image_size": 64, "pretrained": False}],
        students=[{"model": "timm/test_convnext", "image_size": 64}],
    )


@pytest.fixture(scope="module")
def trials(folder, tmp_path_factory):
    """Every method with the linear decoder, two with the convolutional one, as two sweeps of one store."""
    storage = tmp_path_factory.mktemp("runs")
    found = {}
    for decoder, methods in (("linear", METHODS), ("conv", ("kd", "wecolora"))):
        spec = spec_of(folder, storage, methods, decoder=decoder).model_copy(update={"name": decoder})
        context = SweepContext(spec, str(create(spec)))
        for number, cell in enumerate(prepare(spec).cells):
            row = run_trial(context, TrialConfig(f"t{number:04}", number, cell, {}, 0))
            Ledger(Path(context.folder)).write(row)
            found[cell.method, decoder] = (context, row)
        Ledger(Path(context.folder)).publish()
    return found


CASES = [*((m, "linear") for m in METHODS), ("kd", "conv"), ("wecolora", "conv")]


@pytest.mark.parametrize(("method", "decoder"), CASES)
def test_a_trial_scores_what_its_stored_student_scores(trials, method, decoder):
    context, row = trials[method, decoder]
    assert row["status"] == "complete", row["reason"]
    network, meta = load_student(Path(context.folder) / row["student_path"])
    assert meta["structure"]["arguments"] == {"num_classes": 4, "decoder": decoder}
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    task = load_task(context.spec.task, context.store)
    pixels = open_pixels(context.store, task, task.val, POLICY, 1, preprocessing, 1)
    count = len(task.val)
    labels = open_labels(context.store, task, task.val, range(count), POLICY, 1, 64, 1)
    assert score(network, preprocessing, pixels, labels, count, "segmentation", 4).value == row["val_metric"]
    assert row["params_total"] == sum(p.numel() for p in network.parameters())
    assert row["flops"] > 0


def test_the_probe_of_pixels_finds_more_than_the_background(trials):
    for method in ("linear_probe", "wecolora"):
        assert trials[method, "linear"][1]["val_metric"] > 0.35  # the background alone gives less than 0.2


@pytest.mark.parametrize("method", ["wecolora", "kd"])
def test_scoring_a_network_while_it_trains_does_not_change_what_it_becomes(trials, folder, tmp_path, method):
    spec = spec_of(folder, tmp_path / "runs", (method,), decoder="linear")
    spec = spec.model_copy(update={"search": spec.search.model_copy(update={"scheduler": "asha"})})
    (cell,) = prepare(spec).cells
    seen: list[float] = []

    def progress(share: float, metric: float | None) -> None:
        seen.extend([] if metric is None else [metric])

    context = SweepContext(spec, str(tmp_path / "runs" / "small"))
    row = run_trial(context, TrialConfig("t0000", 0, cell, {}, 0), progress)
    assert row["status"] == "complete", row["reason"]
    assert row["val_metric"] == trials[method, "linear"][1]["val_metric"]
    assert len(seen) >= 3
    assert all(0 < value < 1 for value in seen)
    assert method == "kd" or seen[-1] == pytest.approx(row["val_metric"], abs=0.02)  # under the same probe


def test_its_search_space_suits_such_a_folder(folder, tmp_path):
    overrides = {
        "task.data": f"folder:{folder}",
        "task.shots": 4,
        "teachers": "[{model: timm/test_vit, pretrained: false}]",
        "students": "[timm/test_resnet]",
        "storage": tmp_path,
    }
    spec = read_spec("search_spaces/segmentation.yaml", [f"{k}={v}" for k, v in overrides.items()])
    prepared = prepare(spec)
    assert {cell.method for cell in prepared.cells} == set(METHODS)
    assert prepared.dropped == []


def test_what_a_method_learns_without_labels_is_shared_by_both_decoders(trials):
    context, row = trials["wecolora", "conv"]
    assert len(list(context.store.root.glob("distil/*"))) == 3  # wecolora's one, and kd's two
    assert row["store_hits"] > 0


def test_the_dense_maps_of_the_teacher_are_stored_once(trials):
    context, _ = trials["kd", "linear"]
    kinds = [e.meta["about"]["output"]["kind"] for e in context.store.entries() if e.stage == "outputs"]
    assert kinds.count("dense") == 2  # two views, for the head and for both distillations
    assert len(list(context.store.root.glob("teacher_head/*"))) == 1


def test_the_recommendation_names_the_metric_and_reads_test_masks_from_the_files(trials):
    context, _ = trials["kd", "linear"]
    before = set(context.store.root.glob("masks/*"))
    answer = recommend(Path(context.folder))
    assert answer["test"]["metric"] == "mIoU"
    assert 0 < answer["test"]["standard_error"] < 0.3
    assert "mIoU on val" in answer["sentences"][0]
    assert set(context.store.root.glob("masks/*")) == before


# Export


def run_load(folder: Path, image: Path, *blocked: str) -> list[str]:
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({['orchestrator', 'methods', *blocked]})); "
        "script = sys.argv.pop(1); runpy.run_path(script, run_name='__main__')"
    )
    command = [sys.executable, "-I", "-X", "utf8", "-c", code, str(folder / "load.py"), str(image)]
    command.append(str(folder.parent / "mask.png"))
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def student(trials, method: str, decoder: str):
    context, row = trials[method, decoder]
    network, meta = load_student(Path(context.folder) / row["student_path"])
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return network, meta, images


def test_predict_writes_a_mask_of_the_images_size_for_the_square_that_the_network_sees(trials, folder, tmp_path):
    context, row = trials["kd", "linear"]
    network, meta, _ = student(trials, "kd", "linear")
    image = folder / "images" / "03.png"
    answer = ask(f"{context.folder}/{row['student_path']}", [image], masks=tmp_path / "masks")
    (told,) = answer["images"]
    picture = Image.open(told["mask"])
    mask = np.array(picture)
    assert picture.mode == "P"  # colours to look at, class indices inside
    assert mask.shape == (72, 80)
    assert (mask[:, :4] == 255).all()
    assert (mask[:, 76:] == 255).all()
    small = np.array(Image.fromarray(mask[:, 4:76]).resize((64, 64), Image.Resampling.NEAREST))
    assert (small == expected_mask(network, meta, image)).mean() > 0.97
    assert sum(c["share"] for c in told["classes"]) == pytest.approx(1)
    with pytest.raises(UserError, match="is not empty"):
        ask(f"{context.folder}/{row['student_path']}", [image], masks=tmp_path / "masks")
    with pytest.raises(UserError, match=r"^--out: '.*x' cannot be written \(File name too long\)\.$"):
        ask(f"{context.folder}/{row['student_path']}", [image], masks=tmp_path / ("x" * 300))


def at_once(logits: torch.Tensor, side: int) -> torch.Tensor:
    large = functional.interpolate(logits[None], size=(side, side), mode="bilinear", align_corners=False)[0]
    return large.argmax(0).to(torch.uint8)


@pytest.mark.parametrize(
    ("classes", "size", "side"), [(2, 7, 1), (3, 33, 501), (21, 64, 333), (21, 97, 65), (100, 33, 301), (8, 65, 777)]
)
def test_a_mask_is_the_one_of_all_classes_enlarged_at_once(classes, size, side):
    logits = torch.randn(classes, size, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(square_mask(logits, side), at_once(logits, side))
    twice = torch.cat([logits, logits])  # the first of equals
    assert torch.equal(square_mask(twice, side), at_once(logits, side))


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_more_than_one_class_is_enlarged_at_a_time():
    with Largest() as largest:
        square_mask(torch.randn(21, 16, 16), 200)
    assert largest.elements == 200 * 200


def test_a_mask_is_made_once_for_its_shares_and_its_file(trials, folder, tmp_path, monkeypatch):
    sides = []
    monkeypatch.setattr(predict, "square_mask", lambda logits, side: sides.append(side) or square_mask(logits, side))
    context, row = trials["kd", "linear"]
    images = [folder / "images" / "03.png", folder / "images" / "04.png"]
    answer = ask(f"{context.folder}/{row['student_path']}", images, masks=tmp_path / "masks")
    assert sides == [min(Image.open(image).size) for image in images]
    for told in answer["images"]:
        seen = np.array(Image.open(told["mask"]))
        seen = seen[seen != predict.OUTSIDE]
        for found in told["classes"]:
            assert found["share"] == (seen == CLASSES.index(found["label"])).sum() / seen.size


def expected_mask(network: torch.nn.Module, meta: dict[str, Any], path: Path) -> np.ndarray:
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    pixels = render(image, draw(POLICY, "x", (72, 80), 0), 64, preprocessing.interpolation)
    with torch.inference_mode():
        return network(preprocessing.normalise(pixels[None])).argmax(1)[0].numpy().astype(np.uint8)


@pytest.mark.parametrize(("method", "decoder"), [("kd", "linear"), ("wecolora", "conv")])
def test_the_exported_network_gives_the_same_logits_and_its_script_the_same_mask(
    trials, folder, tmp_path, method, decoder
):
    network, meta, images = student(trials, method, decoder)
    report = export_student(network, meta, tmp_path / "out", "safetensors", images)
    assert report["max_abs_difference"] == 0
    assert not report["timm_loads"]
    assert "structure.py" in report["files"]
    source = Path("methods/parts/dense.py")
    assert (tmp_path / "out" / "structure.py").read_bytes() == source.read_bytes()
    image = folder / "images" / "03.png"
    lines = run_load(tmp_path / "out", image)
    mask = np.array(Image.open(tmp_path / "mask.png"))
    wanted = expected_mask(network, meta, image)
    assert (mask == wanted).mean() > 0.999
    shares = {line[7:]: float(line[:6]) for line in lines}
    assert set(shares) == set(CLASSES)
    for index, name in enumerate(CLASSES):
        assert shares[name] == pytest.approx((mask == index).mean(), abs=1e-4)


@pytest.mark.parametrize(("method", "decoder"), [("kd", "conv"), ("wecolora", "linear")])
def test_onnx_gives_dense_logits_at_any_batch_without_torch(trials, folder, tmp_path, method, decoder):
    network, meta, images = student(trials, method, decoder)
    report = export_student(network, meta, tmp_path / "out", "onnx", images)
    assert report["max_abs_difference"] <= 1e-4
    assert "structure.py" not in report["files"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2):
        (got,) = session.run(["logits"], {"images": images[:batch].numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(got, network(images[:batch]).numpy(), rtol=0, atol=1e-4)
    image = folder / "images" / "03.png"
    run_load(tmp_path / "out", image, "torch", "timm", "torchvision")
    agreement = np.array(Image.open(tmp_path / "mask.png")) == expected_mask(network, meta, image)
    assert agreement.mean() > 0.98  # another resampler, a grey level


def test_the_card_says_miou_and_what_was_added(trials, tmp_path):
    network, meta, images = student(trials, "wecolora", "conv")
    export_student(network, meta, tmp_path / "out", "safetensors", images)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (f"| mIoU on val | {meta['val_metric']:.4f} |", "segmenter (decoder conv, num_classes 4)"):
        assert part in card, part
    assert "pipeline_tag: image-segmentation" in card
    assert "library_name: pytorch" in card
    assert "Accuracy" not in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["structure"] == {
        "file": "structure.py",
        "function": "segmenter",
        "build": "methods.parts.dense:segmenter",
        "arguments": {"num_classes": 4, "decoder": "conv"},
    }


def test_the_packaged_transformer_is_exported_under_a_decoder(tmp_path):
    from methods.dense import structure_of
    from methods.parts.dense import segmenter
    from orchestrator.models.load import build_network
    from orchestrator.spec import Model

    entry = Model(model="packaged/vit_clipart")
    torch.manual_seed(0)
    network = segmenter(build_network(entry, num_classes=4, changes={"depth": 2}), 4).eval()
    structure = structure_of(network)
    assert structure is not None
    meta = {
        "model": entry.model_dump(mode="json"),
        "role": "teacher",
        "changes": {"depth": 2},
        "structure": {"build": structure.build, "arguments": dict(structure.arguments)},
        "num_classes": 4,
        "classes": list(CLASSES),
        "preprocessing": {"size": 96, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
        "task": {"kind": "segmentation"},
        "val_metric": 0.5,
    }
    assert export_student(network, meta, tmp_path / "out", "safetensors")["max_abs_difference"] == 0


def test_a_structure_that_needs_this_package_is_not_exported(trials, tmp_path):
    from orchestrator.errors import WorkError

    network, meta, images = student(trials, "kd", "linear")
    meta["structure"] = {**meta["structure"], "build": "methods.dense:structure_of"}
    with pytest.raises(WorkError, match=r"methods.dense cannot be copied into an export: it imports methods"):
        export_student(network, meta, tmp_path / "out", "safetensors", images)
