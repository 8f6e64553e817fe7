"""A sweep on a cluster of three nodes, while parts of it are killed: what is lost, repeated, changed or left over.

    python -m benchmarks.chaos --kills 20 --seed 0

Each run is the same sweep twice, with a store of its own each: undisturbed, and under kills of what is asked for:

    trial      a trial's process
    worker     one of a trial's training workers (needs --workers 2)
    node       a raylet with all its workers; another node joins some seconds later
    drained    a node that is asked to go by SIGTERM, as Kubernetes does, and is killed 30 s later
    cluster    every process at once, head and driver too; another cluster takes the sweep up
    driver     the `orchestrator sweep` process, which `orchestrator resume` follows
    publisher  a process that has written a store entry and not yet published it
    frozen     a node that stands still, with all its processes, until it is given up for dead, and then comes back
    cut        a node that the cluster loses sight of: its trials go on to their ends while others begin them anew

Kills are SIGKILL (the last two: SIGSTOP, and SIGCONT when the node has been given up). The seed decides their order,
and at which share of the trials each comes. A kind that finds nobody at the time changes places with the next.
Only processes that this run started are ever signalled: those that carry its mark in their environment, and their
children.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import yaml

from orchestrator.store import Store
from orchestrator.sweep.ledger import FINAL, Ledger
from orchestrator.sweep.ports import answers, free_port

KINDS = ("trial", "worker", "node", "drained", "cluster", "driver", "publisher", "frozen", "cut")
MARK = "CHAOS_RUN"
# What is the same whenever the same configuration is trained: neither times nor what the store happened to hold.
ALIKE = ["trial_id", "number", "method", "teacher", "student", "status", "reason", "config", "seed", "val_metric"]
ALIKE += ["params_total", "params_trained", "flops", "optimizer_steps", "images_seen"]
SETTLE_S = 30
GRACE_S = 30  # of Ray's own, between SIGTERM to a node and its end
STILL_S = 40  # the cluster gives a node up after about 30
WEIGHTS = "model.safetensors"
FOUND = ["lost", "repeated", "different", "processes", "groups", "files", "damaged", "errors"]
SPARED = 2  # kills of one trial's process: a third would end it with a reason


@dataclass
class Kill:
    """One kill.

    Attributes:
        kind: see `KINDS`.
        ended: trials that had ended.
        seconds: since the sweep's start.
        victim: what was killed, in words.
    """

    kind: str
    ended: int
    seconds: float
    victim: str


@dataclass
class Outcome:
    """One run; everything from `lost` on should be empty.

    Attributes:
        trials: ended with a row.
        device_seconds: CPU-seconds that the cluster had allocated, undisturbed and disturbed.
        lost: trials that had ended and have no final row any more.
        repeated: trials whose final row was written again.
        different: trials that differ from the undisturbed run in a column that must not, or in a bit of the student.
        processes, groups, files: left over.
        damaged: files of the store that are not what was published.
        errors: lives of the driver that ended with an error of their own.
    """

    seed: int
    workers: int
    trials: int
    kills: list[Kill]
    device_seconds: tuple[float, float]
    wall_seconds: tuple[float, float]
    lost: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        left = (self.processes, self.groups, self.files, self.damaged)
        return not any((self.lost, self.repeated, self.different, *left, self.errors))


class Machine:
    """A head without CPUs and some nodes, each a `ray start --block` of ours.

    Args:
        folder: for Ray's own files.
        nodes, cpus: how many, with how many CPUs each.
        mark: what every process of it has in its environment.
        patience: seconds after which a silent node is given up; None: as Ray has it.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int, mark: str, patience: int | None = None) -> None:
        self.folder, self.cpus, self.mark = folder, cpus, mark
        self.still = 2 * patience if patience else STILL_S
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: mark}
        self.environment |= {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
        if patience:
            checks = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 500, "failure_threshold": patience}
            self.environment |= {f"RAY_health_check_{name}": str(value) for name, value in checks.items()}
        self.count, self.heads, self.size = 0, 0, nodes
        self.trouble: Exception | None = None
        self.known: dict[int, tuple[str, str]] = {}  # processes of ours: when each started, on which node
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.begin()

    def begin(self) -> None:
        """Starts the head and the nodes."""
        self.heads += 1
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=true"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}", f"--temp-dir={self.folder / 'ray'}"]
        self.head = self._start(f"head{self.heads}", head)
        try:
            self._wait(lambda: self._joined() >= 0)
            for _ in range(self.size):
                self.add()
            self._wait(lambda: self._joined() == self.size)
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        common = ["--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        common += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        with (self.logs / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *common],
                stdout=log,
                stderr=log,
                env=self.environment | {"CHAOS_NODE": name},
                start_new_session=True,
            )

    def add(self) -> str:
        """Starts another node and waits until it runs: two that start at once on one machine take the same sockets."""
        self.count += 1
        name = f"node{self.count}"
        self.nodes[name] = self._start(name, [f"--address={self.address}", f"--num-cpus={self.cpus}"])
        self._wait(lambda: "Ray runtime started" in (self.logs / f"{name}.log").read_text())
        return name

    def _joined(self) -> int:
        """Nodes that have joined; -1 while there is no cluster to ask."""
        if not ray.is_initialized():
            if not answers("127.0.0.1", int(self.address.split(":")[1])):
                return -1
            try:
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # the head is not ready
                self.trouble = error
                return -1
        return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            if time.monotonic() > deadline or self.head.poll() is not None:
                raise TimeoutError(f"The cluster did not start; see {self.logs}.") from self.trouble
            time.sleep(0.2)

    def processes(self, node: str | None = None) -> dict[int, str]:
        """Living processes of this machine (on one node), by id, with their command lines."""
        found: dict[int, tuple[str, str, str]] = {}  # command line, start, node
        parents, strangers = {}, {}
        for pid, parent, start, line, variables in living():
            parents[pid] = parent
            known = self.known.get(pid, ("", ""))
            if f"{MARK}={self.mark}" in variables:
                where = next((v.partition("=")[2] for v in variables if v.startswith("CHAOS_NODE=")), known[1])
                found[pid] = (line, start, where)
            elif known[0] == start:
                found[pid] = (line, start, known[1])
            else:
                strangers[pid] = (line, start, "")
        # A process that names itself writes over its environment. Its parent tells whose it is, and is remembered.
        grown = True
        while grown:
            children = {pid: one for pid, one in strangers.items() if parents.get(pid) in found}
            grown = bool(children)
            for pid, (line, start, _) in children.items():
                found[pid] = (line, start, found[parents[pid]][2])
                del strangers[pid]
        found.pop(os.getpid(), None)
        for pid, (line, start, where) in found.items():
            if not where and parents[pid] in found:
                found[pid] = (line, start, found[parents[pid]][2])
        self.known = {pid: (start, where) for pid, (_, start, where) in found.items()}
        return {pid: line for pid, (line, _, where) in found.items() if node in (None, where)}

    def kill(self, node: str, how: int = signal.SIGKILL) -> None:
        """Signals every process of a node."""
        for pid in self.processes(node):
            send(pid, how)

    def forget(self, node: str) -> None:
        self.nodes.pop(node).wait()

    def crash(self) -> None:
        """Kills all of it."""
        ray.shutdown()
        while running := self.processes():
            for pid in running:
                send(pid, signal.SIGKILL)
        for process in (self.head, *self.nodes.values()):
            process.wait()
        self.nodes.clear()

    def close(self) -> None:
        """Kills what carries the mark."""
        if ray.is_initialized():
            ray.shutdown()
        for process in (self.head, *self.nodes.values()):
            process.terminate()
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in self.processes():
            send(pid, signal.SIGKILL)


def send(pid: int, how: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)


def living() -> Iterator[tuple[int, int, str, str, list[str]]]:
    """Processes that have not ended: id, parent, start, command line, environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                variables: list[str] = []
                with contextlib.suppress(PermissionError):
                    variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if fields[0] != "Z":
                    yield int(folder.name), int(fields[1]), fields[19], line, variables


class Ordeal:
    """One sweep under kills.

    Args:
        machine: the cluster.
        spec: the sweep file's content.
        folder: of the sweep.
        kills: kinds, in order.
        dice: decides when, and who.
        until: when it must be done; the last kills are left out if most of its time has passed before.
    """

    def __init__(
        self,
        machine: Machine,
        file: Path,
        folder: Path,
        kills: list[str],
        trials: int,
        dice: random.Random,
        until: float,
    ):
        self.machine, self.file, self.folder, self.dice, self.until = machine, file, folder, dice, until
        self.ledger = Ledger(folder)
        self.marks = sorted(dice.uniform(0, 0.7 * trials) for _ in kills)  # the last trials end undisturbed
        self.plan = list(kills)
        self.kills: list[Kill] = []
        self.still: set[str] = set()  # nodes that were stopped or asked to go
        self.wounds: dict[str, int] = {}  # kills by trial
        self.writers: dict[str, int | None] = {}  # processes by what they write
        self.finals: dict[str, float] = {}  # when a trial ended, as first seen
        self.lost: set[str] = set()
        self.repeated: set[str] = set()
        self.errors: list[str] = []
        self.later: list[tuple[float, Callable[[], Any]]] = []
        self.device_seconds = 0.0
        self.started = self.sampled = time.monotonic()
        self.lives = 0
        self.driver = self._drive("sweep", str(file))

    def _drive(self, *words: str) -> subprocess.Popen[bytes]:
        self.lives += 1
        log = self.machine.logs / f"driver-{self.folder.parent.name}-{self.lives}.log"
        with log.open("wb") as to:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *words, "--json"],
                stdout=to,
                stderr=to,
                env=self.machine.environment | {"RAY_ADDRESS": self.machine.address, "CHAOS_NODE": "driver"},
            )

    def run(self) -> None:
        """Until the driver has ended by itself."""
        pause, last = 0.0, self.started + 0.6 * (self.until - self.started)
        while (code := self.driver.poll()) is None:
            if time.monotonic() > self.until:
                self.errors.append(f"not done after {self.until - self.started:.0f} s")
                self.driver.kill()
                self.driver.wait()
                return
            self._look()
            for due, act in [one for one in self.later if one[0] <= time.monotonic()]:
                self.later.remove((due, act))
                act()
            if self.plan and pause < time.monotonic() < last and len(self.finals) >= int(self.marks[0]):
                self._kill()
                pause = time.monotonic() + self.dice.uniform(0.5, 4)
            time.sleep(0.05)
        self._look()
        if code != 0:
            self.errors.append(f"the driver's life {self.lives} ended with {code}")
        for _, act in self.later:
            act()

    def _kill(self) -> None:
        """One of the next kind that finds somebody."""
        for kind in dict.fromkeys(self.plan):
            victim = getattr(self, f"_{kind}")()
            if victim:
                self.plan.remove(kind)
                self.marks.pop(0)
                self.kills.append(Kill(kind, len(self.finals), round(time.monotonic() - self.started, 1), victim))
                print(f"  {self.kills[-1]}", file=sys.stderr, flush=True)
                return

    def _look(self) -> None:
        now = time.monotonic()
        if now - self.sampled < 0.5:
            return
        there, free = ray.cluster_resources().get("CPU", 0), ray.available_resources().get("CPU", 0)
        self.device_seconds += max(0.0, there - free) * (now - self.sampled)
        self.sampled = now
        rows = {row["trial_id"]: row for row in Ledger(self.folder).rows() if row["status"] in FINAL}
        for trial, ended in self.finals.items():
            if trial not in rows:
                self.lost.add(trial)
            elif rows[trial]["ended"] != ended:
                self.repeated.add(trial)
        self.finals |= {trial: row["ended"] for trial, row in rows.items() if trial not in self.finals}

    def _running(self) -> list[tuple[str, int]]:
        """Trials that are running, with the process of each."""
        alive = self.machine.processes()
        rows = [row for row in self.ledger.rows() if row["status"] == "running"]
        return [(row["trial_id"], row["pid"]) for row in rows if row["pid"] in alive]

    def _hit(self, trial: str, pid: int) -> str:
        self.wounds[trial] = self.wounds.get(trial, 0) + 1
        send(pid, signal.SIGKILL)
        return f"{trial} (process {pid})"

    def _trial(self) -> str:
        found = [one for one in self._running() if self.wounds.get(one[0], 0) < SPARED]
        return self._hit(*self.dice.choice(found)) if found else ""

    def _worker(self) -> str:
        workers = [pid for pid, line in self.machine.processes().items() if "RayTrainWorker" in line]
        # A group that dies three times ends its trial with a reason: twice, then not before another trial has ended.
        recent = [kill.ended for kill in self.kills if kill.kind == "worker"][-SPARED:]
        if not workers or recent.count(len(self.finals)) == SPARED:
            return ""
        pid = self.dice.choice(workers)
        send(pid, signal.SIGKILL)
        return f"a training worker (process {pid})"

    def _busy(self) -> list[str]:
        """Nodes on which a trial runs, or a training worker of one."""
        running = {pid for _, pid in self._running()}
        return sorted(
            name
            for name in self.machine.nodes
            if any(pid in running or "RayTrainWorker" in line for pid, line in self.machine.processes(name).items())
        )

    def _node(self) -> str:
        busy = self._busy()
        if not busy:
            return ""
        name = self.dice.choice(busy)
        count = len(self.machine.processes(name))
        self.machine.kill(name)
        self.machine.forget(name)
        self.later.append((time.monotonic() + self.dice.uniform(1, 6), self.machine.add))
        return f"{name} with {count} processes"

    def _drained(self) -> str:
        """Ray drains the node when its first process is asked to end, and ends it after `GRACE_S`."""
        busy = [name for name in self._busy() if name not in self.still]
        if not busy:
            return ""
        name = self.dice.choice(busy)
        self.still.add(name)
        self.machine.nodes[name].terminate()
        self.later.append((time.monotonic() + GRACE_S + 5, lambda: self._replace(name)))
        return f"{name}, {GRACE_S} s before its end"

    def _frozen(self) -> str:
        return self._still(lambda line: True)

    def _cut(self) -> str:
        return self._still(lambda line: "raylet/raylet" in line.split(" ")[0])

    def _still(self, stops: Callable[[str], bool]) -> str:
        """Stops those processes of a node for a while."""
        busy = [name for name in self._busy() if name not in self.still]
        if not busy:
            return ""
        name = self.dice.choice(busy)
        self.still.add(name)
        for pid, line in self.machine.processes(name).items():
            if stops(line):
                send(pid, signal.SIGSTOP)

        def back() -> None:
            if name in self.machine.nodes:  # it may have been killed meanwhile
                self.machine.kill(name, signal.SIGCONT)
                self.later.append((time.monotonic() + 5, lambda: self._replace(name)))

        self.later.append((time.monotonic() + self.machine.still, back))
        return f"{name} for {self.machine.still} s"

    def _replace(self, name: str) -> None:
        """A node that came back from the dead has ended itself, and so has one that was drained; another joins."""
        if name in self.machine.nodes:
            self.machine.kill(name)
            self.machine.forget(name)
            self.machine.add()

    def _driver(self) -> str:
        if not (self.folder / "sweep.yaml").exists() or not self._running():
            return ""
        pid = self.driver.pid
        self.driver.kill()
        self.driver.wait()
        self.driver = self._drive("resume", str(self.folder))
        return f"process {pid}"

    def _cluster(self) -> str:
        if not (self.folder / "sweep.yaml").exists() or not self._running():
            return ""
        self.machine.crash()
        self.driver.wait()
        self.later.clear()
        self.machine.begin()
        self.driver = self._drive("resume", str(self.folder))
        return f"head {self.machine.heads - 1}, its nodes and the driver"

    def _publisher(self) -> str:
        """Looks out for an entry that lies written beside the store, and stops its writer before it is published."""
        store = self.folder.parent / "store"
        until = time.monotonic() + 2  # then the driver is looked at again
        while time.monotonic() < until and self.driver.poll() is None:
            for begun in store.glob(".tmp/*"):
                address = begun.name.rsplit("-", 2)[0]  # what follows is its machine and a random word
                if begun.name not in self.writers:  # known before it writes: then it is quick
                    self.writers[begun.name] = self._holder(store / ".locks" / f"{address}.lock")
                pid = self.writers[begun.name]
                # What a dead writer left stays there until the next one comes.
                if pid is None or pid == self.driver.pid or not _holds_files(begun) or not _alive(pid):
                    continue
                send(pid, signal.SIGSTOP)
                if _holds_files(begun) and self._may_die(pid):
                    send(pid, signal.SIGKILL)
                    return f"process {pid}, which had written {address.rpartition('-')[0]} and not published it"
                send(pid, signal.SIGCONT)
            self._look()
            time.sleep(0.0005)
        return ""

    def _may_die(self, pid: int) -> bool:
        """Whether the trial of a process may be killed once more; counts it."""
        trial = next((one for one, process in self._running() if process == pid), None)
        if trial is not None:
            if self.wounds.get(trial, 0) >= SPARED:
                return False
            self.wounds[trial] = self.wounds.get(trial, 0) + 1
        return True

    def _holder(self, lock: Path) -> int | None:
        """The process of ours that holds a lock."""
        for pid in self.machine.processes():
            with contextlib.suppress(OSError):
                for handle in Path(f"/proc/{pid}/fd").iterdir():
                    held = Path(f"/proc/{pid}/fdinfo") / handle.name
                    if os.readlink(handle) == str(lock) and "\nlock:" in held.read_text():
                        return pid
        return None


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _holds_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except FileNotFoundError:  # it is published
        return False


def sweep_file(storage: Path, trials: int, workers: int, seed: int, steps: int) -> dict[str, Any]:
    """Seconds a trial; no batch norm, so that it may have several workers on CPUs."""
    return {
        "name": "wild",
        "task": {"data": "packaged/clipart", "shots": 10},
        "teachers": [{"model": "timm/test_vit", "image_size": 32, "pretrained": False}],
        "students": [{"model": "timm/test_convnext", "image_size": 32, "pretrained": False}],
        "methods": {"finetune": {}, "kd": {"teacher_tuning": "none"}, "rkd": {}},
        "objectives": ["val_metric", "params_total"],
        "search": {"trials": trials, "seed": seed, "concurrency": 3 if workers == 1 else 2},
        "train": {"steps": steps, "batch": 24, "views": 2, "workers": workers, "checkpoint_s": 0.5, "device": "cpu"},
        "storage": str(storage),
    }


def left_over(machine: Machine, folder: Path, outcome: Outcome) -> None:
    """What is still there after the sweep, some seconds being granted to Ray."""
    store = folder.parent / "store"
    files = [*store.glob(".tmp/*"), *store.glob(".partial/*"), *folder.glob(".t*"), *folder.glob(".*.parquet")]
    files += [*(folder / "trials").glob(".*"), *(folder / "trials" / "running").glob("*")]
    outcome.files += sorted(str(path.relative_to(folder.parent)) for path in files)
    kept = Store(store)
    outcome.damaged += [f"{e.stage}/{e.key}/{name}" for e in kept.entries() for name in kept.damaged(e)]
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        groups = [key for key, one in ray.util.placement_group_table().items() if one["state"] != "REMOVED"]
        busy = [f"{pid} {line}" for pid, line in machine.processes().items() if _at_work(line)]
        if not groups and not busy:
            return
        time.sleep(0.5)
    outcome.groups += groups
    outcome.processes += busy


def _at_work(line: str) -> bool:
    """Whether a process does something for a sweep; Ray's agents, and idle ones in its pool, are Ray's to keep."""
    own = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
    return "-m orchestrator" in line or (line.startswith("ray::") and not line.startswith(own))


def compare(calm: Path, wild: Path) -> list[str]:
    """Trials that are not alike."""
    one, two = (pd.read_parquet(folder / "trials.parquet").set_index("trial_id", drop=False) for folder in (calm, wild))
    wrong = sorted(set(one.index) ^ set(two.index))
    for trial in one.index.intersection(two.index):
        for name in ALIKE:
            a, b = one.loc[trial, name], two.loc[trial, name]
            if a != b and not (pd.isna(a) and pd.isna(b)):
                wrong.append(f"{trial}.{name}: {a} became {b}")
        if not all(frame.loc[trial, "student_path"] for frame in (one, two)):
            continue  # its status tells
        bits = [(folder / frame.loc[trial, "student_path"] / WEIGHTS) for folder, frame in ((calm, one), (wild, two))]
        if bits[0].read_bytes() != bits[1].read_bytes():
            wrong.append(f"{trial}: other weights")
    return wrong


def ordeal(
    seed: int,
    kinds: list[str],
    *,
    trials: int,
    workers: int,
    steps: int,
    nodes: int,
    limit: float,
    patience: int | None = None,
    cpus: int = 2,
) -> Outcome:
    """One undisturbed sweep and one under these kills, on a cluster of its own.

    Args:
        seed: of the sweep, of the kills' order, and of when and whom they hit.
        kinds: one for each kill; the seed decides their order.
        limit: seconds for all of it.
        patience: see `Machine`.
    """
    until = time.monotonic() + limit
    dice = random.Random(seed)
    kinds = dice.sample(kinds, len(kinds))
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    machine = Machine(base, nodes, cpus, uuid.uuid4().hex, patience)
    runs: list[Ordeal] = []
    try:
        for name, plan in (("calm", []), ("wild", kinds)):
            (base / name).mkdir()
            file = base / f"{name}.yaml"
            file.write_text(yaml.safe_dump(sweep_file(base / name, trials, workers, seed, steps)))
            runs.append(Ordeal(machine, file, base / name / "wild", plan, trials, dice, until))
            runs[-1].run()
            print(f"{name}: {time.monotonic() - runs[-1].started:.0f} s", file=sys.stderr, flush=True)
        calm, wild = runs
        outcome = Outcome(
            seed=seed,
            workers=workers,
            trials=len(wild.finals),
            kills=wild.kills,
            device_seconds=(round(calm.device_seconds, 1), round(wild.device_seconds, 1)),
            wall_seconds=(round(calm.sampled - calm.started, 1), round(wild.sampled - wild.started, 1)),
            lost=sorted(wild.lost),
            repeated=sorted(wild.repeated),
            errors=calm.errors + wild.errors,
        )
        if not outcome.errors:
            outcome.different += compare(calm.folder, wild.folder)
        left_over(machine, wild.folder, outcome)
        return outcome
    finally:
        machine.close()
        if "outcome" in locals() and outcome.good:
            shutil.rmtree(base, ignore_errors=True)
        else:
            print(f"kept: {base}", *(e for run in runs for e in run.errors), sep="\n", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, spread evenly over the kinds")
    parser.add_argument("--kinds", default="trial,node,driver,publisher", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="a trial's training workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=int, help="seconds until a silent node is given up (Ray's own: about 30)")
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--out", type=Path, help="JSON file to which the outcome is added")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds: {', '.join(unknown)}: allowed are {', '.join(KINDS)}")
    if "CHAOS_AGAIN" not in os.environ:  # Ray reads what its clusters ask for when it is imported: a token of our own
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "CHAOS_AGAIN": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]], os.environ | token)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing stays behind then, either
    plan = [kinds[i % len(kinds)] for i in range(options.kills)]
    outcome = ordeal(
        options.seed,
        plan,
        trials=options.trials,
        workers=options.workers,
        steps=options.steps,
        nodes=options.nodes,
        limit=options.limit,
        patience=options.patience,
    )
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    known.append(asdict(outcome) | {"good": outcome.good})
    if options.out:
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    report(known)
    return 0 if outcome.good else 1


def report(known: list[dict[str, Any]]) -> None:
    """A line for each run, and one for all of them."""
    lines = []
    for one in known:
        kinds = [kill["kind"] for kill in one["kills"]]
        counts = {kind: kinds.count(kind) for kind in KINDS if kind in kinds}
        calm, wild = one["device_seconds"]
        lines.append(
            {"seed": one["seed"], "workers": one["workers"], "trials": one["trials"], "kills": len(kinds)}
            | {"of": " ".join(f"{kind} {n}" for kind, n in counts.items())}
            | {name: len(one[name]) for name in FOUND}
            | {"device s": calm, "under kills": wild}
        )
    table = pd.DataFrame(lines)
    print(table.to_string(index=False))
    every = [kill["kind"] for one in known for kill in one["kills"]]
    of = ", ".join(f"{kind} {every.count(kind)}" for kind in KINDS if kind in every)
    found = table[FOUND].sum().sum()
    print(f"{len(known)} runs, {table['trials'].sum()} trials, {len(every)} kills ({of}); {found} found.")
    calm, wild = table["device s"].sum(), table["under kills"].sum()
    more = (wild - calm) / max(1, len(every))
    print(f"{calm:.0f} device-seconds undisturbed, {wild:.0f} under kills: {more:.1f} more a kill.")


if __name__ == "__main__":
    sys.exit(main())
