"""How long the commands that people type often take, from the shell.

    python -m benchmarks.commands [SWEEP]    # published; SWEEP: the folder of a sweep that has ended

`best` is timed at its second call: the first one scores the test images.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, machine, markdown, publish

MARK = "commands"
SPEC = ROOT / "search_spaces" / "quickstart.yaml"
ROUNDS = 5


def timed(words: list[str]) -> dict[str, float]:
    """Medians of wall and CPU seconds after one call that warms caches."""
    wall, cpu = [], []
    for turn in range(ROUNDS + 1):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if turn:
            wall.append(time.perf_counter() - began)
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_s": statistics.median(wall), "wall_worst_s": max(wall), "cpu_s": statistics.median(cpu)}


def main() -> None:
    """Times, prints and publishes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", type=Path, help="The folder of a sweep that has ended.")
    options = parser.parse_args()
    command = ["-m", "orchestrator"]
    commands = {"--help": [*command, "--help"], "check": [*command, "check", str(SPEC)]}
    if options.sweep is not None:
        commands["best"] = [*command, "best", str(options.sweep.absolute())]
    commands["python -c 'import torch, timm', beside them"] = ["-c", "import torch, timm"]
    rows = {name: timed(words) for name, words in commands.items()}
    swept = " SWEEP" if options.sweep is not None else ""
    result = {
        "command": f"python -m benchmarks.{MARK}{swept}",
        "machine": machine(1),
        "rounds": ROUNDS,
        "commands": rows,
    }
    print(table(result))
    publish(MARK, result, table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [f"`{name}`", f"{row['wall_s']:.2f} ({row['wall_worst_s']:.2f})", f"{row['cpu_s']:.2f}"]
        for name, row in result["commands"].items()
    ]
    head = ["command", "wall seconds, median (worst)", "CPU seconds"]
    return f"`{result['command']}`: {result['rounds']} rounds; {result['machine']}.\n\n{markdown(head, rows)}"


if __name__ == "__main__":
    main()
