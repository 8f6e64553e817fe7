"""The user's data: what is read, split and drawn, the views of it, and what the teacher says of them."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from small import small_spec
from torch import Tensor

from methods.outputs import Output, read_outputs
from orchestrator.data.decoded import LIMIT, Decoded
from orchestrator.data.draws import philox
from orchestrator.data.images import CorruptError, decode
from orchestrator.data.outputs import Bill, ensure_outputs, open_outputs
from orchestrator.data.pixels import RenderedPixels, open_pixels, rendered_view, stored_pixels
from orchestrator.data.sources import FolderSource, ParquetSource, Source, open_source
from orchestrator.data.task import TaskData, _load_task, listing_of, load_task
from orchestrator.data.views import Policy, draw, draw_all, render, stored_view, view_parameters
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import Preprocessing, load_network
from orchestrator.spec import Model, Task
from orchestrator.store import Records, Store, key_of
from orchestrator.sweep.space import default_knobs, method_space
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

CLASSES = ("ant", "bee", "cat")
SMALL = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
POLICY = Policy(crop_scale=0.35, color=0.4)
TEACHER = Model(model="timm/test_vit", pretrained=False, image_size=32)
POOLED, LOGITS, TOKENS = Output("pooled"), Output("logits"), Output("tokens")
SKIPPED = {"cannot be decoded": 1, "empty file": 1, "exact duplicate": 2, "same image under two classes": 1}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(seed: int, shape: tuple[int, ...] = (40, 56, 3), dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype))


def png(image: Image.Image, fmt: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, fmt)
    return file.getvalue()


def encoded() -> dict[str, bytes]:
    """Three classes of twelve good images, and one broken or doubled file of each kind, by path."""
    files = {f"{name}/{i:02}.png": png(picture(100 * c + i)) for c, name in enumerate(CLASSES) for i in range(12)}
    files["ant/rgba.png"] = png(picture(1000, (40, 40, 4)))
    files["bee/wide.png"] = png(picture(1001, (56, 40), np.uint16))
    files["cat/grey.png"] = png(picture(1002, (48, 48)))
    files["ant/corrupt.png"] = files["ant/00.png"][:60]
    files["bee/empty.jpg"] = b""
    files["ant/again.png"] = files["ant/03.png"]
    files["cat/also.png"] = files["bee/05.png"]
    return files


def folder_of(root: Path, files: dict[str, bytes]) -> str:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return f"folder:{root}"


def parquet_of(path: Path, files: dict[str, bytes], **columns: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": list(files.values()), "label": [p.split("/")[-2] for p in files], **columns}
    pq.write_table(pa.table(rows), path, row_group_size=10)
    return f"parquet:{path}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return folder_of(tmp_path_factory.mktemp("images"), encoded())


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def task(data, store) -> TaskData:
    return load_task(Task(data=data, shots=4), store)


def chosen(task: TaskData) -> set[str]:
    return {task.train.ids[i] for i in task.labelled}


def test_a_folder_is_listed_in_the_order_of_its_paths_and_links_to_folders_are_not_entered(tmp_path):
    for name in ("b/A.PNG", "b/a/x.png", "b/a.png", "b/a.png.d/x.jpeg", "b/z.txt", "a/.hidden.png", "a/x.y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "one.png").symlink_to(tmp_path / "a" / "x.y.png")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "itself.png").symlink_to("itself.png")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "class").symlink_to(tmp_path / "a")
    found = open_source(f"folder:{tmp_path}").items()
    under_b = ["b/A.PNG", "b/a/x.png", "b/a.png", "b/a.png.d/x.jpeg", "b/one.png"]
    assert [i.where for i in found] == [
        "a/.hidden.png", "a/x.y.png", *under_b, "class/.hidden.png", "class/x.y.png"
    ]  # fmt: skip
    stat = (tmp_path / "a" / "x.y.png").stat()
    assert {i.stamp for i in found if i.where in ("a/x.y.png", "b/one.png")} == {f"1.{stat.st_mtime_ns}"}


def test_a_known_listing_is_not_made_again_and_one_that_is_gone_is_refused(tmp_path, store):
    where = folder_of(tmp_path / "images", encoded())
    task = Task(data=where, shots=4)
    before = load_task(task, store)
    (tmp_path / "images" / "ant" / "new.png").write_bytes(png(picture(7)))
    assert load_task(task, store, listing=before.listing) is before
    assert load_task(task, store).listing != before.listing
    with pytest.raises(
        WorkError, match=r"^task\.data: the images of 'folder:.*' have changed since they were listed\.$"
    ):
        load_task(task, Store(tmp_path / "other"), listing=before.listing)


def test_a_folder_that_cannot_be_listed_is_told_in_a_sentence(tmp_path, monkeypatch):
    folder_of(tmp_path, encoded())
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("bee"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"^task\.data: '.*/bee' cannot be read: Permission denied\.$"):
        open_source(f"folder:{tmp_path}").items()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), r"Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), r"No such file or directory"),
        (OSError("no row 7"), r"no row 7"),
    ],
    ids=["refused", "vanished", "without a number"],
)
def test_an_image_that_cannot_be_read_now_is_named_and_nothing_is_stored_of_it(
    tmp_path, store, monkeypatch, kind, error, reason
):
    files = encoded()
    where = (folder_of if kind == "folder" else parquet_of)(tmp_path / "images" / "i.parquet", files)
    bad = "bee/07.png" if kind == "folder" else f"0:{list(files).index('bee/07.png')}"
    source: type[Source] = FolderSource if kind == "folder" else ParquetSource
    read = source.read

    def failing(self: Source, address: str) -> bytes:
        if address == bad:
            raise error
        return read(self, address)

    with monkeypatch.context() as patch:
        patch.setattr(source, "read", failing)
        with pytest.raises(WorkError, match=rf"^task\.data: '{bad}' cannot be read \({reason}\)\.$"):
            load_task(Task(data=where, shots=4), store)
    assert not list(store.root.glob("catalogue/*"))
    assert load_task(Task(data=where, shots=4), store).skipped == SKIPPED


def test_a_broken_parquet_file_is_named_with_what_arrow_says_in_one_line(tmp_path, store):
    where = parquet_of(tmp_path / "i.parquet", encoded())
    path = tmp_path / "i.parquet"
    begin = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = path.read_bytes()
    path.write_bytes(data[:begin] + b"\xff" * 20 + data[begin + 20 :])
    with pytest.raises(WorkError, match=rf"^task\.data: '0:\d' cannot be read \('{path}': .*\)\.$"):
        load_task(Task(data=where, shots=4), store)


def test_an_image_that_has_changed_since_it_was_listed_is_refused(tmp_path, store):
    files = {f"{name}/{i:02}.png": png(picture(3000 + 100 * c + i)) for c, name in enumerate(CLASSES) for i in range(9)}
    task = load_task(Task(data=folder_of(tmp_path / "images", files), shots=2), store)
    (tmp_path / "images" / task.train.where[3]).write_bytes(png(picture(7777)))
    with pytest.raises(WorkError, match=rf"'{task.train.where[3]}' has changed since it was listed; begin again"):
        task.image(task.train, 3)
    (tmp_path / "images" / task.train.where[5]).unlink()
    with pytest.raises(WorkError, match=rf"'{task.train.where[5]}' cannot be read any more \(No such file"):
        task.image(task.train, 5)
    assert task.image(task.train, 4).shape == (3, 40, 56)


def test_a_row_of_a_table_that_has_become_shorter_is_refused(tmp_path, store):
    rows = [{"image": png(picture(4000 + i)), "label": CLASSES[i % 2]} for i in range(24)]
    path = tmp_path / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    spec = Task(data=f"parquet:{path}", shots=2)
    listing = load_task(spec, store).listing
    pq.write_table(pa.Table.from_pylist(rows[:2]), path)
    _load_task.cache_clear()  # as in another process
    task = load_task(spec, store, listing=listing)
    last = max(range(len(task.train)), key=lambda row: int(task.train.where[row].partition(":")[2]))
    refused = (
        rf"^task\.data: '{task.train.where[last]}' cannot be read any more \('.*' has no row \d+ .*it has 2 rows\)"
    )
    with pytest.raises(WorkError, match=refused):
        task.image(task.train, last)


@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_a_trial_lists_the_images_once(colours, tmp_path, monkeypatch, scheduler):
    """A million of them take seconds each time."""
    spec = small_spec(colours, tmp_path, methods={"kd": {}}, search={"trials": 2, "scheduler": scheduler})
    context = SweepContext(spec, str(tmp_path / "small"))
    listed = []
    items = FolderSource.items
    monkeypatch.setattr(FolderSource, "items", lambda source: listed.append(0) or items(source))
    knobs = default_knobs(method_space(spec, "kd"), "kd")
    heard = []
    for number in range(2):
        listed.clear()
        config = TrialConfig(f"t{number:04}", number, Cell("kd", 0, 0), knobs, number)
        row = run_trial(context, config, progress=lambda share, value: heard.append(value))
        assert row["status"] == "complete", row["reason"]
        assert len(listed) == (2 if number == 0 else 1)  # and once where the images are looked at for the first time
    assert any(value is not None for value in heard) == (scheduler == "asha")


def test_splits_are_disjoint_by_content_and_hold_every_good_image_once(task):
    splits = [set(s.ids) for s in (task.train, task.val, task.test)]
    assert [len(s) for s in (task.train, task.val, task.test)] == [len(s) for s in splits]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 38  # 36 + 3 odd modes - 1 of two classes
    assert task.classes == CLASSES
    for split in (task.val, task.test):
        assert [split.labels.count(c) for c in range(3)] == [3, 2, 3]  # a fifth of 13, 12 and 13


def test_broken_and_doubled_images_are_counted_by_reason_and_never_fatal(task):
    assert task.skipped == SKIPPED
    assert sum(task.skipped.values()) + 38 == len(encoded())


def test_every_kept_image_decodes_to_its_catalogued_size(task):
    for split in (task.train, task.val, task.test):
        for row, size in enumerate(split.sizes):
            image = task.image(split, row)
            assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, *size))


def test_transparency_is_laid_on_white_grey_is_repeated_and_16_bit_is_scaled():
    clear = np.zeros((8, 8, 4), np.uint8)
    assert decode(png(Image.fromarray(clear))).unique().tolist() == [255]
    grey = decode(png(picture(0, (8, 9))))
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    assert np.abs(decode(png(Image.fromarray(ramp)))[0].numpy() - ramp / 257.0).max() <= 1


def decoded(values: np.ndarray) -> list[int]:
    """One channel of an 8 x 8 image in TIFF, whose values are these, again and again."""
    image = decode(png(Image.fromarray(np.resize(values, (8, 8))), "tiff"))
    assert torch.equal(image[0], image[1])
    return image[0].flatten()[: len(values)].tolist()


def test_wide_greyscale_is_scaled_from_0_or_its_least_value_below_to_its_greatest():
    hounsfield = np.array([-1000, 0, 1000, 3000], np.int32)
    assert decoded(hounsfield) == decoded(hounsfield.astype(np.float32)) == [0, 63, 127, 255]
    assert decoded(np.array([0, 0.125, 0.5], np.float32)) == [0, 63, 255]
    for whole in (np.int32, np.uint16):
        assert decoded(np.array([100, 200, 400], whole)) == [63, 127, 255]
    assert decoded(np.array([-300, -200, -100], np.float32)) == [0, 127, 255]
    for flat in (np.uint16, np.int32, np.float32):
        assert decoded(np.zeros(2, flat)) == [0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floating_point_values_that_are_not_finite_are_refused(value):
    with pytest.raises(CorruptError, match=r"^values that are not finite$"):
        decoded(np.array([0, 1, value], np.float32))


def test_a_lack_of_memory_is_no_fault_of_an_image(monkeypatch):
    def full(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImageFile, "load", full)
    with pytest.raises(MemoryError):
        decode(png(picture(0)))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "empty file"),
        (b"not an image", "cannot be decoded"),
        (encoded()["ant/corrupt.png"], "cannot be decoded"),
        (png(picture(0, (7, 40, 3))), "smaller than 8 pixels"),
    ],
)
def test_an_unusable_image_says_why(file, reason):
    with pytest.raises(CorruptError, match=reason):
        decode(file)


@pytest.mark.parametrize("shots", [1, 3, 6])
def test_shots_are_drawn_of_every_class(data, store, shots):
    task = load_task(Task(data=data, shots=shots), store)
    assert [[task.train.labels[i] for i in task.labelled].count(c) for c in range(3)] == [shots] * 3
    assert (task.info.labelled, task.info.unlabelled) == (3 * shots, len(task.train) - 3 * shots)


def test_null_shots_label_all_of_train(data, store):
    task = load_task(Task(data=data, shots=None), store)
    assert len(task.labelled) == len(task.train) == 22
    assert task.info.unlabelled == 0


def test_fewer_shots_are_a_subset_of_more(data, store):
    draws = [chosen(load_task(Task(data=data, shots=n), store)) for n in (1, 2, 4, 6)]
    assert all(few < many for few, many in itertools.pairwise(draws))


def test_another_seed_is_another_draw_and_the_same_seed_the_same(data, tmp_path):
    first, again, other = (
        load_task(Task(data=data, shots=4, seed=seed), Store(tmp_path / where))
        for seed, where in ((0, "a"), (0, "b"), (1, "a"))
    )
    assert (first.train, first.val, first.test, first.labelled) == (again.train, again.val, again.test, again.labelled)
    assert set(first.test.ids) != set(other.test.ids)
    assert chosen(first) != chosen(other)
    assert first.labels_hash == again.labels_hash != other.labels_hash


def test_without_unlabelled_images_train_holds_the_labelled_ones_alone(data, store, task):
    few = load_task(Task(data=data, shots=4, unlabelled=False), store)
    assert len(few.train) == 12
    assert chosen(few) == chosen(task)
    assert few.labels_hash == task.labels_hash
    assert (few.val, few.test) == (task.val, task.test)


def test_ready_splits_are_kept_and_lose_their_duplicates_from_train(tmp_path, store):
    counts = {"train": 8, "val": 3, "test": 4}
    files = {}
    for s, (split, count) in enumerate(counts.items()):
        for c, name in enumerate(CLASSES):
            files |= {f"{split}/{name}/{i}.png": png(picture(1000 * s + 100 * c + i)) for i in range(count)}
    for copy, of in (("train/ant/x", "test/ant/0"), ("train/bee/y", "val/bee/1"), ("val/cat/z", "test/cat/2")):
        files[f"{copy}.png"] = files[f"{of}.png"]
    task = load_task(Task(data=folder_of(tmp_path / "ready", files), shots=5), store)
    for split, count in counts.items():
        rows = task.split(split)
        assert [rows.labels.count(c) for c in range(3)] == [count] * 3
        assert {w.split("/")[0] for w in rows.where} == {split}
    assert task.skipped == {"exact duplicate": 3}
    aliased = {path.replace("val/", "validation/"): data for path, data in files.items()}
    assert load_task(Task(data=folder_of(tmp_path / "alias", aliased), shots=5), store).val.ids == task.val.ids


def test_where_only_train_and_test_are_ready_val_is_drawn_from_train(tmp_path, store):
    files = {f"train/{n}/{i}.png": png(picture(100 * c + i)) for c, n in enumerate(CLASSES) for i in range(10)}
    files |= {f"test/{n}/{i}.png": png(picture(5000 + 100 * c + i)) for c, n in enumerate(CLASSES) for i in range(4)}
    task = load_task(Task(data=folder_of(tmp_path / "ready", files), shots=5), store)
    assert (len(task.train), len(task.val), len(task.test)) == (24, 6, 12)
    assert {w.split("/")[0] for w in task.train.where + task.val.where} == {"train"}


def of_splits(root: Path, *folders: str) -> str:
    """Six images of each class in each folder, all of them different."""
    files = {
        f"{folder}/{name}/{i}.png": png(picture(1000 * f + 100 * c + i))
        for f, folder in enumerate(folders)
        for c, name in enumerate(CLASSES)
        for i in range(6)
    }
    return folder_of(root, files)


def test_folders_of_splits_may_be_written_in_capitals_and_keep_their_names(tmp_path, store):
    task = load_task(Task(data=of_splits(tmp_path, "Training", "VALID", "Test"), shots=2), store)
    assert task.classes == CLASSES
    assert [{w.split("/")[0] for w in task.split(s).where} for s in ("train", "val", "test")] == [
        {"Training"},
        {"VALID"},
        {"Test"},
    ]
    assert task.image(task.test, 0).shape == (3, 40, 56)


def test_of_two_folders_of_one_split_both_count(tmp_path, store):
    task = load_task(Task(data=of_splits(tmp_path, "train", "Training", "test"), shots=2), store)
    assert {w.split("/")[0] for w in task.train.where + task.val.where} == {"train", "Training"}
    assert {w.split("/")[0] for w in task.test.where} == {"test"}


def test_beside_train_and_test_a_folder_without_images_is_passed_over_and_one_with_images_refused(tmp_path, store):
    where = of_splits(tmp_path, "train", "Test")
    (tmp_path / "annotations" / "deep").mkdir(parents=True)
    (tmp_path / "annotations" / "deep" / "a.json").write_text("{}")
    assert load_task(Task(data=where, shots=2), store).classes == CLASSES
    (tmp_path / "annotations").rename(tmp_path / "Vall")
    (tmp_path / "Vall" / "deep" / "a.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_task(Task(data=where, shots=2), store)
    assert str(caught.value) == (
        f"task.data: the folder '{tmp_path}/Vall' holds images, beside folders of train and test; allowed there are "
        "train, val, test, valid, validation, training and testing, and folders without images. Did you mean 'val'?"
    )


@pytest.mark.parametrize("names", [("train", "plane"), ("Train", "training", "plane"), ("test", "val", "plane")])
def test_folders_named_like_splits_are_classes_unless_train_stands_beside_val_or_test(tmp_path, names):
    of_splits(tmp_path, *names)
    items = open_source(f"folder:{tmp_path}").items()
    assert {item.label for item in items} == set(names)
    assert {item.split for item in items} == {""}


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_gives_what_the_folder_gives(tmp_path, store, task, struct):
    files = encoded()
    where = parquet_of(tmp_path / "p" / "images.parquet", files)
    if struct:  # as Hugging Face writes images
        rows = {"image": [{"bytes": b, "path": p} for p, b in files.items()], "label": [p[:3] for p in files]}
        pq.write_table(pa.table(rows), tmp_path / "p" / "images.parquet", row_group_size=7)
    other = load_task(Task(data=where, shots=4), store)
    for name in ("train", "val", "test"):
        mine, theirs = task.split(name), other.split(name)
        assert (mine.ids, mine.labels, mine.sizes) == (theirs.ids, theirs.labels, theirs.sizes)
        assert all(torch.equal(task.image(mine, i), other.image(theirs, i)) for i in range(len(mine)))
    assert (other.classes, other.labelled, other.skipped) == (task.classes, task.labelled, task.skipped)
    assert other.labels_hash == task.labels_hash


def test_parquet_keeps_its_split_column_and_its_groups_together(tmp_path, store):
    files = {f"{n}/{i}.png": png(picture(100 * c + i)) for c, n in enumerate(CLASSES) for i in range(12)}
    splits = ["test" if i % 4 == 3 else "" for i in range(36)]
    stems = [f"group{i // 3}" for i in range(36)]
    ready = load_task(Task(data=parquet_of(tmp_path / "a" / "i.parquet", files, split=splits), shots=2), store)
    assert sorted(ready.test.where) == sorted(f"0:{i}" for i in range(3, 36, 4))
    grouped = load_task(Task(data=parquet_of(tmp_path / "b" / "i.parquet", files, stem=stems), shots=2), store)
    for number in range(12):
        members = {f"0:{3 * number + i}" for i in range(3)}
        assert sum(bool(members & set(grouped.split(s).where)) for s in ("train", "val", "test")) == 1


def test_nulls_in_parquet_are_no_split_no_stem_and_no_label(tmp_path, store):
    files = {f"{n}/{i}.png": png(picture(100 * c + i)) for c, n in enumerate(CLASSES) for i in range(12)}
    columns = {
        "label": [None if i % 12 == 5 else path.split("/")[0] for i, path in enumerate(files)],
        "split": ["test" if i % 4 == 3 else None for i in range(36)],
        "stem": [f"pair{i // 2}" if i < 4 else None for i in range(36)],
    }
    task = load_task(Task(data=parquet_of(tmp_path / "i.parquet", files, **columns), shots=2), store)
    assert task.classes == CLASSES
    assert task.skipped == {"no label": 3}
    assert sorted(task.test.where) == sorted(f"0:{i}" for i in range(3, 36, 4))
    assert len(task.val) > 0  # with one stem "None" they all would be of one group
    assert {item.group for item in task.source.items()} == {"pair0", "pair1", ""}


def test_a_number_that_is_none_is_no_label_either(tmp_path, store):
    files = {f"{n}/{i}.png": png(picture(100 * c + i)) for c, n in enumerate(CLASSES) for i in range(12)}
    labels = [float("nan") if i == 7 else float(i // 12) for i in range(36)]
    task = load_task(Task(data=parquet_of(tmp_path / "i.parquet", files, label=labels), shots=2), store)
    assert task.classes == ("0.0", "1.0", "2.0")
    assert task.skipped == {"no label": 1}


def test_a_table_without_nulls_has_the_address_that_it_always_had(tmp_path):
    files = {f"x/{i}.png": b"x" for i in range(3)}
    columns = {"label": [1, 0, 2], "split": ["train", "", "test"], "stem": ["a", "", "None"]}
    where = parquet_of(tmp_path / "i.parquet", files, **columns)
    stat = (tmp_path / "i.parquet").stat()
    stamp = f"{stat.st_size}.{stat.st_mtime_ns}"
    rows = [["0:0", "1", "train", "a", stamp], ["0:1", "0", "", "", stamp], ["0:2", "2", "test", "None", stamp]]
    assert listing_of(Task(data=where)) == key_of(rows)


def test_the_packaged_clip_art_has_nine_classes_that_twenty_shots_fit(store):
    task = load_task(Task(data="packaged/clipart", shots=20), store)
    assert len(task.classes) == 9
    assert task.info.labelled == 180
    assert not set(task.train.ids) & set(task.val.ids)
    assert not set(task.train.ids + task.val.ids) & set(task.test.ids)
    assert min(task.val.labels.count(c) for c in range(9)) > 0
    assert min(task.test.labels.count(c) for c in range(9)) > 0


@pytest.mark.parametrize(("size", "square"), [((40, 56), (0, 8, 40, 40)), ((57, 40), (8, 0, 40, 40))])
def test_view_0_is_the_central_square_as_it_is(size, square):
    parameters = draw(POLICY, "any", size, 0)
    assert parameters.tolist() == [*square, 0, 1, 1, 1]
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    top, left, side, _ = square
    assert torch.equal(render(image, parameters, side, "bicubic"), image[:, top : top + side, left : left + side])


def test_a_view_is_what_it_always_was():
    """Its address says nothing of the code that draws it: other numbers would mix with those that stores hold."""
    assert draw(Policy(0.35, 0.2), "id", (40, 56), 3).tolist() == pytest.approx(
        [5, 4, 26, 31, 0, 0.8797004222869873, 1.1404767036437988, 1.0283833742141724], rel=1e-7
    )
    assert draw(Policy(0.35, 0.0), "id", (40, 56), 3).tolist() == [2, 16, 37, 29, 1, 1, 1, 1]


def test_parameters_depend_on_the_image_the_view_and_the_policy_alone():
    drawn = draw(POLICY, "id", (40, 56), 3)
    assert np.array_equal(drawn, draw(POLICY, "id", (40, 56), 3))
    others = [(POLICY, "other", 3), (POLICY, "id", 4), (Policy(0.5, 0.4), "id", 3), (Policy(0.35, 0.1), "id", 3)]
    assert not any(np.array_equal(drawn, draw(policy, name, (40, 56), view)) for policy, name, view in others)


def test_many_views_drawn_at_once_are_the_single_ones_bit_for_bit():
    """Sizes that differ, that need many tries (20 x 900), and that leave a crop no place to choose (8 x 8)."""
    rng = np.random.default_rng(0)
    several = [(int(h), int(w)) for h, w in rng.integers(8, 700, (2000, 2))]
    for policy in (Policy(0.35, 0.0), Policy(0.08, 0.4), Policy(1.0, 0.2)):
        for sizes in (several, [(64, 64)] * 2000, [(20, 900)] * 500, [(8, 8)] * 500):
            ids = [f"{number:x}" for number in rng.integers(1 << 62, size=len(sizes))]
            single = np.stack([draw(policy, i, s, 7) for i, s in zip(ids, sizes, strict=True)])
            assert np.array_equal(draw_all(policy, ids, sizes, 7), single)
            assert np.array_equal(
                draw_all(policy, ids[:3], sizes[:3], 0), np.stack([draw(policy, "", s, 0) for s in sizes[:3]])
            )
    assert draw_all(POLICY, [], [], 1).shape == (0, 8)


def test_philox_is_numpys():
    keys = np.random.default_rng(1).integers(0, 1 << 64, (50, 2), dtype=np.uint64)
    theirs = [np.random.Philox(key=key).random_raw(12) for key in keys]
    assert np.array_equal(philox(keys), np.stack(theirs))


def test_drawn_views_lie_in_the_image_and_within_the_policy():
    rows = np.stack([draw(POLICY, f"image {i}", (40, 56), 1 + i % 3) for i in range(600)])
    top, left, height, width, flip, *colour = rows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 40).all()
    assert (left + width <= 56).all()
    assert (height * width).min() >= 0.33 * 40 * 56  # 0.35 and the rounding of both sides
    assert set(flip) == {0, 1}
    assert 0.42 < flip.mean() < 0.58
    assert 0.6 <= np.min(colour) < 0.63
    assert 1.37 < np.max(colour) <= 1.4


def test_stored_parameters_replay_the_same_pixels_after_the_drawing_has_changed(task, store, monkeypatch):
    before = torch.cat(
        list(rendered_view(task, task.val, view_parameters(stored_view(store, task.val, POLICY, 2)), SMALL))
    )
    monkeypatch.setattr("orchestrator.data.views.draw", lambda *a: pytest.fail("drawn again"))
    stored = view_parameters(stored_view(store, task.val, POLICY, 2))
    assert torch.equal(before, torch.cat(list(rendered_view(task, task.val, stored, SMALL))))


def test_view_0_has_one_address_under_every_policy_and_other_views_have_their_own(task, store):
    other = Policy(0.8, 0.0)
    assert stored_view(store, task.val, POLICY, 0).key == stored_view(store, task.val, other, 0).key
    assert stored_view(store, task.val, POLICY, 1).key != stored_view(store, task.val, other, 1).key


def test_stored_pixels_are_the_rendered_ones_bit_for_bit_and_more_views_keep_the_first(task, store):
    rows, views = np.arange(8).repeat(4), np.tile(np.arange(4), 8)
    live = open_pixels(store, task, task.val, POLICY, 4, SMALL, limit_gb=0)
    assert isinstance(live, RenderedPixels)
    assert not list(store.root.glob("pixels/*"))
    four = open_pixels(store, task, task.val, POLICY, 4, SMALL, limit_gb=1)
    assert len(list(store.root.glob("pixels/*"))) == 4
    two = open_pixels(store, task, task.val, POLICY, 2, SMALL, limit_gb=1)
    assert len(list(store.root.glob("pixels/*"))) == 4  # the same two entries
    pixels = four.batch(rows, views)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (32, 3, 32, 32))
    assert torch.equal(pixels, live.batch(rows, views))
    assert torch.equal(pixels[views < 2], two.batch(rows[views < 2], views[views < 2]))
    assert torch.equal(pixels[views == 3], stored_pixels(store, task, task.val, POLICY, 3, SMALL).rows(range(8)))


class Forwards:
    """What the teacher has seen: the bytes of every input image, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.teacher = load_network(TEACHER, "teacher")
        self.seen: list[bytes] = []
        whole = self.teacher.module.forward_features

        def counted(images: torch.Tensor, **kwargs: object) -> torch.Tensor:
            self.seen += [image.numpy().tobytes() for image in images]
            return whole(images, **kwargs)

        monkeypatch.setattr(self.teacher.module, "forward_features", counted)

    def take(self) -> list[bytes]:
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def forwards(monkeypatch) -> Forwards:
    return Forwards(monkeypatch)


def ask(store: Store, task: TaskData, forwards: Forwards, views: int, wanted: list[Output], **kwargs):
    return ensure_outputs(store, task, task.train, forwards.teacher, POLICY, range(views), wanted, **kwargs)


@pytest.mark.parametrize("wanted", [[POOLED], [POOLED, LOGITS, TOKENS, Output("tokens", 2)]])
def test_the_teacher_sees_each_image_and_view_once_whatever_the_number_of_outputs(task, store, forwards, wanted):
    bill = Bill()
    entries = ask(store, task, forwards, 2, wanted, bill=bill)
    seen = forwards.take()
    assert len(seen) == len(set(seen)) == bill.forwards_paid == 2 * len(task.train)
    assert {key: len(found) for key, found in entries.items()} == {o.key: 2 for o in wanted}
    again = Bill()
    assert ask(store, task, forwards, 2, wanted, bill=again).keys() == entries.keys()
    assert forwards.take() == []
    assert (again.forwards_paid, again.forwards_shared) == (0, 2 * len(task.train))
    more = Bill()
    ask(store, task, forwards, 4, wanted, bill=more)
    extended = forwards.take()
    assert len(set(extended)) == len(extended) == more.forwards_paid == 2 * len(task.train)
    assert not set(extended) & set(seen)


def test_what_other_trials_will_want_comes_from_the_same_pass(task, store, forwards):
    ask(store, task, forwards, 2, [POOLED], also=[LOGITS, TOKENS])
    assert len(forwards.take()) == 2 * len(task.train)
    entries = ask(store, task, forwards, 2, [TOKENS, LOGITS])
    assert forwards.take() == []
    assert list(entries) == [TOKENS.key, LOGITS.key]


def test_stored_outputs_are_the_live_ones_in_half_precision(task, store, forwards):
    wanted = [POOLED, LOGITS, TOKENS, Output("map", 3, grid=2)]
    entries = ask(store, task, forwards, 2, wanted)
    for view in range(2):
        parameters = view_parameters(stored_view(store, task.train, POLICY, view))
        pixels = torch.cat(list(rendered_view(task, task.train, parameters, forwards.teacher.preprocessing)))
        with torch.inference_mode():
            images = forwards.teacher.preprocessing.normalise(pixels)
            live = read_outputs(forwards.teacher.module, images, wanted)
        for output in wanted:
            stored = open_outputs(entries[output.key])[view].all()
            assert stored.dtype == torch.float16
            torch.testing.assert_close(stored.float(), live[output.key], rtol=2e-3, atol=1e-4)
    width = Records(entries[TOKENS.key][0].path / "records.arrow").shape
    assert width == (5, 64)  # four patches of 16 pixels and the class token


def test_outputs_of_another_teacher_size_or_image_set_are_others(task, store, forwards):
    here = ask(store, task, forwards, 1, [POOLED])[POOLED.key][0]
    larger = load_network(TEACHER.model_copy(update={"image_size": 48}), "teacher")
    sized = ensure_outputs(store, task, task.train, larger, POLICY, [0], [POOLED])[POOLED.key][0]
    val = ensure_outputs(store, task, task.val, forwards.teacher, POLICY, [0], [POOLED])[POOLED.key][0]
    assert len({here.key, sized.key, val.key}) == 3


def test_labels_and_shots_are_not_in_the_address_of_teacher_outputs(data, task, store, forwards):
    ask(store, task, forwards, 1, [POOLED])
    forwards.take()
    ask(store, load_task(Task(data=data, shots=2), store), forwards, 1, [POOLED])
    assert forwards.take() == []


def test_a_pass_that_died_half_way_is_done_again_even_for_fewer_outputs(task, store, forwards, monkeypatch):
    whole = forwards.teacher.module.forward_features
    with monkeypatch.context() as patch:
        patch.setattr(forwards.teacher.module, "forward_features", lambda images: pytest.fail("killed"))
        patch.setattr("shutil.rmtree", lambda *a, **k: None)  # a killed process clears nothing away
        with pytest.raises(pytest.fail.Exception):
            ask(store, task, forwards, 1, [POOLED, LOGITS])
    assert forwards.teacher.module.forward_features == whole
    (entry,) = ask(store, task, forwards, 1, [POOLED])[POOLED.key]
    assert len(forwards.take()) == len(task.train)
    assert len(open_outputs([entry])[0]) == len(task.train)
    assert not list(store.root.glob(".partial/*"))


def test_collecting_leaves_a_pass_in_flight_alone(task, store, forwards, monkeypatch):
    whole, collected = forwards.teacher.module.forward_features, []

    def collecting(images: torch.Tensor) -> torch.Tensor:
        collected.append(store.collect())
        return whole(images)

    monkeypatch.setattr(forwards.teacher.module, "forward_features", collecting)
    (entry,) = ask(store, task, forwards, 1, [POOLED])[POOLED.key]
    assert set(collected) == {(0, 0)}
    assert store.damaged(entry) == []


def test_a_view_is_the_crop_flipped_and_brightened_as_its_parameters_say():
    image = torch.randint(0, 100, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = image[:, 3:23, 7:27]
    for flip, brightness, expected in ((0, 1, crop), (1, 1, crop.flip(-1)), (0, 2, crop * 2)):
        parameters = np.array([3, 7, 20, 20, flip, brightness, 1, 1], dtype=np.float32)
        assert torch.equal(render(image, parameters, 20, "bicubic"), expected)


def test_an_image_is_decoded_once_whatever_views_and_sizes_are_made_of_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(Task(data=f"folder:{colours}", shots=4), Store(tmp_path))
    count = Counter[str]()

    def counted(data: bytes) -> Tensor:
        count[hashlib.sha256(data).hexdigest()] += 1
        return decode(data)

    monkeypatch.setattr("orchestrator.data.decoded.decode", counted)
    kept = Decoded(LIMIT)
    monkeypatch.setattr("orchestrator.data.task.DECODED", kept)
    for size in (16, 24):
        expected = Preprocessing(size, (0.5,) * 3, (0.5,) * 3, "bicubic")
        for view in range(3):
            pixels = RenderedPixels(task, task.train, Policy(0.35, 0.4), expected)
            pixels.batch(np.arange(len(task.train)), np.full(len(task.train), view))
    assert count == dict.fromkeys(task.train.ids, 1)
    assert kept.held == sum(3 * h * w for h, w in task.train.sizes)


def test_decoded_images_take_no_more_than_their_limit_and_the_first_ones_stay() -> None:
    image = io.BytesIO()
    Image.new("RGB", (10, 20), (200, 30, 40)).save(image, "png")
    kept, reads = Decoded(2 * 600 + 599), Counter[str]()

    def read(name: str) -> bytes:
        reads[name] += 1
        return image.getvalue()

    for _ in range(3):
        for name in "abc":
            assert kept.image(name, lambda name=name: read(name)).shape == (3, 20, 10)
    assert reads == {"a": 1, "b": 1, "c": 3}
    assert kept.held == 1200
