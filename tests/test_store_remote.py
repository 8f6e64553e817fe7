"""A store on object storage, against a real S3-protocol server: nodes are caches of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import GCS, S3
from small import small_spec

from methods.outputs import Output
from orchestrator.data.outputs import Bill, ensure_outputs, open_outputs
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy
from orchestrator.errors import FullDiskError, UserError
from orchestrator.models.load import load_network
from orchestrator.spec import Model, Task
from orchestrator.store import (
    Records,
    RemoteStore,
    bucket,
    key_of,
    lease,
    open_store,
    remote,
    store_at,
    write_records,
)
from orchestrator.store.bucket import Bucket, RemoteError
from orchestrator.store.remote import IN_USE_S
from orchestrator.store.store import BusyError
from orchestrator.train.loop import Checkpoint

KEY = key_of("an entry")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["orchestrator.sweep.run", "orchestrator.sweep.study"])  # `small` imports them
SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    hurry(monkeypatch.setattr)


def hurry(set_value: Any) -> None:
    set_value(bucket, "FIRST_WAIT_S", 0.05)
    set_value(bucket, "PATIENCE_S", 2.0)
    set_value(lease, "HEARTBEAT_S", 0.2)
    set_value(lease, "DEAD_S", 2.0)
    set_value(lease, "POLL_S", 0.1)


class Node:
    """A store as one node sees it: with a cache of its own."""

    def __init__(self, address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("ORCHESTRATOR_CACHE", str(cache))
            self.store = RemoteStore(address)


@pytest.fixture
def nodes(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RemoteStore]:
    address = s3.address(tmp_path.name)
    return [Node(address, tmp_path / name, monkeypatch).store for name in "ab"]


@pytest.fixture(scope="module", params=["s3", "gs"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[S3 | GCS]:
    """Each kind of object storage."""
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    server = GCS()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
def pair(anywhere: S3 | GCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RemoteStore]:
    """Two nodes on each kind of object storage."""
    address = anywhere.address(tmp_path.name)
    return [Node(address, tmp_path / name, monkeypatch).store for name in "ab"]


def refuse(folder: Path) -> None:
    pytest.fail("computed twice")


def objects(store: RemoteStore) -> list[str]:
    return [one.name for one in store.bucket.list()]


def on_a_node(address: str, cache: str, barrier: Any, answers: Any, log: str, seconds: float) -> None:
    os.environ.update(SECRETS | {"ORCHESTRATOR_CACHE": cache})
    hurry(setattr)

    def write(folder: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "data").write_text("half")
        time.sleep(seconds)
        (folder / "data").write_text("result")

    barrier.wait()
    entry = store_at(address).compute("stage", KEY, write)
    answers.put((entry.computed, (entry.path / "data").read_text()))


def test_what_one_node_published_is_copied_once_to_another_and_read_by_memory_map(
    nodes: list[RemoteStore], s3: S3
) -> None:
    table = torch.arange(600.0).view(100, 6)

    def write(folder: Path) -> dict[str, Any]:
        write_records(folder / "records.arrow", 100, [table], "float32")
        return {"forwards": 100}

    one, two = nodes
    made = one.compute("outputs", KEY, write, reads={"weights": "w"})
    assert made.computed
    assert two.root != one.root
    before = len(s3.seen)
    found = two.compute("outputs", KEY, refuse)
    assert not found.computed
    assert found.path.is_relative_to(two.root)
    assert found.meta == made.meta
    assert torch.equal(Records(found.path / "records.arrow").all(), table)
    assert len(s3.seen) > before
    before = len(s3.seen)
    assert two.get("outputs", KEY) is not None  # from the node's own disk
    assert len(s3.seen) == before
    assert [(e.stage, e.key, e.bytes) for e in two.entries()] == [("outputs", KEY, made.bytes)]
    assert not any(name.startswith(".leases") for name in objects(one))


def test_nodes_and_processes_that_ask_at_once_compute_once(anywhere: S3 | GCS, tmp_path: Path) -> None:
    barrier, answers, log = PROCESSES.Barrier(6), PROCESSES.Queue(), tmp_path / "log"
    caches = [str(tmp_path / f"node{i % 3}") for i in range(6)]  # two processes on each of three nodes
    words = (barrier, answers, str(log), 1.0)
    processes = [PROCESSES.Process(target=on_a_node, args=(anywhere.address(tmp_path.name), c, *words)) for c in caches]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert len(log.read_text().splitlines()) == 1
    assert sorted(computed for computed, _ in found) == [False] * 5 + [True]
    assert {text for _, text in found} == {"result"}


def pass_on_a_node(address: str, cache: str, data: str, barrier: Any, answers: Any) -> None:
    os.environ.update(SECRETS | {"ORCHESTRATOR_CACHE": cache})  # in no hurry: nobody is to be taken for dead
    torch.set_num_threads(1)
    store, bill = store_at(address), Bill()
    task = load_task(Task(data=f"folder:{data}", shots=4), store)
    teacher = load_network(Model(model="timm/test_vit", image_size=32, pretrained=False), "teacher")
    barrier.wait()
    found = ensure_outputs(store, task, task.train, teacher, Policy(0.35, 0.4), [1], [Output("pooled")], bill=bill)
    answers.put((len(task.train), bill.forwards_paid, float(open_outputs(found["pooled"])[0].all().float().sum())))


def test_of_nodes_that_need_a_view_at_once_one_makes_its_pass(s3: S3, colours: Path, tmp_path: Path) -> None:
    barrier, answers = PROCESSES.Barrier(4), PROCESSES.Queue()
    address = s3.address(tmp_path.name)
    words = [(address, str(tmp_path / f"node{i}"), str(colours), barrier, answers) for i in range(4)]
    processes = [PROCESSES.Process(target=pass_on_a_node, args=one) for one in words]
    for process in processes:
        process.start()
    told = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    count = told[0][0]
    assert sorted(paid for _, paid, _ in told) == [0, 0, 0, count]
    assert len({total for _, _, total in told}) == 1


@pytest.mark.parametrize("same_node", [True, False])
def test_when_a_node_dies_while_it_computes_another_takes_over(
    anywhere: S3 | GCS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_node: bool
) -> None:
    address, log = anywhere.address(tmp_path.name), tmp_path / "log"
    barrier, answers = PROCESSES.Barrier(2), PROCESSES.Queue()
    words = (address, str(tmp_path / "dies"), barrier, answers, str(log), 600.0)
    process = PROCESSES.Process(target=on_a_node, args=words)
    process.start()
    barrier.wait()
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    store = Node(address, tmp_path / ("dies" if same_node else "lives"), monkeypatch).store
    assert store.get("stage", KEY) is None
    assert store.entries() == []
    with pytest.raises(BusyError):
        store.compute("stage", KEY, refuse, wait=False)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    entry = store.compute("stage", KEY, lambda folder: (folder / "data").write_text("whole") and None)
    assert entry.computed
    assert (entry.path / "data").read_text() == "whole"
    assert not any(name.startswith(".leases") for name in objects(store))


def test_a_holder_that_was_only_asleep_publishes_a_whole_entry_all_the_same(
    nodes: list[RemoteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 600)  # asleep
    one, two = nodes
    entered, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        (folder / "data").write_text("by one")
        entered.set()
        assert go_on.wait(60)

    sleeper = threading.Thread(target=lambda: one.compute("stage", KEY, slow))
    sleeper.start()
    assert entered.wait(60)
    for name in objects(one):
        one.bucket.delete(name)  # its lease is gone, as if it had slept for too long
    taken = two.compute("stage", KEY, lambda folder: (folder / "data").write_text("by two") and None)
    go_on.set()
    sleeper.join(60)
    assert (taken.path / "data").read_text() == "by two"
    (entry,) = two.entries()
    assert two.damaged(entry) == []
    freed, removed = two.collect()
    assert removed == 0
    assert freed == len("by two")  # the attempt that nothing names any more
    assert two.damaged(entry) == []


@pytest.mark.parametrize("mode", ["503", "broken off"])
def test_errors_of_the_server_are_waited_out(
    nodes: list[RemoteStore], s3: S3, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "PATIENCE_S", 30.0)
    s3.mode = mode

    def write(folder: Path) -> None:
        (folder / "data").write_bytes(b"x" * 100_000)
        s3.failures = 6  # more than the client below repeats by itself

    entry = nodes[0].compute("stage", KEY, write)
    assert s3.failures == 0
    assert nodes[0].damaged(entry) == []
    s3.failures = 6
    assert nodes[1].compute("stage", KEY, refuse).bytes == 100_000
    assert s3.failures == 0
    s3.mode = "503"


def test_a_server_that_stays_away_is_one_sentence_and_nothing_is_published(nodes: list[RemoteStore], s3: S3) -> None:
    def write(folder: Path) -> None:
        (folder / "data").write_text("result")
        s3.failures = 10**9

    try:
        with pytest.raises(RemoteError, match=r"^The object storage s3://bucket/\S+ could not write \S+ in \d+ s"):
            nodes[0].compute("stage", KEY, write)
    finally:
        s3.failures = 0
    assert nodes[0].get("stage", KEY) is None
    assert nodes[1].get("stage", KEY) is None
    assert list((nodes[0].root / ".tmp").iterdir()) == []
    assert nodes[1].compute("stage", KEY, lambda f: None).computed  # after the lost lease's time


def test_googles_server_that_stays_away_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "REQUEST_S", 1.0)
    server = GCS()
    try:
        there = Bucket(server.address("away"))
        there.write("name", b"content")
        assert there.read("name") == b"content"
    finally:
        server.remove()
    with pytest.raises(RemoteError, match=r"^The object storage gs://\S+ could not read name in \d+ s"):
        there.read("name")


def test_a_trial_whose_object_storage_stays_away_fails_with_that_reason(
    colours: Path, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.trial.context import SweepContext
    from orchestrator.trial.plan import Cell, TrialConfig
    from orchestrator.trial.run import run_trial

    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    spec = small_spec(colours, tmp_path, methods={"finetune": {}}, store={"remote": s3.address(tmp_path.name)})
    context = SweepContext(spec, str(tmp_path / "small"))
    config = TrialConfig("t0000", 0, Cell("finetune", None, 0), {}, 0)
    s3.failures = 10**9
    try:
        row = run_trial(context, config)
    finally:
        s3.failures = 0
    assert row["status"] == "failed"
    assert row["reason"].startswith("The object storage s3://bucket/")
    row = run_trial(context, config)
    assert row["status"] == "complete", row["reason"]
    assert (tmp_path / "small" / row["student_path"] / "student.json").is_file()
    assert not (tmp_path / "store").exists()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "other"))
    again = run_trial(context, config)
    assert (again["val_metric"], again["store_misses"]) == (row["val_metric"], 0)


def test_a_changed_object_is_never_read_and_is_named_by_verify(pair: list[RemoteStore]) -> None:
    entry = pair[0].compute("stage", KEY, lambda folder: (folder / "data").write_text("result") and None)
    name = f"stage/{KEY}/{entry.meta['attempt']}/data"
    pair[0].bucket.write(name, b"resulT")
    with pytest.raises(RemoteError, match="differs from what was published"):
        pair[1].get("stage", KEY)
    assert not pair[1]._folder("stage", KEY).exists()
    assert pair[1].damaged(entry) == ["data"]


def test_without_its_meta_nothing_is_there_and_gc_takes_the_rest(pair: list[RemoteStore]) -> None:
    one, two = pair
    kept = one.compute("stage", key_of("kept"), lambda folder: (folder / "data").write_bytes(b"x" * 10) and None)
    one.bucket.write(f"stage/{KEY}/0123456789ab/data", b"x" * 7)  # its writer died before it wrote meta.json
    one.bucket.write(f".partial/stage-{KEY}/checkpoint.pt", b"x" * 5)
    assert two.get("stage", KEY) is None
    assert [e.key for e in two.entries()] == [kept.key]
    assert two.collect() == (12, 0)
    assert two.damaged(kept) == []
    assert two.collect(max_bytes=5) == (10, 1)
    assert two.entries() == []
    assert [name for name in objects(two) if not name.startswith(".leases")] == []


def test_gc_spares_what_a_node_works_on(pair: list[RemoteStore]) -> None:
    one, two = pair
    with one.lock("stage", KEY):
        one.bucket.write(f".partial/stage-{KEY}/checkpoint.pt", b"x" * 5)
        assert two.collect() == (0, 0)
    assert two.collect() == (5, 0)


def test_partial_work_goes_on_on_another_node_and_goes_when_the_entry_is_published(pair: list[RemoteStore]) -> None:
    def checkpoint(store: RemoteStore) -> Checkpoint:
        folder = store.scratch("stage", KEY)
        return Checkpoint(folder / "checkpoint.pt", 0.0, mirror=store.mirror(folder))

    one, two = (checkpoint(node) for node in pair)
    assert one.load() is None
    one.save({"step": 5})
    assert two.load() == {"step": 5}
    two.save({"step": 9})
    assert one.load() == {"step": 9}  # and not what it left itself
    pair[1].compute("stage", KEY, lambda folder: None)
    assert checkpoint(pair[1]).load() is None
    assert not any(name.startswith(".partial") for name in objects(pair[0]))


def test_a_copy_that_would_fill_the_nodes_disk_is_refused(nodes: list[RemoteStore]) -> None:
    nodes[0].compute("stage", KEY, lambda folder: (folder / "data").write_text("result") and None)
    nodes[1].min_free_gb = 1e9
    with pytest.raises(FullDiskError, match=r"less than store\.min_free_gb = 1e\+09"):
        nodes[1].get("stage", KEY)


def test_a_cache_keeps_its_limit_by_what_was_not_asked_for_lately(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three copies of 1 kB in 2.5 kB the longest unused goes; what was used within the hour stays, limit or not."""
    address = s3.address(tmp_path.name)
    first = Node(address, tmp_path / "a", monkeypatch).store
    keys = [digit * 20 for digit in "123"]
    for key in keys:
        first.compute("stage", key, lambda folder: (folder / "data").write_bytes(b"x" * 1000) and None)
    monkeypatch.setenv("ORCHESTRATOR_CACHE_GB", "2.5e-6")
    second = Node(address, tmp_path / "b", monkeypatch).store

    def kept() -> list[str]:
        return sorted(path.parent.name for path in second.root.glob("stage/*/meta.json"))

    for key in keys[:2]:
        assert second.get("stage", key) is not None
    long_ago = time.time() - 2 * IN_USE_S
    os.utime(second.root / "stage" / keys[1] / "meta.json", (long_ago, long_ago))
    assert second.get("stage", keys[2]) is not None
    assert kept() == [keys[0], keys[2]]
    assert second.get("stage", keys[1]) is not None  # it comes again, and none may go for it
    assert kept() == keys
    assert first.entries()  # nothing went from the storage
    monkeypatch.setenv("ORCHESTRATOR_CACHE_GB", "lots")
    with pytest.raises(UserError, match="ORCHESTRATOR_CACHE_GB is 'lots'; it takes GB, a number above 0"):
        RemoteStore(address)


def test_open_store_knows_addresses_and_sweeps_on_object_storage(colours: Path, tmp_path: Path, s3: S3) -> None:
    address = s3.address(tmp_path.name)
    assert open_store(address).address == address
    spec = small_spec(colours, tmp_path, store={"remote": address})
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "sweep.yaml").write_text(spec.to_yaml())
    assert open_store(tmp_path / "small").address == address == spec.store_address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://me:hunter2@bucket/x", "holds a key"),
        ("s3://bucket/x?secret_key=hunter2", "holds a key"),
        ("s3://bucket/../x", "leads out"),
        ("http://bucket/x", "no address"),
        ("bucket/x", "no address"),
        ("s3://", "no address"),
    ],
)
def test_an_address_with_a_key_or_of_another_kind_is_refused(
    colours: Path, tmp_path: Path, address: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        small_spec(colours, tmp_path, store={"remote": address})
    assert "hunter2" not in str(refused.value)


def test_a_bucket_that_is_not_there_is_refused_before_anything_runs(
    colours: Path, tmp_path: Path, anywhere: S3 | GCS
) -> None:
    from orchestrator.sweep.folder import check_storage

    check_storage(small_spec(colours, tmp_path, store={"remote": anywhere.address("x")}))
    address = anywhere.address("x").replace("bucket/", "elsewhere/")
    with pytest.raises(
        UserError, match=r"^store\.remote: The object storage \w+://(anonymous@)?elsewhere/x refuses to"
    ):
        check_storage(small_spec(colours, tmp_path, store={"remote": address}))


def test_a_folder_by_its_file_address_is_object_storage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = (tmp_path / "shared").as_uri()
    one, two = (Node(address, tmp_path / name, monkeypatch).store for name in "ab")
    made = one.compute("stage", KEY, lambda folder: (folder / "data").write_text("result") and None)
    found = two.compute("stage", KEY, refuse)
    assert json.dumps(found.meta) == json.dumps(made.meta)
    assert isinstance(Bucket(address).read(f"stage/{KEY}/meta.json"), bytes)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RemoteStore]:
    """Two nodes on a folder that stands for object storage."""
    return [Node((tmp_path / "shared").as_uri(), tmp_path / name, monkeypatch).store for name in "ab"]


def write_result(folder: Path) -> None:
    (folder / "data").write_text("result")


def as_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known any more of what lies in the storage, as in a process that begins."""
    monkeypatch.setattr(remote, "_SEEN", set())


def test_a_torn_copy_is_copied_again(shared: list[RemoteStore]) -> None:
    one, two = shared
    made = one.compute("stage", KEY, write_result)
    torn = two.compute("stage", KEY, refuse).path / "meta.json"
    torn.write_bytes(b"")
    found = two.compute("stage", KEY, refuse)
    assert found.meta == made.meta == json.loads(torn.read_text())
    torn.write_bytes(b"")
    for name in objects(two):
        two.bucket.delete(name)
    assert two.compute("stage", KEY, write_result).computed


def test_gc_takes_a_torn_copy_away_and_leaves_the_entry(shared: list[RemoteStore]) -> None:
    one, two = shared
    made = one.compute("stage", KEY, write_result)
    copy = two.compute("stage", KEY, refuse)
    (copy.path / "meta.json").write_bytes(b"")
    assert two.collect() == (len("result"), 0)
    assert not copy.path.exists()
    assert two.entries()[0].meta == made.meta
    assert two.get("stage", KEY) is not None


def test_a_copy_is_on_the_disk_before_it_appears(shared: list[RemoteStore], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = shared
    one.compute("stage", KEY, write_result)
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        assert not two._folder("stage", KEY).exists()
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition("-")[0])

    monkeypatch.setattr(os, "fsync", fsync)
    two.compute("stage", KEY, refuse)
    assert sorted(synced) == ["copy", "data", "meta.json"]


def test_what_gc_took_from_the_storage_is_published_again_by_a_node_that_has_a_copy(
    shared: list[RemoteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = shared
    made = one.compute("stage", KEY, write_result)
    assert two.collect(max_bytes=0) == (len("result"), 1)
    assert two.get("stage", KEY) is None
    as_new_processes(monkeypatch)
    assert not one.compute("stage", KEY, refuse).computed
    found = two.get("stage", KEY)
    assert found is not None
    assert found.meta == made.meta
    assert (found.path / "data").read_text() == "result"
    assert two.damaged(found) == []


def test_a_process_asks_the_storage_once_whether_it_has_what_lies_on_the_node(
    nodes: list[RemoteStore], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes[0].compute("stage", KEY, write_result)
    requests = []
    for begins in (False, True, False):
        if begins:
            as_new_processes(monkeypatch)
        before = len(s3.seen)
        nodes[0].compute("stage", KEY, refuse)
        requests.append(len(s3.seen) - before)
    assert requests == [0, 1, 0]


def test_a_damaged_copy_is_not_published_again_but_computed_anew(
    shared: list[RemoteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = shared
    damaged = one.compute("stage", KEY, write_result)
    two.collect(max_bytes=0)
    (damaged.path / "data").write_text("resulT")
    as_new_processes(monkeypatch)
    assert one.compute("stage", KEY, write_result).computed
    found = two.get("stage", KEY)
    assert found is not None
    assert (found.path / "data").read_text() == "result"


def test_a_copy_waits_for_the_node_that_computes_anew_what_the_storage_lost(
    shared: list[RemoteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = shared
    one.compute("stage", KEY, write_result)
    two.collect(max_bytes=0)
    as_new_processes(monkeypatch)
    with two.lock("stage", KEY), pytest.raises(BusyError):
        one.compute("stage", KEY, refuse, wait=False)
    assert not one.compute("stage", KEY, refuse, wait=False).computed


def test_gc_takes_no_entry_while_a_node_works_and_says_how_much_stays(
    pair: list[RemoteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    usual = lease.DEAD_S
    one.compute("stage", KEY, lambda folder: (folder / "data").write_bytes(b"x" * 2_000_000) and None)
    monkeypatch.setattr(lease, "DEAD_S", 60.0)  # the sign of life is seen as soon as it comes
    with (
        one.lock("stage", key_of("a training")),
        pytest.warns(UserWarning, match=r"^1\.5 MB more than asked for stay in the store: processes that are running"),
    ):
        assert two.collect(max_bytes=500_000) == (0, 0)
    assert [e.key for e in two.entries()] == [KEY]
    monkeypatch.setattr(lease, "DEAD_S", usual)
    assert two.collect(max_bytes=500_000) == (2_000_000, 1)


def test_the_lease_of_a_dead_node_does_not_keep_gc_from_its_work(shared: list[RemoteStore]) -> None:
    one, two = shared
    one.compute("stage", KEY, write_result)
    one.bucket.write(f".leases/stage-{key_of('a training')}/node-0123456789ab", b"x")
    assert two.collect(max_bytes=0) == (len("result"), 1)
