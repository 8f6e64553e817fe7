"""One class a pixel, from images and masks to an exported network."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pixel_data import INK, mask_folder
from small import small_spec

from methods.contract import IGNORE
from orchestrator.data import load_task
from orchestrator.data.images import CorruptError, decode_mask
from orchestrator.data.labels import RenderedMasks, StoredMasks, open_labels
from orchestrator.data.pixels import open_pixels
from orchestrator.data.task import TaskData
from orchestrator.data.views import Policy, draw, render, render_mask
from orchestrator.errors import UserError
from orchestrator.evaluate.metrics import mean_iou, overlaps, score
from orchestrator.models import load_student
from orchestrator.models.load import Preprocessing
from orchestrator.select.export import export_student
from orchestrator.spec import SweepSpec, Task, read_spec
from orchestrator.store import Store
from orchestrator.sweep.board import recommend
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.run import create, prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.run import run_trial

METHODS = ("finetune", "linear_probe", "kd", "wecolora")
CLASSES = ("background", *INK)
POLICY = Policy(crop_scale=0.35, color=0.0)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return mask_folder(tmp_path_factory.mktemp("pixels") / "scenes")


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder that a test may spoil."""
    return mask_folder(tmp_path / "scenes", 20)


def task_of(folder: Path, **changes) -> Task:
    return Task(**{"data": f"folder:{folder}", "kind": "segmentation", "shots": 4, **changes})


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def present(task: TaskData, row: int) -> set[int]:
    return set(task.mask(task.train, row).unique().tolist()) - {IGNORE}


# Data


def test_images_masks_and_class_names_are_read_and_255_does_not_count(folder, store):
    task = load_task(task_of(folder), store)
    assert task.classes == CLASSES
    assert task.info.kind == "segmentation"
    sizes = [len(s) for s in (task.train, task.val, task.test)]
    assert all(abs(a - b) <= 1 for a, b in zip(sizes, (24, 8, 8), strict=True)), sizes
    assert len({*task.train.ids, *task.val.ids, *task.test.ids}) == 40
    for row in range(5):
        stem = Path(task.train.where[row]).stem
        raw = np.array(Image.open(folder / "masks" / f"{stem}.png"))
        assert np.array_equal(task.mask(task.train, row).numpy(), raw)
        assert raw[0].tolist() == [255] * 80


def test_another_ignore_index_is_marked_the_same_and_255_then_is_no_class(tmp_path, store):
    root = mask_folder(tmp_path / "other", 20, border=9)
    task = load_task(task_of(root, ignore_index=9), store)
    mask = task.mask(task.train, 0)
    assert mask[0].unique().tolist() == [IGNORE]
    assert set(mask.unique().tolist()) <= {0, 1, 2, 3, IGNORE}
    with pytest.raises(UserError, match=r"holds the class index 9, which is outside the 4 classes \(0 to 3\)"):
        load_task(task_of(root), store)


def test_without_names_the_classes_are_the_indices(own, store):
    (own / "classes.txt").unlink()
    assert load_task(task_of(own), store).classes == ("0", "1", "2", "3")


def test_palette_greyscale_and_bilevel_masks_are_read_as_indices():
    values = np.array([[0, 1, 2], [1, 1, 0]], np.uint8)
    palette = Image.fromarray(values, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    file = io.BytesIO()
    palette.save(file, "png")
    assert decode_mask(file.getvalue()).tolist() == values.tolist()
    assert decode_mask(png(values)).tolist() == values.tolist()
    assert decode_mask(png((values > 0).astype(np.uint8) * 255, "1")).tolist() == (values > 0).astype(int).tolist()
    assert decode_mask(png(values.astype(np.uint16))).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty mask file"),
        (b"not a mask", "mask cannot be decoded"),
        (png(np.zeros((4, 4, 3), np.uint8)), "mask of colours instead of class indices"),
        (png(np.full((4, 4), 300, np.uint16)), "mask with values above 255"),
    ],
)
def test_an_unusable_mask_says_why(data, reason):
    with pytest.raises(CorruptError, match=reason):
        decode_mask(data)


def test_images_with_unusable_masks_are_counted_by_reason(own, store):
    masks, images = own / "masks", own / "images"
    (masks / "00.png").write_bytes(b"broken")
    (masks / "01.png").write_bytes(png(np.zeros((72, 79), np.uint8)))
    (masks / "02.png").write_bytes(png(np.zeros((72, 80, 3), np.uint8)))
    (masks / "03.png").write_bytes(png(np.full((72, 80), 255, np.uint8)))
    (images / "04.png").write_bytes((images / "05.png").read_bytes())
    (images / "06.png").write_bytes((images / "07.png").read_bytes())
    (masks / "06.png").write_bytes((masks / "07.png").read_bytes())
    task = load_task(task_of(own), store)
    assert task.skipped == {
        "mask cannot be decoded": 1,
        "mask of another size than its image": 1,
        "mask of colours instead of class indices": 1,
        "mask of ignored pixels only": 1,
        "exact duplicate": 2,
        "same image with another mask": 1,
    }
    assert sum(map(len, (task.train, task.val, task.test))) == 20 - 4 - 2 - 1


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_gives_what_the_folder_gives(folder, store, tmp_path, struct):
    stems = [f"{i:02}" for i in range(40)]
    columns: dict[str, list[Any]] = {}
    for name, where in (("image", "images"), ("mask", "masks")):
        found = [(folder / where / f"{stem}.png").read_bytes() for stem in stems]
        columns[name] = [{"bytes": b, "path": "x"} for b in found] if struct else found
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "p" / "a.parquet", row_group_size=7)
    (tmp_path / "p" / "classes.txt").write_text((folder / "classes.txt").read_text())
    one = load_task(task_of(folder), store)
    other = load_task(Task(data=f"parquet:{tmp_path / 'p'}", kind="segmentation", shots=4), store)
    assert (other.classes, other.labelled, other.labels_hash) == (one.classes, one.labelled, one.labels_hash)
    for row in range(len(one.train)):
        assert torch.equal(one.mask(one.train, row), other.mask(other.train, row))


def test_ready_splits_are_kept(tmp_path, store):
    root = tmp_path / "ready"
    for number, split in enumerate(("train", "valid", "test")):
        whole = mask_folder(tmp_path / split, 24)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
            for path in sorted((whole / kind).iterdir())[8 * number : 8 * number + 8]:
                path.rename(root / split / kind / path.name)
    task = load_task(task_of(root, shots=1), store)
    assert [{w.split("/")[0] for w in task.split(s).where} for s in ("train", "val", "test")] == [
        {"train"},
        {"valid"},
        {"test"},
    ]
    assert task.classes == ("0", "1", "2", "3")


def test_shots_are_images_in_which_a_class_occurs_and_fewer_are_a_subset_of_more(folder, store):
    draws = []
    for shots in (1, 2, 4):
        task = load_task(task_of(folder, shots=shots), store)
        for c in range(4):
            assert sum(c in present(task, row) for row in task.labelled) >= shots
        assert len(task.labelled) <= 3 * shots  # the background comes along with every colour
        draws.append({task.train.ids[i] for i in task.labelled})
    assert all(few < many for few, many in itertools.pairwise(draws))
    other = load_task(task_of(folder, shots=2, seed=1), store)
    assert {other.train.ids[i] for i in other.labelled} != draws[1]
    few = load_task(task_of(folder, shots=2, unlabelled=False), store)
    assert {few.train.ids[i] for i in few.labelled} == draws[1]
    assert len(few.train) == len(draws[1])


def test_every_split_has_every_class(folder, store):
    task = load_task(task_of(folder), store)
    for split in (task.train, task.val, task.test):
        found = [set(task.mask(split, row).unique().tolist()) for row in range(len(split))]
        share = [sum(c in one for one in found) / len(split) for c in range(4)]
        assert share[0] == 1
        assert all(0.25 <= s <= 0.75 for s in share[1:]), share  # half of the images each


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "masks" / "07.png").unlink(), r"there is no mask for 'images/07.png' in .*/masks'"),
        (lambda r: (r / "masks").rename(r / "mask"), r"needs '.*masks'; there is images and mask. Did you mean 'mask'"),
        (lambda r: (r / "classes.txt").write_text("a\nb\n"), r"the mask of 'images/.*' holds the class index [23], "),
        (lambda r: (r / "classes.txt").write_text("a\n\nb\n"), r"line 2 of '.*classes.txt' is empty"),
        (lambda r: (r / "classes.txt").write_text("a\nb\na\n"), r"line 3 of '.*classes.txt' is a repetition"),
        (
            lambda r: [p.write_bytes(png(np.zeros((72, 80), np.uint8))) for p in (r / "masks").iterdir()],
            r"hold only one class \(background\); at least two are needed",
        ),
        (
            lambda r: [p.write_bytes(b"") for p in (r / "masks").iterdir()],
            r"none of the 20 images can be used: 20 empty mask file",
        ),
    ],
    ids=["no mask", "no folder", "outside", "empty name", "name twice", "one class", "all broken"],
)
def test_bad_data_is_refused_in_a_sentence(own, store, spoil, message):
    spoil(own)
    with pytest.raises(UserError, match=message):
        load_task(task_of(own), store)


# Masks under views


def test_a_mask_follows_the_crop_and_the_flip_of_its_image_pixel_for_pixel():
    """The image is its own mask; where nothing is resized every pixel must agree."""
    mask = torch.randint(0, 4, (40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = (mask * 60)[None].repeat(3, 1, 1)
    for flip in (0, 1):
        parameters = np.array([3, 7, 20, 20, flip, 1, 1, 1], dtype=np.float32)
        seen = render(image, parameters, 20, "bicubic")[0] / 60
        assert torch.equal(render_mask(mask, parameters, 20), seen.to(torch.uint8))
        assert torch.equal(seen.to(torch.uint8), mask[3:23, 7:27].flip(-1) if flip else mask[3:23, 7:27])


@pytest.mark.parametrize("size", [15, 45, 64])
def test_a_resized_mask_agrees_with_its_resized_image_inside_every_area(size):
    """Areas of 20 pixels; a shift by half a pixel would show at their borders, all on one side."""
    mask = torch.randint(0, 4, (5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mask = mask.repeat_interleave(20, 0).repeat_interleave(20, 1)
    parameters = np.array([0, 0, 100, 100, 0, 1, 1, 1], dtype=np.float32)
    planes = torch.stack([(mask == c).to(torch.uint8) * 255 for c in range(4)])
    best = torch.stack([render(p[None].repeat(3, 1, 1), parameters, size, "bilinear")[0] for p in planes]).float()
    clear = best.max(0).values > 0.55 * 255
    assert clear.float().mean() > 0.8
    assert torch.equal(render_mask(mask, parameters, size)[clear], best.argmax(0)[clear].to(torch.uint8))


def test_a_reduced_mask_holds_the_pixels_at_the_centres():
    mask = torch.arange(81, dtype=torch.uint8).view(9, 9)
    parameters = np.array([0, 0, 9, 9, 0, 1, 1, 1], dtype=np.float32)
    assert torch.equal(render_mask(mask, parameters, 3), mask[1::3, 1::3])
    assert torch.equal(render_mask(mask, np.array([0, 0, 9, 9, 1, 1, 1, 1], np.float32), 3), mask[1::3, 1::3].flip(-1))


def test_stored_masks_are_the_rendered_ones_and_belong_to_the_stored_pixels(folder, store):
    task = load_task(task_of(folder), store)
    rows, views = np.arange(24).repeat(3), np.tile(np.arange(3), 24)
    stored = open_labels(store, task, task.train, task.labelled, POLICY, 3, 32, limit_gb=1)
    live = open_labels(store, task, task.train, task.labelled, POLICY, 3, 32, limit_gb=0)
    assert isinstance(stored, StoredMasks)
    assert isinstance(live, RenderedMasks)
    assert len(list(store.root.glob("masks/*"))) == 3
    masks = stored.batch(rows, views)
    assert torch.equal(masks, live.batch(rows, views))
    preprocessing = Preprocessing(32, (0, 0, 0), (1, 1, 1), "bilinear")
    pixels = open_pixels(store, task, task.train, POLICY, 3, preprocessing, 1).batch(rows, views).float()
    ink = torch.tensor([(128, 128, 128), *INK.values()]).float()
    nearest = (pixels[:, None] - ink[None, :, :, None, None]).square().sum(2).argmin(1)
    counts = masks != IGNORE
    assert (nearest == masks)[counts].float().mean() > 0.93  # the rest are borders and noise


def test_masks_of_images_without_a_label_are_never_read(folder, store, monkeypatch):
    task = load_task(task_of(folder), store)
    known = {task.train.where[i] for i in task.labelled}
    read = task.source.read_mask
    asked = set()
    monkeypatch.setattr(task.source, "read_mask", lambda where: asked.add(where) or read(where))
    for limit in (0, 1):
        labels = open_labels(store, task, task.train, task.labelled, POLICY, 2, 24, limit)
        masks = labels.batch(np.arange(24), np.arange(24) % 2)
        for row in range(24):
            assert (masks[row] == IGNORE).all() == (row not in task.labelled)
    assert asked == known


def test_the_address_of_masks_holds_the_masks_the_size_and_what_is_ignored(folder, own, store):
    def keys() -> set[str]:
        return {p.name for p in store.root.glob("masks/*")}

    def ask(task: TaskData, size: int) -> None:
        open_labels(store, task, task.train, task.labelled, POLICY, 1, size, 1)

    task = load_task(task_of(folder), store)
    ask(task, 24)
    ask(task, 24)
    assert len(keys()) == 1
    ask(task, 32)
    assert len(keys()) == 2
    ask(load_task(task_of(folder, shots=2), store), 24)
    assert len(keys()) == 3


# Metric


def test_iou_of_a_hand_made_mask_with_ignored_pixels():
    masks = torch.tensor([[[0, 0, 1], [1, 2, 255], [255, 255, 2]]])
    guess = torch.tensor([[[0, 1, 1], [1, 0, 0], [2, 1, 2]]])
    both, either = overlaps(guess, masks, 4)
    # class 0: one of {two masked, two guessed (one on a counted pixel of class 2)}; class 1: 2 of 3; class 2: 1 of 2
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
