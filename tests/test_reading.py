"""Reading images and running teachers over them: threads, memory of device and disk, numbers that do not fit."""

from __future__ import annotations

import io
import threading
import warnings
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small import small_spec
from torch import Tensor

from methods.outputs import Output
from orchestrator.data import images as images_module
from orchestrator.data import passes
from orchestrator.data import task as task_module
from orchestrator.data.embed import embedded_prompts
from orchestrator.data.images import decode, decode_mask, decoders, read_ahead
from orchestrator.data.labels import RenderedMasks, open_labels, stored_masks
from orchestrator.data.outputs import ensure_outputs, open_outputs
from orchestrator.data.pixels import RenderedPixels, rendered_view, stored_pixels
from orchestrator.data.sources import tables
from orchestrator.data.sources.tables import ParquetSource
from orchestrator.data.task import Split, TaskData, load_task
from orchestrator.data.views import Policy, draw_all
from orchestrator.errors import FullDiskError, UserError, WorkError, nearest
from orchestrator.models.load import Network, Preprocessing, load_network
from orchestrator.spec import Model, Task
from orchestrator.store import Store
from orchestrator.store import store as store_module
from orchestrator.sweep import costs as costs_module
from orchestrator.sweep import stock
from orchestrator.sweep.costs import OutputCosts, costs_of, sentences_of
from orchestrator.sweep.run import prepare
from orchestrator.sweep.space import wanted_outputs
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

POLICY = Policy(crop_scale=0.35, color=0.4)
SMALL = Preprocessing(16, (0.5,) * 3, (0.5,) * 3, "bicubic")
POOLED, LOGITS, TOKENS = Output("pooled"), Output("logits"), Output("tokens")
TEACHER = Model(model="timm/test_vit", image_size=32, pretrained=False)
WAIT_S = 20.0
Disk = namedtuple("Disk", "total used free")


class Meeting:
    """Images that are given only when so many are asked for at once."""

    def __init__(self, at_once: int) -> None:
        self.barrier = threading.Barrier(at_once, timeout=WAIT_S)
        self.threads: set[int] = set()
        self.torch_threads: set[int] = set()

    def image(self, split: Split, row: int) -> Tensor:
        self.barrier.wait()
        self.threads.add(threading.get_ident())
        self.torch_threads.add(torch.get_num_threads())
        return torch.full((3, 20, 24), row, dtype=torch.uint8)

    def mask(self, split: Split, row: int) -> Tensor:
        return self.image(split, row)[0]


def split_of(count: int) -> Split:
    names = tuple(f"{i:04d}" for i in range(count))
    return Split(names, names, (0,) * count, ((20, 24),) * count)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def teacher() -> Network:
    return load_network(TEACHER, "teacher")


@pytest.fixture
def task(colours: Path, store: Store) -> TaskData:
    return load_task(Task(data=f"folder:{colours}", shots=4), store)


# --- threads


def test_as_many_threads_decode_as_the_process_may_use(four_threads: None) -> None:
    assert (decoders(), decoders(1), decoders(6.5)) == (4, 2, 6)
    torch.set_num_threads(1)
    assert decoders() == 2


def test_rendered_pixels_come_from_threads_that_are_kept_each_on_one_cpu(four_threads: None) -> None:
    meeting, split = Meeting(4), split_of(8)
    pixels = RenderedPixels(meeting, split, Policy(1.0, 0.0), SMALL)  # type: ignore[arg-type]
    rows, views = np.array([5, 1, 7, 3]), np.zeros(4, dtype=np.int64)
    for _ in range(3):
        assert pixels.batch(rows, views)[:, 0, 0, 0].tolist() == rows.tolist()
    assert len(meeting.threads) == 4
    assert meeting.torch_threads == {1}
    assert torch.get_num_threads() == 4
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert other == [4]  # threads to come are none of ours


def test_views_and_masks_are_rendered_by_as_many(four_threads: None, store: Store) -> None:
    split = split_of(8)
    views = draw_all(Policy(1.0, 0.0), split.ids, split.sizes, 0)
    found = torch.cat(list(rendered_view(Meeting(4), split, views, SMALL, 4)))  # type: ignore[arg-type]
    assert found[:, 0, 0, 0].tolist() == list(range(8))
    masked: Any = Meeting(4)
    masked.spec = Task(data="folder:x", kind="segmentation")
    masks = RenderedMasks(masked, split, range(8), Policy(1.0, 0.0), 16)
    rows = np.arange(8)
    for _ in range(2):
        assert masks.batch(rows, rows * 0)[:, 0, 0].tolist() == rows.tolist()
    assert len(masked.threads) == 4
    assert stored_masks(store, masked, split, Policy(1.0, 0.0), 0, 16).all()[:, 0, 0].tolist() == rows.tolist()


def test_later_batches_are_rendered_while_one_is_used_and_not_all_of_them() -> None:
    begun: list[int] = []
    third = threading.Event()

    class Watched:
        def image(self, split: Split, row: int) -> Tensor:
            begun.append(row)
            if row == 3 * 4:
                third.set()
            return torch.zeros(3, 20, 24, dtype=torch.uint8)

    split = split_of(400)
    views = draw_all(Policy(1.0, 0.0), split.ids, split.sizes, 0)
    batches = rendered_view(Watched(), split, views, SMALL, 4)  # type: ignore[arg-type]
    next(batches)
    assert third.wait(WAIT_S)
    batches.close()  # type: ignore[attr-defined]
    assert len(begun) <= 4 * (1 + 4)


def test_what_is_read_ahead_is_bounded_and_in_order() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            asked.append(item)
            yield item

    results = read_ahead(lambda item: item * item, items(), 3, 10)
    assert next(results) == 0
    assert len(asked) == 11
    assert list(results) == [i * i for i in range(1, 100)]


def test_images_are_first_looked_at_by_all_cpus(colours: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def watched(work: Any, items: Any, threads: int, ahead: int) -> Any:
        told.append((threads, ahead))
        return map(work, items)

    monkeypatch.setattr(task_module, "read_ahead", watched)
    monkeypatch.setattr(task_module, "all_cpus", lambda: 13)
    load_task(Task(data=f"folder:{colours}", shots=4, seed=5), store)
    assert told == [(13, task_module.AHEAD)]


def test_decoding_leaves_the_warnings_of_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = warnings.filters
    seen: list[bool] = []
    whole = Image.open

    def watched(*words: Any, **options: Any) -> Any:
        seen.append(warnings.filters is before)
        return whole(*words, **options)

    monkeypatch.setattr(Image, "open", watched)
    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(file, "PNG")
    decode(file.getvalue())
    decode_mask(file.getvalue())
    assert seen == [True, True]


def test_warnings_of_pillow_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images_module.hide_warnings()
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
        warnings.warn_explicit("mine", UserWarning, "mine.py", 1, module="mine")
    assert [str(one.message) for one in told] == ["mine"]


# --- the teacher


def test_a_teacher_is_back_on_the_cpu_after_a_pass(task, store, teacher, monkeypatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr(teacher.module, "to", lambda device: moves.append(device) or teacher.module)
    monkeypatch.setattr(passes, "live_outputs", lambda *words: {"pooled": torch.zeros(len(words[2]), 4)})
    ensure_outputs(store, task, task.val, teacher, POLICY, [0], [POOLED])
    assert set(moves) == {"cpu"}
    moves.clear()
    ensure_outputs(store, task, task.train, teacher, POLICY, [0, 1], [POOLED], device="meta")
    assert moves[0] == "meta"
    assert moves[-1] == "cpu"
    moves.clear()
    monkeypatch.setattr(passes, "live_outputs", lambda *words: {"pooled": torch.full((len(words[2]), 4), torch.inf)})
    with pytest.raises(UserError):
        ensure_outputs(store, task, task.train, teacher, POLICY, [2], [POOLED], device="meta")
    assert moves == ["meta", "cpu"]


def test_a_text_tower_is_back_on_the_cpu_when_it_has_embedded_the_prompts(task, store, monkeypatch) -> None:
    class Tower:
        identity = "tower"

        def __init__(self) -> None:
            self.moves: list[str] = []

        def to(self, device: str) -> Tower:
            self.moves.append(device)
            return self

        def embed(self, texts: list[str]) -> Tensor:
            return torch.zeros(len(texts), 3)

    tower = Tower()
    monkeypatch.setattr("orchestrator.data.embed.text_tower_of", lambda entry: tower)
    embedded_prompts(store, task, TEACHER, "meta")
    assert tower.moves == ["meta", "cpu"]


def test_a_pass_goes_on_with_fewer_images_at_a_time_where_memory_lacks(task, store, teacher, monkeypatch) -> None:
    live, sizes = passes.live_outputs, []

    def short(*words: Any) -> Any:
        sizes.append(len(words[2]))
        if len(words[2]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return live(*words)

    whole = ensure_outputs(Store(store.root.parent / "whole"), task, task.train, teacher, POLICY, [1], [POOLED, TOKENS])
    monkeypatch.setattr(passes, "live_outputs", short)
    found = ensure_outputs(store, task, task.train, teacher, POLICY, [1], [POOLED, TOKENS])
    for key, (entry,) in found.items():
        expected = open_outputs(whole[key])[0].all()
        torch.testing.assert_close(open_outputs([entry])[0].all(), expected, rtol=2e-3, atol=1e-3)
    assert sum(size > 5 for size in sizes) <= 4  # it does not try again what did not go


def test_one_image_that_is_too_much_for_the_device_is_told(task, store, teacher, monkeypatch) -> None:
    def none(*words: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(passes, "live_outputs", none)
    with pytest.raises(WorkError, match=r"in a pass of the teacher 'timm/test_vit', even for one image at a time"):
        ensure_outputs(store, task, task.train, teacher, POLICY, [1], [POOLED], also=[LOGITS])


def test_what_fits_is_computed_in_whole_batches_where_more_did_not(task, store, teacher, monkeypatch) -> None:
    live, sizes = passes.live_outputs, []

    def short(*words: Any) -> Any:
        sizes.append(len(words[2]))
        if LOGITS in words[3]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return live(*words)

    monkeypatch.setattr(passes, "live_outputs", short)
    ensure_outputs(store, task, task.train, teacher, POLICY, [1], [POOLED], also=[LOGITS])
    assert sizes[sizes.index(1) + 1 :] == [len(task.train)]


def test_fresh_views_are_no_remedy_for_what_the_head_is_fitted_on() -> None:
    assert "train.fresh" not in passes.remedy(POOLED)
    assert "train.fresh" in passes.remedy(TOKENS)


@pytest.mark.parametrize(
    ("factor", "precision", "said"),
    [
        (
            1e6,
            "fp32",
            r"'pooled' of the teacher .* reaches .*float16 holds 6.55e\+04.*leave out the methods that read it",
        ),
        (torch.nan, "fp32", r"has values that are not finite; its weights are damaged"),
        (torch.inf, "fp16", r"has values that are not finite; its precision is fp16: use bf16 or fp32"),
        (torch.nan, "bf16", r"its precision is bf16: use fp32"),
    ],
)
def test_outputs_that_do_not_fit_are_never_stored(task, store, monkeypatch, factor, precision, said) -> None:
    live = passes.live_outputs

    def scaled(*words: Any) -> Any:
        return {key: value * (factor if key == "pooled" else 1) for key, value in live(*words).items()}

    monkeypatch.setattr(passes, "live_outputs", scaled)
    teacher = load_network(TEACHER.model_copy(update={"precision": precision}), "teacher")
    with pytest.raises(UserError, match=said):
        ensure_outputs(store, task, task.train, teacher, POLICY, [1], [POOLED, LOGITS])
    assert not [entry for entry in store.entries() if entry.stage == "outputs"]
    # That another trial wants what cannot be stored is that one's misfortune.
    found = ensure_outputs(store, task, task.train, teacher, POLICY, [1], [LOGITS], also=[POOLED])
    assert open_outputs(found["logits"])[0].all().isfinite().all()


def test_an_output_that_is_not_a_number_is_not_near_the_live_one(task, store, teacher, monkeypatch) -> None:
    ensure_outputs(store, task, task.val, teacher, POLICY, [0], [POOLED])
    monkeypatch.setattr(stock, "_against_live", lambda *words: torch.nan)
    assert any("differs from the live teacher" in one for one in stock.verify(str(store.root))["sentences"])


def test_verify_finds_the_one_number_of_a_table_that_is_not_finite(task, store, teacher, monkeypatch) -> None:
    fitting = passes.fitting

    def one_wrong(*words: Any) -> Tensor:
        stored = fitting(*words)
        stored[-1, -1] = torch.inf
        return stored

    ensure_outputs(store, task, task.val, teacher, POLICY, [0], [LOGITS])
    monkeypatch.setattr(passes, "fitting", one_wrong)
    (entry,) = ensure_outputs(store, task, task.val, teacher, POLICY, [0], [POOLED])[POOLED.key]
    monkeypatch.setattr(stock, "_against_live", lambda *words: 0.0)  # as if none of its sample were wrong
    monkeypatch.setattr(stock, "CHUNK", 1)
    assert stock.verify(str(store.root))["damaged"] == [f"outputs/{entry.key}: has values that are not finite"]


# --- the disk


def test_a_pass_ends_before_it_eats_what_is_to_stay_free(task, store, teacher, monkeypatch) -> None:
    store.min_free_gb = 1.0
    free = [10**9 + 6000]
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: Disk(10**10, 0, free[0]))
    with pytest.raises(
        FullDiskError, match=r"has 1\.00 GB of free disk, and 0\.00 GB that are .*store\.min_free_gb = 1:"
    ):
        ensure_outputs(store, task, task.train, teacher, POLICY, [1], [TOKENS])
    assert not list(store.root.glob(".partial/*/*.tmp"))
    with pytest.raises(FullDiskError, match="that are to be written would leave less than"):
        stored_pixels(store, task, task.train, POLICY, 0, SMALL)
    free[0] += 10**8
    assert ensure_outputs(store, task, task.train, teacher, POLICY, [1], [TOKENS])


def test_stored_outputs_are_reckoned_to_the_byte(colours: Path, tmp_path: Path, monkeypatch) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        methods={"kd": {}, "fitnet": {"hint_layer": 0.5, "grid": 1}, "wecolora": {"rank": [4, 8], "factor": 2}},
    )
    prepared = prepare(spec)
    reckoned = costs_of(spec, prepared.task, prepared.cells, prepared.spaces)
    assert reckoned is not None
    holdings, _, found = reckoned
    assert isinstance(found, OutputCosts)
    wanted = wanted_outputs(spec, prepared.spaces, prepared.cells, prepared.task.info)
    row = run_trial(
        SweepContext(spec, f"{tmp_path}/small", prefetch=wanted), TrialConfig("t0", 0, Cell("kd", 0, 0), {}, 0)
    )
    assert row["status"] == "complete", row["reason"]
    entries = [e for e in Store(spec.store_address).entries() if e.stage == "outputs"]
    assert sum(entry.bytes for entry in entries) == found.bytes
    assert (found.images, found.views) == (len(prepared.task.train), 2)
    assert found.output.startswith("tokens")
    (told,) = sentences_of(spec, holdings, found)
    assert told.startswith(f"Stored: outputs of teachers on {found.images} images, views of each up to 2: about ")
    monkeypatch.setattr(costs_module.shutil, "disk_usage", lambda _: Disk(1, 1, 10**9 // 2 + 10))
    reckoned = costs_of(spec, prepared.task, prepared.cells, prepared.spaces)
    assert reckoned is not None
    assert "has room for 0.0 kB of that: use fewer train.views" in sentences_of(spec, holdings, reckoned[2])[1]
    fresh = small_spec(colours, tmp_path, methods={"rkd": {}}, train={"steps": 6, "batch": 12, "fresh": True})
    reckoned = costs_of(fresh, prepared.task, [Cell("rkd", 0, 0)], {"rkd": {}})
    assert reckoned is not None
    assert isinstance(reckoned[2], OutputCosts)
    assert (reckoned[2].views, reckoned[2].output) == (1, "pooled")  # the teacher's head is fitted on view 0


# --- many images


def test_several_labels_take_a_byte_a_class_until_they_are_read(store: Store) -> None:
    names = tuple(f"{i:04d}" for i in range(5))
    labels = ((0, 2), (), (1,), (0,), (2,))
    split = Split(names, names, labels, ((20, 24),) * 5)
    task = TaskData(
        Task(data="folder:x", kind="multilabel"),
        ("a", "b", "c"),
        split,
        split,
        split,
        (0, 1, 4),
        {},
        None,  # type: ignore[arg-type]
    )
    found: Any = open_labels(store, task, split, (0, 1, 4), POLICY, 1, 16, 1)
    assert found.values.dtype == torch.int8
    batch = found.batch(np.array([4, 2, 1, 0]), np.zeros(4))
    assert batch.dtype == torch.float32
    assert batch.tolist() == [[0, 0, 1], [-1, -1, -1], [0, 0, 0], [1, 0, 1]]


def test_nobody_looks_for_the_nearest_of_very_many_names() -> None:
    asked = 0

    def names() -> Iterator[str]:
        nonlocal asked
        for number in range(10**6):
            asked += 1
            yield f"image{number}"

    assert nearest("image0", names()) == ""
    assert asked < 20_000
    assert nearest("imag", ["image"]) == " Did you mean 'image'?"


def test_row_groups_that_are_read_whole_for_each_image_are_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tables, "LARGE", 5000)
    rows = pa.table({"image": [bytes(3000)] * 20, "label": ["a", "b"] * 10})
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
    pq.write_table(rows, tmp_path / "large.parquet", row_group_size=2, **options)
    pq.write_table(rows, tmp_path / "small.parquet", row_group_size=1, **options)
    pq.write_table(rows, tmp_path / "few.parquet", row_group_size=4, **options)
    with pytest.warns(UserWarning, match=r"a row group of '.*large.parquet' holds 0 MB of images.*row_group_size"):
        assert len(ParquetSource(tmp_path / "large.parquet").items()) == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ParquetSource(tmp_path / "small.parquet").items()
        ParquetSource(tmp_path / "few.parquet").items()  # all of it stays in memory
