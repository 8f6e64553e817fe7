"""Masks: how they are read and checked, split and drawn, and that they go where their images go."""

from __future__ import annotations

import errno
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pixel_data import INK, mask_folder

import orchestrator.data.task as task_module
from methods.contract import IGNORE
from orchestrator.data.images import CorruptError, decode_mask
from orchestrator.data.labels import RenderedMasks, StoredMasks, open_labels
from orchestrator.data.pixels import open_pixels
from orchestrator.data.sources import MaskFolderSource
from orchestrator.data.task import TaskData, load_task
from orchestrator.data.views import Policy, render, render_mask
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import Preprocessing
from orchestrator.spec import Task
from orchestrator.store import Store

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


def test_masks_are_found_without_a_listing_and_what_was_listed_stays(own, store, monkeypatch):
    before = load_task(task_of(own), store)
    masks = [before.mask(before.train, row) for row in range(len(before.train))]
    with (own / "classes.txt").open("a") as names:
        names.write("another\n")
    monkeypatch.setattr(MaskFolderSource, "items", lambda _: pytest.fail("the images are listed again"))
    task_module._load_task.cache_clear()  # as in another process
    again = load_task(task_of(own), store, listing=before.listing)
    assert again is not before
    assert again.classes == before.classes == CLASSES
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: again.mask(again.train, row), range(len(again.train))))
    assert all(torch.equal(a, b) for a, b in zip(found, masks, strict=True))
    where = again.train.where[0]
    changed = own / "masks" / f"{Path(where).stem}.png"
    changed.write_bytes(png(np.zeros((8, 8), np.uint8)))
    with pytest.raises(WorkError, match=rf"^task\.data: the mask of '{where}' has changed since it was listed"):
        again.mask(again.train, 0)
    changed.unlink()
    gone = rf"^task\.data: the mask of '{where}' cannot be read any more \(No such file or directory\); restore it"
    with pytest.raises(WorkError, match=gone):
        again.mask(again.train, 0)


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


def test_a_lack_of_memory_is_no_fault_of_a_mask(monkeypatch):
    def full(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImageFile, "load", full)
    with pytest.raises(MemoryError):
        decode_mask(png(np.zeros((4, 4), np.uint8)))


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


def test_a_mask_that_cannot_be_read_now_is_named_and_nothing_is_stored_of_it(own, store, monkeypatch):
    read = MaskFolderSource.read_mask

    def failing(source: MaskFolderSource, where: str) -> bytes:
        if where == "images/07.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(source, where)

    with monkeypatch.context() as patch:
        patch.setattr(MaskFolderSource, "read_mask", failing)
        refused = r"^task\.data: the mask of 'images/07\.png' cannot be read \(Input/output error\)\.$"
        with pytest.raises(WorkError, match=refused):
            load_task(task_of(own), store)
    assert not list(store.root.glob("catalogue/*"))
    assert load_task(task_of(own), store).skipped == {}


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


@pytest.mark.parametrize("folders", [("train", "valid", "test"), ("Training", "Val", "TEST")])
def test_ready_splits_are_kept(tmp_path, store, folders):
    root = tmp_path / "ready"
    (root / "notes").mkdir(parents=True)
    for number, split in enumerate(folders):
        whole = mask_folder(tmp_path / split, 24)
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
            for path in sorted((whole / kind).iterdir())[8 * number : 8 * number + 8]:
                path.rename(root / split / kind / path.name)
    task = load_task(task_of(root, shots=1), store)
    assert [{w.split("/")[0] for w in task.split(s).where} for s in ("train", "val", "test")] == [
        {folder} for folder in folders
    ]
    assert task.mask(task.train, 0).shape == (72, 80)
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
