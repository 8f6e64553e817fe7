"""A pass of a teacher over a view: its parts, who computes them, and what of that is seen in the store."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_spec

from methods.outputs import Output
from orchestrator.data import passes
from orchestrator.data.outputs import Bill, ensure_outputs, open_outputs
from orchestrator.data.passes import Pass, live_outputs
from orchestrator.data.pixels import rendered_view
from orchestrator.data.task import TaskData, load_task
from orchestrator.data.views import Policy, stored_view, view_parameters
from orchestrator.models.load import Network, load_network
from orchestrator.spec import Model, Task
from orchestrator.store import Store, in_turns
from orchestrator.store.store import BusyError
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

POLICY = Policy(crop_scale=0.35, color=0.4)
POOLED, LOGITS, TOKENS = Output("pooled"), Output("logits"), Output("tokens")
ROWS = 8
TEACHER = Model(model="timm/test_vit", image_size=32, pretrained=False)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["orchestrator.sweep.run", "orchestrator.sweep.study"])  # `small` imports them


@pytest.fixture
def teacher() -> Network:
    return load_network(TEACHER, "teacher")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def task(colours: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> TaskData:
    monkeypatch.setattr(passes, "ROWS", ROWS)
    task = load_task(Task(data=f"folder:{colours}", shots=4), store)
    assert len(task.train) > 3 * ROWS
    return task


class Watched:
    """What the teacher sees, and what happens meanwhile."""

    def __init__(self, teacher: Network, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bytes] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        whole = teacher.module.forward_features

        def forward(images: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            meanwhile, self.meanwhile = self.meanwhile, lambda: None
            meanwhile()
            self.seen += [image.numpy().tobytes() for image in images]
            return whole(images, **kwargs)

        monkeypatch.setattr(teacher.module, "forward_features", forward)


@pytest.fixture
def watched(teacher: Network, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(teacher, monkeypatch)


def needed(store: Store, task: TaskData, teacher: Network, wanted: list[Output], also: Iterable[Output] = ()) -> Pass:
    """View 1 as a trial needs it."""
    view = stored_view(store, task.train, POLICY, 1)
    return Pass(store, task, task.train, teacher, view, 1, wanted, also, "cpu", "float16")


def test_trials_that_need_a_view_at_once_make_its_pass_together(task, store, teacher, watched) -> None:
    count = len(task.train)
    one, other = needed(store, task, teacher, [POOLED]), needed(store, task, teacher, [POOLED])
    watched.meanwhile = lambda: other.entries(wait=False)
    entry = one.entries(wait=False)[POOLED.key]
    assert len(watched.seen) == len(set(watched.seen)) == count
    assert (one.forwards, other.forwards) == (ROWS, count - ROWS)
    assert entry.meta["forwards"] == count
    assert entry.meta["seconds"] == pytest.approx(one.seconds + other.seconds)
    assert other.entries(wait=False)[POOLED.key].key == entry.key
    assert not list(store.root.glob(".partial/*"))


def test_a_bill_has_what_its_trial_computed_and_the_rest_as_shared(task, store, teacher, watched) -> None:
    count, bills = len(task.train), [Bill(), Bill()]

    def ask(bill: Bill) -> None:
        ensure_outputs(store, task, task.train, teacher, POLICY, [1], [POOLED], bill=bill)

    other = needed(store, task, teacher, [POOLED])
    watched.meanwhile = lambda: other.entries(wait=False)
    for bill in bills:
        ask(bill)
    assert [(bill.forwards_paid, bill.forwards_shared) for bill in bills] == [(ROWS, count - ROWS), (0, count)]
    assert [(bill.misses, bill.hits) for bill in bills] == [(1, 0), (0, 1)]
    assert sum(bill.seconds_paid for bill in bills) + other.seconds == pytest.approx(bills[1].seconds_saved)


def test_parts_change_nothing_of_what_is_stored(task, store, teacher, tmp_path, monkeypatch) -> None:
    wanted = [POOLED, LOGITS, TOKENS, Output("map", 3, grid=2)]
    parted = ensure_outputs(store, task, task.train, teacher, POLICY, range(2), wanted)
    monkeypatch.setattr(passes, "ROWS", 1024)
    whole = ensure_outputs(Store(tmp_path / "whole"), task, task.train, teacher, POLICY, range(2), wanted)
    for output in wanted:
        for a, b in zip(parted[output.key], whole[output.key], strict=True):
            assert a.key == b.key
            assert a.bytes == b.bytes
            torch.testing.assert_close(open_outputs([a])[0].all(), open_outputs([b])[0].all(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_type_of_number_survives_its_parts(task, store, teacher, dtype) -> None:
    found = ensure_outputs(store, task, task.train, teacher, POLICY, [0], [POOLED], dtype=dtype)
    values = open_outputs(found[POOLED.key])[0].all()
    assert values.dtype == getattr(torch, dtype)
    parameters = view_parameters(stored_view(store, task.train, POLICY, 0))
    pixels = torch.cat(list(rendered_view(task, task.train, parameters, teacher.preprocessing)))
    live = live_outputs(teacher, teacher.module, pixels, [POOLED])[POOLED.key]
    torch.testing.assert_close(values.float(), live, rtol=2e-2 if dtype == "bfloat16" else 2e-3, atol=1e-3)


def test_what_a_trial_that_died_had_done_is_not_done_again(task, store, teacher, watched) -> None:
    count = len(task.train)

    def die() -> None:
        raise KeyboardInterrupt

    def after_a_part() -> None:
        watched.meanwhile = die

    watched.meanwhile = after_a_part
    with pytest.raises(KeyboardInterrupt):
        needed(store, task, teacher, [POOLED]).entries(wait=False)
    assert len(watched.seen) == ROWS
    assert needed(store, task, teacher, [POOLED]).entries(wait=True) is not None
    assert len(watched.seen) == len(set(watched.seen)) == count
    assert not list(store.root.glob(".partial/*"))


def test_two_sweeps_with_other_methods_share_a_pass(task, store, teacher, watched) -> None:
    count = len(task.train)
    here = needed(store, task, teacher, [POOLED], also=[LOGITS])
    there = needed(store, task, teacher, [LOGITS, TOKENS])
    watched.meanwhile = lambda: there.entries(wait=False)
    assert here.entries(wait=False) is not None
    # The first part was begun before anybody asked for tokens; all others have what both want.
    assert (here.forwards, there.forwards) == (ROWS, count - ROWS)
    assert there.entries(wait=False).keys() == {LOGITS.key, TOKENS.key}
    assert (len(watched.seen), len(set(watched.seen))) == (count + ROWS, count)
    assert not list(store.root.glob(".partial/*"))


def ask_in_a_process(root: str, data: str, barrier: Any, answers: Any) -> None:
    passes.ROWS = ROWS
    torch.set_num_threads(1)
    store, bill = Store(root), Bill()
    task = load_task(Task(data=f"folder:{data}", shots=4), store)
    teacher = load_network(TEACHER, "teacher")
    barrier.wait()
    found = ensure_outputs(store, task, task.train, teacher, POLICY, range(4), [POOLED, LOGITS], bill=bill)
    values = [float(table.all().float().sum()) for key in sorted(found) for table in open_outputs(found[key])]
    answers.put((bill.forwards_paid, bill.forwards_shared, values))


def test_processes_that_ask_at_once_see_each_image_once_between_them(colours: Path, store, task) -> None:
    barrier, answers = PROCESSES.Barrier(3), PROCESSES.Queue()
    words = (str(store.root), str(colours), barrier, answers)
    processes = [PROCESSES.Process(target=ask_in_a_process, args=words) for _ in range(3)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    count = 4 * len(task.train)
    assert sum(paid for paid, _, _ in told) == count
    assert [paid + shared for paid, shared, _ in told] == [count] * 3
    assert told[0][2] == told[1][2] == told[2][2]
    assert not list(store.root.glob(".partial/*"))


def test_a_trial_that_needs_a_stage_that_another_is_at_takes_a_part_in_the_pass_before_it(
    colours: Path, tmp_path: Path, teacher: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both need the teacher's head, which is fitted once; the second comes in the middle of the first one's pass."""
    monkeypatch.setattr(passes, "ROWS", ROWS)
    watched, compute, entries = Watched(teacher, monkeypatch), Store.compute, Pass.entries
    spec = small_spec(colours, tmp_path)
    context = SweepContext(spec, str(tmp_path / "sweep"))
    there: list[int] = []

    class WaitsError(BaseException):
        """The second trial would wait from here on, for what this very thread is at."""

    def leave(self: Store, stage: str, *words: Any, **options: Any) -> Any:
        if stage == "teacher_head":
            raise WaitsError
        return compute(self, stage, *words, **options)

    def busy(self: Pass, wait: bool) -> Any:
        found = entries(self, wait=False)
        if found is None:
            raise WaitsError
        return found

    def other() -> None:
        before = len(watched.seen)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "compute", leave)
            patch.setattr(Pass, "entries", busy)
            with pytest.raises(WaitsError):
                run_trial(context, TrialConfig("t1", 1, Cell("kd", 0, 0), {"lr": 0.1}, 0))
        there.append(len(watched.seen) - before)

    watched.meanwhile = other
    row = run_trial(context, TrialConfig("t0", 0, Cell("kd", 0, 0), {}, 0))
    assert row["status"] == "complete", row["reason"]
    assert there[0] > ROWS
    assert len(watched.seen) == len(set(watched.seen))


def test_a_part_whose_file_is_torn_is_made_again(task, store, teacher, watched) -> None:
    def tear() -> None:
        (file,) = store.root.glob(".partial/*/*.npy")
        file.write_bytes(file.read_bytes()[:-3])
        (file.parent / "seconds.json").write_text("")

    watched.meanwhile = lambda: setattr(watched, "meanwhile", tear)
    entry = needed(store, task, teacher, [POOLED]).entries(wait=False)[POOLED.key]
    assert len(open_outputs([entry])[0]) == len(task.train)
    assert not list(store.root.glob(".partial/*"))


def test_what_another_trial_asks_for_in_vain_is_its_own_fault(task, store, teacher, watched) -> None:
    wrong = needed(store, task, teacher, [Output("tokens", 99)])
    failed: list[str] = []

    def ask() -> None:
        try:
            wrong.entries(wait=False)
        except ValueError as error:
            failed.append(str(error))
            wrong._asked()  # as if it had been killed

    watched.meanwhile = ask
    assert needed(store, task, teacher, [POOLED]).entries(wait=False) is not None
    assert failed


def test_what_a_trial_left_that_died_while_it_published_is_tidied_up(task, store, teacher) -> None:
    one = needed(store, task, teacher, [POOLED])
    one.entries(wait=False)
    for part in one._parts:
        part.folder.mkdir(parents=True)
        part.file(POOLED).write_bytes(b"published")
    assert needed(store, task, teacher, [POOLED]).entries(wait=False) is not None
    assert not list(store.root.glob(".partial/*"))


def test_parts_that_were_collected_are_made_again(task, store, teacher, watched) -> None:
    watched.meanwhile = lambda: setattr(watched, "meanwhile", store.collect)
    assert needed(store, task, teacher, [POOLED]).entries(wait=False) is not None
    assert len(watched.seen) == len(task.train) + ROWS
    assert not list(store.root.glob(".partial/*"))


def test_where_nodes_do_not_see_each_others_folders_a_pass_is_whole(task, store, teacher, watched, monkeypatch) -> None:
    monkeypatch.setattr(store, "mirror", lambda folder: object())
    one, other = needed(store, task, teacher, [POOLED]), needed(store, task, teacher, [POOLED])
    left: list[Any] = []
    watched.meanwhile = lambda: left.append(other.entries(wait=False))
    assert one.entries(wait=False) is not None
    assert (one.forwards, other.forwards, left) == (len(task.train), 0, [None])


def test_what_others_are_computing_comes_last_and_is_waited_for_only_then() -> None:
    asked: list[tuple[str, bool]] = []
    busy = {"a": 2, "b": 1}

    def attempt(key: str, wait: bool) -> str | None:
        asked.append((key, wait))
        busy[key] = busy.get(key, 0) - 1
        if busy[key] >= 0 and not wait:
            if key == "a":
                raise BusyError(key)
            return None
        return key.upper()

    assert in_turns("abc", attempt) == {"a": "A", "b": "B", "c": "C"}
    assert asked == [("a", False), ("b", False), ("c", False), ("a", False), ("b", False), ("a", False)]
    asked.clear()
    busy |= {"a": 9, "b": 9, "c": 9}
    assert in_turns("ab", attempt) == {"a": "A", "b": "B"}
    assert asked == [("a", False), ("b", False), ("a", True), ("b", False), ("b", False), ("b", True)]
