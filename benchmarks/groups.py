"""What a group of two workers costs a trial beside its training loop, and how fast the loop is.

    python -m benchmarks.groups            # minutes; writes benchmarks/results/ and docs/performance.md
    python -m benchmarks.groups --quick    # one round, nothing written
    python -m benchmarks.groups --networks test_convnext resnet18 --data packaged/icons   # written nowhere

By turns, on the same two cores and the same images, student, batch and steps: a plain `TorchTrainer`, torchrun of the
same plain loop, and ours: the first job of a group and later ones. Then whole trials, one after another: a
`TorchTrainer` nested in Tune's trials as Ray's documentation shows it, and a sweep of ours, evaluation included. What a
job or trial costs is its wall time less the time inside its loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import yaml

from benchmarks.peers.plain_ddp import SIZE, fit, trial
from benchmarks.record import command_of, machine, publish, timm_name, versions

MARK = "groups"
LATER = 2  # jobs of a group after its first
LARGER = 8  # steps of a larger network are so many times fewer


NETWORKS = ("test_vit", "vit_tiny_patch16_224")


def spec_of(folder: Path, options: argparse.Namespace, trials: int, network: str) -> dict[str, Any]:
    return {
        "name": "ours",
        "task": {"data": options.data, "shots": None},  # the plain loop trains on every image of train
        "students": [{"model": f"timm/{network}", "image_size": SIZE, "pretrained": False}],
        "methods": {"finetune": {}},
        "search": {"trials": trials, "sampler": "random", "concurrency": 1, "defaults_first": False},
        "train": {
            "steps": options.steps,
            "batch": options.batch,
            "views": 2,
            "workers": 2,
            "sync_batchnorm": False,  # plain DDP has none
        },
        "storage": str(folder),
    }


class Ours:
    """Jobs of trials on the runner that a trial's process has."""

    def __init__(self, folder: Path, options: argparse.Namespace, network: str) -> None:
        from orchestrator.spec import parse_spec
        from orchestrator.train.group import GroupRunner
        from orchestrator.trial.context import SweepContext

        spec = parse_spec(spec_of(folder, options, 1, network))
        self.context = SweepContext(spec, str(folder / "ours"))
        self.runner, self.count = GroupRunner(self.context), itertools.count()

    def job(self) -> dict[str, float]:
        """Wall seconds of one training job and those of its loop."""
        from orchestrator.trial.plan import Cell, TrialConfig
        from orchestrator.trial.run import run_trial

        number = next(self.count)
        found: dict[str, float] = {}

        def timed(job: Any, folder: Path, report: Any = None) -> dict[str, Any]:
            began = time.perf_counter()
            about = self.runner(job, folder, report)
            found.update(wall=time.perf_counter() - began, loop=about["loop_seconds"], rank=about["seconds"])
            return about

        row = run_trial(
            self.context, TrialConfig(f"t{number}", number, Cell("finetune", None, 0), {}, number), None, timed
        )
        if row["status"] != "complete":
            raise SystemExit(row["reason"])
        return found


def torchrun(folder: Path, options: argparse.Namespace, network: str) -> dict[str, float]:
    """The plain loop under torchrun."""
    out = folder / "torchrun.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.peers.plain_ddp", str(out)]
    command += ["--steps", str(options.steps), "--batch", str(options.batch), "--network", network]
    command += ["--data", options.data]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return {"wall": time.perf_counter() - began, **json.loads(out.read_text(encoding="utf-8"))}


def nested(config: dict[str, Any], trials: int) -> list[float]:
    """Seconds from the end of a trial to the end of the next one, less the loop: plain Tune and Train."""
    from ray import tune

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0, "memory": 1}),  # it only waits
        param_space=config | {"number": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name=f"nested-{time.time_ns()}", storage_path=config["storage"], verbose=0),
    )
    found = sorted((r.metrics["ended"], r.metrics["loop"]) for r in tuner.fit())  # type: ignore[attr-defined,index]
    return [later[0] - earlier[0] - later[1] for earlier, later in itertools.pairwise(found)]


def swept(folder: Path, options: argparse.Namespace, trials: int) -> list[float]:
    """The same of a sweep of ours through the command line; also its evaluation."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec_of(folder, options, trials, options.networks[0])))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orchestrator", "sweep", str(path), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = sorted(json.loads(done.stdout), key=lambda row: row["ended"])
    if {row["status"] for row in rows} != {"complete"}:
        raise SystemExit(f"Not every trial is complete: {[row['reason'] for row in rows]}")
    return [later["ended"] - earlier["ended"] - later["loop_seconds"] for earlier, later in itertools.pairwise(rows)]


def main() -> None:
    """Runs the rounds, prints the table, writes the JSON."""
    from orchestrator.sweep.cluster import start_ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument(
        "--networks",
        nargs="+",
        type=timm_name,
        default=list(NETWORKS),
        help="of timm; costs are of the first one's jobs",
    )
    parser.add_argument("--data", default="packaged/clipart", help="packaged/NAME or folder:PATH")
    parser.add_argument("--quick", action="store_true", help="one round of 50 steps, two trials, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds, options.trials = 50, 1, 2
    kind, _, path = options.data.partition(":")
    options.data = f"{kind}:{Path(path).absolute()}" if path else options.data  # workers have folders of their own
    os.environ["OMP_NUM_THREADS"] = "1"
    first = options.networks[0]
    costs: dict[str, list[float]] = {}
    rates: dict[str, dict[str, list[float]]] = {name: {"torchrun": [], "ours": []} for name in options.networks}

    def add(name: str, one: dict[str, float]) -> None:
        costs.setdefault(name, []).append(one["wall"] - one["loop"])
        print(f"{name}: {one['wall'] - one['loop']:.2f} s outside {one['loop']:.2f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_ray(1)
        config = {
            "network": first,
            "data": options.data,
            "steps": options.steps,
            "batch": options.batch,
            "storage": name,
            "out": f"{name}/plain.json",
        }
        ours = Ours(folder / "jobs", options, first)
        ours.job()  # stores the pixels, which every later job reads
        ours.runner.end()
        images = options.steps * options.batch
        for _ in range(options.rounds):
            add("plain", fit(config))
            add("torchrun", one := torchrun(folder, options, first))
            rates[first]["torchrun"].append(images / one["loop"])
            add("first", ours.job())
            for _ in range(LATER):
                add("later", one := ours.job())
                rates[first]["ours"].append(images / one["loop"])
            ours.runner.end()
        fewer = argparse.Namespace(**{**vars(options), "steps": max(10, options.steps // LARGER)})
        for network in options.networks[1:]:
            larger, images = Ours(folder / network, fewer, network), fewer.steps * fewer.batch
            larger.job()
            for _ in range(options.rounds):
                rates[network]["torchrun"].append(images / torchrun(folder, fewer, network)["loop"])
                rates[network]["ours"].append(images / larger.job()["loop"])
            larger.runner.end()
        costs["nested"] = nested(config, options.trials)
        ray.shutdown()
        costs["swept"] = swept(folder / "jobs", options, options.trials)
    result = {
        "command": command_of(MARK, parser, options, but=("quick",)),
        "machine": machine(2),
        "versions": versions("torch", "ray"),
        "outside_loop_s": costs,
        "images_per_s": rates,
    }
    print(table(result))
    if not options.quick and (options.networks, options.data) == (list(NETWORKS), parser.get_default("data")):
        publish(MARK, result, table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    costs = result["outside_loop_s"]

    def seen(values: list[float], digits: int = 2) -> str:
        span = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        return f"{statistics.median(values):.{digits}f} ({span}; {len(values)})"

    names = {
        "plain": "a job: plain `TorchTrainer`",
        "torchrun": "a job: torchrun",
        "first": "a job here, a group's first",
        "later": "a job here, the group kept",
        "nested": "a trial: `TorchTrainer` nested in Tune",
        "swept": "a trial here, its evaluation included",
    }
    lines = [
        f"`{result['command']}`: median, range and number; {result['machine']}; {result['versions']}.",
        "",
        "| 2 workers | seconds outside the training loop |",
        "| --- | --- |",
        *(f"| {text} | {seen(costs[name])} |" for name, text in names.items()),
        "",
        "| 2 workers, images/s inside the loop | plain DDP under torchrun | here | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for network, rates in result["images_per_s"].items():
        ratio = statistics.median(rates["ours"]) / statistics.median(rates["torchrun"])
        lines.append(f"| {network} | {seen(rates['torchrun'], 0)} | {seen(rates['ours'], 0)} | {ratio:.2f} |")
    share = statistics.median(costs["swept"]) / statistics.median(costs["nested"])
    lines += ["", f"A trial costs {share:.2f} of the nested one's."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
