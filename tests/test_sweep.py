"""Whole sweeps as a user starts them, on a local cluster of their own or on one that they join."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from local_cluster import head
from small import small_spec

from orchestrator.data.task import load_task
from orchestrator.spec import SweepSpec
from orchestrator.store import Store
from orchestrator.sweep.ledger import FINAL, Ledger

pytestmark = pytest.mark.ray
LIMIT_S = 400


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster that sweeps join."""
    with head(4) as address:
        yield address


def command(*words: str, cluster: str | None = None) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment |= {"RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"} if cluster else {}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def done(process: subprocess.Popen[str]) -> str:
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # it takes its cluster with it
        process.communicate()
        raise
    assert process.returncode == 0, err[-2000:]
    return out


def write(spec: SweepSpec, path: Path) -> str:
    path.write_text(spec.to_yaml())
    return str(path)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.stderr.read()[-2000:] if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_same_file_again_is_all_store_hits_and_the_teacher_saw_each_view_once(
    colours: Path, tmp_path: Path
) -> None:
    kd = {"teacher_tuning": "none", "temperature": {"low": 1, "high": 8, "log": True}}  # a tuned one is another teacher
    methods = {"finetune": {}, "kd": kd, "wecolora": {"rank": [4, 8], "factor": 2, "target": "prenorm"}}
    spec = small_spec(colours, tmp_path / "runs", methods=methods, search={"trials": 7})
    file = write(spec, tmp_path / "spec.yaml")
    first = json.loads(done(command("sweep", file, "--json")))
    assert [r["status"] for r in first] == ["complete"] * 7, [r["reason"] for r in first]
    task = load_task(spec.task, Store(tmp_path / "runs" / "store"))
    images = len(task.train)
    assert sum(r["teacher_forwards"] for r in first) == images * spec.train.views
    again = json.loads(done(command("sweep", file, "--name", "again", "--json")))
    assert [r["config"] for r in again] == [r["config"] for r in first]
    assert [r["val_metric"] for r in again] == [r["val_metric"] for r in first]
    assert sum(r["store_misses"] for r in again) == 0
    assert sum(r["teacher_forwards"] for r in again) == 0
    table = pd.read_parquet(tmp_path / "runs" / "small" / "trials.parquet")
    assert list(table["trial_id"]) == [f"t{i:04}" for i in range(7)]
    best = json.loads(done(command("best", str(tmp_path / "runs" / "small"), "--json")))
    assert best["val_metric"] == table["val_metric"].max()
    assert best["test"]["images"] == len(task.test)
    verified = json.loads(done(command("store", "verify", str(tmp_path / "runs"), "--json")))
    assert verified["damaged"] == []
    assert verified["compared"] >= 4


def test_a_killed_driver_is_resumed_without_losing_or_repeating_a_trial(
    colours: Path, tmp_path: Path, cluster: str
) -> None:
    train = {"steps": 40, "batch": 12, "views": 2}
    spec = small_spec(colours, tmp_path / "runs", train=train, search={"trials": 8, "concurrency": 2})
    folder = tmp_path / "runs" / "small"
    process = command("sweep", write(spec, tmp_path / "spec.yaml"), cluster=cluster)
    wait_for(lambda: sum(r["status"] in FINAL for r in Ledger(folder).rows()) >= 3, process)
    process.kill()
    process.communicate()
    before = {r["trial_id"]: r for r in Ledger(folder).rows() if r["status"] in FINAL}
    after = {r["trial_id"]: r for r in json.loads(done(command("resume", str(folder), "--json", cluster=cluster)))}
    assert sorted(after) == [f"t{i:04}" for i in range(8)]
    assert {r["status"] for r in after.values()} == {"complete"}
    for trial_id, row in before.items():
        assert after[trial_id]["ended"] == row["ended"], f"{trial_id} was repeated"


def test_a_killed_trial_process_is_run_again_to_one_complete_row(colours: Path, tmp_path: Path, cluster: str) -> None:
    train = {"steps": 400, "batch": 12, "views": 2, "checkpoint_s": 0.5}
    spec = small_spec(colours, tmp_path / "runs", train=train, methods={"finetune": {}}, search={"trials": 2})
    folder = tmp_path / "runs" / "small"
    process = command("sweep", write(spec, tmp_path / "spec.yaml"), "--json", cluster=cluster)
    partial = tmp_path / "runs" / "store" / ".partial"
    wait_for(lambda: list(partial.glob("*/checkpoint.pt")), process)
    victim = next(r for r in Ledger(folder).rows() if r["status"] == "running" and r["pid"])
    os.kill(victim["pid"], signal.SIGKILL)
    rows = json.loads(done(process))
    assert [(r["trial_id"], r["status"]) for r in rows] == [("t0000", "complete"), ("t0001", "complete")]
    killed = next(r for r in rows if r["trial_id"] == victim["trial_id"])
    assert killed["pid"] != victim["pid"]
    assert killed["optimizer_steps"] == 400
    assert not list((tmp_path / "runs" / "store" / ".tmp").glob("finetune-*"))


def test_early_stopped_trials_are_pruned_with_a_reason_and_say_how_far_they_came(
    colours: Path, tmp_path: Path, cluster: str
) -> None:
    spec = small_spec(
        colours,
        tmp_path / "runs",
        methods={"finetune": {"lr": [0.003, 1e-6, 2e-6, 3e-6, 4e-6]}},
        search={"trials": 5, "sampler": "grid", "scheduler": "asha", "reduction": 2, "concurrency": 1},
        train={"steps": 80, "batch": 12, "views": 2},
    )
    rows = json.loads(done(command("sweep", write(spec, tmp_path / "spec.yaml"), "--json", cluster=cluster)))
    states = {r["status"] for r in rows}
    assert states == {"complete", "pruned"}, [(r["status"], r["reason"]) for r in rows]
    for row in rows:
        if row["status"] == "pruned":
            assert row["reason"].startswith("stopped by asha at ")
            assert row["student_path"] == ""


def test_a_group_that_is_stopped_early_is_pruned_and_gives_everything_back(colours: Path, tmp_path: Path) -> None:
    import ray
    from ray.util import placement_group_table

    from orchestrator.sweep.cluster import start_ray
    from orchestrator.sweep.folder import create
    from orchestrator.sweep.run import prepare, run

    spec = small_spec(
        colours,
        tmp_path / "runs",
        methods={"finetune": {"lr": [0.003, 1e-6, 2e-6]}},
        search={"trials": 3, "sampler": "grid", "scheduler": "asha", "reduction": 2, "concurrency": 1},
        train={"steps": 80, "batch": 12, "views": 2, "workers": 2},
    )
    start_ray(1)
    try:
        folder = create(spec)
        run(prepare(spec), folder)
        rows = Ledger(folder).rows()
        assert [r["status"] for r in rows] == ["complete", "pruned", "pruned"], [r["reason"] for r in rows]
        for row in rows[1:]:
            assert row["reason"].startswith("stopped by asha at ")
            assert float(row["reason"].split(" at ")[1].split("%")[0]) < 60  # its work was stopped, not only its name
            assert 0 < row["val_metric"] < rows[0]["val_metric"]
            assert row["student_path"] == ""
            assert (folder / "trials" / f"{row['trial_id']}.loss.jsonl").is_file()  # the first rank's curve is kept
        (trained,) = (tmp_path / "runs" / "store" / "finetune").iterdir()  # nothing of a stopped one is published
        assert (trained / "meta.json").is_file()
        cpus = ray.cluster_resources()["CPU"]
        deadline = time.monotonic() + LIMIT_S
        while ray.available_resources().get("CPU", 0) < cpus:
            assert time.monotonic() < deadline, "a stopped group still holds CPUs"
            time.sleep(0.2)
        assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    finally:
        ray.shutdown()


def test_two_sweeps_at_once_on_one_cluster_share_the_store_and_nothing_else(
    colours: Path, tmp_path: Path, cluster: str
) -> None:
    import optuna

    methods = {"kd": {"temperature": [2.0, 4.0], "teacher_tuning": "none"}, "wecolora": {"rank": 4, "factor": 2}}
    spec = small_spec(colours, tmp_path / "runs", methods=methods, search={"trials": 3, "sampler": "grid"})
    file = write(spec, tmp_path / "spec.yaml")
    both = [command("sweep", file, "--name", name, "--json", cluster=cluster) for name in ("one", "two")]
    rows = [json.loads(done(process)) for process in both]
    began = [min(r["started"] for r in of_one) for of_one in rows]
    assert max(began) < min(max(r["ended"] for r in of_one) for of_one in rows), "they did not run at once"
    for name, of_one in zip(("one", "two"), rows, strict=True):
        assert [(r["trial_id"], r["status"]) for r in of_one] == [(f"t000{i}", "complete") for i in range(3)]
        study = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / name / "study.db"))
        )
        (held,) = study.get_all_studies()
        assert [t.state.name for t in study.get_all_trials(held._study_id)] == ["COMPLETE"] * 3
    assert not {r["pid"] for r in rows[0]} & {r["pid"] for r in rows[1]}
    assert [r["val_metric"] for r in rows[0]] == [r["val_metric"] for r in rows[1]]
    task = load_task(spec.task, Store(tmp_path / "runs" / "store"))
    together = rows[0] + rows[1]
    assert sum(r["teacher_forwards"] for r in together) == len(task.train) * spec.train.views
    entries = Store(tmp_path / "runs" / "store").entries()
    assert sum(r["store_misses"] for r in together) <= len(entries)  # what one of them made, the other found
