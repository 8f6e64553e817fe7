"""Scoring: on which device, in how much memory, and that what was made faster gives what it gave before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from small import small_spec
from small_clip import clip_folder
from test_export import CNN, picture, student
from torch import Tensor, nn

import orchestrator.select.deployed
import orchestrator.trial.run
from methods import heads
from orchestrator.evaluate import forward, metrics
from orchestrator.evaluate.details import Details
from orchestrator.evaluate.forward import device_here
from orchestrator.evaluate.outcomes import write_outcomes
from orchestrator.evaluate.suite import retrieval
from orchestrator.models.load import Preprocessing
from orchestrator.select.deployed import deployed
from orchestrator.select.export import export_student
from orchestrator.select.predict import ask
from orchestrator.store import store_at
from orchestrator.sweep import final_score
from orchestrator.sweep.begun import begun_task
from orchestrator.sweep.folder import create
from orchestrator.trial import score
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in name: every module remembers where it was sent, and stays on the CPU."""
    whole, back = nn.Module.to, nn.Module.cpu

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not args or not isinstance(args[0], str | torch.device):
            return whole(self, *args, **kwargs)
        for module in self.modules():
            object.__setattr__(module, "where", str(args[0]))
        return self

    def cpu(self: nn.Module) -> nn.Module:
        to(self, "cpu")
        return back(self)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.Module, "cpu", cpu)
    for module in (score, final_score, orchestrator.select.deployed):
        monkeypatch.setattr(module, "device_here", lambda wanted="cuda": wanted)


def noting(function: Callable[..., Any], notes: list[Any], what: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which also notes `what` of its arguments."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        notes.append(what(*args, **kwargs))
        return function(*args, **kwargs)

    return noted


def places(network: nn.Module) -> set[str]:
    return {getattr(module, "where", "cpu") for module in network.modules()}


CELLS = {
    "kd": Cell("kd", 0, 0),
    "linear_probe": Cell("linear_probe", None, 0),
    "embedding_regression": Cell("embedding_regression", 0, 0),
}


@pytest.mark.parametrize("method", CELLS)
def test_a_network_is_scored_where_trials_train_and_stored_from_the_cpu(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: None, method: str
) -> None:
    changes: dict[str, Any] = {"methods": {method: {}}, "latency": {"device": "cpu"}}
    if method == "embedding_regression":
        changes["teachers"] = [{"model": f"local:{clip_folder(tmp_path / 'clip')}"}]
    spec = small_spec(colours, tmp_path / "runs", **changes)
    seen: dict[str, set[str]] = {}

    def spy(name: str, at: int) -> None:
        real = getattr(score, name)

        def heard(*args: Any, **kwargs: Any) -> Any:
            network = args[at].network if name == "save_student" else args[at]
            seen[name] = places(getattr(network, "backbone", network))  # prototypes follow the tensors of theirs
            return real(*args, **kwargs)

        monkeypatch.setattr(score, name, heard)

    for name, at in (("fit_probe", 0), ("score", 0), ("save_student", 1), ("costs", 0)):
        spy(name, at)
    embed = score.embedded_prompts

    def embedded(store: Any, task: Any, entry: Any, device: str) -> Any:
        seen["texts"] = {device}
        return embed(store, task, entry, "cpu")

    monkeypatch.setattr(score, "embedded_prompts", embedded)
    real = orchestrator.trial.run.evaluate
    monkeypatch.setattr(
        orchestrator.trial.run,
        "evaluate",
        lambda context, *rest: real(dataclasses.replace(context, device="cuda"), *rest),
    )
    row = run_trial(SweepContext(spec, str(tmp_path / "runs" / "small")), TrialConfig("t0", 0, CELLS[method], {}, 0))
    assert row["status"] == "complete", row["reason"]
    expected = {"score": {"cuda"}, "save_student": {"cpu"}, "costs": {"cpu"}}
    further = {"linear_probe": {"fit_probe": {"cuda"}}, "embedding_regression": {"texts": {"cuda"}}}
    assert seen == expected | further.get(method, {})


def test_a_process_without_a_gpu_scores_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device_here(wanted) for wanted in ("cuda", "cuda:1", "cpu", "meta")] == ["cpu", "cpu", "cpu", "meta"]


def test_test_is_read_on_a_gpu_if_trials_may_have_one_and_by_all_cpus(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: None
) -> None:
    spec = small_spec(colours, tmp_path / "runs", methods={"linear_probe": {}})
    folder = create(spec)
    listing = begun_task(spec.task, folder, store_at(spec.store_address)).listing
    context = SweepContext(spec, str(folder), listing=listing)
    row = run_trial(context, TrialConfig("t0000", 0, CELLS["linear_probe"], {}, 0))
    assert row["status"] == "complete", row["reason"]
    seen: list[tuple[set[str], int]] = []
    real = final_score.score

    def heard(network: nn.Module, *rest: Any, **kwargs: Any) -> Any:
        seen.append((places(network), torch.get_num_threads()))
        return real(network, *rest, **kwargs)

    monkeypatch.setattr(final_score, "score", heard)
    monkeypatch.setattr(final_score, "all_cpus", lambda: 2)
    final_score.read_test(folder, row["student_path"])
    kept_off = spec.model_copy(update={"train": spec.train.model_copy(update={"device": "cpu"})})
    monkeypatch.setattr(final_score, "open_sweep", lambda folder: kept_off)
    final_score.read_test(folder, row["student_path"])
    assert seen == [({"cuda"}, 2), ({"cpu"}, 2)]
    assert torch.get_num_threads() == 1


def test_a_student_is_asked_on_a_gpu(tmp_path: Path, gpu: None) -> None:
    network, meta = student(CNN)
    export_student(network, meta, tmp_path / "out", "safetensors")
    model = deployed(str(tmp_path / "out"))
    assert model.network is not None
    assert places(model.network) == {"cuda"}
    assert ask(str(tmp_path / "out"), [picture(tmp_path / "image.png")])["images"]


def test_convolutions_of_scores_are_not_rounded_and_the_setting_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []

    class Network(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(images.flatten(1))

    class Given:
        def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
            return torch.zeros(len(rows), 3, 2, 2, dtype=torch.uint8)

    class Truth:
        def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
            return torch.zeros(len(rows), dtype=torch.int64)

    preprocessing = Preprocessing(2, (0.5,) * 3, (0.5,) * 3, "bilinear")
    score.score(Network(12, 3), preprocessing, Given(), Truth(), 40, "classification", 3)
    assert set(seen) == {False}
    assert len(seen) == 3  # 40 images, 16 at a time
    assert torch.backends.cudnn.allow_tf32


def test_images_in_parts_give_what_all_at_once_give() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    pixels = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8)
    preprocessing = Preprocessing(8, (0.5,) * 3, (0.5,) * 3, "bilinear")
    whole = network(preprocessing.normalise(pixels))
    torch.testing.assert_close(forward.forward(network, preprocessing, pixels, "cpu"), whole, rtol=1e-6, atol=1e-6)


def test_kept_weights_are_the_stores_own_and_copied_where_they_cannot_be_linked(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in ("linked", "copied"):
        spec = small_spec(colours, tmp_path / way, methods={"linear_probe": {}})
        context = SweepContext(spec, str(tmp_path / way / "small"))
        if way == "copied":

            def refused(*_: Any) -> None:
                raise OSError("no links here")

            monkeypatch.setattr(score.os, "link", refused)
        row = run_trial(context, TrialConfig("t0", 0, CELLS["linear_probe"], {}, 0))
        assert row["status"] == "complete", row["reason"]
        (entry,) = [e for e in context.store.entries() if e.stage == "evaluate"]
        kept = Path(context.folder) / row["student_path"]
        assert (kept / "model.safetensors").samefile(entry.path / "model.safetensors") == (way == "linked")
        assert (kept / "model.safetensors").read_bytes() == (entry.path / "model.safetensors").read_bytes()
        assert not (kept / "student.json").samefile(entry.path / "student.json")  # it tells of the trial
        assert "trial_id" not in json.loads((entry.path / "student.json").read_text())


@pytest.mark.parametrize("several", [False, True])
def test_a_head_fitted_on_some_rows_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 8, generator=generator), torch.arange(90) % 5
    given = F.one_hot(labels, 5).float() if several else labels
    rows, start = features.double(), (torch.randn(5, 8).double(), torch.randn(5).double())
    weight, bias = (t.clone().requires_grad_() for t in start)
    logits = rows @ weight.T + bias
    wrong = F.binary_cross_entropy_with_logits(logits, given.double(), reduction="sum") if several else None
    loss = (F.cross_entropy(logits, labels) if wrong is None else wrong / 90) + 0.05 * weight.square().sum()
    loss.backward()
    asked: list[tuple[float, Tensor]] = []

    def step(self: Any, objective: Any) -> None:
        asked.append((float(objective()), self.param_groups[0]["params"][0].grad))

    sizes: list[int] = []
    rowwise = heads._rowwise
    monkeypatch.setattr(heads, "_rowwise", noting(rowwise, sizes, lambda some, known: len(some)))
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.LBFGS, "step", step)
        for room in (heads.CHUNK_BYTES, 4 * 5 * 8 * 40):
            patched.setattr(heads, "CHUNK_BYTES", room)
            heads._solve(rows, given, 5, 0.1, start)
    assert sizes == [90, 40, 40, 10]
    for value, slope in asked:
        assert value / 1e6 == pytest.approx(loss.item(), rel=1e-10)
        torch.testing.assert_close(slope[:, :-1] / 1e6, weight.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slope[:, -1] / 1e6, bias.grad, rtol=1e-9, atol=1e-12)
    whole = heads.fit_linear_head_cv(features, given, 5)
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * 5 * 4 * 7)
    torch.testing.assert_close(heads.fit_linear_head_cv(features, given, 5), whole, rtol=1e-5, atol=1e-6)


def test_details_of_thousands_of_classes_keep_no_logits_and_count_no_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = 20_000
    lengths: list[int] = []
    count = torch.bincount
    monkeypatch.setattr(torch, "bincount", noting(count, lengths, lambda values, minlength: minlength))
    details = Details("classification", classes)
    for start in (0, 4):
        logits = torch.zeros(4, classes)
        logits[torch.arange(4), torch.tensor([0, 1, 2, 7])] = 3.0
        truth = torch.tensor([0, 1, 2, 3])
        details.hear(np.arange(start, start + 4), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), logits, truth)
    assert sum(t.numel() for t in details.one) == 8
    details.write(tmp_path, tuple(map(str, range(classes))))
    found = json.loads((tmp_path / "details.json").read_text())
    assert max(lengths) == classes
    assert found["confusion"] is None
    assert [c["value"] for c in found["classes"][:5]] == [1.0, 1.0, 1.0, 0.0, None]
    share = float(torch.tensor([3.0, *[0.0] * (classes - 1)]).softmax(0)[0])
    assert found["worst"][0] == {"row": 3, "truth": [3], "said": [7], "value": pytest.approx(share)}
    write_outcomes(tmp_path, "classification", *details.joined())
    assert load_file(tmp_path / "outcomes.safetensors")["right"].tolist() == [1, 1, 1, 0] * 2


def pairs_ordered(scores: np.ndarray, positive: np.ndarray) -> float:
    """The definition: of a positive and a negative row, the positive one is higher; a tie counts half."""
    above = scores[positive][:, None], scores[~positive][None]
    return float(((above[0] > above[1]) + 0.5 * (above[0] == above[1])).mean()) if positive.any() else np.nan


@pytest.mark.parametrize("cells", [10**6, 50])
def test_classes_ranked_together_have_the_areas_of_each_alone(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(metrics, "CELLS", cells)
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(40, 4)).round(1).astype(np.float16), rng.integers(0, 2, (40, 4))
    labels[:, 2] = 0
    values = metrics.aurocs(scores, labels > 0.5)[0]
    expected = [pairs_ordered(scores[:, c], labels[:, c] > 0.5) for c in range(4)]
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    draws = [rng.integers(0, 40, 40) for _ in range(5)]
    one_by_one = [metrics.mean_auroc(scores[rows], labels[rows]) for rows in draws]
    sorts: list[int] = []
    sort = np.argsort
    monkeypatch.setattr(np, "argsort", noting(sort, sorts, lambda *a, **k: 1))
    np.testing.assert_allclose(metrics.resampled(metrics.mean_auroc, scores, labels, draws), one_by_one, rtol=1e-9)
    assert len(sorts) == (1 if cells > 1000 else 4)  # once for each block of classes, whatever the number of draws


def test_images_with_captions_are_numbered_by_a_counter_and_read_by_all_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "all_cpus", lambda: 5)
    asked: list[int] = []
    pool = retrieval.decoding_pool
    monkeypatch.setattr(retrieval, "decoding_pool", noting(pool, asked, lambda threads: threads))
    pictures = [picture(tmp_path / f"{i}.png").read_bytes() + bytes(i) for i in range(3)]
    data = [pictures[0], b"none", pictures[1], pictures[0], pictures[2]]
    table = pa.table({"image": data, "caption": [f"text {i}" for i in range(5)]})
    pq.write_table(table, tmp_path / "x.parquet")
    known = retrieval.Captioned()
    found = [name for batch in retrieval.read_captioned([tmp_path / "x.parquet"], known) for name, _ in batch]
    assert len(found) == 3
    assert known.pairs == [(0, 0), (1, 1), (0, 2), (2, 3)]
    assert asked == [5]
