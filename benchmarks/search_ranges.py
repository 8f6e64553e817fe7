"""The searches on spaces with ranges, which no grid can hold: six methods' own spaces on made-up landscapes.

    python -m benchmarks.search_ranges                # 10 minutes, one core
    python -m benchmarks.search_ranges --landscapes 2 --dry

A landscape is drawn from a seed: a height for each method; for each range a parabola, deepest for the rate of learning;
for each choice a step to each value. Where methods share a knob's name, its parabola is alike in all of them, which is
what the process over all methods is made for; in other landscapes it is drawn anew for each method. What is told to the
search has noise, what is compared has none. All searches go over the same landscapes, so that differences are in pairs.
Searches here begin with the methods' defaults, the script does not. Nothing is trained: this says how searches learn,
not how students do.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.optuna_search import PlainSearch
from benchmarks.record import command_of, machine, markdown, publish, versions
from methods.knobs import Choice, Range

MARK = "search_ranges"
METHODS = ("kd", "tdmr", "fitnet", "attention_transfer", "rkd", "finetune")
PLAIN = "plain"
SEARCHES = {
    "random": "random search",
    PLAIN: "a plain Optuna script: TPE, multivariate, by groups",
    "tpe": "here, `sampler: tpe`",
    "gp": "here by default: a process over all methods",
}
KINDS = {"alike in all methods": True, "each method's own": False}
AFTER = (12, 24, 48)
NOISE = 0.05


def spec_of(folder: Path, sampler: str, seed: int) -> Any:
    """The sweep, parsed; every method searches its own space."""
    from orchestrator.spec import parse_spec
    from orchestrator.sweep.folder import resolved

    raw = {
        "name": "search-ranges",
        "task": {"data": "packaged/clipart", "shots": 20},
        "teachers": ["packaged/vit_clipart"],
        "students": [{"model": "timm/test_resnet", "image_size": 48}],
        "methods": {method: {} for method in METHODS},
        "search": {"sampler": sampler, "seed": seed, "trials": AFTER[-1], "concurrency": 1},
        "storage": str(folder),
    }
    return resolved(parse_spec(raw))


class Landscape:
    """What a configuration is worth, without noise; see the module's docstring."""

    def __init__(self, spaces: dict[str, dict[str, Any]], seed: int, alike: bool) -> None:
        dice = np.random.default_rng(seed)
        self.heights = {method: 0.6 * dice.normal() for method in spaces}
        self.shapes: dict[tuple[str, str], tuple[Any, Any]] = {}
        common: dict[str, tuple[float, float]] = {}
        for method, space in spaces.items():
            for knob, domain in space.items():
                depth = 12.0 if knob == "lr" else 3.2
                drawn = (dice.uniform(0.1, 0.9), depth * abs(dice.normal()))
                peak, deep = common.setdefault(knob, drawn) if alike else drawn
                if isinstance(domain, Range):
                    own = float(np.clip(peak + 0.12 * dice.normal(), 0, 1)), deep * math.exp(0.3 * dice.normal())
                    self.shapes[method, knob] = (domain, own)
                elif isinstance(domain, Choice):
                    self.shapes[method, knob] = (domain, [0.3 * dice.normal() for _ in domain.values])

    def __call__(self, method: str, knobs: dict[str, Any]) -> float:
        worth = self.heights[method]
        for knob, value in knobs.items():
            domain, shape = self.shapes.get((method, knob), (None, None))
            if isinstance(domain, Range):
                peak, deep = shape
                ends = (math.log(domain.low), math.log(domain.high)) if domain.log else (domain.low, domain.high)
                place = ((math.log(value) if domain.log else value) - ends[0]) / (ends[1] - ends[0])
                worth -= deep * (place - peak) ** 2
            elif isinstance(domain, Choice):
                worth += shape[list(domain.values).index(value)]
        return worth


def best_after(prepared: Any, sampler: str, seed: int, alike: bool) -> list[float]:
    """The best that a search has tried after each of `AFTER` trials."""
    from orchestrator.sweep.study import Study

    land, noise = Landscape(prepared.spaces, seed, alike), np.random.default_rng(1000 + seed)
    tried: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        spec = spec_of(Path(name), "random" if sampler == PLAIN else sampler, seed)
        study = Study(spec, Path(name), prepared.cells, prepared.spaces, prepared.task.info)
        script = PlainSearch(prepared.spaces, seed)
        for _ in range(AFTER[-1]):
            if sampler == PLAIN:
                tried.append(land(*script.ask()))
                script.tell(tried[-1] + NOISE * noise.normal())
                continue
            config = study.ask()
            tried.append(land(config.cell.method, config.knobs))
            told = {"status": "complete", "val_metric": tried[-1] + NOISE * noise.normal(), "trial_id": config.trial_id}
            study.tell(config.number, told)
    return [max(tried[:trials]) for trials in AFTER]


def main() -> None:
    """Searches, prints the table, writes it."""
    from orchestrator.sweep.run import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscapes", type=int, default=30)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        prepared = prepare(spec_of(Path(name), "random", 0), dry=True)
    found = {
        kind: {s: [best_after(prepared, s, seed, alike) for seed in range(options.landscapes)] for s in SEARCHES}
        for kind, alike in KINDS.items()
    }
    result = {
        "command": command_of(MARK, parser, options),
        "machine": machine(1),
        "versions": versions("optuna", "torch"),
        "after": AFTER,
        "best": found,
    }
    print(text := table(result))
    if not options.dry:
        publish(MARK, result, text)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""

    def told(values: list[float]) -> str:
        return f"{statistics.fmean(values):+.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"

    rows = []
    for kind, best in result["best"].items():
        for sampler, label in SEARCHES.items():
            pairs = list(zip(best[sampler], best["random"], strict=True))
            if sampler != "random":
                means = [told([own[at] - chance[at] for own, chance in pairs]) for at in range(len(AFTER))]
                rows.append([kind, label, *means])
    head = ["parabolas", "search", *(f"after {trials} trials" for trials in result["after"])]
    what = f"the best trial so far, less random search's; mean and its standard error over {len(pairs)} landscapes"
    facts = f"`{result['command']}`: {what}; {result['machine']}; {result['versions']}."
    return f"{facts}\n\n{markdown(head, rows)}"


if __name__ == "__main__":
    main()
