"""What dies, what is frozen, and what comes back: nothing is lost, and nothing ends twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import small_spec

from orchestrator.data.task import load_task
from orchestrator.files import once
from orchestrator.store import Store
from orchestrator.sweep import tune
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.study import Study
from orchestrator.train.loop import Checkpoint


def row(trial: str, status: str, **more: Any) -> dict[str, Any]:
    return {"trial_id": trial, "status": status, "teacher": None, "student": "s", "val_metric": 0.5} | more


def test_the_first_end_of_a_trial_stands_whoever_ends_it_again(tmp_path: Path) -> None:
    here, there = Ledger(tmp_path), Ledger(tmp_path)  # two processes, one of them given up for dead
    here.write(row("t0000", "running"))
    there.write(row("t0000", "running"))
    there.write(row("t0000", "failed", reason="its process died 3 times"))
    here.write(row("t0000", "complete"))
    here.write(row("t0000", "running"))
    for ledger in (here, there, Ledger(tmp_path)):
        assert [r["status"] for r in ledger.rows()] == ["failed"]
    assert [p.name for p in sorted((tmp_path / "trials").rglob("*")) if p.is_file()] == ["t0000.json"]


def test_of_many_that_write_at_once_one_is_whole_and_stays(tmp_path: Path) -> None:
    path, go, seen = tmp_path / "one.json", threading.Barrier(16), set()

    def write(number: int) -> None:
        go.wait()
        once(path, lambda to: to.write_text(json.dumps([number] * 2000)))
        seen.add(path.read_text())

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1
    assert len(set(json.loads(seen.pop()))) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_trial_remembers_where_it_was_begun_until_a_new_driver_begins_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.live("t0001", "a") == []
    assert ledger.live("t0001", "b") == ["a"]
    assert Ledger(tmp_path).live("t0001", "a") == ["a", "b"]
    ledger.revive("t0001")
    assert ledger.live("t0001", "c") == []


def test_a_death_is_not_counted_when_its_node_turns_out_dead_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def nodes() -> list[dict[str, Any]]:  # the second node's death is noticed at the third look
        looks.append(1)
        return [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": len(looks) < 3}]

    here = SimpleNamespace(get_node_id=lambda: "a")
    monkeypatch.setattr(tune, "ray", SimpleNamespace(nodes=nodes, get_runtime_context=lambda: here))
    monkeypatch.setattr(tune, "draining", frozenset)
    monkeypatch.setattr(tune, "GONE_S", 5.0)
    ledger = Ledger(tmp_path)
    for node in ("a", "a", "b"):
        ledger.live("t0000", node)
    assert tune._deaths(ledger, "t0000") == 2
    assert len(looks) == 3
    monkeypatch.setattr(tune, "GONE_S", 0.0)
    assert tune._deaths(ledger, "t0000") == 3  # what it says of four lives: the last one on "a" has died, too


def test_a_resumed_sweep_proposes_as_many_trials_at_a_time_as_when_it_began(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    task = load_task(spec.task, Store(tmp_path / "store"))
    assert Study(spec, tmp_path, [], {}, task.info).keep("concurrency", 3) == 3
    assert Study(spec, tmp_path, [], {}, task.info).keep("concurrency", 1) == 3  # though two of its nodes are gone


@pytest.mark.parametrize("damage", ["cut", "empty", "scribbled", "another"])
def test_a_damaged_checkpoint_is_removed_and_training_begins_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint = Checkpoint(path, 1.0)
    checkpoint.save({"step": 7, "moving": {"w": torch.arange(4000.0)}})
    state = checkpoint.load()
    assert state is not None
    assert state["step"] == 7
    whole = path.read_bytes()
    middle = len(whole) // 2
    spoilt = {
        "cut": whole[:middle],
        "empty": b"",
        "scribbled": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "another": b"not a checkpoint" * 100,
    }[damage]
    path.write_bytes(spoilt)
    with pytest.warns(UserWarning, match=r"checkpoint\.pt.*damaged"):
        assert checkpoint.load() is None
    assert not path.exists()
    checkpoint.save({"step": 8})
    assert checkpoint.load() == {"step": 8}


@pytest.mark.slow  # minutes; deaths one by one are in test_sweep.py, test_scale.py and test_study_storage.py
@pytest.mark.ray
def test_nothing_is_lost_repeated_changed_or_left_over_when_a_process_a_publisher_and_the_driver_are_killed(
    tmp_path: Path,
) -> None:
    words = ["--kills", "3", "--trials", "4", "--kinds", "trial,publisher,driver", "--nodes", "1", "--seed", "1"]
    out = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "benchmarks.chaos", *words, "--steps", "200", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (outcome,) = json.loads(out.read_text())
    assert outcome["trials"] == 4
    assert {kill["kind"] for kill in outcome["kills"]} >= {"driver"}
