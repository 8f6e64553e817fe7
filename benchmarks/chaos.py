"""A sweep on a cluster of three nodes, while parts of it are killed: what is lost, repeated, changed or left over.

    python -m benchmarks.chaos --kills 20 --seed 0

Each run is the same sweep twice, with a store of its own each: undisturbed, and under kills of what is asked for:

    trial      a trial's process
    worker     one of a trial's training workers (needs --workers 2)
    node       a raylet with all its workers; another node joins some seconds later
    driver     the `orchestrator sweep` process, which `orchestrator resume` follows
    publisher  a process that has written a store entry and not yet published it
    frozen     a node that stands still until it is given up for dead and its trials run elsewhere, and then comes back

Kills are SIGKILL, in an order that the seed decides, each when a share of the trials has ended that the seed decides.
Only processes that this run started are ever signalled: those that carry its mark in their environment, and their
children.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
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

from orchestrator.sweep.ledger import FINAL, Ledger

KINDS = ("trial", "worker", "node", "driver", "publisher", "frozen")
MARK = "CHAOS_RUN"
# What is the same whenever the same configuration is trained: neither times nor what the store happened to hold.
ALIKE = ["trial_id", "number", "method", "teacher", "student", "status", "reason", "config", "seed", "val_metric"]
ALIKE += ["params_total", "params_trained", "flops", "optimizer_steps", "images_seen"]
LIMIT_S = 1800
SETTLE_S = 30
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
    """One run; every count but the first four should be 0.

    Attributes:
        trials: ended with a row.
        device_seconds: CPU-seconds that the cluster had allocated, undisturbed and disturbed.
        lost: trials that had ended and have no final row any more.
        repeated: trials whose final row was written again.
        different: trials that differ from the undisturbed run in a column that must not.
        processes, groups, files: left over.
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
    errors: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        found = (self.lost, self.repeated, self.different, self.processes, self.groups, self.files, self.errors)
        return not any(found)


class Machine:
    """A head without CPUs and some nodes, each a `ray start --block` of ours.

    Args:
        folder: for Ray's own files.
        nodes, cpus: how many, with how many CPUs each.
        mark: what every process of it has in its environment.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int, mark: str) -> None:
        self.folder, self.cpus, self.mark = folder, cpus, mark
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: mark}
        self.environment |= {"OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
        self.address = f"127.0.0.1:{free_port()}"
        self.count = 0
        self.trouble: Exception | None = None
        self.known: dict[int, tuple[str, str]] = {}  # processes of ours: when each started, on which node
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        port = self.address.split(":")[1]
        head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=true"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}", f"--temp-dir={folder / 'ray'}"]
        self.head = self._start("head", head)
        try:
            self._wait(lambda: self._joined() >= 0)
            for _ in range(nodes):
                self.add()
            self._wait(lambda: self._joined() == nodes)
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
            with contextlib.closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", int(self.address.split(":")[1]))):
                    return -1
            try:
                ray.init(self.address, log_to_driver=False, logging_level="ERROR")
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    """

    def __init__(self, machine: Machine, file: Path, folder: Path, kills: list[str], trials: int, dice: random.Random):
        self.machine, self.file, self.folder, self.dice = machine, file, folder, dice
        self.ledger = Ledger(folder)
        marks = sorted(dice.uniform(0, trials - 1) for _ in kills)
        self.plan = list(zip(kills, marks, strict=True))
        self.kills: list[Kill] = []
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
        deadline = time.monotonic() + LIMIT_S
        pause = 0.0
        while (code := self.driver.poll()) is None:
            if time.monotonic() > deadline:
                self.errors.append(f"not done after {LIMIT_S} s")
                self.driver.kill()
                self.driver.wait()
                return
            self._look()
            for due, act in [one for one in self.later if one[0] <= time.monotonic()]:
                self.later.remove((due, act))
                act()
            if self.plan and time.monotonic() > pause and len(self.finals) >= int(self.plan[0][1]):
                kind = self.plan[0][0]
                victim = getattr(self, f"_{kind}")()
                if victim:
                    self.plan.pop(0)
                    self.kills.append(Kill(kind, len(self.finals), time.monotonic() - self.started, victim))
                    print(f"  {self.kills[-1]}", file=sys.stderr, flush=True)
                    pause = time.monotonic() + self.dice.uniform(0.5, 4)
            time.sleep(0.05)
        self._look()
        if code != 0:
            self.errors.append(f"the driver's life {self.lives} ended with {code}")
        for _, act in self.later:
            act()

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

    def _frozen(self) -> str:
        busy = self._busy()
        if not busy:
            return ""
        name = self.dice.choice(busy)
        # Only its raylet: as if cut off from the cluster, its trials go on and end.
        for pid, line in self.machine.processes(name).items():
            if "raylet/raylet" in line.split(" ")[0]:
                send(pid, signal.SIGSTOP)

        def back() -> None:
            for pid in self.machine.processes(name):
                send(pid, signal.SIGCONT)
            self.later.append((time.monotonic() + 5, lambda: self._replace(name)))

        self.later.append((time.monotonic() + 40, back))
        return f"{name} for 40 s"

    def _replace(self, name: str) -> None:
        """A node that came back from the dead has ended itself; another joins."""
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
                if pid is None or pid == self.driver.pid or not _holds_files(begun):
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
    return wrong


def ordeal(seed: int, kinds: list[str], *, trials: int, workers: int, steps: int, nodes: int, cpus: int = 2) -> Outcome:
    """One undisturbed sweep and one under these kills, on a cluster of its own.

    Args:
        seed: of the sweep, of the kills' order, and of when and whom they hit.
        kinds: one for each kill; the seed decides their order.
    """
    dice = random.Random(seed)
    kinds = dice.sample(kinds, len(kinds))
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    machine = Machine(base, nodes, cpus, uuid.uuid4().hex)
    try:
        runs = []
        for name, plan in (("calm", []), ("wild", kinds)):
            (base / name).mkdir()
            file = base / f"{name}.yaml"
            file.write_text(yaml.safe_dump(sweep_file(base / name, trials, workers, seed, steps)))
            runs.append(Ordeal(machine, file, base / name / "wild", plan, trials, dice))
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
            print(f"kept: {base}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, spread evenly over the kinds")
    parser.add_argument("--kinds", default="trial,node,driver,publisher", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="a trial's training workers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to which the outcome is added")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds: {', '.join(unknown)}: allowed are {', '.join(KINDS)}")
    if "CHAOS_AGAIN" not in os.environ:  # Ray reads what its clusters ask for when it is imported: a token of our own
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "CHAOS_AGAIN": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]], os.environ | token)
    plan = [kinds[i % len(kinds)] for i in range(options.kills)]
    outcome = ordeal(
        options.seed,
        plan,
        trials=options.trials,
        workers=options.workers,
        steps=options.steps,
        nodes=options.nodes,
    )
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    known.append(asdict(outcome) | {"good": outcome.good})
    if options.out:
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    report(known)
    return 0 if outcome.good else 1


def report(known: list[dict[str, Any]]) -> None:
    """A line for each run."""
    lines = []
    for one in known:
        kinds = [kill["kind"] for kill in one["kills"]]
        counts = {kind: kinds.count(kind) for kind in KINDS if kind in kinds}
        calm, wild = one["device_seconds"]
        lines.append(
            {"seed": one["seed"], "workers": one["workers"], "trials": one["trials"], "kills": len(kinds)}
            | {"of": " ".join(f"{kind} {n}" for kind, n in counts.items())}
            | {name: len(one[name]) for name in ("lost", "repeated", "different", "processes", "groups", "files")}
            | {"errors": len(one["errors"]), "device s": calm, "under kills": wild}
        )
    print(pd.DataFrame(lines).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
