"""The store: addresses, records, one computation at a time whatever dies, and what is left behind."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import WorkError, behind, disk_full
from orchestrator.store import Entry, Records, Store, key_of, write_records
from orchestrator.store.store import BusyError
from orchestrator.sweep.stock import verify

KEY = key_of("an entry")
PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, not by every process
PROCESSES.set_forkserver_preload(["orchestrator.store"])


def leftovers(store: Store) -> list[str]:
    """Names of temporary and partial folders, and of entries that are not whole."""
    hidden = [p.name for part in (".tmp", ".partial") for p in store.root.glob(f"{part}/*")]
    broken = [p.name for p in store.root.glob("[!.]*/*") if not (p / "meta.json").is_file()]
    return sorted(hidden + broken)


def fill(store: Store, name: str, size: int = 1000) -> Any:
    """An entry of `size` bytes."""
    return store.compute("stage", key_of(name), lambda f: (f / "data").write_bytes(b"x" * size) and None)


def ask_once(root: Path, barrier: Any, answers: Any) -> None:
    def write(folder: Path) -> None:
        with (root.parent / "computed.log").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # long enough for the others to ask meanwhile
        (folder / "data").write_text("result")

    barrier.wait()
    entry = Store(root).compute("stage", KEY, write)
    answers.put((entry.computed, (entry.path / "data").read_text()))


def compute_forever(root: Path, started: Any) -> None:
    def write(folder: Path) -> None:
        (folder / "data").write_text("half of a res")
        started.set()
        threading.Event().wait()

    Store(root).compute("stage", KEY, write)


def look_up_and_stay(root: Path, found: Any) -> None:
    """A process that looks up entry "a", makes entry "b" and lives on."""
    store = Store(root)
    assert store.get("stage", key_of("a")) is not None
    fill(store, "b")
    found.set()
    threading.Event().wait()


READS = {"weights": "a" * 64, "views": [0, 1], "recipe": {"lr": 0.001, "clip": None}, "labels": True}
CHANGES = {
    "another value": {**READS, "weights": "b" * 64},
    "another order of a list": {**READS, "views": [1, 0]},
    "another nested value": {**READS, "recipe": {"lr": 0.002, "clip": None}},
    "one key more": {**READS, "seed": 0},
    "one key less": {k: v for k, v in READS.items() if k != "labels"},
    "another type of the same number": {**READS, "labels": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_key_changes_with_anything_read(change):
    assert key_of(CHANGES[change]) != key_of(READS)


def test_a_key_is_twenty_hex_digits_and_does_not_depend_on_the_order_of_keys():
    key = key_of(READS)
    assert len(key) == 20
    assert set(key) <= set("0123456789abcdef")
    assert key == key_of(dict(reversed(READS.items())))


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, Path("x"), torch.zeros(1), np.float32(1), b"bytes", math.nan, math.inf, key_of]
)
def test_a_key_refuses_what_is_not_json(value):
    with pytest.raises((TypeError, ValueError)):
        key_of({"reads": [value]})


@pytest.mark.parametrize("shape", [(), (7,), (5, 16), (3, 8, 8)])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_records_come_back_bit_for_bit(tmp_path, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (10, *shape), generator=generator, dtype=torch.int64)
    values = values.to(torch.uint8) if dtype == "uint8" else (values / 7).half()
    write_records(tmp_path / "r.arrow", 10, [values[:4], values[4:4], values[4:]], dtype)
    records = Records(tmp_path / "r.arrow")
    assert len(records) == 10
    assert records.shape == shape
    assert records.all().dtype == values.dtype
    assert torch.equal(records.all(), values)
    assert torch.equal(records.rows([9, 0, 3, 3]), values[[9, 0, 3, 3]])
    assert [p.name for p in tmp_path.iterdir()] == ["r.arrow"]


@pytest.mark.parametrize(("dtype", "shape", "width"), [("float16", (17, 24), 816), ("uint8", (3, 32, 32), 3072)])
def test_a_record_takes_its_values_times_their_bytes(tmp_path, dtype, shape, width):
    store = Store(tmp_path / "store")
    table = torch.zeros((200, *shape)).to(getattr(torch, dtype))

    def write(folder: Path) -> None:
        write_records(folder / "r.arrow", 200, [table], dtype)

    entry = store.compute("stage", KEY, write)
    assert entry.bytes / 200 == pytest.approx(width, rel=0.05)
    assert entry.bytes == sum(p.stat().st_size for p in entry.path.iterdir() if p.name != "meta.json")


@pytest.mark.parametrize("count", [9, 11])
def test_fewer_or_more_records_than_said_are_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"10 records were given where {count}"):
        write_records(tmp_path / "r.arrow", count, [torch.zeros(10, 2)], "float32")


def test_a_table_of_any_memory_layout_is_stored_as_its_values(tmp_path):
    maps = torch.randn(6, 40, 1, 1).half().to(memory_format=torch.channels_last)  # torch calls this contiguous
    assert maps.is_contiguous()
    assert maps.stride(-1) != 1
    for number, table in enumerate(
        (maps, torch.randn(5, 6).T, torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    ):
        write_records(tmp_path / f"{number}.arrow", len(table), [table], str(table.dtype).removeprefix("torch."))
        assert torch.equal(Records(tmp_path / f"{number}.arrow").all(), table)


def test_records_of_two_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_records(tmp_path / "r.arrow", 4, [torch.zeros(2, 2), torch.zeros(2, 3)], "float32")


def test_four_processes_that_ask_at_once_compute_once(tmp_path):
    barrier, answers = PROCESSES.Barrier(4), PROCESSES.Queue()
    processes = [PROCESSES.Process(target=ask_once, args=(tmp_path / "store", barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0, 0]
    assert len((tmp_path / "computed.log").read_text().splitlines()) == 1
    assert sorted(computed for computed, _ in found) == [False, False, False, True]
    assert {text for _, text in found} == {"result"}
    assert leftovers(Store(tmp_path / "store")) == []


def test_when_the_computing_process_is_killed_a_waiter_takes_over_and_sees_nothing_half_written(tmp_path):
    store, started = Store(tmp_path / "store"), PROCESSES.Event()
    process = PROCESSES.Process(target=compute_forever, args=(store.root, started))
    process.start()
    assert started.wait(120)
    assert store.get("stage", KEY) is None
    assert store.entries() == []
    with pytest.raises(BusyError):
        store.compute("stage", KEY, lambda f: None, wait=False)
    in_flight = leftovers(store)
    assert len(in_flight) == 1
    assert store.collect() == (0, 0)
    assert leftovers(store) == in_flight

    seen: list[Any] = []

    def write(folder: Path) -> None:
        seen.extend(folder.iterdir())
        (folder / "data").write_text("whole result")

    waiter = threading.Thread(target=lambda: seen.append(store.compute("stage", KEY, write)))
    waiter.start()
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    waiter.join(60)
    (entry,) = seen  # the folder to write into was empty
    assert process.exitcode == -signal.SIGKILL
    assert entry.computed
    assert (entry.path / "data").read_text() == "whole result"
    assert store.get("stage", KEY).meta["files"]["data"]["bytes"] == len("whole result")
    assert leftovers(store) == []  # whoever takes over clears what the dead writer left
    assert store.collect() == (0, 0)


def test_what_was_computed_is_found_by_every_later_call(tmp_path):
    store = Store(tmp_path / "store")
    first = fill(store, "a", 10)
    again = store.compute("stage", key_of("a"), lambda f: pytest.fail("computed twice"))
    assert (first.computed, again.computed) == (True, False)
    assert first.meta == again.meta
    assert [e.key for e in Store(tmp_path / "store").entries()] == [key_of("a")]


def test_a_failed_write_leaves_neither_an_entry_nor_a_temporary_folder(tmp_path):
    store = Store(tmp_path / "store")

    def write(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise RuntimeError("the teacher broke")

    with pytest.raises(RuntimeError, match="the teacher broke"):
        store.compute("stage", KEY, write)
    assert store.get("stage", KEY) is None
    assert leftovers(store) == []
    assert store.compute("stage", KEY, lambda f: None, wait=False).computed  # the lock is free again


def test_where_locks_do_not_hold_among_machines_the_first_to_publish_wins(tmp_path, monkeypatch):
    store, theirs = Store(tmp_path / "store"), []

    def write(folder: Path) -> None:
        (folder / "data").write_text("second")
        with monkeypatch.context() as patch:  # another machine, whose lock this one's kernel does not know
            patch.setattr("platform.node", lambda: "another")
            published = store._publish("stage", KEY, lambda f: (f / "data").write_text("first") and None, None)
        theirs.append(published)

    entry = store.compute("stage", KEY, write)
    assert not entry.computed
    assert (entry.path / "data").read_text() == "first"
    assert entry.meta == theirs[0].meta
    assert leftovers(store) == []


def test_partial_work_outlives_a_failure_and_goes_when_the_entry_is_published(tmp_path):
    store = Store(tmp_path / "store")

    def broken(folder: Path) -> None:
        store.scratch("stage", KEY).mkdir(parents=True)
        (store.scratch("stage", KEY) / "checkpoint").write_text("step 5")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.compute("stage", KEY, broken)
    assert (store.scratch("stage", KEY) / "checkpoint").read_text() == "step 5"
    store.compute("stage", KEY, lambda f: None)
    assert not store.scratch("stage", KEY).exists()
    store.scratch("stage", KEY).mkdir()  # as if its writer had died between publishing and tidying up
    assert not store.compute("stage", KEY, broken).computed
    assert leftovers(store) == []


def test_collecting_removes_what_dead_processes_left_and_spares_what_a_lock_holds(tmp_path):
    store = Store(tmp_path / "store")
    entry, dead, alive = fill(store, "kept", 50), key_of("dead"), key_of("alive")
    for key in (dead, alive):
        for folder in (store.root / ".tmp" / f"stage-{key}-0123abcd", store.scratch("stage", key)):
            folder.mkdir(parents=True)
            (folder / "data").write_bytes(b"x" * 100)
    grave = store.root / ".tmp" / "removed-0123abcd"
    grave.mkdir()
    (grave / "data").write_bytes(b"x" * 7)
    with store.lock("stage", alive):
        assert store.collect() == (207, 0)
        assert leftovers(store) == [f"stage-{alive}", f"stage-{alive}-0123abcd"]
    assert store.collect() == (200, 0)
    assert leftovers(store) == []
    assert store.damaged(entry) == []


def test_an_entry_that_was_never_renamed_into_place_is_not_an_entry(tmp_path):
    store = Store(tmp_path / "store")
    fill(store, "kept", 50)
    hidden = store.root / ".tmp" / f"stage-{KEY}-0123abcd"
    hidden.mkdir(parents=True)
    (hidden / "meta.json").write_text('{"files": {"data": {"bytes": 5, "sha256": ""}}}')
    assert [(e.stage, e.key) for e in store.entries()] == [("stage", key_of("kept"))]


def test_above_max_bytes_the_least_recently_used_entries_go_first(tmp_path):
    store = Store(tmp_path / "store")
    for age, name in enumerate("abcd"):
        entry = fill(store, name, 1000)
        os.utime(entry.path / "meta.json", (1e9 + age, 1e9 + age))
    assert store.get("stage", key_of("a")) is not None  # the oldest, used just now
    assert store.collect(max_bytes=4000) == (0, 0)
    assert store.collect(max_bytes=2500) == (2000, 2)
    assert {e.key for e in store.entries()} == {key_of("a"), key_of("d")}
    assert store.collect(max_bytes=0) == (2000, 2)
    assert store.entries() == []
    assert leftovers(store) == []


def test_gc_counts_no_file_that_lies_in_a_sweep_too(tmp_path):
    store = Store(tmp_path / "store")
    linked, own = unused_for_long(store, "a", "b")
    os.utime(linked.path / "meta.json", (1e9 - 1, 1e9 - 1))
    os.link(linked.path / "data", tmp_path / "student")
    assert store.collect(max_bytes=1000) == (0, 0)
    assert store.collect(max_bytes=0) == (1000, 2)
    torn = fill(store, "c")
    os.link(torn.path / "data", tmp_path / "other")
    (torn.path / "meta.json").write_text("")
    assert store.collect() == (0, 1)
    assert own.key not in {e.key for e in store.entries()}


def unused_for_long(store: Store, *names: str) -> list[Entry]:
    """Entries of 1000 bytes that nothing has asked for since 2001."""
    entries = [fill(store, name) for name in names]
    for entry in entries:
        os.utime(entry.path / "meta.json", (1e9, 1e9))
    return entries


def test_gc_spares_what_a_living_process_has_looked_up_or_made_and_says_how_much(tmp_path):
    store, found = Store(tmp_path / "store"), PROCESSES.Event()
    unused_for_long(store, "a", "c")
    process = PROCESSES.Process(target=look_up_and_stay, args=(store.root, found))
    process.start()
    assert found.wait(120)
    with pytest.warns(UserWarning, match=r"^0\.0 MB more than asked for stay in the store: processes that are running"):
        assert store.collect(max_bytes=0) == (1000, 1)
    assert {e.key for e in store.entries()} == {key_of("a"), key_of("b")}
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert store.collect(max_bytes=0) == (2000, 2)
    assert store.entries() == []


def test_gc_does_not_take_what_was_asked_for_after_it_had_begun(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    (entry,) = unused_for_long(store, "a")
    seen = store._by_use()
    assert store.get("stage", entry.key) is not None
    monkeypatch.setattr(store, "_by_use", lambda: seen)
    with pytest.warns(UserWarning, match="stay in the store"):
        assert store.collect(max_bytes=0) == (0, 0)
    assert store.damaged(entry) == []


def test_gc_removes_the_files_by_which_dead_processes_told_that_they_lived(tmp_path):
    store = Store(tmp_path / "store")
    fill(store, "a")
    (own,) = store.root.glob(".users/*")
    (own.parent / "1000000000-0123456789ab.lock").touch()
    assert store.collect(max_bytes=10_000) == (0, 0)
    assert list(store.root.glob(".users/*")) == [own]


def test_entries_of_a_store_that_cannot_be_written_are_found(tmp_path):
    entry = fill(Store(tmp_path / "store"), "a")
    (tmp_path / "read").symlink_to(tmp_path / "store")
    users = tmp_path / "store" / ".users"
    for file in users.iterdir():
        file.unlink()
    users.rmdir()
    users.touch()  # whoever runs this may be root, who can write anywhere else
    found = Store(tmp_path / "read").get("stage", entry.key)
    assert found is not None
    assert found.meta == entry.meta


@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "missing"])
def test_damage_is_found_and_named(tmp_path, damage):
    store = Store(tmp_path / "store")

    def write(folder: Path) -> None:
        for name in ("good", "bad"):
            (folder / name).write_bytes(bytes(range(256)))

    entry = store.compute("stage", KEY, write)
    assert store.damaged(entry) == []
    data = bytearray((entry.path / "bad").read_bytes())
    data[100] ^= 1
    if damage == "missing":
        (entry.path / "bad").unlink()
    else:
        (entry.path / "bad").write_bytes(data if damage == "a flipped byte" else data[:-1])
    assert store.damaged(store.get("stage", KEY)) == ["bad"]


def test_too_little_free_disk_refuses_the_computation_in_one_sentence(tmp_path):
    store = Store(tmp_path / "store", min_free_gb=1e9)
    with pytest.raises(WorkError, match=r"GB of free disk, less than store\.min_free_gb = 1e\+09: free some, or run"):
        store.compute("stage", KEY, lambda f: pytest.fail("computed without disk"))
    assert store.get("stage", KEY) is None
    assert leftovers(store) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing_is_one_sentence_and_leaves_nothing(tmp_path, code):
    store = Store(tmp_path / "store")

    def write(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(WorkError, match=rf"The disk of the store .* is full while writing stage/{KEY}\."):
        store.compute("stage", KEY, write)
    assert store.get("stage", KEY) is None
    assert leftovers(store) == []


def test_a_full_disk_is_found_behind_other_errors_and_a_chain_that_leads_into_itself_has_an_end():
    full = OSError(errno.ENOSPC, "full")
    last = RuntimeError("last")
    last.__context__ = full
    assert disk_full(last)
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__context__ = two, one
    assert not disk_full(one)
    assert list(behind(one)) == [one, two]
    assert list(behind(two, contexts=False)) == [two]


def test_another_error_of_the_disk_is_not_called_a_full_disk(tmp_path):
    def write(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    with pytest.raises(OSError, match="input/output error"):
        Store(tmp_path / "store").compute("stage", KEY, write)


TEARS = {
    "empty": lambda meta: meta.write_bytes(b""),
    "cut off": lambda meta: meta.write_bytes(meta.read_bytes()[:-20]),
    "zeros": lambda meta: meta.write_bytes(bytes(200)),
    "missing": lambda meta: meta.unlink(),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_entry_counts_as_absent_and_the_next_computation_replaces_it(tmp_path, tear):
    store = Store(tmp_path / "store")
    torn = fill(store, "a")
    TEARS[tear](torn.path / "meta.json")
    assert store.get("stage", torn.key) is None
    again = fill(store, "a", 500)
    assert again.computed
    assert store.get("stage", torn.key).meta == again.meta
    assert store.damaged(again) == []
    assert leftovers(store) == []


def test_verify_takes_damaged_entries_away_where_it_is_told_to(tmp_path):
    store = Store(tmp_path / "store")
    kept, bad = fill(store, "a"), fill(store, "b")
    next(path for path in bad.path.iterdir() if path.name != "meta.json").write_bytes(b"other")
    command = ["store", "verify", str(store.root)]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, WorkError)
    assert "`store verify --remove` takes them away" in str(refused.exception)
    removed = CliRunner().invoke(app, [*command, "--remove"])
    assert removed.exit_code == 0
    assert "2 entries, 1 damaged and removed." in removed.output
    assert [entry.key for entry in store.entries()] == [kept.key]


@pytest.mark.parametrize("tear", TEARS)
def test_verify_names_a_torn_entry_and_gc_takes_it_away(tmp_path, tear):
    store = Store(tmp_path / "store")
    kept, torn = fill(store, "a"), fill(store, "b")
    TEARS[tear](torn.path / "meta.json")
    size = sum(file.stat().st_size for file in torn.path.iterdir())
    assert verify(str(store.root))["damaged"] == [f"stage/{torn.key}: meta.json differs from what was published"]
    with store.lock("stage", torn.key):  # somebody is about to replace it
        assert store.collect() == (0, 0)
    assert store.collect() == (size, 1)
    assert [e.key for e in store.entries()] == [kept.key]
    assert not torn.path.exists()
    assert leftovers(store) == []


def test_all_files_of_an_entry_and_their_folder_are_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    synced: list[Path] = []

    def fsync(descriptor: int) -> None:
        assert store.get("stage", KEY) is None
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def write(folder: Path) -> None:
        for name in ("one", "two"):
            (folder / name).write_text(name)

    monkeypatch.setattr(os, "fsync", fsync)
    store.compute("stage", KEY, write)
    (folder,) = {path.parent for path in synced if path.name == "one"}
    assert sorted(synced) == [folder, folder / "meta.json", folder / "one", folder / "two"]


def test_a_disk_that_is_found_to_be_full_when_files_are_brought_to_it_is_the_same_sentence(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))  # as a file server says it

    store = Store(tmp_path / "store")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WorkError, match=rf"The disk of the store .* is full while writing stage/{KEY}\."):
        store.compute("stage", KEY, lambda f: (f / "data").write_text("whole") and None)
    assert store.get("stage", KEY) is None
    assert leftovers(store) == []


def test_a_file_system_that_cannot_bring_a_folder_to_the_disk_is_used_all_the_same(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    assert fill(Store(tmp_path / "store"), "a").computed
