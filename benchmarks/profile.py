"""Where a sweep's time goes, by py-spy over its driver and every process that trials run in.

    python -m benchmarks.profile                               # KD, TDMR and WeCoLoRA; published: 2 minutes
    python -m benchmarks.profile SPEC.yaml --set train.steps=200
    python -m benchmarks.profile SPEC.yaml --stacks stacks.txt  # raw stacks, for a flame graph

Samples of threads that are on a processor, 50 a second; each counts for the innermost part of the sweep that its stack
is in. Of Ray's own processes, what the system says they used. py-spy comes with ray[default] and needs the right to
read other processes' memory (ptrace).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

from benchmarks.record import machine, markdown, publish, quiet_environment, versions
from benchmarks.sweep_against_plain import DEFAULTS, spec_of, trials_of

RATE = 50  # samples a second
# From the innermost part to the outermost; a frame is `function (file:line)`.
PARTS: list[tuple[str, tuple[str, ...]]] = [
    ("reading batches ahead", ("_read (orchestrator/train/feed.py",)),
    ("backward", ("backward (torch/_tensor.py",)),
    ("optimiser", ("step (torch/optim/",)),
    ("forward and loss", ("loss (methods/", "forward (methods/contract/learner.py")),
    ("val metric and probe", ("val_metric (orchestrator/trial/score.py", "fit_probe (", "_probe (orchestrator/trial/")),
    ("FLOPs and memory", ("costs (orchestrator/evaluate/cost.py",)),
    ("latency", ("latency_of (", "latency (orchestrator/evaluate/cost.py")),
    ("evaluation, the rest", ("evaluate (orchestrator/trial/score.py",)),
    (
        "reading images",
        ("open_rgb (orchestrator/data/images.py", "decode (orchestrator/data/images.py", "_scan.<locals>.look ("),
    ),
    (
        "rendering views",
        (
            "rendered_view (",
            "render (orchestrator/data/views.py",
            "one (orchestrator/data/pixels.py",
            "stacked (orchestrator/data/",
        ),
    ),
    ("teacher's forward passes", ("live_outputs (",)),
    ("teacher's pass, the rest", ("entries (orchestrator/data/passes.py",)),
    ("training loop, the rest", ("fit (orchestrator/train/loop.py",)),
    ("loading data and networks", ("load_task (", "load_network (", "_load (orchestrator/models/load.py")),
    ("small solves", ("_fit (orchestrator/trial/run.py",)),
    ("giving memory back", ("release_memory (",)),
    ("imports", ("<frozen importlib", "_find_and_load")),
    ("trials, the rest", ("run_trial (",)),
    ("driver: proposals and ledger", ("orchestrator/sweep/",)),
    ("Ray in the driver and in trials", ("(ray/",)),
]
SERVICES = "Ray's own processes"
# Frames of threads that wait, which py-spy may take for busy.
WAITING = ("Condition.wait (threading.py", "_worker (concurrent/futures/thread.py", "_poll_until_acquired (filelock/")


def part_of(stack: str) -> str:
    """The part of a sweep that a stack `outer;...;inner` is in."""
    frames = stack.split(";")
    for frame in reversed(frames):
        for name, marks in PARTS[:-3]:
            if any(mark in frame for mark in marks):
                return name
    return next((name for name, marks in PARTS[-3:] if any(mark in stack for mark in marks)), "other")


def started_by(pid: int) -> list[psutil.Process]:
    """What the child of a process has started, and what that has; empty where one of the two is gone."""
    try:
        return [process for driver in psutil.Process(pid).children() for process in driver.children(recursive=True)]
    except psutil.Error:
        return []


def sampled(command: list[str], folder: Path) -> tuple[Path, float]:
    """Runs a sweep: (the stacks of its driver and its trials' processes, CPU seconds of all others that it started).

    py-spy finds children by itself, but a worker of Ray replaces its program once after it was started, and what py-spy
    has learnt of it is void then. So each is sampled from when it has its name.
    """
    record = [str(Path(sys.executable).with_name("py-spy")), "record", "--rate", str(RATE), "--format", "raw"]
    said = folder.parent / "said"  # by py-spy and by the sweep: a pipe that nobody reads would fill, and stop both
    samplers: dict[int, subprocess.Popen[bytes]] = {}
    others: dict[int, float] = {}
    with said.open("wb") as words:

        def start(name: str, *rest: str) -> subprocess.Popen[bytes]:
            line = [*record, "-o", str(folder / name), *rest]
            return subprocess.Popen(line, env=quiet_environment(), stdout=subprocess.DEVNULL, stderr=words)

        run = start("driver", "--", *command)
        while run.poll() is None:
            for process in started_by(run.pid):
                try:
                    name = (process.cmdline() or [""])[0]
                    if not name.startswith("ray::") or name.endswith("Agent"):
                        others[process.pid] = sum(process.cpu_times()[:2])
                    elif process.pid not in samplers:
                        samplers[process.pid] = start(str(process.pid), "--pid", str(process.pid))
                except psutil.Error:
                    continue
            time.sleep(0.2)
        for sampler in samplers.values():
            sampler.wait()
    if not (folder / "driver").is_file() or len(list(folder.iterdir())) == 1:
        raise SystemExit(f"py-spy has seen no driver, or no trial: {said.read_text(errors='replace').strip()[-500:]}")
    together = folder / "stacks"
    together.write_text("".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())))
    return together, sum(seconds for pid, seconds in others.items() if pid not in samplers)


def main() -> None:
    """Runs the sweep under py-spy and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", type=Path)
    parser.add_argument("--set", action="append", default=[], help="as of `orchestrator sweep`")
    parser.add_argument("--stacks", type=Path, help="keep the raw stacks here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = options.spec
        if spec is None:
            spec = folder / "profile.yaml"
            spec.write_text(yaml.safe_dump(spec_of({**DEFAULTS, "steps": 60}, trials_of(2, 12), folder)))
        changes = [word for change in options.set for word in ("--set", change)]
        (folder / "stacks").mkdir()
        sweep = ["orchestrator", "sweep", str(spec), "--storage", str(folder), "--json", *changes]
        stacks, services = sampled([sys.executable, "-m", *sweep], folder / "stacks")
        seconds: Counter[str] = Counter({SERVICES: round(services * RATE)})
        for line in stacks.read_text(encoding="utf-8").splitlines():
            stack, _, count = line.rpartition(" ")
            if not stack.rpartition(";")[2].startswith(WAITING):
                seconds[part_of(stack)] += int(count)
        if options.stacks:
            shutil.copyfile(stacks, options.stacks)
    total = sum(seconds.values()) or 1
    rows = [[name, f"{count / RATE:.1f}", f"{100 * count / total:.0f} %"] for name, count in seconds.most_common()]
    print(text := markdown(["part", "CPU seconds", "share"], rows))
    if options.spec is None and not options.set:
        result = {
            "command": "python -m benchmarks.profile",
            "machine": machine(2),
            "versions": versions("torch", "ray"),
        }
        about = f"`{result['command']}`: six trials; {result['machine']}; {result['versions']}."
        publish("profile", {**result, "rate": RATE, "samples": dict(seconds)}, f"{about}\n\n{text}")


if __name__ == "__main__":
    main()
