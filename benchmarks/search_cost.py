"""Device-seconds until a search has found the exhaustive grid's best, less one percent, on a real task.

    python -m benchmarks.search_cost                 # trains the grid: 10 minutes; goes on from its table in --storage
    python -m benchmarks.search_cost --task icons    # another task, teacher, kind of student and other methods
    python -m benchmarks.search_cost --task icons --repeats 3   # a configuration is the mean of three seeds' trainings
    python -m benchmarks.search_cost --task clipart_cnn --repeats 3   # unseen when the search was written
    python -m benchmarks.search_cost --replay        # from benchmarks/results/search_cost_grid_TASK.json alone: seconds
    python -m benchmarks.search_cost --spec my_sweep.yaml   # your data, networks and methods, knobs as lists

The grid is trained through the product's own trials; what is written down of each is its val metric at every eighth of
its budget and the CPU seconds until then. The best of one seed each may owe it to luck: with `--repeats` a
configuration scores the mean of that many seeds, and costs what they cost together.

Searches are then replayed against that table, one trial at a time: proposals are the product's (`sweep.study.Study`),
decisions to stop are those of the scheduler that the product hands to Ray Tune (`sweep.tune`), and what a trial costs
and scores is read from the table. The product proposes none twice, and ends when all were proposed; what the plain
script proposes twice costs nothing the second time. A search that misses the goal is counted as a
miss, and what it spent is added to the expected cost of those that reach it.

Of a sweep file of your own its networks, data, methods and training are read; search, limits and objectives are this
benchmark's. Grid and table lie in --storage as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.optuna_search import PlainSearch
from benchmarks.record import (
    RESULTS,
    begun,
    machine,
    markdown,
    measured_alike,
    on_cpu,
    own_sweep,
    publish,
    versions,
    write_result,
)
from orchestrator.errors import UserError, listed

MARGIN = 0.01
FIVE = 5  # of which one is good enough
ORDERS = 2000  # random orders: what chance takes should owe nothing to chance
WARM_SEED = 1000  # of trainings that are not counted; none that is has it
OWN = ("search", "limits", "objectives", "latency", "storage", "store", "cluster")  # not what is compared
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
SPECS: dict[str, dict[str, Any]] = {
    "clipart": {
        "name": "search-cost",
        "task": {"data": "packaged/clipart", "shots": 20},
        "teachers": ["packaged/vit_clipart"],
        "students": [{"model": "timm/test_resnet", "image_size": 48}],
        "methods": {
            "kd": {"lr": RATES, "temperature": [1.0, 2.0, 4.0, 8.0], "weight": [0.5, 0.9]},
            "tdmr": {"lr": RATES, "proxy_dim": [32, 128], "lambda_end": [0.5, 0.8], "temperature": [2.0, 4.0]},
            "rkd": {"lr": RATES},
            "finetune": {"lr": RATES},
        },
        "train": {"steps": 100, "batch": 64, "views": 3},
    },
    "icons": {
        "name": "search-cost-icons",
        "task": {"data": "packaged/icons", "shots": None},
        "teachers": [{"model": "packaged/efficientnet_lite0", "image_size": 96}],
        "students": [{"model": "timm/test_efficientnet", "image_size": 48}],
        "methods": {
            "kd": {"lr": RATES, "temperature": [1.0, 2.0, 4.0, 8.0], "weight": [0.5, 0.9]},
            "fitnet": {"lr": RATES, "hint_layer": [0.5, 1.0], "hint_share": [0.1, 0.3], "weight": [0.5, 0.9]},
            "attention_transfer": {"lr": RATES, "strength": [3.0, 30.0]},
            "finetune": {"lr": RATES},
        },
        "train": {"steps": 100, "batch": 64, "views": 3},
    },
    "clipart_cnn": {
        "name": "search-cost-clipart-cnn",
        "task": {"data": "packaged/clipart", "shots": 20},
        "teachers": [{"model": "packaged/efficientnet_lite0", "image_size": 96}],
        "students": [{"model": "timm/test_convnext", "image_size": 48}],
        "methods": {
            "kd": {"lr": RATES, "temperature": [1.0, 4.0], "weight": [0.5, 0.9]},
            "tdmr": {"lr": RATES, "proxy_dim": [32, 128], "lambda_end": [0.5, 0.8]},
            "fitnet": {"lr": RATES, "hint_layer": [0.5, 1.0], "weight": [0.5, 0.9]},
            "attention_transfer": {"lr": RATES, "strength": [3.0, 30.0]},
            "rkd": {"lr": RATES, "weight": [0.5, 0.9]},
            "finetune": {"lr": RATES},
        },
        "train": {"steps": 100, "batch": 64, "views": 3},
    },
}


def grid_file(task: str) -> Path:
    """Where the trained grid of a task is written down."""
    return RESULTS / f"search_cost_grid_{task}.json"


def spec_of(
    raw: dict[str, Any], folder: Path, sampler: str, scheduler: str, seed: int, *, defaults_first: bool = True
) -> Any:
    """The sweep, parsed."""
    from orchestrator.spec import parse_spec
    from orchestrator.sweep.folder import resolved

    search = {"sampler": sampler, "scheduler": scheduler, "seed": seed, "trials": 1000, "concurrency": 1}
    search["defaults_first"] = defaults_first
    return resolved(parse_spec({**raw, "search": search, "storage": str(folder)}))


def key_of(method: str, knobs: dict[str, Any]) -> str:
    """A configuration of the table."""
    return json.dumps([method, sorted(knobs.items())])


def prepared_grid(raw: dict[str, Any], folder: Path) -> Any:
    """The checked sweep whose trials are the grid."""
    from orchestrator.sweep.run import prepare

    return prepare(spec_of(raw, folder, "grid", "asha", 0))


def record(name: str, raw: dict[str, Any], folder: Path, repeats: int) -> dict[str, Any]:
    """Trains the grid with that many seeds, or what a run that was stopped has not; the folder holds it so far.

    What another machine or other versions took is not joined: it is measured again.
    """
    from orchestrator.sweep.space import grid, wanted_outputs
    from orchestrator.trial.context import SweepContext
    from orchestrator.trial.plan import TrialConfig
    from orchestrator.trial.run import run_trial

    prepared = prepared_grid(raw, folder)
    spec = prepared.spec
    wanted = wanted_outputs(spec, prepared.spaces, prepared.cells, prepared.task.info)
    context = SweepContext(spec, f"{folder}/{spec.name}", prefetch=wanted)
    about: dict[str, Any] = {"spec": json.loads(json.dumps(raw)), "machine": machine(1)}
    about |= {"versions": versions("torch", "timm")}
    progress = folder / grid_file(name).name
    table = measured_alike(progress, about) or {"task": name, **about, "runs": {}}
    todo = [(cell, knobs) for cell in prepared.cells for knobs in grid(prepared.spaces[cell.method], cell.method)]
    warm: set[str] = set()
    for seed in range(repeats):
        for number, (cell, knobs) in enumerate(todo):
            runs = table["runs"].setdefault(key_of(cell.method, knobs), [])
            if len(runs) > seed:
                continue
            if cell.method not in warm:  # the teacher's pass, pixels and imports are nobody's
                run_trial(context, TrialConfig(f"warm-{cell.method}", 0, cell, knobs, WARM_SEED))
                warm.add(cell.method)
            runs.append(trained(context, TrialConfig(f"t{seed}-{number:04d}", number, cell, knobs, seed)))
            write_result(progress, table)
            end = runs[-1]["curve"][-1][1]
            print(f"seed {seed}, {number + 1} of {len(todo)}: {end:.3f}", file=sys.stderr, flush=True)
    return table


def shared_stages(prepared: Any) -> list[str]:
    """`METHOD: STAGE` of stages that train or generate before the last one, and are the same in several configurations.

    Whichever of these comes first would pay for all. (What is fitted, as TDMR's proxies are, takes next to nothing.)
    """
    from methods.contract import ImageStage, TrainStage
    from orchestrator.sweep.space import grid
    from orchestrator.trial.plan import TrialConfig, configure, method_named, setting_of

    found: list[str] = []
    for cell in prepared.cells:
        seen: list[Any] = []
        setting = setting_of(prepared.spec, prepared.task.info, cell)
        for knobs in grid(prepared.spaces[cell.method], cell.method):
            settings = configure(prepared.spec, TrialConfig(cell.method, 0, cell, knobs, 0))
            for stage in method_named(cell.method).stages(settings, setting)[:-1]:
                if isinstance(stage, TrainStage | ImageStage):
                    found += [f"{cell.method}: {stage.name}"] * (stage in seen)
                    seen.append(stage)
    return list(dict.fromkeys(found))


def seeds_of(table: dict[str, Any] | None) -> int:
    """With how many seeds each configuration of a recorded grid was trained at least; 0 of none."""
    return min(map(len, table["runs"].values()), default=0) if table else 0


def keep(path: Path, table: dict[str, Any]) -> None:
    """Writes a grid down, unless the file holds one of the same sweep that has more seeds."""
    there = seeds_of(begun(path, table["spec"]))
    if there > seeds_of(table):
        print(f"{path.name} has {there} seeds, this grid {seeds_of(table)}: it stays as it is.", file=sys.stderr)
    else:
        write_result(path, table)


def trained(context: Any, config: Any) -> dict[str, Any]:
    """`curve`, (share of the budget, val metric, CPU seconds until then) at every eighth, and `seconds` in all."""
    from orchestrator.trial.run import run_trial

    curve: list[tuple[float, float, float]] = []
    began = time.process_time()

    def hear(share: float, value: float | None) -> None:
        if value is not None:
            curve.append((share, value, time.process_time() - began))

    row = run_trial(context, config, progress=hear)
    if row["status"] != "complete":
        raise SystemExit(f"{config.cell.method}, {config.knobs}: {row['reason']}")
    seconds = time.process_time() - began
    return {"curve": [*curve, (1.0, row["val_metric"], seconds)], "seconds": seconds}


def averaged(table: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The table with `trials`: of each configuration the mean metric of its first runs and the sum of their seconds."""
    trials = {}
    for key, runs in table["runs"].items():
        if len(runs) < repeats:
            raise SystemExit(f"The recorded grid of {table['task']} has {len(runs)} seeds, not {repeats}.")
        curves = zip(*(run["curve"] for run in runs[:repeats]), strict=True)
        curve = [(at[0][0], statistics.fmean(p[1] for p in at), sum(p[2] for p in at)) for at in curves]
        trials[key] = {"curve": curve, "seconds": sum(run["seconds"] for run in runs[:repeats])}
    return {"spec": table["spec"], "machine": table["machine"], "trials": trials}


Search = Callable[[dict[str, Any], int], Iterator[tuple[float, float]]]


def at_random(table: dict[str, Any], seed: int) -> Iterator[tuple[float, float]]:
    """(seconds, val) of each trial, in a random order without repetition."""
    names = sorted(table["trials"])
    random.Random(seed).shuffle(names)
    for name in names:
        yield table["trials"][name]["seconds"], table["trials"][name]["curve"][-1][1]


def script(table: dict[str, Any], seed: int) -> Iterator[tuple[float, float]]:
    """The same of a plain Optuna script, which may propose a configuration again."""
    search = PlainSearch(checked(json.dumps(table["spec"])).spaces, seed)
    seen: set[str] = set()
    for _ in range(4 * len(table["trials"])):
        key = key_of(*search.ask())
        known = table["trials"][key]
        search.tell(known["curve"][-1][1])
        yield (0.0 if key in seen else known["seconds"]), known["curve"][-1][1]
        seen.add(key)


@functools.lru_cache
def checked(spec: str) -> Any:
    """The cells and spaces of a sweep, given as JSON, which no seed changes."""
    from orchestrator.sweep.run import prepare

    with tempfile.TemporaryDirectory() as folder:
        return prepare(spec_of(json.loads(spec), Path(folder), "tpe", "none", 0))


def product(sampler: str, scheduler: str, *, defaults_first: bool = True) -> Search:
    """The product's proposals (unless told otherwise, methods at their defaults first) with its scheduler."""

    def search(table: dict[str, Any], seed: int) -> Iterator[tuple[float, float]]:
        from ray.tune.schedulers import TrialScheduler

        from orchestrator.sweep.study import Study
        from orchestrator.sweep.tune import scheduler_of
        from orchestrator.trial.context import SweepContext

        with tempfile.TemporaryDirectory() as folder:
            prepared = checked(json.dumps(table["spec"]))
            spec = spec_of(table["spec"], Path(folder), sampler, scheduler, seed, defaults_first=defaults_first)
            study = Study(spec, Path(folder), prepared.cells, prepared.spaces, prepared.task.info)
            judge = scheduler_of(SweepContext(spec, folder))
            for _ in table["trials"]:  # none comes twice
                config = study.ask()
                key = key_of(config.cell.method, config.knobs)
                known = table["trials"][key]
                trial: Any = _Trial(config.trial_id)
                judge.on_trial_add(None, trial)  # type: ignore[arg-type]
                spent, value, status = known["seconds"], known["curve"][-1][1], "complete"
                for share, metric, seconds in known["curve"][:-1]:
                    result = {"progress": share * 100, "val_metric": metric, "training_iteration": 1}
                    if judge.on_trial_result(None, trial, result) == TrialScheduler.STOP:  # type: ignore[arg-type]
                        spent, value, status = seconds, metric, "pruned"
                        break
                else:
                    judge.on_trial_complete(None, trial, {"progress": 100, "val_metric": value})  # type: ignore[arg-type]
                study.tell(config.number, {"status": status, "val_metric": value, "trial_id": config.trial_id})
                yield spent, (value if status == "complete" else float("-inf"))

    return search


class _Trial:
    """What a scheduler asks of a trial of Tune."""

    status = "RUNNING"

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


SEARCHES: dict[str, tuple[str, Search]] = {
    "random": ("random search", at_random),
    "script": ("a plain Optuna script: TPE, multivariate, by groups", script),
    "tpe": ("here, `sampler: tpe`", product("tpe", "none")),
    "gp": ("here by default: a process over all methods", product("gp", "none")),
    "free": ("here: the same with `defaults_first: false`", product("gp", "none", defaults_first=False)),
    "asha": ("here by default and ASHA, from half of a budget on", product("gp", "asha")),
}
GOALS = {"best": "the best less 0.01", "five": "one of the five best"}


def reached(table: dict[str, Any], search: Search, seed: int, goals: list[float]) -> list[tuple[float, int, bool]]:
    """For each goal, (device-seconds, trials, True) until a whole trial scores it; all and False if none does.

    A search may miss it for good: a good configuration that was stopped once is stopped again.
    """
    spent, count = 0.0, 0
    found: dict[float, tuple[float, int, bool]] = {}
    for seconds, value in search(table, seed):
        spent += seconds
        count += 1
        for goal in goals:
            if value >= goal:
                found.setdefault(goal, (spent, count, True))
        if len(found) == len(set(goals)):
            break
    return [found.get(goal, (spent, count, False)) for goal in goals]


def main() -> None:
    """Records, replays, prints the table, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SPECS, default="clipart")
    parser.add_argument("--spec", type=Path, help="a sweep file of yours, in place of a packaged task")
    parser.add_argument("--seeds", type=int, default=20, help="of each search")
    parser.add_argument("--repeats", type=int, default=1, help="seeds of each configuration")
    parser.add_argument("--replay", action="store_true", help="train nothing")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="where the grid's store lies")
    parser.add_argument("--dry", action="store_true", help="write no table")
    options = parser.parse_args()
    raw = SPECS[options.task]
    if options.spec:
        raw = {key: value for key, value in on_cpu(own_sweep(options.spec)).items() if key not in OWN}
        try:
            cells = checked(json.dumps(raw)).cells
            shared = shared_stages(prepared_grid(raw, options.storage.absolute()))
        except UserError as error:
            parser.error(str(error))
        if len({cell.method for cell in cells}) < len(cells):
            parser.error(
                "--spec: one teacher and one student, please: a configuration is told by its method and knobs."
            )
        if shared:
            parser.error(
                f"--spec: {listed(shared)} would be trained for several configurations at once, and the first of them "
                "would pay for it; search only knobs that this stage depends on too, or leave the method out."
            )
    name = raw["name"] if options.spec else options.task
    kept = options.storage.absolute() / grid_file(name).name if options.spec else grid_file(name)
    if options.replay:
        recorded = begun(kept, raw)
        if recorded is None:
            parser.error(f"--replay: {kept} holds no grid of this sweep; train it first.")
    else:
        recorded = record(name, raw, options.storage.absolute(), options.repeats)
        if not options.dry:
            keep(kept, recorded)
    table = averaged(recorded, options.repeats)
    if len(table["trials"]) < FIVE:
        parser.error(f"the grid has {len(table['trials'])} configurations; {FIVE} at least are needed.")
    whole = sum(trial["seconds"] for trial in table["trials"].values())
    values = sorted((trial["curve"][-1][1] for trial in table["trials"].values()), reverse=True)
    goals = {"best": values[0] - MARGIN, "five": values[FIVE - 1]}
    source = f"--spec {options.spec}" if options.spec else f"--task {name}"
    again = f" --repeats {options.repeats}" if options.repeats > 1 else ""
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.search_cost {source}{again}",
        "repeats": options.repeats,
        "machine": table["machine"],
        "versions": versions("torch", "timm", "ray", "optuna"),
        "grid": {"trials": len(values), "seconds": whole, "best": values[0]},
        "goals": {name: {"value": goal, "good": sum(v >= goal for v in values)} for name, goal in goals.items()},
        "searches": {name: {} for name in SEARCHES},
    }
    for kind, (_, search) in SEARCHES.items():
        seeds = ORDERS if kind == "random" else options.seeds
        runs = [reached(table, search, seed, list(goals.values())) for seed in range(seeds)]
        for which, found in zip(goals, zip(*runs, strict=True), strict=True):
            seconds, trials, hits = (list(column) for column in zip(*found, strict=True))
            runs_of = {"seconds": seconds, "trials": trials, "hits": hits}
            result["searches"][kind][which] = {k: v[: options.seeds] for k, v in runs_of.items()} | {
                "seeds": seeds,
                "reached": sum(hits),
                "mean": sum(seconds) / sum(hits) if any(hits) else None,  # a seed that misses begins anew: all is paid
                "sd": statistics.stdev(seconds),
                "median": statistics.median(trials),
            }
            print(f"{kind}, {which}: reached in {sum(hits)} of {len(hits)} seeds", file=sys.stderr, flush=True)
    print(text := as_table(result))
    mark = f"search_cost_{name}{'_means' if options.repeats > 1 else ''}"
    if options.spec:
        write_result(options.storage / f"{mark}.json", result)
    elif not options.dry:
        publish(mark, result, text)


def _seconds(found: dict[str, Any]) -> str:
    if not found["reached"]:
        return "never"
    return f"{found['mean']:.0f}" + (f" ± {found['sd']:.0f}" if found["reached"] == found["seeds"] else "")


def as_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    grid, searches = result["grid"], result["searches"]
    rows = [["", "exhaustive grid", "", grid["trials"], f"{grid['seconds']:.0f}", "100 %", ""]]
    for which, label in GOALS.items():
        chance: float | None = None
        for name, (search, _) in SEARCHES.items():
            found = searches[name][which]
            mean = found["mean"]
            chance = chance or mean
            rows.append(
                [
                    label,
                    search,
                    f"{found['reached']:,} of {found['seeds']:,}",
                    f"{found['median']:.0f}",
                    _seconds(found),
                    f"{100 * mean / grid['seconds']:.0f} %" if mean else "never",
                    f"{100 * mean / chance:.0f} %" if mean else "never",
                ]
            )
    head = ["until", "search", "seeds that reach it", "trials, median", "expected device-seconds"]
    head += ["of the grid", "of random search"]
    means = f", each the mean of {result['repeats']} seeds" if result["repeats"] > 1 else ""
    goals = "; ".join(
        f"{GOALS[which]}: {goal['value']:.3f}, by {goal['good']} of them" for which, goal in result["goals"].items()
    )
    spread = "expected: mean ± sd over seeds (of random search, orders), or what all spend for each that reaches it"
    return (
        f"`{result['command']}`: {grid['trials']} configurations{means}; best val {grid['best']:.3f}; {goals}; "
        f"{spread}; {result['machine']}; {result['versions']}.\n\n{markdown(head, rows)}"
    )


if __name__ == "__main__":
    main()
