"""What does not grow with a corpus, what `check` reckons for one, and what a death in the middle costs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import small_spec
from small_clip import clip_folder, image_corpus, sentence_corpus
from typer.testing import CliRunner

from benchmarks.corpora import beginning
from benchmarks.corpora import image_corpus as image_corpus_of_clipart
from benchmarks.scale import applied, estimates_table
from benchmarks.streaming import throughput
from methods.contract import Batch, Learner
from methods.vision_language import EMBEDDING
from orchestrator.cli import app
from orchestrator.data.corpus import Shard, corpus_at, open_corpus
from orchestrator.data.corpus import corpus as corpus_module
from orchestrator.data.embed import EmbedJob, ensure_embedded
from orchestrator.data.memory import AHEAD, stream_memory
from orchestrator.data.stream import Plan, Stream, blocks_of, read_on_threads
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy
from orchestrator.errors import UserError
from orchestrator.models.load import Preprocessing, load_network
from orchestrator.spec import Estimate, SweepSpec, parse_spec, read_spec
from orchestrator.store import Entry, JoinedRecords, OpenFiles, Store, write_records
from orchestrator.sweep.costs import costs_of, embedding_bytes, rate_of, reckon
from orchestrator.sweep.holdings import Holdings, shards_of
from orchestrator.sweep.run import prepare
from orchestrator.sweep.streamed import Training
from orchestrator.train.feed import WHOLE, Order, StreamFeeder, scattered
from orchestrator.train.job import TrainJob
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig, policy_of
from orchestrator.trial.run import run_trial

SCALE = Path(__file__).parents[1] / "search_spaces" / "dime_fm_scale.yaml"
LIMIT_S = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def spec(colours: Path, tmp_path: Path, teacher: Path, corpus: Path, sentences: Path) -> SweepSpec:
    return small_spec(
        colours,
        tmp_path,
        teachers=[f"local:{teacher}"],
        methods={"dime_fm": {"texts": "sentences", "text_rule": "all"}},
        corpus={"images": str(corpus), "sentences": str(sentences), "window": 32},
    )


# --- what does not grow


@pytest.mark.parametrize("count", [2, 3, 5, 1000, 4097, 65_537])
def test_an_order_that_is_computed_is_a_permutation_and_another_one_for_another_seed(count: int) -> None:
    places = np.arange(count)
    first = scattered(places, count, [0, 20, 0])
    assert np.array_equal(np.sort(first), places)
    if count > 100:
        other = scattered(places, count, [0, 20, 1])
        assert (first == other).mean() < 0.05
        assert abs(np.corrcoef(first, places)[0, 1]) < 0.1
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.1


def test_the_order_of_a_billion_sentences_takes_no_memory_and_goes_on_anywhere() -> None:
    count = 10**9
    assert count > WHOLE
    order = Order(count, 3, 20)
    whole, epochs = order.take(count - 500, 1000)
    assert epochs.tolist() == [0] * 500 + [1] * 500
    assert np.array_equal(np.concatenate([order.take(count - 500 + i, 100)[0] for i in range(0, 1000, 100)]), whole)
    assert len(set(whole[:500].tolist())) == 500
    tracemalloc.start()
    order.take(123_456_789, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_small_order_is_the_seeded_permutation() -> None:
    items, epochs = Order(7, 1, 2).take(5, 4)
    assert epochs.tolist() == [0, 0, 1, 1]
    expected = [np.random.default_rng([1, 2, epoch]).permutation(7) for epoch in (0, 1)]
    assert items.tolist() == [*expected[0][5:], *expected[1][:2]]


def test_the_plan_of_forty_million_images_takes_megabytes() -> None:
    tracemalloc.start()
    shards = [Shard("/x", "x", 4096, 0, "", (256,) * 16)] * 9766
    plan = Plan(blocks_of(shards), 0, 3, 32, 4096)
    window, done = next(plan.windows(1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(plan.blocks) == 156_256
    assert (len(window.order), window.epoch, done) == (4096, 0, 1_000_000 % 4096)
    assert peak < 30e6


def test_a_shard_that_was_read_is_as_small_as_one_that_was_not(corpus: Path) -> None:
    shard = open_corpus(str(corpus)).shards[0]
    before = len(pickle.dumps(shard)), set(vars(shard))
    shard.read(0, ["id"])
    assert (len(pickle.dumps(shard)), set(vars(shard))) == before


def test_tables_of_many_files_keep_few_open_and_are_read_alike(tmp_path: Path) -> None:
    rows = torch.arange(120).reshape(40, 3)
    paths = [tmp_path / f"{i}.arrow" for i in range(8)]
    for i, path in enumerate(paths):
        write_records(path, 5, [rows[5 * i : 5 * i + 5]], "int64")
    files = OpenFiles(paths, most=3)
    table = JoinedRecords(files, [5] * 8)
    assert len(table) == 40
    assert files._open.cache_info().misses == 0  # lengths are known without opening anything
    chosen = np.random.default_rng(0).permutation(40)
    assert torch.equal(table.rows(chosen), rows[chosen])
    assert files._open.cache_info().currsize == 3


def test_a_corpus_is_looked_through_once_for_one_state_of_its_manifest(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    looked = corpus_module.differing
    monkeypatch.setattr(corpus_module, "differing", lambda c: seen.append(c.address) or looked(c))
    address = f"file://{corpus}"
    assert corpus_at(address) is corpus_at(address)
    assert len(seen) == 1
    manifest = corpus / "corpus.json"
    os.utime(manifest, (0, 0))
    corpus_at(address)
    assert len(seen) == 2


def test_blocks_ahead_fill_the_memory_that_a_worker_may_take_and_never_more() -> None:
    image, block = 3 * 224 * 224, 256 * 3 * 224 * 224
    ample = stream_memory(4096, 256, 224, 640, 4, 1e12)
    assert ample.ahead == 16 + 4  # a window, and what is being decoded
    assert ample.window == (4096 + 255) * image
    assert ample.waiting == 24 * block
    on_gpu = stream_memory(4096, 256, 224, 640, 4, 1e12, AHEAD)
    assert (on_gpu.batches, ample.batches) == (5 * 640 * image, 3 * 640 * image)
    for limit in (1.8e9, 1.3e9):
        tight = stream_memory(4096, 256, 224, 640, 4, limit)
        assert 1 <= tight.ahead < 20
        assert tight.total <= limit < tight.total + block
    assert stream_memory(4096, 256, 224, 640, 4, 1.0).ahead == 1  # the window itself decides what is trained on


def test_a_stream_holds_no_more_than_was_reckoned(corpus: Path) -> None:
    shards, size, window, batch, threads = open_corpus(str(corpus)).shards, 96, 48, 8, 2
    memory = stream_memory(window, 16, size, batch, threads, 1e9)
    plan = Plan(blocks_of(shards), 0, 0, 1, window)
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.5,) * 3, "bilinear")
    stream = Stream(plan, shards, Policy(0.5, 0.0), preprocessing, read_on_threads(threads, memory.ahead))
    tracemalloc.start()
    for pixels, _ in itertools.islice(stream.batches(0, batch), 40):
        assert pixels.shape == (8, 3, 96, 96)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory.total + 2e6


# --- what check reckons


ONE = Training(0, 10**9, 10**8, 24, 10**7, 1000, 64, 100, "sentences", 0, 50, ("images", "sentences"))


def costs(spec: SweepSpec, **training: Any) -> Any:
    holdings = Holdings((4096, 4096, 1000), (500, 20), 10**8, 10**5, 0, 256)
    return reckon(holdings, [replace(ONE, **training)], spec)


def scaled(spec: SweepSpec, **changes: Any) -> SweepSpec:
    return parse_spec(spec.model_dump(mode="json") | changes)


def test_costs_are_those_of_the_formulas(spec: SweepSpec) -> None:
    machines = {
        "nodes": 2,
        "gpus": 4,
        "tflops": 100.0,
        "utilisation": 0.5,
        "cores": 40,
        "decode": 1e9,
        "read_gb_s": 1e9,
    }
    made = scaled(
        spec,
        estimate=machines,
        train={"steps": 100, "batch": 64, "workers": 8},
        search={"trials": 3},
        corpus={"images": spec.corpus.images, "window": 512, "actors": 5},
    )
    found = costs(made)
    images, sentences = 9192, 520
    assert found.corpus_bytes == 10**8 + 10**5
    assert found.checkpoint_bytes == 3 * 4 * 1000
    assert found.student_bytes == 3 * 4 * 1000
    assert found.embed_images_s == (5e13 / 1e9, "compute")
    assert found.embed_device_seconds == pytest.approx(images * 1e9 / 5e13 + sentences * 1e8 / 5e13)
    assert found.embed_hours == pytest.approx(found.embed_device_seconds / 5 / 3600)
    pairs = 2 * 24 * 64 * (50 + 64) * 4 / 8  # the global batch's similarities, an image of a worker
    assert found.train_device_seconds == pytest.approx(100 * 64 * (3e7 + pairs) / 5e13)
    assert found.sweep_hours == pytest.approx(found.embed_hours + 3 * found.train_device_seconds / 8 / 3600)
    texts = images / 64 * 8 * 50 * 4096  # every worker reads every text, a page each
    assert found.read_bytes_per_epoch == 10**8 + images * 48 + round(texts)
    assert found.loss_bytes == 4 * 5 * 64 * 64
    slow = {**machines, "decode": 100.0}
    assert costs(scaled(made, estimate=slow)).embed_images_s == (200.0, "decoding")  # two threads an actor


def test_the_slowest_of_three_limits_the_rate() -> None:
    machines = Estimate(gpus=4, tflops=100.0, utilisation=0.5, cores=40, decode=100.0, read_gb_s=2.0)
    assert rate_of(machines, 5e13, 1) == (1.0, "compute")
    assert rate_of(machines, 1, 1) == (1000.0, "decoding")
    assert rate_of(machines, 1, 1e6) == (500.0, "reading")
    assert rate_of(machines, 1, 1, readers=2) == (200.0, "decoding")


def test_stored_bytes_are_reckoned_to_the_byte(spec: SweepSpec) -> None:
    task = load_task(spec.task, Store(Path(spec.storage) / "store"))
    prepared = prepare(spec)
    reckoned = costs_of(spec, task, prepared.cells, prepared.spaces)
    assert reckoned is not None
    holdings, (training,), found = reckoned
    assert (holdings.images, holdings.sentences, training.embeds) == (100, 60, ("images", "sentences"))
    knobs = {"texts": "sentences", "text_rule": "all"}
    row = run_trial(
        SweepContext(spec, f"{spec.storage}/small"), TrialConfig("t0000", 0, Cell("dime_fm", 0, 0), knobs, 0)
    )
    assert row["status"] == "complete", row["reason"]
    entries = Store(Path(spec.storage) / "store").entries()
    stored = {
        stage: sum(e.bytes for e in entries if e.stage == stage and "rows" in e.meta["about"])
        for stage in ("corpus_outputs", "text_embeddings")
    }
    assert stored == {
        "corpus_outputs": found.image_embedding_bytes,
        "text_embeddings": found.text_embedding_bytes,
    }
    folders = [Path(spec.corpus.images or ""), Path(spec.corpus.sentences or "")]
    assert found.corpus_bytes == sum(p.stat().st_size for f in folders for p in f.glob("*.parquet"))
    state = load_file(Path(spec.storage) / "small" / "students" / "t0000" / "model.safetensors")
    assert 4 * sum(v.numel() for n, v in state.items() if "prototypes" not in n) == found.student_bytes // 5


def test_embeddings_of_the_papers_corpus_take_what_the_format_takes() -> None:
    images = embedding_bytes(shards_of(40_000_000, 4096), 768, "float16")
    assert 0 < images - 40_000_000 * 768 * 2 < 9766 * 1000


def test_the_paper_scale_file_is_checked_without_its_corpus_and_refused_by_a_sweep(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(SCALE), "--set", f"storage={tmp_path}", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["combinations"] == 1
    assert sum("is not here" in sentence for sentence in facts["unchecked"]) == 2
    assert any("ViT-L-14" in sentence for sentence in facts["unchecked"])
    found = facts["costs"]
    # ViT-L/14 takes 81 GMAC an image: 24 blocks of 12 x 1024² weights and attention, on 257 tokens.
    assert found["embed_images_s"][0] == pytest.approx(312e12 * 0.35 / (2 * 81e9), rel=0.06)
    assert found["embed_images_s"][1] == "compute"
    assert found["image_embedding_bytes"] == pytest.approx(61.44e9, rel=1e-3)
    assert found["text_embedding_bytes"] == pytest.approx(43.62e9, rel=1e-3)
    spec = read_spec(SCALE, [f"storage={tmp_path}"])
    with pytest.raises(UserError, match="There is no corpus at '/data/corpora/images'"):
        prepare(spec)
    with pytest.raises(UserError, match="There is no corpus at '/data/corpora/sentences'"):
        prepare(read_spec(SCALE, [f"storage={tmp_path}", "corpus.expect.sentences=0"]), dry=True)


def test_a_window_that_does_not_fit_is_refused(spec: SweepSpec) -> None:
    corpus = {**spec.model_dump(mode="json")["corpus"], "window": 4096}
    with pytest.raises(UserError, match=r"corpus.memory_gb: 0.01 is too little for a stream of 32 px.*takes 0.01 GB"):
        prepare(scaled(spec, corpus={**corpus, "memory_gb": 0.01}))
    assert prepare(scaled(spec, corpus={**corpus, "memory_gb": 0.1})).cells


def test_a_sweep_that_stores_nothing_of_a_teacher_has_no_estimate(colours: Path, tmp_path: Path) -> None:
    prepared = prepare(small_spec(colours, tmp_path, methods={"finetune": {}}))
    assert costs_of(prepared.spec, prepared.task, prepared.cells, prepared.spaces) is None


def test_the_page_tells_what_the_code_reckons() -> None:
    page = (SCALE.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert estimates_table({"estimates": applied()}) in page


def test_the_benchmark_of_the_stream_compares_equal_work(tmp_path: Path) -> None:
    made = image_corpus_of_clipart(tmp_path / "c", 256, 32, rows_per_shard=128, row_group=64)
    assert open_corpus(str(made), "images").rows == 256
    result = throughput(made, 32, 192, 1, 64, ["bare", "threads"], ("trivial",))
    assert result["trivial bare"]["ratio"] == 1
    assert result["trivial threads"]["images_s"] > 0
    assert open_corpus(str(beginning(made, tmp_path / "one", 1))).rows == 128


# --- deaths


def wait_for(condition: Callable[[], Any], running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert running(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


CHILD = """
import sys
sys.path[:0] = sys.argv[4:]
import test_scale
test_scale.logged_run(*sys.argv[1:4])
"""


def logged_run(spec_file: str, log: str, trial_id: str) -> None:
    """One trial that writes down the step and the rows of every batch that was asked for."""
    torch.set_num_threads(1)
    spec = read_spec(spec_file)
    read = StreamFeeder._read

    def reading(self: StreamFeeder, step: int) -> Any:
        tables = dict(self.tables)

        class Watched:
            def rows(self, rows: np.ndarray) -> torch.Tensor:
                with Path(log).open("a") as file:
                    file.write(json.dumps([step, rows.tolist()]) + "\n")
                return tables["embedding"].rows(rows)

        self.tables = {"embedding": Watched()}  # type: ignore[dict-item]
        try:
            return read(self, step)
        finally:
            self.tables = tables

    StreamFeeder._read = reading  # type: ignore[method-assign]
    try:
        knobs = {"texts": "sentences", "text_rule": "all"}
        config = TrialConfig(trial_id, 0, Cell("dime_fm", 0, 0), knobs, 0)
        row = run_trial(SweepContext(spec, f"{spec.storage}/{spec.name}"), config)
    finally:
        StreamFeeder._read = read  # type: ignore[method-assign]
    assert row["status"] == "complete", row["reason"]


def batches_of(log: Path) -> dict[int, list[int]]:
    return dict(map(json.loads, log.read_text().splitlines()))


def test_a_trial_that_is_killed_in_the_middle_of_an_epoch_goes_on_with_the_very_next_images(
    spec: SweepSpec, tmp_path: Path
) -> None:
    train = {"steps": 80, "batch": 12, "checkpoint_s": 1e-9}
    files = {}
    for name in ("whole", "broken"):
        made = scaled(spec, train=train, storage=str(tmp_path / name))
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(made.to_yaml())
    broken = tmp_path / "broken.log"
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", CHILD, str(files["broken"]), str(broken), "t0000", here, str(Path(here).parent)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    partial = tmp_path / "broken" / "store" / ".partial"
    wait_for(lambda: list(partial.glob("*/checkpoint.pt")), lambda: process.poll() is None)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (checkpoint,) = partial.glob("*/checkpoint.pt")
    step = int(torch.load(checkpoint, weights_only=True)["step"])
    assert 0 < step < 80
    resumed = tmp_path / "resumed.log"
    logged_run(str(files["broken"]), str(resumed), "t0000")
    logged_run(str(files["whole"]), str(tmp_path / "whole.log"), "t0000")
    whole, after = batches_of(tmp_path / "whole.log"), batches_of(resumed)
    assert min(after) == step
    assert all(after[i] == whole[i] for i in range(step, 80))
    assert all(rows == whole[i] for i, rows in batches_of(broken).items())
    students = [tmp_path / n / "small" / "students" / "t0000" / "model.safetensors" for n in ("whole", "broken")]
    assert students[0].read_bytes() == students[1].read_bytes()


@dataclass(frozen=True)
class LoggedJob(EmbedJob):
    """An embedding that writes down when it begins and ends a shard, and takes its time."""

    log: str = ""

    def worker(self) -> Any:
        made, log = super().worker(), self.log
        write = made._write

        def slow(folder: Path, shard: Shard) -> dict[str, Any]:
            for what in ("begins", "ends"):
                with Path(log).open("a") as file:
                    file.write(f"{os.getpid()} {what} {shard.file}\n")
                if what == "begins":
                    about = write(folder, shard)
                    time.sleep(0.4)
            return about

        made._write = slow
        return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from orchestrator.sweep.cluster import start_ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_ray(1)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow  # a minute; trials and drivers that are killed are in test_sweep.py
@pytest.mark.ray
def test_when_an_embedding_actor_is_killed_only_its_shard_is_embedded_again(
    spec: SweepSpec, tmp_path: Path, cluster: None
) -> None:
    from orchestrator.data.actors import make_on_actors

    images = image_corpus(tmp_path / "many", 96, rows_per_shard=8)
    made = scaled(spec, corpus={"images": str(images), "actors": 2, "min_actors": 2})
    log = tmp_path / "log"
    log.touch()
    job = LoggedJob(made, f"{made.storage}/store", 0, "images", EMBEDDING, "cpu", str(log))
    failures: list[BaseException] = []

    def embed() -> None:
        try:
            make_on_actors(job, list(range(12)))
        except BaseException as error:
            failures.append(error)

    def lines() -> list[list[str]]:
        return [line.split() for line in log.read_text().splitlines()]

    def in_flight() -> list[list[str]]:
        ended = {(pid, shard) for pid, what, shard in lines() if what == "ends"}
        return [[pid, shard] for pid, what, shard in lines() if what == "begins" and (pid, shard) not in ended]

    running = threading.Thread(target=embed)
    running.start()
    wait_for(lambda: len([1 for _, what, _ in lines() if what == "ends"]) >= 4 and in_flight(), running.is_alive)
    victim = int(in_flight()[0][0])
    os.kill(victim, signal.SIGKILL)
    running.join(LIMIT_S)
    assert not failures, failures
    embedded: list[Entry] = [e for e in job.store.entries() if e.stage == "corpus_outputs"]
    assert sorted(e.meta["about"]["shard"] for e in embedded) == [f"part-{i:05}.parquet" for i in range(12)]
    assert [job.store.damaged(e) for e in embedded] == [[]] * 12
    ended = Counter(shard for _, what, shard in lines() if what == "ends")
    begun = Counter(shard for _, what, shard in lines() if what == "begins")
    assert set(ended.values()) == {1}
    again = [shard for shard, times in begun.items() if times > 1]
    assert len(again) == 1
    assert begun[again[0]] == 2
    assert next(pid for pid, what, shard in lines() if shard == again[0] and what == "begins") == str(victim)


def watched(job: TrainJob, log: Path) -> TrainJob:
    """The same training by a learner that writes down who computes which step on which images, and takes its time."""
    kind = type(job.stage.learner.__name__, (job.stage.learner,), {})
    loss = job.stage.learner.loss

    def slow(self: Learner, batch: Batch, progress: float) -> dict[str, torch.Tensor]:
        images = hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()
        with log.open("a") as file:
            file.write(f"{os.getpid()} {torch.distributed.get_rank()} {round(progress * job.steps)} {images}\n")
        time.sleep(0.05)
        return loss(self, batch, progress)

    kind.loss = slow  # type: ignore[method-assign]
    return replace(job, stage=replace(job.stage, learner=kind))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_training_worker_is_killed_the_stream_goes_on_at_the_checkpoint(
    spec: SweepSpec, tmp_path: Path, cluster: None, rank: int
) -> None:
    from orchestrator.data.actors import make_on_actors
    from orchestrator.train.group import GroupRunner

    steps, log = 24, tmp_path / "log"
    log.touch()
    made = scaled(spec, train={"steps": steps, "batch": 12, "workers": 2, "checkpoint_s": 1e-9})
    context = SweepContext(made, f"{made.storage}/small")
    group = GroupRunner(context)
    config = TrialConfig("t0000", 0, Cell("dime_fm", 0, 0), {"texts": "sentences", "text_rule": "all"}, 0)
    rows: list[dict[str, Any]] = []

    def train() -> None:
        def run(job: TrainJob, folder: Path, report: Any) -> dict[str, Any]:
            return group(watched(job, log), folder, report)

        with group:
            rows.append(run_trial(context, config, runner=run, mapper=make_on_actors))

    def lines() -> list[tuple[int, int, int, str]]:
        found = [line.split() for line in log.read_text().splitlines() if line.count(" ") == 3]
        return [(int(pid), int(who), int(step), images) for pid, who, step, images in found]

    running = threading.Thread(target=train)
    running.start()
    wait_for(lambda: max((step for _, _, step, _ in lines()), default=0) >= 10, running.is_alive)
    victim = next(pid for pid, who, _, _ in lines() if who == rank)
    (checkpoint,) = (Path(made.storage) / "store" / ".partial").glob("*/checkpoint.pt")
    reached = int(torch.load(checkpoint, weights_only=True)["step"])
    os.kill(victim, signal.SIGKILL)
    running.join(LIMIT_S)
    (row,) = rows
    assert row["status"] == "complete", row["reason"]
    assert (row["teacher_forwards"], row["images_seen"]) == (100, steps * 12)
    first = [line for line in lines() if line[0] in {pid for pid, _, step, _ in lines() if step == 0}]
    second = [line for line in lines() if line not in first]
    began = min(step for _, _, step, _ in second)
    assert 0 < reached <= began <= max(step for _, _, step, _ in first) + 1
    shards = open_corpus(str(made.corpus.images)).shards
    preprocessing = load_network(made.students[0], "student").preprocessing
    for who in (0, 1):
        plan = Plan(blocks_of(shards), 0, who, 2, made.corpus.window)
        stream = Stream(plan, shards, policy_of(made), preprocessing, read_on_threads(1, 4))
        images = [
            hashlib.sha256(preprocessing.normalise(torch.from_numpy(pixels)).numpy().tobytes()).hexdigest()
            for pixels, _ in itertools.islice(stream.batches(0, 6), steps)
        ]
        told = {step: seen for _, one, step, seen in first if one == who}
        assert told == {step: images[step] for step in told}
        told = {step: seen for _, one, step, seen in second if one == who}
        assert told == {step: images[step] for step in range(began, steps)}


DRIVER = """
import sys
sys.path[:0] = sys.argv[3:]
import test_scale
test_scale.embed_logged(*sys.argv[1:3])
"""


def embed_logged(spec_file: str, log: str) -> None:
    """A driver with a Ray of its own that embeds a corpus of 12 shards on two actors."""
    import ray

    from orchestrator.data.actors import make_on_actors
    from orchestrator.sweep.cluster import start_ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_ray(1)
    made = read_spec(spec_file)
    make_on_actors(LoggedJob(made, f"{made.storage}/store", 0, "images", EMBEDDING, "cpu", log), list(range(12)))


@pytest.mark.slow  # a minute; trials and drivers that are killed are in test_sweep.py
@pytest.mark.ray
def test_when_the_driver_is_killed_only_the_shards_in_flight_are_embedded_again(
    spec: SweepSpec, tmp_path: Path, cluster: None
) -> None:
    from orchestrator.data.actors import make_on_actors

    images = image_corpus(tmp_path / "many", 96, rows_per_shard=8)
    made = scaled(spec, corpus={"images": str(images), "actors": 2, "min_actors": 2})
    log, file = tmp_path / "log", tmp_path / "sweep.yaml"
    log.touch()
    file.write_text(made.to_yaml())
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", DRIVER, str(file), str(log), here, str(Path(here).parent)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: log.read_text().count(" ends ") >= 4, lambda: process.poll() is None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    job = LoggedJob(made, f"{made.storage}/store", 0, "images", EMBEDDING, "cpu", str(log))
    again = ensure_embedded(job, make_on_actors)
    there = sum(not entry.computed for entry in again)
    assert 4 <= there < 12
    embedded = [e for e in job.store.entries() if e.stage == "corpus_outputs"]
    assert sorted(e.meta["about"]["shard"] for e in embedded) == [f"part-{i:05}.parquet" for i in range(12)]
    assert [job.store.damaged(e) for e in embedded] == [[]] * 12
    ended = Counter(line.split()[2] for line in log.read_text().splitlines() if " ends " in line)
    begun = Counter(line.split()[2] for line in log.read_text().splitlines() if " begins " in line)
    assert set(ended.values()) == {1}
    assert len(ended) == 12
    assert sum(begun.values()) - 12 <= 2  # one for each actor
    assert max(begun.values()) <= 2
