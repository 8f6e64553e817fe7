"""Where a sweep's time goes, by py-spy over its driver and every process that it starts.

    python -m benchmarks.profile                               # KD, TDMR and WeCoLoRA; published: 2 minutes
    python -m benchmarks.profile SPEC.yaml --set train.steps=200
    python -m benchmarks.profile SPEC.yaml --stacks stacks.txt  # raw stacks, for a flame graph

Samples of threads that are on a processor, 50 a second; each counts for the innermost part of the sweep that its stack
is in. py-spy comes with ray[default] and needs the right to read other processes' memory (ptrace).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from benchmarks.record import machine, markdown, publish, quiet_environment, versions
from benchmarks.sweep_against_plain import DEFAULTS, spec_of, trials_of

RATE = 50  # samples a second
# From the innermost part to the outermost; a frame is `function (file:line)`.
PARTS: list[tuple[str, tuple[str, ...]]] = [
    ("reading batches ahead", ("_read (orchestrator/train/feed.py",)),
    ("backward", ("backward (torch/_tensor.py",)),
    ("optimiser", ("step (torch/optim/",)),
    ("forward and loss", ("loss (methods/", "forward (methods/contract.py")),
    ("val metric and probe", ("val_metric (orchestrator/trial/score.py", "fit_probe (", "_probe (orchestrator/trial/")),
    ("FLOPs and memory", ("costs (orchestrator/evaluate/cost.py",)),
    ("latency", ("latency_of (", "latency (orchestrator/evaluate/cost.py")),
    ("evaluation, the rest", ("evaluate (orchestrator/trial/score.py",)),
    ("rendering views", ("rendered_view (", "render (orchestrator/data/views.py", "one (orchestrator/data/pixels.py")),
    ("teacher's forward passes", ("live_outputs (",)),
    ("teacher's pass, the rest", ("_pass (orchestrator/data/outputs.py",)),
    ("training loop, the rest", ("fit (orchestrator/train/loop.py",)),
    ("loading data and networks", ("load_task (", "load_network (", "_load (orchestrator/models/load.py")),
    ("small solves", ("_fit (orchestrator/trial/run.py",)),
    ("imports", ("<frozen importlib", "_find_and_load")),
    ("trials, the rest", ("run_trial (",)),
    ("driver: proposals and ledger", ("orchestrator/sweep/",)),
    ("Ray and the dashboard", ("(ray/", "dashboard")),
]


def part_of(stack: str) -> str:
    """The part of a sweep that a stack `outer;...;inner` is in."""
    frames = stack.split(";")
    for frame in reversed(frames):
        for name, marks in PARTS[:-3]:
            if any(mark in frame for mark in marks):
                return name
    return next((name for name, marks in PARTS[-3:] if any(mark in stack for mark in marks)), "other")


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
        stacks = options.stacks or folder / "stacks.txt"
        changes = [word for change in options.set for word in ("--set", change)]
        sweep = ["orchestrator", "sweep", str(spec), "--storage", str(folder), "--json", *changes]
        record = ["py-spy", "record", "--subprocesses", "--rate", str(RATE), "--format", "raw", "-o", str(stacks)]
        command = [*record, "--", sys.executable, "-m", *sweep]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=quiet_environment(), text=True
        )
        if not stacks.is_file():
            raise SystemExit(f"py-spy has written nothing: {done.stderr.strip()[-500:]}")
        seconds: Counter[str] = Counter()
        for line in stacks.read_text(encoding="utf-8").splitlines():
            stack, _, count = line.rpartition(" ")
            seconds[part_of(stack)] += int(count)
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
