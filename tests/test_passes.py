"""A pass of a teacher over a view: its parts, who computes them, and what of that is seen in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.outputs import Output
from orchestrator.data import passes
from orchestrator.data.outputs import Bill, ensure_outputs, open_outputs
from orchestrator.data.passes import Pass
from orchestrator.data.task import TaskData, load_task
from orchestrator.data.views import Policy, stored_view
from orchestrator.models.load import Network, load_network
from orchestrator.spec import Model, Task
from orchestrator.store import Store, in_turns
from orchestrator.store.store import BusyError

POLICY = Policy(crop_scale=0.35, color=0.4)
POOLED, LOGITS, TOKENS = Output("pooled"), Output("logits"), Output("tokens")
ROWS = 8


@pytest.fixture
def teacher() -> Network:
    return load_network(Model(model="timm/test_vit", image_size=32, pretrained=False), "teacher")


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
    assert values.float().std() > 0.1
    assert values.isfinite().all()


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
