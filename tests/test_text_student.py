"""A text tower smaller than the teacher's: what it makes of padding, what trains it, where it is used and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small import small_spec
from small_clip import clip_folder, image_corpus, sentence_corpus

from methods.contract import Batch, Given
from methods.parts.text_tower import TextTower, kept, trimmed
from methods.text_student import TextLearner
from orchestrator.data.embed import class_vectors, prompts_of
from orchestrator.data.outputs import Bill
from orchestrator.data.pool import make_here
from orchestrator.data.task import load_task
from orchestrator.evaluate.suite.subject import stored_subject
from orchestrator.models.clip import text_tower
from orchestrator.models.load import load_student
from orchestrator.models.texts import StudentTexts
from orchestrator.select.export import export_student
from orchestrator.select.export.texts import ExportedTexts
from orchestrator.select.predict import ask
from orchestrator.spec import SweepSpec
from orchestrator.store import Records, RemoteStore, Store
from orchestrator.train.feed import TokenFeeder
from orchestrator.train.loop import part_of
from orchestrator.trial.context import SweepContext
from orchestrator.trial.materials import Materials
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

SHAPE = {"vocabulary": 50, "context": 12, "embedding": 8, "width": 32, "layers": 1, "heads": 1, "rank": 16}


def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(**SHAPE).eval()


@pytest.mark.parametrize("pad", [0, 1, 9])
def test_padding_changes_no_embedding_whatever_number_pads(pad: int) -> None:
    texts = [[5, 6, 7, 9], [5, 8, 9]]
    rows = torch.tensor([[*t, *[pad] * (12 - len(t))] for t in texts])
    assert kept(rows).sum(1).tolist() == [len(t) + (pad != 9) for t in texts]
    short = trimmed(rows)
    assert short.shape[1] == 4 + (pad != 9)
    network = tower()
    assert torch.allclose(network(rows), network(short), atol=1e-6)
    assert torch.allclose(network(rows)[1], network(trimmed(rows[1:]))[0], atol=1e-6)
    assert not torch.allclose(network(rows)[0], network(rows)[1], atol=1e-3)


def test_a_text_as_long_as_the_context_is_read_whole_and_in_order() -> None:
    rows = torch.tensor([[5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 9]])
    assert bool(kept(rows).all())
    swapped = rows[:, [0, 2, 1, *range(3, 12)]]
    assert not torch.allclose(tower()(rows), tower()(swapped), atol=1e-4)


def test_it_has_the_parameters_of_its_formula() -> None:
    width, rank, layers = 32, 16, 1
    block = (
        4 * width + 3 * width * width + 3 * width + width * width + width + 2 * 2 * width * width + 2 * width + width
    )
    wanted = 50 * rank + rank * width + 12 * width + layers * block + 2 * width + width * 8
    assert sum(p.numel() for p in tower().parameters()) == wanted


def test_texts_are_learned_by_heart_and_told_apart() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(10, 50, (48, 12))
    # As close together as a dual encoder's texts: a cosine alone could be near 1 with all of them confused.
    target = torch.randn(8) * 4 + torch.randn(48, 8)
    learner = TextLearner({"tower": SHAPE}, Given(values={}, num_classes=0))
    optimizer = torch.optim.AdamW(learner.parameters(), 5e-3)
    losses = []
    for step in range(300):
        parts = learner(Batch(torch.empty(0), texts=target, tokens=tokens), step / 300)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < 0.1 * losses[0]
    own = torch.nn.functional.normalize(learner.student(tokens), dim=-1)
    nearest = (own @ torch.nn.functional.normalize(target, dim=-1).T).argmax(1)
    assert (nearest == torch.arange(48)).float().mean() > 0.95
    assert learner.facts()["text_cosine"] > 0.9


class Table:
    def __init__(self, start: int, count: int, width: int) -> None:
        self.values = torch.arange(start, start + count)[:, None].expand(count, width)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def rows(self, indices: Any) -> torch.Tensor:
        return self.values[torch.as_tensor(indices)]


def test_all_ranks_together_read_every_text_once_a_pass_with_its_own_tokens() -> None:
    tables = [(Table(0, 5, 3), Table(0, 5, 4)), (Table(5, 11, 3), Table(5, 11, 4))]
    seen = []
    for step in range(2):
        for rank in range(2):
            batch = TokenFeeder(tables, batch=8, seed=1, rank=rank, world=2)(step, "cpu")
            assert batch.texts is not None
            assert batch.tokens is not None
            assert batch.texts.shape == (4, 3)
            assert batch.tokens.shape == (4, 4)
            assert torch.equal(batch.texts[:, 0].long(), batch.tokens[:, 0])
            seen += batch.tokens[:, 0].tolist()
    assert sorted(seen) == list(range(16))
    assert seen != sorted(seen)


def test_accumulated_parts_of_a_batch_keep_each_text_with_its_tokens() -> None:
    batch = TokenFeeder([(Table(0, 8, 3), Table(0, 8, 4))], batch=8, seed=1)(0, "cpu")
    parts = [part_of(batch, number, 2) for number in range(2)]
    assert all(torch.equal(p.texts[:, 0].long(), p.tokens[:, 0]) for p in parts)  # type: ignore[index]
    assert sorted(int(row) for p in parts for row in p.tokens[:, 0]) == list(range(8))  # type: ignore[index]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, colours: Path, teacher: Path) -> tuple[SweepSpec, dict[str, Any]]:
    """A trial with a text student on a streamed corpus, and its row."""
    folder = tmp_path_factory.mktemp("texts")
    corpus = {"images": str(image_corpus(folder / "i")), "sentences": str(sentence_corpus(folder / "s")), "window": 32}
    spec = small_spec(colours, folder, teachers=[f"local:{teacher}"], methods={"dime_fm": {}}, corpus=corpus)
    return spec, trial(spec, "t0000")


def trial(spec: SweepSpec, name: str, **knobs: Any) -> dict[str, Any]:
    small = {"texts": "sentences", "text_rule": "all", "text_student": "small", "text_width": 32, "text_layers": 1}
    config = TrialConfig(name, 0, Cell("dime_fm", 0, 0), {**small, **knobs}, 0)
    row = run_trial(SweepContext(spec, f"{spec.storage}/small"), config)
    assert row["status"] == "complete", row["reason"]
    return row


def test_the_row_counts_its_parameters_and_its_steps(made: tuple[SweepSpec, dict[str, Any]], teacher: Path) -> None:
    spec, row = made
    facts = json.loads(row["facts"])
    tensors = load_file(Path(spec.storage) / "small" / "students" / "t0000" / "text.safetensors")
    assert facts["text_params"] == sum(t.numel() for t in tensors.values())
    plain = trial(spec, "t0001", text_student="none")
    theirs = text_tower(spec.teachers[0], weights=True)
    assert (
        json.loads(plain["facts"])["text_params"]
        == theirs.parameters
        == sum(
            t.numel()
            for n, t in load_file(teacher / "open_clip_model.safetensors").items()
            if not n.startswith("visual")
        )
    )
    assert row["params_trained"] == plain["params_trained"] + facts["text_params"]
    assert (row["optimizer_steps"], row["images_seen"]) == (12, 72)
    assert row["params_total"] == plain["params_total"]  # of the network that is measured and exported
    assert -1 <= facts["text_cosine"] <= 1


def test_classes_are_told_by_its_own_embeddings_of_their_names(made: tuple[SweepSpec, dict[str, Any]]) -> None:
    spec, _ = made
    folder = Path(spec.storage) / "small" / "students" / "t0000"
    task = load_task(spec.task, Store(Path(spec.storage) / "store"))
    own = StudentTexts(folder, text_tower(spec.teachers[0], weights=True))
    network, _ = load_student(folder)
    expected = class_vectors(own.embed(prompts_of(task)), 3)
    assert torch.allclose(network.prototypes.vectors, expected, atol=1e-6)  # type: ignore[union-attr,arg-type]
    subject = stored_subject(folder)
    assert torch.equal(subject.embed(["a cat"], "cpu"), own.embed(["a cat"]))


def test_tokens_are_stored_beside_embeddings_and_both_are_shared(made: tuple[SweepSpec, dict[str, Any]]) -> None:
    spec, row = made
    store = Store(Path(spec.storage) / "store")
    entries = [e for e in store.entries() if e.stage == "text_tokens"]
    assert sorted(e.meta["about"]["rows"] for e in entries) == sorted(
        [10, 25, 25, len(prompts_of(load_task(spec.task, store)))]
    )
    shard = next(e for e in entries if e.meta["about"].get("shard") == "part-00000.parquet")
    texts = pq.read_table(Path(str(spec.corpus.sentences)) / "part-00000.parquet")["text"].to_pylist()
    expected = text_tower(spec.teachers[0], weights=True).tokenize(texts)
    assert np.array_equal(Records(shard.path / "records.arrow").all().numpy(), expected.numpy())
    again = trial(spec, "t0002", lr=1e-4)  # another image tower under the same text tower
    assert [e.stage for e in store.entries()].count("distil_texts") == 1
    assert again["store_hits"] > row["store_hits"]


def test_tokens_of_a_corpus_lie_on_object_storage_like_all_else(
    made: tuple[SweepSpec, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    spec, _ = made
    address = (tmp_path / "bucket").as_uri()
    spec = spec.model_copy(update={"store": spec.store.model_copy(update={"remote": address})})
    config = TrialConfig("t0000", 0, Cell("dime_fm", 0, 0), {}, 0)
    tokens = Materials(SweepContext(spec, str(tmp_path / "sweep")), config, Bill(), make_here)
    addresses = [*tokens.token_addresses("sentences"), *tokens.token_addresses("prompts")]
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another node's"))
    store = RemoteStore(address)
    assert sorted(addresses) == sorted(f"{e.stage}/{e.key}" for e in store.entries() if e.stage == "text_tokens")
    assert len(addresses) == 4


def test_an_export_embeds_texts_without_this_package_or_the_teacher(
    made: tuple[SweepSpec, dict[str, Any]], tmp_path: Path
) -> None:
    spec, _ = made
    folder = Path(spec.storage) / "small" / "students" / "t0000"
    network, meta = load_student(folder)
    own = StudentTexts(folder, text_tower(spec.teachers[0], weights=True))
    report = export_student(network, meta, tmp_path / "out", "safetensors", texts=(own, spec.teachers[0]))
    assert report["text_parameters"] == own.parameters
    assert report["text_difference"] <= 1e-5
    assert {"text/load.py", "text/model.safetensors", "text/text_tower.py"} <= set(report["files"])
    command = [sys.executable, "-I", str(tmp_path / "out" / "text" / "load.py"), "a cat", "two dogs"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    assert torch.allclose(torch.tensor([json.loads(p) for p in printed]), own.embed(["a cat", "two dogs"]), atol=1e-5)
    loaded = ExportedTexts(tmp_path / "out" / "text")
    assert torch.allclose(loaded.embed(["a cat", "two dogs"]), own.embed(["a cat", "two dogs"]), atol=1e-5)
    picture = sorted(Path(str(spec.task.data).removeprefix("folder:")).rglob("*.png"))[:1]
    asked = ask(str(tmp_path / "out"), picture, top=3)
    named = ask(str(tmp_path / "out"), picture, top=3, classes=meta["classes"], prompts=spec.task.templates)
    assert {c["label"]: pytest.approx(c["probability"], abs=1e-4) for c in asked["images"][0]["classes"]} == {
        c["label"]: c["probability"] for c in named["images"][0]["classes"]
    }
