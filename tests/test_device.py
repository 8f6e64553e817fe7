"""What training asks of a GPU, seen on a CPU: that nothing waits for it, what is sent, and what it has no room for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import small_spec
from test_resume import RECIPE, Drawn, Small
from torch import Tensor, nn

from methods import ranks
from methods.attention_transfer import attention_loss
from methods.contract import Batch, Feed, Setting, TaskInfo, supervised_loss
from methods.generators.priming import DiffusionPriming
from methods.kd import uneven_distillation_loss
from methods.ota import OTALearner
from methods.proxy import cka
from methods.ranks import gathered
from methods.rkd import RKD
from methods.tdmr import _others, feature_distance
from methods.transport import transport_cost
from orchestrator.evaluate.cost import latency
from orchestrator.models.load import Preprocessing
from orchestrator.sweep.run import SweepContext
from orchestrator.train.compiled import blocks_of, compiled
from orchestrator.train.feed import AHEAD, Feeder
from orchestrator.train.given import _thawed
from orchestrator.train.loop import CHECK_STEPS, HURRY_S, SPARSE, Checkpoint, DeviceMemoryError, DivergedError, fit
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

# A tensor on the device `meta` has no values: to ask for one, or for how many rows a mask leaves, is an error. So what
# runs there never waits for a GPU. The device `cpu:0` is a CPU, and to the feed another device.

PREPROCESSING = Preprocessing(4, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")


def test_a_networks_mean_and_deviation_are_sent_to_its_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    whole = torch.tensor
    pixels = torch.randint(0, 256, (2, 3, 6, 10), dtype=torch.uint8)
    expected = (pixels / 255 - whole(PREPROCESSING.mean).view(3, 1, 1)) / whole(PREPROCESSING.std).view(3, 1, 1)

    def tensor(*arguments: Any, **words: Any) -> Tensor:
        sent.append(arguments)
        return whole(*arguments, **words)

    monkeypatch.setattr(torch, "tensor", tensor)
    with torch.inference_mode():
        PREPROCESSING.normalise(pixels)
    first = len(sent)
    images = PREPROCESSING.normalise(pixels)
    assert len(sent) == first
    torch.testing.assert_close(images, expected)
    nn.Conv2d(3, 2, 3)(images).sum().backward()  # what inference mode has made could not be trained on


def by_rows(logits: Tensor, labels: Tensor, kind: str, smoothing: float) -> Tensor:
    """The loss of the rows with a label, picked out."""
    known = labels[:, 0] >= 0 if kind == "multilabel" else labels >= 0
    if kind == "multilabel":
        target = labels[known] * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits[known], target)
    return F.cross_entropy(logits[known], labels[known], label_smoothing=smoothing)


def labels_of(kind: str, rows: int) -> Tensor:
    if kind == "segmentation":
        return torch.randint(0, 5, (rows, 6, 6))
    return torch.randint(0, 2, (rows, 5)).float() if kind == "multilabel" else torch.randint(0, 5, (rows,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_the_loss_masks_rows_without_a_label_as_if_they_were_left_out(kind: Any, smoothing: float) -> None:
    for without in (0, 20, 63):
        torch.manual_seed(without)
        values, labels = torch.randn(64, 5), labels_of(kind, 64)
        labels[64 - without :] = -1
        found = []
        for loss_of in (supervised_loss, by_rows):
            logits = values.clone().requires_grad_()
            loss = loss_of(logits, labels, kind, smoothing)
            loss.backward()
            found.append((loss, logits.grad))
        exact = without == 0 or (kind == "classification" and smoothing == 0)
        torch.testing.assert_close(found[0], found[1], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "segmentation"])
def test_the_loss_does_not_wait_for_the_device_and_is_0_without_labels(kind: Any) -> None:
    shape = (4, 5, 3, 3) if kind == "segmentation" else (4, 5)
    supervised_loss(
        torch.randn(shape, device="meta", requires_grad=True), labels_of(kind, 4).to("meta"), kind
    ).backward()
    logits = torch.randn(shape, requires_grad=True)
    loss = supervised_loss(logits, torch.full_like(labels_of(kind, 4), 255 if kind == "segmentation" else -1), kind)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_distillation_from_sure_teachers_does_not_wait_for_the_device() -> None:
    learner: Any = OTALearner.__new__(OTALearner)
    nn.Module.__init__(learner)
    learner.kind, learner.temperature, learner.min_confidence = "classification", 2.0, 0.0
    rows = torch.randn(4, 5, device="meta")
    learner.distillation(rows, rows)
    student, teacher = torch.randn(2, 8, 5)
    assert torch.equal(
        learner.distillation(student, teacher), uneven_distillation_loss(student, teacher, 2.0, "classification")
    )
    sure = teacher.softmax(1).amax(1) >= 0.5
    learner.min_confidence = 0.5
    assert torch.equal(
        learner.distillation(student, teacher),
        uneven_distillation_loss(student[sure], teacher[sure], 2.0, "classification"),
    )


def test_the_moving_average_does_not_wait_for_the_device_and_keeps_its_bits() -> None:
    learner: Any = DiffusionPriming.__new__(DiffusionPriming)
    nn.Module.__init__(learner)
    learner.student, learner.decay = nn.Linear(40, 40), 0.9
    learner.register_buffer("averaged", torch.randn(1640))
    learner.register_buffer("updates", torch.zeros((), dtype=torch.int64))
    expected = learner.averaged.clone()
    now = nn.utils.parameters_to_vector(learner.student.parameters()).detach()
    for step in range(120):
        learner._average()
        expected.lerp_(now, 1 - min(0.9, (1 + step) / (10 + step)))
        assert torch.equal(learner.averaged, expected)
    learner.to("meta")._average()


def test_similarities_to_other_rows_do_not_wait_for_the_device() -> None:
    square = torch.randn(6, 6)
    assert torch.equal(_others(square), square[~torch.eye(6, dtype=torch.bool)].view(6, 5))
    _others(square.to("meta"))


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(*shape)
    return rows, rows + 0.3 * torch.randn(*shape)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (transport_cost, (24, 16)),
        (lambda a, b: feature_distance(a, b, "similarity"), (24, 16)),
        (lambda a, b: attention_loss(a, b, "affinity"), (4, 8, 4, 4)),
        (cka, (24, 16)),
        (cka, (12, 16)),
    ],
    ids=["transport", "similarity", "affinity", "cka", "cka of few rows"],
)
def test_losses_of_similarities_are_computed_in_float32_under_autocast(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    one, other = pair(*shape)
    with torch.autocast("cpu", torch.bfloat16):
        halved = loss(one, other)
    assert halved.dtype == torch.float32
    assert torch.equal(halved, loss(one, other))


def test_the_alignment_of_features_in_half_precision_does_not_overflow() -> None:
    one, other = (rows.half() for rows in pair(512, 64))
    torch.testing.assert_close(cka(one, other), cka(one.float(), other.float()))


def test_rows_of_other_ranks_are_gathered_in_single_precision_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks._Gathered, "apply", lambda rows: rows)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    found = [gathered(torch.ones(2, 3, dtype=kind)).dtype for kind in kinds]
    assert found == [torch.float32] * 3 + [torch.float64]


class Stored:
    """A view's outputs or pixels: what is read and pinned is noted."""

    shape, dtype = (2,), torch.float16

    def __init__(self) -> None:
        self.read: list[int] = []

    def rows(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).half()[:, None].repeat(1, 2)

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        self.read.append(len(self.read))
        return torch.from_numpy(rows).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def feeder(stored: Any) -> Feeder:
    tables: Any = {"logits": [stored, stored]}
    return Feeder(Feed("all"), 40, stored, PREPROCESSING, tables=tables, batch=4, views=2, seed=0)


def test_stored_outputs_travel_to_a_device_as_they_are_stored_and_are_pinned_by_the_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[tuple[torch.dtype, bool]] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append((tensor.dtype, threading.current_thread() is threading.main_thread()))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    batches = {}
    for device in ("cpu", "cpu:0"):
        one = feeder(Stored())
        batches[device] = [one(step, device) for step in (0, 1, 2, 7, 8, 3)]  # in order, and after a jump
        one.close()
        assert bool(pinned) == (device == "cpu:0")
    assert set(pinned) == {(torch.uint8, False), (torch.float16, False)}
    for here, there in zip(*batches.values(), strict=True):
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.outputs["logits"], there.outputs["logits"])
        assert here.outputs["logits"].dtype == there.outputs["logits"].dtype == torch.float32


@pytest.mark.parametrize(("device", "ahead"), [("cpu", 1), ("cpu:0", AHEAD)])
def test_a_device_is_read_ahead_for_by_a_few_batches_and_the_cpu_by_one(
    device: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    stored = Stored()
    one = feeder(stored)
    for step in range(5):
        one(step, device)
    assert one._ahead is not None
    one._ahead._reader.shutdown(wait=True)
    assert len(stored.read) == 5 + ahead


class Clock:
    """Seconds that pass only while a state is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, save_s: float) -> None:
        self.now = 0.0
        write = torch.save

        def save(*arguments: Any) -> None:
            self.now += save_s
            write(*arguments)

        monkeypatch.setattr(torch, "save", save)
        monkeypatch.setattr("orchestrator.train.loop.time.monotonic", lambda: self.now)

    def wait(self, checkpoint: Checkpoint) -> float:
        """Seconds until the next save is due."""
        began = self.now
        while not checkpoint.due(1):
            self.now += 0.5
        return self.now - began


@pytest.mark.parametrize(("save_s", "pause_s"), [(0.1, 30), (4, SPARSE * 4)])
def test_a_slow_save_is_not_soon_done_again(
    save_s: float, pause_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, save_s)
    kept = Checkpoint(tmp_path / "checkpoint.pt", 30)
    assert clock.wait(kept) == pytest.approx(30, abs=0.5)
    kept.save({"step": 1})
    assert clock.wait(kept) == pytest.approx(pause_s, abs=0.5)
    kept.save({"step": 2}, hurry=True)  # the process will be taken away
    assert clock.wait(kept) == pytest.approx(HURRY_S, abs=0.5)


def test_a_state_is_copied_from_its_device_once_and_hashed_and_written_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Tensor] = []
    written: list[dict[str, Any]] = []

    def cpu(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(Tensor, "cpu", cpu)

    def save(state: dict[str, Any], path: Path) -> None:
        written.append(state)
        path.touch()

    monkeypatch.setattr(torch, "save", save)
    Checkpoint(tmp_path / "checkpoint.pt", 1).save(
        {"moving": {"w": torch.ones(3)}, "optimizer": [{"m": torch.ones(2)}]}
    )
    assert len(copies) == 2
    assert written[0]["moving"]["w"] is copies[0]
    assert written[0]["optimizer"][0]["m"] is copies[1]


class Bursting(Small):
    """Its loss is not a number from the fourth step on; the weights are not after it."""

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        self.seen = getattr(self, "seen", 0) + 1
        return {"loss": super().loss(batch, 0.0)["loss"] * (math.nan if self.seen > 3 else 1.0)}


def test_a_loss_that_is_not_finite_is_noticed_before_long_and_never_saved(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "checkpoint.pt", math.inf, 1)
    with pytest.raises(DivergedError, match=f"The loss is nan at step {CHECK_STEPS} of 100000"):
        fit(Bursting(), Drawn(), RECIPE, 100_000, checkpoint=kept)  # type: ignore[arg-type]
    state = torch.load(kept.path, weights_only=True)
    assert state["step"] == 3
    assert all(tensor.isfinite().all() for tensor in state["moving"].values())


class Heavy(Small):
    """Does not fit onto the device."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def to(self, *_: Any, **__: Any) -> Any:
        raise self.error


MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]


@pytest.mark.parametrize("error", MEMORY, ids=["torch", "cuBLAS"])
def test_a_network_that_has_no_room_on_the_device_is_told_as_such(error: Exception) -> None:
    with pytest.raises(DeviceMemoryError, match=r"^out of device memory before the first step"):
        fit(Heavy(error), Drawn(), RECIPE, 2)  # type: ignore[arg-type]


def test_a_live_teacher_that_has_no_room_on_the_device_is_told_as_such(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("orchestrator.train.feed.LiveTeacher.__post_init__", full)
    spec = small_spec(colours, tmp_path, train={"steps": 2, "batch": 12, "fresh": True})
    row = run_trial(SweepContext(spec, f"{spec.storage}/s"), TrialConfig("t0", 0, Cell("kd", 0, 0), {}, 0))
    assert row["reason"].startswith("out of device memory before the first step, for the teacher that sees fresh views")


def test_a_network_that_trains_compiled_is_measured_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    fast: list[nn.Module] = []

    def compile_(self: nn.Module, **_: Any) -> None:
        def call(*arguments: Any) -> Any:
            fast.append(self)
            return self._call_impl(*arguments)

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", compile_)
    network = timm.create_model("test_vit", img_size=32)
    images = torch.randn(2, 3, 32, 32)
    with compiled(network, True):
        for training in (True, False, True):
            fast.clear()
            network.train(training)(images)
            assert fast == (blocks_of(network) if training else [])


def test_a_latency_of_the_cpu_asks_nothing_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> None:
        raise AssertionError("a context was opened on the GPU")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", opened)
    assert latency(nn.Conv2d(3, 2, 3), 8, min_run_time=0.01).device == "cpu"


def test_rkd_is_left_out_where_triples_of_a_batch_fit_into_no_memory() -> None:
    tasks = [TaskInfo("classification", 3, 30, 0, batch=batch) for batch in (1024, 2048)]
    fits, reason = (RKD.refuses(Setting(task=task, teacher=None, student=None)) for task in tasks)
    assert fits is None
    assert reason == (
        "rkd relates every three images of a micro batch, in several tables of 34 GB for "
        "train.batch / train.accumulate = 2048; allowed is 1024 at most"
    )


def test_a_fresh_copy_of_a_network_is_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def second(self: Any, memo: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    network: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    network.append(network[0])
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", second)
    copied: Any = _thawed(network)
    assert copied[2].weight is copied[0].weight
    assert copied[0].weight.data_ptr() != network[0].weight.data_ptr()
    assert all(p.requires_grad for p in copied.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(copied.state_dict().values(), network.state_dict().values(), strict=True)
    )
