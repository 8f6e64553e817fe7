"""A sweep over KD, TDMR and WeCoLoRA here, against the same trials in a plain Optuna and PyTorch script.

    python -m benchmarks.sweep_against_plain               # 6, 12 and 24 trials: 36 minutes, 24 alone takes 21
    python -m benchmarks.sweep_against_plain --trials 24   # one size; the others stay in results/ and in the table
    python -m benchmarks.sweep_against_plain --trials 6 --steps 20 --dry
    python -m benchmarks.sweep_against_plain --trials 24 --steps 120 --block sweep_against_plain_shorter

One frozen ViT teacher of at least ten times each student's FLOPs, two processes of one thread, the same images, steps
and batch; a teacher without a transformer's equal blocks leaves WeCoLoRA out on both sides. The peer
(`peers/plain_optuna.py`) runs its teacher in every step. What is counted is wall time, all of it:
start-up, imports, cluster, evaluation. A plain ViT without downloaded weights is drawn from a seed, which changes no
FLOP; `--teacher packaged/vit_clipart --teacher-size 96` is a trained one, whose stem no student of WeCoLoRA is rid of.
Other data: `--data packaged/icons --shots 4`, or `--data folder:PATH`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import (
    RESULTS,
    checked,
    command_of,
    machine,
    markdown,
    measured_alike,
    publish,
    versions,
    watched,
)

MARK = "sweep_against_plain"
PROCESSES = 2
METHODS = ("kd", "tdmr", "wecolora")
LEAST_RATIO = 10.0  # of the teacher's FLOPs to a student's


def trials_of(per_method: int, factor: int, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """The `methods` of a sweep file whose grid has `per_method` trials of each: 2, 4 or 8."""
    many, more = per_method >= 4, per_method >= 8
    found = {
        "kd": {
            "temperature": [2.0, 4.0],
            "lr": [1e-3, 3e-3] if many else 3e-3,
            "weight": [0.5, 0.9] if more else 0.5,
        },
        "tdmr": {
            "proxy_dim": [32, 64],
            "lr": [1e-3, 3e-3] if many else 3e-3,
            "lambda_end": [0.5, 0.8] if more else 0.5,
        },
        "wecolora": {
            "factor": factor,
            "rank": [8, 16, 32, 64] if more else [8, 32],
            "lr": [2e-3, 4e-3] if many else 4e-3,
        },
    }
    return {name: found[name] for name in methods}


def share_of_gpu() -> dict[str, float]:
    """What each trial takes where there are fewer GPUs than processes, so that they run beside each other."""
    import torch

    count = torch.cuda.device_count()
    return {"gpus_per_worker": count / PROCESSES} if 0 < count < PROCESSES else {}


def spec_of(setting: dict[str, Any], methods: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sweep file."""
    teacher = {"model": setting["teacher"], "image_size": setting["teacher_size"]}
    if setting["teacher"].startswith("timm/"):
        teacher |= {"pretrained": False}
    return {
        "name": "ours",
        "task": {"data": setting["data"], "shots": setting["shots"]},
        "teachers": [teacher],
        "students": [{"model": setting["student"], "image_size": setting["student_size"]}],
        "methods": methods,
        "search": {"trials": 1000, "sampler": "grid", "concurrency": PROCESSES},
        "train": {"steps": setting["steps"], "batch": setting["batch"], "views": setting["views"], **share_of_gpu()},
        "storage": str(folder),
    }


def served(setting: dict[str, Any], factor: int, methods: Sequence[str] = METHODS) -> tuple[list[str], list[str]]:
    """Which of the methods these networks and data can feed, and of each other one the reason."""
    with tempfile.TemporaryDirectory() as name:
        prepared = checked(spec_of(setting, trials_of(2, factor, methods), Path(name)))
    runnable = {cell.method for cell in prepared.cells}
    return [name for name in methods if name in runnable], prepared.dropped


def check_ratio(spec: dict[str, Any], factor: int) -> dict[str, float]:
    """FLOPs of the teacher and of each student an image, in millions; says so where the teacher's are too few."""
    from methods.wecolora import kept_blocks, truncated
    from orchestrator.evaluate.cost import flops
    from orchestrator.models.load import load_network
    from orchestrator.spec import parse_spec

    parsed = parse_spec(spec)
    teacher, student = load_network(parsed.teachers[0], "teacher"), load_network(parsed.students[0], "student")
    size = teacher.preprocessing.size
    found = {
        "teacher": flops(teacher.module, size) / 1e6,
        "student": flops(student.module, student.preprocessing.size) / 1e6,
    }
    if "wecolora" in spec["methods"]:
        kept = kept_blocks(len(teacher.module.blocks), factor, "first")  # type: ignore[arg-type]
        found["wecolora"] = flops(truncated(teacher.module, kept), size) / 1e6
    if found["teacher"] / max(value for name, value in found.items() if name != "teacher") < LEAST_RATIO:
        print(f"A student has more than a tenth of the teacher's FLOPs: {found}", file=sys.stderr)
    return found


def ours(spec: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Wall seconds and rows of one sweep through the command line."""
    path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec))
    began = time.time()
    command = [sys.executable, "-m", "orchestrator", "sweep", str(path), "--name", name, "--json"]
    output, wall, cpu = watched(command)
    rows = json.loads(output)
    if {row["status"] for row in rows} != {"complete"}:
        raise SystemExit(f"Not every trial is complete: {[(r['status'], r['reason']) for r in rows]}")
    return {"seconds": wall, "cpu": cpu, "began": began, "rows": rows}


def peer(module: str, setting: dict[str, Any], trials: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The peer's own account of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.json"
    path.write_text(json.dumps({**setting, "processes": PROCESSES, "trials": trials}))
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", str(folder), str(path)]
    output, wall, cpu = watched(command)
    found = json.loads(output.splitlines()[-1]) | {"seconds": wall, "cpu": cpu}
    if found["trials"] != len(trials):
        raise SystemExit(f"The peer has finished {found['trials']} of {len(trials)} trials.")
    return found


def listed_trials(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination, as the peer wants it."""
    from orchestrator.spec import parse_spec
    from orchestrator.sweep.space import grid, method_space

    spec = parse_spec(spec_of(DEFAULTS, methods, Path("runs")))
    return [{"method": name, **knobs} for name in methods for knobs in grid(method_space(spec, name), name)]


def outside(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By method, seconds outside the training loop of each warm trial: torch is there, no teacher pass was paid."""
    seen: set[int] = set()
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda r: r["started"]):
        if row["pid"] in seen and row["teacher_forwards"] == 0:
            found.setdefault(row["method"], []).append(row["ended"] - row["started"] - row["loop_seconds"])
        seen.add(row["pid"])
    return found


DEFAULTS: dict[str, Any] = {
    "data": "packaged/clipart",
    "teacher": "timm/vit_small_patch16_224",
    "teacher_size": 64,
    "student": "timm/test_resnet",
    "student_size": 48,
    "shots": 20,
    "steps": 240,
    "batch": 32,
    "views": 3,
}


def arguments(text: str | None, factor: int) -> argparse.ArgumentParser:
    """The options that say what is compared."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--factor", type=int, default=factor, help="WeCoLoRA keeps one block in this many")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    return parser


def compared(
    module: str, setting: dict[str, Any], methods: dict[str, Any], rounds: int, label: str
) -> list[dict[str, Any]]:
    """Runs both sides by turns; checks that the teacher saw each view of each training image once, and no more."""
    from orchestrator.data.task import load_task
    from orchestrator.spec import parse_spec
    from orchestrator.store import store_at

    trials = listed_trials(methods)
    found = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spec = spec_of(setting, methods, folder)
            sides = {}
            for side in ("ours", "peer") if number % 2 else ("peer", "ours"):
                if side == "ours":
                    sides[side] = ours(spec, folder, "first")
                else:
                    sides[side] = peer(module, setting, trials, folder / "peer")
            again = ours(spec, folder, "again")
            task = load_task(parse_spec(spec).task, store_at(str(folder / "store")), needed=("train", "val"))
            images = len(task.train)
        rows = sides["ours"]["rows"]
        forwards = sum(row["teacher_forwards"] for row in rows)
        if len(rows) != len(trials) or forwards != images * setting["views"]:
            raise SystemExit(
                f"{len(rows)} trials, {forwards} teacher forwards; {images} x {setting['views']} expected."
            )
        one = {
            "peer_s": sides["peer"]["seconds"],
            "ours_s": sides["ours"]["seconds"],
            "again_s": again["seconds"],
            "peer_cpu_s": sides["peer"]["cpu"],
            "ours_cpu_s": sides["ours"]["cpu"],
            "cold_start_s": min(row["started"] for row in rows) - sides["ours"]["began"],
            "loop_s": sum(row["loop_seconds"] for row in rows),
            "peer_trial_s": statistics.median(sides["peer"]["trial_seconds"]),
            "outside_loop_s": outside(rows),
            "store_s": sum(row["store_seconds_paid"] for row in rows if row["teacher_forwards"]),
            "teacher_images": forwards,
            "peer_teacher_images": len(trials) * setting["steps"] * setting["batch"],
            "val": {
                "ours": {row["config"]: row["val_metric"] for row in rows},
                "peer": sides["peer"]["val"],
            },
        }
        found.append(one)
        print(
            f"{label}, round {number}: {one['ours_s']:.0f} s here, {one['peer_s']:.0f} s there",
            file=sys.stderr,
            flush=True,
        )
    return found


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds before the first trial, and seconds a trial, of the least squares line."""
    return statistics.linear_regression(*zip(*points, strict=True))[::-1]  # type: ignore[return-value]


def main() -> None:
    """Runs the sizes, prints the table, writes it."""
    parser = arguments(__doc__, 12)
    parser.add_argument(
        "--trials",
        type=int,
        nargs="+",
        default=[6, 12, 24],
        choices=[6, 12, 24],
        help="of three methods; fewer where one is left out",
    )
    parser.add_argument("--block", default=MARK, help="the block of docs/performance.md that is written")
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in DEFAULTS}
    methods, left_out = served(setting, options.factor)
    costs = check_ratio(spec_of(setting, trials_of(2, options.factor, methods), Path("runs")), options.factor)
    about = {
        "setting": {**setting, "factor": options.factor},
        "machine": machine(PROCESSES),
        "versions": versions("torch", "timm", "ray", "optuna", "peft"),
    }
    result = measured_alike(RESULTS / f"{options.block}.json", about) or {"sizes": {}}
    for asked in options.trials:
        listing = trials_of(asked // len(METHODS), options.factor, methods)
        trials = asked // len(METHODS) * len(methods)
        result["sizes"][str(trials)] = compared("plain_optuna", setting, listing, options.rounds, f"{trials} trials")
    result |= {**about, "command": command_of(MARK, parser, options), "mflop": costs, "left_out": left_out}
    print(text := table(result))
    if not options.dry:
        publish(options.block, result, text)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    setting, costs = result["setting"], result["mflop"]
    sizes = {int(n): rounds for n, rounds in sorted(result["sizes"].items(), key=lambda item: int(item[0]))}

    def median(trials: int, name: str) -> float:
        return statistics.median(one[name] for one in sizes[trials])

    rows = [
        [
            trials,
            f"{median(trials, 'peer_s'):.0f}",
            f"{median(trials, 'ours_s'):.0f}",
            f"{statistics.median(one['peer_s'] / one['ours_s'] for one in rounds):.2f} x",
            f"{median(trials, 'peer_cpu_s'):.0f}",
            f"{median(trials, 'ours_cpu_s'):.0f}",
            f"{statistics.median(one['peer_cpu_s'] / one['ours_cpu_s'] for one in rounds):.2f} x",
            f"{median(trials, 'again_s'):.0f}",
            f"{median(trials, 'teacher_images'):,.0f}",
            f"{median(trials, 'peer_teacher_images'):,.0f}",
            len(rounds),
        ]
        for trials, rounds in sizes.items()
    ]
    head = ["trials", "plain, s", "here, s", "faster", "plain, CPU s", "here, CPU s", "less"]
    head += ["same file again, s", "teacher's images", "plain's", "rounds"]
    copied = ""
    if "wecolora" in costs:
        copied = (
            f" and into its own copy with one block in {setting['factor']} ({costs['wecolora']:.0f} MFLOP, "
            f"{costs['teacher'] / costs['wecolora']:.1f} x less)"
        )
    text = [
        f"`{result['command']}`: {setting['data']}, "
        f"{setting['teacher']} at {setting['teacher_size']} px "
        f"({costs['teacher']:.0f} MFLOP an image) into {setting['student']} at {setting['student_size']} px "
        f"({costs['student']:.0f} MFLOP, {costs['teacher'] / costs['student']:.0f} x less){copied}; "
        f"{setting['steps']} steps x {setting['batch']} images, {setting['views']} views; {result['machine']}; "
        f"{result['versions']}.",
        *(f"\nLeft out on both sides: {reason}" for reason in result.get("left_out", ())),
        "",
        markdown(head, rows),
    ]
    if len(sizes) > 1:
        plain = line([(n, median(n, "peer_cpu_s")) for n in sizes])
        here = line([(n, median(n, "ours_cpu_s")) for n in sizes])
        text += [
            "",
            f"A further trial takes {plain[1]:.1f} s of CPU there and {here[1]:.2f} s here ({plain[1] / here[1]:.1f} x "
            f"less), after {plain[0]:.0f} s and {here[0]:.0f} s that do not depend on their number.",
        ]
    most = sizes[max(sizes)]
    warm: dict[str, list[float]] = {}
    for one in most:
        for method, values in one["outside_loop_s"].items():
            warm.setdefault(method, []).extend(values)
    spent = ", ".join(f"{method} {statistics.median(values):.2f} s" for method, values in warm.items())
    text += [
        "",
        f"Of {max(sizes)} trials here: {statistics.median(one['cold_start_s'] for one in most):.1f} s from the command "
        f"to the first trial, {statistics.median(one['loop_s'] for one in most):.0f} s of training loops and "
        f"{statistics.median(one['store_s'] for one in most):.0f} s of the teacher's pass, both over {PROCESSES} "
        f"processes; outside its loop a warm trial takes {spent} (median).",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    main()
