"""A training process that is about to be taken away saves its state first."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_resume import RECIPE, Drawn, Small

from orchestrator.train.loop import Checkpoint, fit
from orchestrator.train.notice import watched

pytestmark = pytest.mark.ray
HERE = Path(__file__).parent
LIMIT_S = 60


class Slow(Drawn):
    """Steps of 10 ms; the one that has begun stands in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "step"

    def __call__(self, step: int, device: str) -> Any:
        self.path.write_text(str(step))
        time.sleep(0.01)
        return super().__call__(step, device)


class Worker:
    """An actor whose process trains in a second thread, as those of Ray Tune and Ray Train do."""

    def begin(self, folder: Path) -> int:
        threading.Thread(target=self.train, args=(folder,), daemon=True).start()
        return os.getpid()

    def train(self, folder: Path) -> None:
        import ray

        feeder: Any = Slow(folder)
        kept = Checkpoint(folder / "checkpoint.pt", math.inf)
        with watched([ray.get_runtime_context().get_node_id()]) as notice:
            fit(Small(), feeder, RECIPE, 1_000_000, checkpoint=kept, notice=notice)


@pytest.fixture
def nodes() -> Iterator[tuple[str, list[str]]]:
    """The address of a cluster, and the ids of its two nodes; the second one is the head."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        paths = {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": paths})
        yield cluster.address, [cluster.add_node(num_cpus=1).node_id, cluster.head_node.node_id]
    finally:
        ray.shutdown()
        cluster.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(pid: int) -> bool:
    """True once the process is gone or waits only to be reaped; it may go while it is asked for."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def saved(folder: Path) -> int:
    return int(torch.load(folder / "checkpoint.pt", weights_only=True)["step"])


def test_a_worker_whose_node_is_drained_saves_and_goes_on_and_one_that_is_signalled_saves_its_last_step(
    nodes: tuple[str, list[str]], tmp_path: Path
) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    address, ids = nodes
    folders, workers = [tmp_path / "drained", tmp_path / "signalled"], []
    for folder, node in zip(folders, ids, strict=True):
        folder.mkdir()
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        workers.append(ray.remote(num_cpus=1)(Worker).options(scheduling_strategy=there).remote())
    drained, signalled = folders
    pids = ray.get([w.begin.remote(folder) for w, folder in zip(workers, folders, strict=True)])
    wait_for(lambda: all((folder / "step").exists() for folder in folders))

    command = [str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={address}", f"--node-id={ids[0]}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=60"]
    subprocess.run(command, check=True, capture_output=True)
    wait_for((drained / "checkpoint.pt").exists)
    assert not (signalled / "checkpoint.pt").exists()
    wait_for(lambda: int((drained / "step").read_text() or 0) > saved(drained))

    os.kill(pids[1], signal.SIGTERM)
    wait_for(lambda: ended(pids[1]))
    assert saved(signalled) == int((signalled / "step").read_text()) + 1
