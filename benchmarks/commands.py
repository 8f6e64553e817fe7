"""How long the commands that people type often take, from the shell.

    python -m benchmarks.commands [SWEEP]      # writes benchmarks/results/; SWEEP: the folder of a sweep that has ended

`best` is timed at its second call: the first one scores the test images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "commands.json"
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
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", nargs="?", type=Path, help="The folder of a sweep that has ended.")
    options = parser.parse_args()
    command = ["-m", "orchestrator"]
    commands = {"--help": [*command, "--help"], "check": [*command, "check", str(SPEC)]}
    if options.sweep is not None:
        commands["best"] = [*command, "best", str(options.sweep.absolute())]
    commands["python -c 'import torch, timm', beside them"] = ["-c", "import torch, timm"]
    rows = {name: timed(words) for name, words in commands.items()}
    print("| command | wall seconds, median (worst) | CPU seconds |")
    print("| --- | --- | --- |")
    for name, row in rows.items():
        print(f"| `{name}` | {row['wall_s']:.2f} ({row['wall_worst_s']:.2f}) | {row['cpu_s']:.2f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    RESULTS.write_text(json.dumps({"machine": machine, "rounds": ROUNDS, "commands": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
