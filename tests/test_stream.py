"""A corpus streamed into training: an order that numbers alone decide, and a run of DIME-FM on it."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small import small_spec
from small_clip import clip_folder, image_corpus, sentence_corpus

import orchestrator
from methods.outputs import Output
from methods.parts.zero_shot import Prototypes, ZeroShot
from methods.vision_language import EMBEDDING
from orchestrator.data import actors
from orchestrator.data.corpus import CorpusShard, build_corpus, open_corpus
from orchestrator.data.embed import EmbedJob, class_vectors, embedded_prompts
from orchestrator.data.outputs import open_outputs
from orchestrator.data.pool import make_here
from orchestrator.data.stream import Block, Plan, Stream, blocks_of, read_on_ray, read_on_threads
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy, draw, draw_all, render
from orchestrator.errors import UserError
from orchestrator.models.clip import text_tower
from orchestrator.models.load import Preprocessing, load_network, load_student
from orchestrator.models.weights import hash_weights
from orchestrator.process import SELDOM
from orchestrator.select.export import export_student
from orchestrator.spec import Model, SweepSpec
from orchestrator.store import Records, Store
from orchestrator.sweep.run import prepare
from orchestrator.sweep.stock import verify
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

BLOCKS = [
    Block(s, g, g * 16, rows) for s, groups in enumerate([[16, 16, 8], [16, 3], [16]]) for g, rows in enumerate(groups)
]
ROWS = sum(b.rows for b in BLOCKS)
SMALL = Preprocessing(16, (0.5,) * 3, (0.5,) * 3, "bilinear")


def order(plan: Plan, count: int, position: int = 0) -> list[tuple[int, int, int]]:
    """The next images of a worker: (shard, row of the shard, epoch)."""
    found: list[tuple[int, int, int]] = []
    for window, done in plan.windows(position):
        rows = [(p.block.shard, p.block.start + int(r)) for p in window.pieces for r in p.rows]
        found += [(*rows[i], window.epoch) for i in window.order[done:]]
        if len(found) >= count:
            return found[:count]
    raise AssertionError


@pytest.mark.parametrize("world", [1, 2, 3, 5, 11])
def test_every_image_is_read_once_an_epoch_by_one_worker(world: int) -> None:
    seen = []
    for rank in range(world):
        plan = Plan(BLOCKS, 0, rank, world, window=20)
        own = sum(len(p.rows) for p in plan.pieces(0))
        seen += order(plan, own)
        assert all(epoch == 0 for _, _, epoch in order(plan, own)) or own == 0
    assert len(seen) == ROWS
    assert len(set(seen)) == ROWS


def test_an_epoch_has_another_order_and_a_seed_its_own() -> None:
    plan = Plan(BLOCKS, 0, 0, 1, window=30)
    both = order(plan, 2 * ROWS)
    first, second = ([row[:2] for row in part] for part in (both[:ROWS], both[ROWS:]))
    assert sorted(first) == sorted(second)
    assert first != second
    assert order(Plan(BLOCKS, 0, 0, 1, window=30), ROWS) == both[:ROWS]
    assert order(Plan(BLOCKS, 1, 0, 1, window=30), ROWS) != both[:ROWS]


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1), (7, 6)])
def test_a_resumed_stream_goes_on_with_the_very_next_image(world: int, rank: int) -> None:
    plan = Plan(BLOCKS, 3, rank, world, window=20)
    whole = order(plan, 150)
    for position in (0, 1, 19, 20, 33, 74, 75, 149):
        assert order(plan, 150 - position, position) == whole[position:]


def test_rows_of_neighbouring_blocks_are_shuffled_together() -> None:
    blocks = [Block(0, g, g * 16, 16) for g in range(20)]
    groups = [row // 16 for _, row, _ in order(Plan(blocks, 0, 0, 1, window=160), 160)]
    assert len(set(groups[:16])) >= 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_corpus(tmp_path_factory.mktemp("corpus"))


def stream(corpus: Path, threads: int = 2, **plan: Any) -> Stream:
    shards = open_corpus(str(corpus)).shards
    made = Plan(blocks_of(shards), **{"seed": 0, "rank": 0, "world": 1, "window": 32, **plan})
    return Stream(made, shards, Policy(0.5, 0.0), SMALL, read_on_threads(threads))


def taken(stream: Stream, position: int, batches: int, size: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(itertools.islice(stream.batches(position, size), batches))


def test_what_is_decoded_where_changes_no_pixel(corpus: Path) -> None:
    expected = taken(stream(corpus), 0, 30)
    for other in (
        taken(stream(corpus, threads=1), 0, 30),
        [*taken(stream(corpus), 0, 11), *taken(stream(corpus), 88, 19)],
    ):
        for (pixels, rows), (mine, theirs) in zip(expected, other, strict=True):
            assert np.array_equal(rows, theirs)
            assert np.array_equal(pixels, mine)


def test_workers_that_share_blocks_read_what_one_alone_would(corpus: Path) -> None:
    def epoch(**plan: Any) -> dict[int, bytes]:
        own = stream(corpus, **plan)
        count = sum(len(piece.rows) for piece in own.plan.pieces(0))
        return {
            int(n): p.tobytes() for pixels, rows in taken(own, 0, count, 1) for p, n in zip(pixels, rows, strict=True)
        }

    parts = [epoch(rank=rank, world=3) for rank in range(3)]
    assert Plan(blocks_of(open_corpus(str(corpus)).shards), 0, 0, 3, 32).divided
    assert sum(map(len, parts)) == len(epoch())
    assert parts[0] | parts[1] | parts[2] == epoch()


def test_small_images_are_decoded_by_one_thread_at_a_time_and_large_ones_are_not(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[int] = []
    busy = set[int]()
    meet = threading.Event()

    def draw_slowly(*given: Any) -> np.ndarray:
        busy.add(threading.get_ident())
        meet.wait(0.05)
        at_once.append(len(busy))
        busy.discard(threading.get_ident())
        return draw_all(*given)

    monkeypatch.setattr("orchestrator.data.stream.draw_all", draw_slowly)
    alone = taken(stream(corpus), 0, 10)
    assert max(at_once) == 1
    monkeypatch.setattr("orchestrator.data.stream.SMALL", 0)
    for (pixels, _), (theirs, _) in zip(alone, taken(stream(corpus), 0, 10), strict=True):
        assert np.array_equal(pixels, theirs)
    assert max(at_once) == 2


def test_an_image_of_the_stream_is_its_row_under_the_view_of_its_epoch(corpus: Path) -> None:
    shards = [CorpusShard(shard) for shard in open_corpus(str(corpus)).shards]
    flat = [(shard, row) for shard in shards for row in range(shard.shard.rows)]
    policy, checked = Policy(0.5, 0.0), 0
    for pixels, rows in taken(stream(corpus), 0, 25):
        for one, number in zip(pixels, rows, strict=True):
            shard, row = flat[number]
            view = draw(policy, shard.split.ids[row], shard.split.sizes[row], 1 if checked < len(flat) else 2)
            assert np.array_equal(one, render(shard.image(shard.split, row), view, 16, "bilinear").numpy())
            checked += 1
    assert checked == 200


CELL = Cell("dime_fm", 0, 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def spec(colours: Path, tmp_path: Path, teacher: Path, corpus: Path, sentences: Path) -> SweepSpec:
    return small_spec(
        colours,
        tmp_path,
        teachers=[f"local:{teacher}"],
        methods={"dime_fm": {"texts": "sentences"}, "embedding_regression": {}},
        corpus={"images": str(corpus), "sentences": str(sentences), "window": 32},
    )


def trial(**knobs: Any) -> TrialConfig:
    return TrialConfig("t0000", 0, CELL, {"texts": "sentences", "text_budget": 20, **knobs}, 0)


def run(spec: SweepSpec, config: TrialConfig) -> dict[str, Any]:
    row = run_trial(SweepContext(spec, str(Path(spec.storage) / "small")), config)
    assert row["status"] == "complete", row["reason"]
    return row


def test_the_teachers_embeddings_of_a_corpus_are_computed_once_and_by_shard(spec: SweepSpec) -> None:
    first = run(spec, trial())
    assert first["teacher_forwards"] == 100
    again = run(spec, trial(lr=1e-3))
    assert (again["teacher_forwards"], again["teacher_forwards_shared"]) == (0, 100)
    store = Store(Path(spec.storage) / "store")
    entries = [e for e in store.entries() if e.stage == "corpus_outputs"]
    assert sorted(e.meta["about"]["rows"] for e in entries) == [20, 40, 40]
    store.remove(entries[0])
    assert run(spec, trial(lr=2e-3))["teacher_forwards"] == entries[0].meta["about"]["rows"]


def test_an_embedding_is_the_teachers_of_the_plain_image(spec: SweepSpec, corpus: Path) -> None:
    job = EmbedJob(spec, str(Path(spec.storage) / "store"), 0, "images", EMBEDDING, "cpu")
    assert make_here(job, [1]) == [1]
    assert make_here(job, [0, 1]) == [0]  # the other one was there: who did not make it does not pay for it
    entry = job.worker()(1)
    assert not entry.computed
    network = load_network(spec.teachers[0], "teacher")
    shard = CorpusShard(open_corpus(str(corpus)).shards[1])
    pixels = render(shard.image(shard.split, 5), draw(Policy(1, 0), "", (36, 42), 0), 32, "bicubic")
    with torch.no_grad():
        expected = network.module(network.preprocessing.normalise(pixels[None]))[0]
    stored = open_outputs([entry])[0].rows([5])[0].float()
    assert torch.allclose(stored, expected, atol=2e-3)


def test_verify_compares_a_corpus_with_the_live_teacher(spec: SweepSpec, corpus: Path) -> None:
    run(spec, trial())
    found = verify(Path(spec.storage))
    assert found["damaged"] == []
    assert found["compared"] == 3
    assert found["worst"] < 2e-3
    store = Store(Path(spec.storage) / "store")
    entry = next(e for e in store.entries() if e.stage == "corpus_outputs" and e.meta["about"]["rows"] == 20)
    records = (entry.path / "records.arrow").read_bytes()
    (entry.path / "records.arrow").write_bytes(records[:-200] + bytes(200))
    assert any(f"corpus_outputs/{entry.key}" in said for said in verify(Path(spec.storage))["damaged"])


def test_dm_9_the_zero_shot_of_a_student_that_is_the_teacher_is_the_teachers(spec: SweepSpec) -> None:
    store = Store(Path(spec.storage) / "store")
    task = load_task(spec.task, store)
    network = load_network(spec.teachers[0], "teacher")
    vectors = class_vectors(
        Records(embedded_prompts(store, task, spec.teachers[0], "cpu").path / "records.arrow").all(), 3
    )
    prototypes = Prototypes(*vectors.shape)
    prototypes.vectors.copy_(vectors)
    images = torch.randn(40, 3, 32, 32)
    with torch.no_grad():
        mine = ZeroShot(network.module, prototypes)(images).argmax(1)
        embeddings = torch.nn.functional.normalize(network.module(images), dim=-1)
    tower = text_tower(spec.teachers[0], weights=True)
    means = []
    for name in task.classes:
        rows = torch.nn.functional.normalize(tower.embed([t.format(name) for t in spec.task.templates]), dim=-1).mean(0)
        means.append(torch.nn.functional.normalize(rows, dim=0))
    assert torch.equal(mine, (embeddings @ torch.stack(means).T).argmax(1))


def test_dm_10_the_teacher_and_what_is_stored_of_it_do_not_change(spec: SweepSpec) -> None:
    tower = text_tower(spec.teachers[0], weights=True)
    before = hash_weights(tower._model), hash_weights(load_network(spec.teachers[0], "teacher").module)
    run(spec, trial(udist_weight=0.2))
    store = Store(Path(spec.storage) / "store")
    assert (hash_weights(tower._model), hash_weights(load_network(spec.teachers[0], "teacher").module)) == before
    assert [store.damaged(entry) for entry in store.entries()] == [[]] * len(store.entries())


def test_dm_11_the_run_is_the_same_whatever_caption_an_image_has(spec: SweepSpec, tmp_path: Path, corpus: Path) -> None:
    table = pa.concat_tables(pq.read_table(p, columns=["image", "caption"]) for p in sorted(corpus.glob("*.parquet")))
    shuffled = table.set_column(1, "caption", table["caption"].take(pa.array(range(99, -1, -1))))
    losses = []
    for name, one in (("as_is", table), ("shuffled", shuffled)):
        pq.write_table(one, tmp_path / f"{name}.parquet")
        made = tmp_path / name
        build_corpus(f"parquet:{tmp_path / name}.parquet", made, "images", rows_per_shard=40, row_group=16)
        own = spec.model_copy(
            update={
                "corpus": spec.corpus.model_copy(update={"images": str(made)}),
                "storage": str(tmp_path / f"s{name}"),
            }
        )
        run(own, trial())
        students = Path(own.storage) / "small" / "students" / "t0000" / "model.safetensors"
        losses.append(students.read_bytes())
    assert losses[0] == losses[1]


def test_the_row_tells_the_temperatures_and_the_student_embeds(spec: SweepSpec) -> None:
    row = run(spec, trial())
    facts = json.loads(row["facts"])
    assert facts["t_pvl"] == facts["t_udist"] != 3.0
    network, meta = load_student(Path(spec.storage) / "small" / "students" / "t0000")
    assert meta["structure"]["build"] == "methods.parts.zero_shot:attach"
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert network(images).shape == (2, 3)
        assert network.embed(images).shape == (2, 24)  # type: ignore[operator]


def test_epochs_are_passes_over_the_corpus(spec: SweepSpec) -> None:
    train = spec.train.model_copy(update={"steps": None, "epochs": 0.6})
    row = run(spec.model_copy(update={"train": train}), trial())
    assert row["optimizer_steps"] == 5  # of 100 images in batches of 12


def test_both_methods_with_a_dual_encoder_are_planned(spec: SweepSpec) -> None:
    assert {cell.method for cell in prepare(spec).cells} == {"dime_fm", "embedding_regression"}


def test_without_a_corpus_the_training_images_and_the_class_names_teach(
    colours: Path, tmp_path: Path, teacher: Path
) -> None:
    spec = small_spec(colours, tmp_path, teachers=[f"local:{teacher}"], methods={"dime_fm": {}})
    row = run(spec, TrialConfig("t0000", 0, CELL, {}, 0))
    task = load_task(spec.task, Store(Path(spec.storage) / "store"))
    assert row["teacher_forwards"] == len(task.train)  # the plain images alone
    same = run(spec, TrialConfig("t0001", 1, CELL, {"teacher_view": "same"}, 0))
    assert same["teacher_forwards"] == len(task.train)  # view 1 of 2


def test_texts_that_are_not_there_are_named(spec: SweepSpec) -> None:
    lacking = spec.model_copy(update={"corpus": spec.corpus.model_copy(update={"sentences": None})})
    with pytest.raises(UserError, match="texts 'sentences': there are none; the sweep file brings prompts, captions"):
        prepare(lacking.model_copy(update={"methods": {"dime_fm": {"texts": "sentences"}}}))
    student = Model(model="open_clip/ViT-B-33")
    with pytest.raises(UserError, match=r"There is no open_clip model 'ViT-B-33'.*Did you mean"):
        prepare(lacking.model_copy(update={"teachers": [student], "methods": {"dime_fm": {}}}))


def test_a_dual_encoder_also_teaches_by_its_pooled_feature_and_its_tower_is_a_student(
    colours: Path, tmp_path: Path, teacher: Path
) -> None:
    towers = [f"local:{teacher}"]
    spec = small_spec(colours, tmp_path, teachers=towers, students=towers, methods={"kd": {}, "dime_fm": {}})
    wanted = {0: (Output("pooled"), EMBEDDING)}
    for number, method in enumerate(("kd", "dime_fm")):
        config = TrialConfig(f"t000{number}", number, Cell(method, 0, 0), {}, 0)
        context = SweepContext(spec, str(tmp_path / "small"), prefetch=wanted)
        row = run_trial(context, config)
        # One pass a view gives what both methods read; the plain images are the first view.
        assert (row["status"], row["teacher_forwards"]) == ("complete", 2 * 42 if number == 0 else 0), row["reason"]
        network, meta = load_student(tmp_path / "small" / "students" / config.trial_id)
        for format in ("safetensors", "onnx"):
            made = export_student(network, meta, tmp_path / f"{method}_{format}", format)
            assert made["max_abs_difference"] <= 1e-4
        assert {name.partition(".")[0] for name in network.state_dict()} <= {"visual", "head", "backbone", "prototypes"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from orchestrator.sweep.cluster import start_ray

    start_ray(1)
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(60)  # of a stream that was left in the middle: it must not meet the cluster's end
    ray.shutdown()


@pytest.mark.ray
def test_a_worker_of_our_own_cluster_looks_for_garbage_seldom_and_imports_our_copy_when_it_works(cluster: None) -> None:
    import ray

    @ray.remote
    def told() -> tuple[Any, list[str], str]:
        import gc
        import sys

        loaded = [name for name in sys.modules if name.startswith("orchestrator")]
        import orchestrator

        return gc.get_threshold(), loaded, orchestrator.__file__

    assert ray.get(told.remote()) == (SELDOM, [], orchestrator.__file__)


@pytest.mark.ray
def test_ray_data_gives_the_same_images_as_threads(corpus: Path, cluster: None) -> None:
    ours = stream(corpus)
    theirs = Stream(ours.plan, ours.shards, ours.policy, SMALL, read_on_ray(2, 3, 16 * 3 * 16 * 16))
    for position in (0, 56):
        for (pixels, rows), (mine, own) in zip(taken(ours, position, 30), taken(theirs, position, 30), strict=True):
            assert np.array_equal(rows, own)
            assert np.array_equal(pixels, mine)


@pytest.mark.ray
def test_ray_data_rests_while_readers_are_as_far_ahead_as_they_may(
    corpus: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[float] = []
    rest = actors._Rest.on_execution_step

    def counted(own: actors._Rest, executor: Any) -> None:
        rest(own, executor)
        rounds.append(time.monotonic())

    monkeypatch.setattr(actors._Rest, "on_execution_step", counted)
    ours = stream(corpus)
    theirs = Stream(ours.plan, ours.shards, ours.policy, SMALL, read_on_ray(2, 3, 16 * 3 * 16 * 16)).batches(0, 8)
    next(theirs)
    began = time.monotonic()
    time.sleep(2)  # a long step of a training
    during = [at for at in rounds if at > began]
    theirs.close()
    assert 0 < len(during) < 400  # two in 11 ms at most; thousands without the rest


@pytest.mark.ray
def test_two_workers_embed_and_stream_with_the_loss_that_their_streams_give(spec: SweepSpec, cluster: None) -> None:
    from orchestrator.data.actors import make_on_actors
    from orchestrator.train.group import GroupRunner

    train = spec.train.model_copy(update={"workers": 2, "steps": 8})
    context = SweepContext(spec.model_copy(update={"train": train}), str(Path(spec.storage) / "small"))
    with GroupRunner(context) as runner:
        row = run_trial(context, trial(), runner=runner, mapper=make_on_actors)
    assert row["status"] == "complete", row["reason"]
    assert (row["teacher_forwards"], row["images_seen"]) == (100, 96)
