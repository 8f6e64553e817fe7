"""What the driver of a sweep costs for each trial, and whether that grows: sweeps of instantaneous trials.

    python -m benchmarks.driver                       # 10, 100 and 1,000 trials; published
    python -m benchmarks.driver --sizes 10 100        # minutes

Each trial is one configuration that the store holds already, so that it takes milliseconds. Counted from outside: CPU
seconds and resident memory of the driver's process, wall seconds between the ends of trials. There is nothing to search
in these sweeps, so what a proposal takes is counted by itself: of the default search over six methods' own spaces, with
as many results, and with a limit that some of them break.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import command_of, machine, markdown, publish, quiet_environment, versions

MARK = "driver"
TICK = os.sysconf("SC_CLK_TCK")
SPEC: dict[str, Any] = {
    "name": "driver",
    "task": {"data": "packaged/clipart", "shots": 5},
    "students": [{"model": "timm/test_resnet", "image_size": 48}],
    "methods": {"linear_probe": {}},
    "train": {"steps": 1, "batch": 16, "views": 1},
}


def used(pid: int) -> tuple[float, int]:
    """(CPU seconds, resident bytes) of a process."""
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(stat[11]) + int(stat[12])) / TICK, int(stat[21]) * os.sysconf("SC_PAGE_SIZE")


def watched(folder: Path, trials: int) -> dict[str, Any]:
    """Runs one sweep and samples its driver at every tenth of its trials."""
    search = {"trials": trials, "concurrency": 1, "defaults_first": False}
    spec = SPEC | {"search": search, "storage": str(folder), "name": f"driver-{trials}"}
    path = folder / f"{trials}.yaml"
    path.write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "orchestrator", "sweep", str(path), "--json"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quiet_environment())
    rows = folder / f"driver-{trials}" / "trials"
    points: list[dict[str, float]] = []
    while driver.poll() is None:
        done = sum(1 for _ in rows.glob("t*.json")) if rows.is_dir() else 0
        if done >= (len(points) + 1) * trials / 10 or (done and not points):
            seconds, resident = used(driver.pid)
            points.append({"trials": done, "wall_s": time.monotonic(), "cpu_s": seconds, "mb": resident / 1e6})
        time.sleep(0.05)
    if driver.returncode != 0 or len(points) < 2:
        raise SystemExit(f"The sweep of {trials} trials ended with exit code {driver.returncode}.")
    steps = list(itertools.pairwise(points))

    def each(what: str) -> list[float]:
        return [1000 * (b[what] - a[what]) / (b["trials"] - a["trials"]) for a, b in steps if b["trials"] > a["trials"]]

    cpu, wall = each("cpu_s"), each("wall_s")
    return {
        "trials": trials,
        "cpu_ms_first": cpu[0],
        "cpu_ms_last": cpu[-1],
        "wall_ms_first": wall[0],
        "wall_ms_last": wall[-1],
        "mb_first": points[0]["mb"],
        "mb_last": points[-1]["mb"],
        "points": points,
    }


def proposals(sizes: list[int]) -> list[dict[str, float]]:
    """CPU milliseconds of a proposal, median of the last five before each number of results."""
    from benchmarks.search_ranges import spec_of
    from orchestrator.sweep.run import prepare
    from orchestrator.sweep.study import Study

    dice = random.Random(0)
    taken: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        spec = spec_of(Path(name), "gp", 0)
        spec = spec.model_copy(update={"limits": spec.limits.model_copy(update={"latency_ms": 5.0})})
        prepared = prepare(spec_of(Path(name), "gp", 0), dry=True)
        study = Study(spec, Path(name), prepared.cells, prepared.spaces, prepared.task.info)
        for _ in range(max(sizes)):
            began = time.process_time()
            config = study.ask()
            taken.append(1000 * (time.process_time() - began))
            row = {"status": "complete", "val_metric": dice.random(), "latency_ms": dice.uniform(0, 6)}
            study.tell(config.number, row)
    return [{"results": size, "cpu_ms": statistics.median(taken[max(0, size - 5) : size])} for size in sizes]


def main() -> None:
    """Runs the sizes, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = [watched(Path(name), trials) for trials in options.sizes]
    result = {
        "command": command_of(MARK, parser, options),
        "machine": machine(1),
        "versions": versions("ray", "optuna"),
        "sizes": found,
        "proposals": proposals(options.sizes),
    }
    print(table(result))
    publish(MARK, result, table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [
            f"{row['trials']:,}",
            f"{row['cpu_ms_first']:.0f}, {row['cpu_ms_last']:.0f}",
            f"{row['wall_ms_first']:.0f}, {row['wall_ms_last']:.0f}",
            f"{row['mb_first']:.0f} to {row['mb_last']:.0f}",
        ]
        for row in result["sizes"]
    ]
    head = ["trials", "CPU ms a trial, first and last tenth", "wall ms a trial", "driver's memory, MB"]
    asked = [[f"{one['results']:,}", f"{one['cpu_ms']:.0f}"] for one in result["proposals"]]
    return (
        f"`{result['command']}`: {result['machine']}; {result['versions']}.\n\n{markdown(head, rows)}\n\n"
        f"{markdown(['results', 'a proposal, CPU ms'], asked)}"
    )


if __name__ == "__main__":
    main()
