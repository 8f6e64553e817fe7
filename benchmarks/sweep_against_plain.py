"""A sweep of 12 KD and WeCoLoRA trials here, against the same trials in a plain Optuna and PyTorch script.

    python -m benchmarks.sweep_against_plain            # writes benchmarks/results/ and docs/performance.md
    python -m benchmarks.sweep_against_plain --quick    # minutes, nothing written

Same networks, data, steps, batch, two processes of one thread. The peer runs its teacher in every step. Each round runs
both, one after the other, and a second sweep on the store that the first one filled. What is counted is wall time, all
of it: start-up, imports, cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import ray
import timm
import torch
import yaml

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARK = "sweep_against_plain"
SPEC: dict[str, Any] = {
    "name": "ours",
    "task": {"data": "packaged/clipart", "shots": 20},
    "teachers": ["packaged/vit_clipart"],
    "students": [{"model": "timm/test_resnet", "image_size": 48}],
    "methods": {
        "kd": {"temperature": [2.0, 4.0, 8.0], "lr": [1e-3, 3e-3], "weight": 0.5},
        "wecolora": {"factor": [2, 3], "rank": [8, 16, 32]},
    },
    "search": {"trials": 12, "sampler": "grid", "concurrency": 2},
}


def ours(folder: Path, name: str, steps: int, lr_seed: int = 0) -> dict[str, Any]:
    """Wall seconds and rows of one sweep through the command line."""
    spec = SPEC | {"train": {"steps": steps, "batch": 64, "views": 3}, "storage": str(folder)}
    spec["search"] = SPEC["search"] | {"seed": lr_seed}
    path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec))
    began = time.time()
    command = [sys.executable, "-m", "orchestrator", "sweep", str(path), "--name", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    rows = json.loads(done.stdout)
    if {row["status"] for row in rows} != {"complete"}:
        raise SystemExit(f"Not every trial is complete: {[(r['status'], r['reason']) for r in rows]}")
    return {"seconds": time.time() - began, "began": began, "rows": rows}


def plain(folder: Path, steps: int) -> dict[str, Any]:
    """The peer's own account of one run."""
    command = [sys.executable, "-m", "benchmarks.peers.plain_optuna", str(folder), "--steps", str(steps)]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.time() - began}


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}


def outside(rows: list[dict[str, Any]], method: str = "") -> list[float]:
    """Seconds outside the training loop of each warm trial: torch was imported, and its teacher pass was paid."""
    seen: set[int] = set()
    found = []
    for row in sorted(rows, key=lambda r: r["started"]):
        if row["pid"] in seen and row["teacher_forwards"] == 0 and row["method"].startswith(method):
            found.append(row["ended"] - row["started"] - row["loop_seconds"])
        seen.add(row["pid"])
    return found


def between(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds from the end of a trial to the start of the next one in the same process."""
    ended: dict[int, float] = {}
    found = []
    for row in sorted(rows, key=lambda r: r["started"]):
        if row["pid"] in ended:
            found.append(row["started"] - ended[row["pid"]])
        ended[row["pid"]] = row["ended"]
    return found


def main() -> None:
    """Runs the rounds, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="30 steps, one round, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 30, 1
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            first = ours(folder, "first", options.steps, number)
            peer = plain(folder / "plain", options.steps)
            other = ours(folder, "second", options.steps, number + 100)  # another seed: it trains, on stored outputs
            again = ours(folder, "again", options.steps, number)
        rounds.append({"first": first, "plain": peer, "second": other, "again": again})
        print(
            f"round {number}: {first['seconds']:.0f} s here, {peer['seconds']:.0f} s plain", file=sys.stderr, flush=True
        )

    def median(*keys: str) -> float:
        return statistics.median(r[keys[0]]["seconds"] for r in rounds)

    warm = [s for r in rounds for which in ("first", "second") for s in outside(r[which]["rows"])]
    start = [min(row["started"] for row in r["first"]["rows"]) - r["first"]["began"] for r in rounds]
    gaps = [s for r in rounds for which in ("first", "second") for s in between(r[which]["rows"])]
    loop = [sum(row["loop_seconds"] for row in r["first"]["rows"]) for r in rounds]
    result = {
        "steps": options.steps,
        "rounds": options.rounds,
        "command": f"python -m benchmarks.sweep_against_plain --steps {options.steps} --rounds {options.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 2 processes of 1 thread",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"ray {ray.__version__}, optuna {optuna.__version__}",
        "plain_s": median("plain"),
        "ours_first_s": median("first"),
        "ours_second_s": median("second"),
        "ours_again_s": median("again"),
        "ratio_first": median("plain") / median("first"),
        "ratio_second": median("plain") / median("second"),
        "ratio_again": median("plain") / median("again"),
        "outside_loop_s": {
            "median": statistics.median(warm),
            "quartiles": statistics.quantiles(warm, n=4),
            "trials": len(warm),
            "kd_median": statistics.median(
                s for r in rounds for w in ("first", "second") for s in outside(r[w]["rows"], "kd")
            ),
            "wecolora_median": statistics.median(
                s for r in rounds for w in ("first", "second") for s in outside(r[w]["rows"], "wecolora")
            ),
        },
        "between_trials_s": statistics.median(gaps),
        "cold_start_s": statistics.median(start),
        "loop_s": statistics.median(loop),
        "teacher_images": {
            "ours": [sum(row["teacher_forwards"] for row in r["first"]["rows"]) for r in rounds],
            "plain": 12 * options.steps * 64,
        },
        "val": {
            "plain": rounds[0]["plain"]["val"],
            "ours": {row["config"]: row["val_metric"] for row in rounds[0]["first"]["rows"]},
        },
    }
    print(
        f"12 trials of {options.steps} steps x 64 images, median of {options.rounds} rounds; {result['versions']}\n"
        f"plain Optuna + PyTorch, live teacher   {result['plain_s']:7.1f} s\n"
        f"here, empty store                      {result['ours_first_s']:7.1f} s   {result['ratio_first']:.2f}x\n"
        f"here, another seed on the same store   {result['ours_second_s']:7.1f} s   {result['ratio_second']:.2f}x\n"
        f"here, the same file again              {result['ours_again_s']:7.1f} s   {result['ratio_again']:.2f}x\n"
        f"outside the training loop, a warm trial: median {statistics.median(warm):.2f} s ({len(warm)} trials)\n"
        f"from the command to the first trial: {result['cold_start_s']:.1f} s"
    )
    if options.quick:
        return
    target = Path(__file__).parent / "results" / f"{MARK}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    block = f"<!-- {MARK} -->\n{table(result)}\n<!-- end -->"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(rf"<!-- {MARK} -->.*?<!-- end -->", lambda _: block, page, flags=re.S), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    warm = result["outside_loop_s"]
    images = statistics.median(result["teacher_images"]["ours"])
    lines = [
        f"`{result['command']}`: 12 trials of {result['steps']} steps x 64 images, median of {result['rounds']} "
        f"rounds; {result['machine']}; {result['versions']}.",
        "",
        "| | wall seconds | against the plain script |",
        "| --- | --- | --- |",
        f"| plain Optuna + PyTorch, live teacher | {result['plain_s']:.0f} | 1 |",
        f"| here, empty store | {result['ours_first_s']:.0f} | {result['ratio_first']:.2f} x |",
        f"| here, another seed on the same store | {result['ours_second_s']:.0f} | {result['ratio_second']:.2f} x |",
        f"| here, the same file again | {result['ours_again_s']:.0f} | {result['ratio_again']:.2f} x |",
        "",
        f"From the command to the first trial: {result['cold_start_s']:.1f} s. Between two trials of a process: "
        f"{result['between_trials_s']:.2f} s. Outside the training loop, a warm trial (imports done, teacher outputs "
        f"there): median {warm['median']:.2f} s of {warm['trials']} trials; KD {warm['kd_median']:.2f} s, WeCoLoRA "
        f"{warm['wecolora_median']:.2f} s, nearly all of it the evaluation. Images that the teacher saw: "
        f"{images:,.0f} here, {result['teacher_images']['plain']:,} there.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
