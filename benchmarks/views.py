"""Accuracy with V stored views against fresh augmentation with a live teacher.

    python -m benchmarks.views             # 15 minutes of one core; goes on where it was stopped, by STORAGE/views.json
    python -m benchmarks.views --table     # table and picture from benchmarks/results/views.json alone
    python -m benchmarks.views --spec my_sweep.yaml     # your data and networks; table and picture lie in --storage

KD on packaged clip art, or the first combination of your sweep file that learns from a teacher's outputs, at its knobs'
defaults. Equal steps, the same seeds in every arm: each draws other labelled images, another initial student and
another order. Stored: an image's view is drawn in each step from its V stored ones. Fresh: a view that the image never
had, which the teacher then sees live. Scored is the student on val; test is not read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.ablations.harness import Arm, run_arm
from benchmarks.record import (
    RESULTS,
    ROOT,
    begun,
    checked,
    command_of,
    machine,
    markdown,
    measured_alike,
    on_cpu,
    own_sweep,
    publish,
    versions,
    write_result,
)

PICTURE = ROOT / "docs" / "pictures" / "views.svg"
VIEWS = (1, 2, 4, 8, 16)
FRESH = "fresh"
SPEC: dict[str, Any] = {
    "name": "views",
    "task": {"data": "packaged/clipart", "shots": 20},
    "teachers": ["packaged/vit_clipart"],
    "students": [{"model": "timm/test_resnet", "image_size": 48}],
    "methods": {"kd": {"lr": 3e-3}},
    "train": {"steps": 240, "batch": 64},
}


def arm_of(prepared: Any) -> Arm:
    """The sweep's first combination that learns from outputs of a teacher, at its knobs' defaults."""
    from methods.contract import TrainStage
    from orchestrator.sweep.space import default_knobs
    from orchestrator.trial.plan import TrialConfig, configure, method_named, setting_of

    for cell in prepared.cells:
        knobs = default_knobs(prepared.spaces[cell.method], cell.method)
        settings = configure(prepared.spec, TrialConfig(cell.method, 0, cell, knobs, 0))
        stages = method_named(cell.method).stages(settings, setting_of(prepared.spec, prepared.task.info, cell))
        trained = [stage for stage in stages if isinstance(stage, TrainStage)]
        if trained and trained[-1].feed.outputs:
            return Arm(cell.method, cell.method, knobs, cell.teacher, cell.student)
    raise SystemExit("No method of this sweep learns from outputs of a teacher in its last training stage.")


def measured(spec: dict[str, Any], arm: Arm, views: int | str, seed: int, storage: str) -> dict[str, float]:
    """Val, device-seconds and the teacher's images of one trial."""
    train = spec.get("train", {}) | ({"fresh": True} if views == FRESH else {"views": views, "fresh": False})
    row = run_arm({**spec, "train": train, "storage": storage, "name": f"{spec['name']}-{views}"}, arm, seed)
    return {name: row[name] for name in ("val_metric", "loop_seconds", "teacher_forwards")}


def main() -> None:
    """Runs what is missing, writes JSON, table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--spec", type=Path, help="a sweep file of yours, in place of packaged clip art")
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: two at least, for a standard deviation.")
    spec = SPEC
    if options.spec:
        own = on_cpu(own_sweep(options.spec))
        spec = {key: value for key, value in own.items() if key not in ("store", "storage", "limits")}
    folder = Path(options.storage)
    path = folder / (f"views-{spec['name']}.json" if options.spec else "views.json")
    if options.table and not options.spec:
        path = RESULTS / "views.json"
    prepared = checked({**spec, "storage": str(folder)})
    arm = arm_of(prepared)
    about = {"spec": json.loads(json.dumps(spec)), "machine": machine(1), "versions": versions("torch", "timm")}
    known = begun(path, spec) if options.table else measured_alike(path, about)
    if options.table and known is None:
        parser.error(f"--table: {path} holds no run of this sweep.")
    result: dict[str, Any] = known or {**about, "arms": {}}
    if not options.table:
        result["command"] = command_of("views", parser, options, but=("storage", "table"))
    result |= {
        "method": arm.method,
        "teacher": prepared.spec.teachers[arm.teacher or 0].model,
        "student": prepared.spec.students[arm.student].model if arm.student is not None else "its own student",
        "steps": prepared.spec.train.total_steps(len(prepared.task.train)),
        "batch": prepared.spec.train.batch,
        "images": len(prepared.task.train),
    }
    for seed in range(options.seeds if not options.table else 0):
        for views in (*VIEWS, FRESH):
            seeds = result["arms"].setdefault(str(views), {})
            if str(seed) not in seeds:
                seeds[str(seed)] = measured(spec, arm, views, seed, options.storage)
                write_result(path, result)
                print(f"{views}, seed {seed}: {seeds[str(seed)]['val_metric']:.3f}", file=sys.stderr, flush=True)
    drawn = path.with_suffix(".svg") if options.spec else PICTURE
    drawn.parent.mkdir(exist_ok=True)
    drawn.write_text(picture(result), encoding="utf-8")
    print(text := table(result))
    if not options.spec:
        publish("views", result, text)


def values_of(result: dict[str, Any], views: int | str) -> list[float]:
    """Val by seed."""
    seeds = result["arms"][str(views)]
    return [seeds[seed]["val_metric"] for seed in sorted(seeds, key=int)]


def table(result: dict[str, Any]) -> str:
    """The result as Markdown; differences from fresh views are taken seed by seed."""
    fresh = values_of(result, FRESH)
    rows = []
    for views in (*VIEWS, FRESH):
        values = values_of(result, views)
        apart = [a - b for a, b in zip(values, fresh, strict=True)]
        images = max(one["teacher_forwards"] for one in result["arms"][str(views)].values())
        rows.append(
            [
                views,
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}",
                ", ".join(f"{v:.3f}" for v in values),
                "" if views == FRESH else f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart):.3f}",
                f"{statistics.median(one['loop_seconds'] for one in result['arms'][str(views)].values()):.0f}",
                f"{images:,.0f}" if views == FRESH else f"{result['images'] * views:,.0f}, shared",
            ]
        )
    head = ["views", "val, mean ± sd", "seeds", "against fresh", "training loop, s", "teacher's images"]
    return (
        f"`{result['command']}`: {result['method']}, {result['teacher']} into {result['student']}, "
        f"{result['steps']} steps x {result['batch']} images, {len(fresh)} seeds; {result['machine']}; "
        f"{result['versions']}.\n\n{markdown(head, rows)}"
    )


def picture(result: dict[str, Any]) -> str:
    """The curve over V as SVG: means with one standard deviation, and the band of fresh views."""
    wide, high, left, bottom, top = 560, 300, 60, 250, 20
    known = {v: values_of(result, v) for v in (*VIEWS, FRESH)}
    stats = {v: (statistics.mean(vals), statistics.stdev(vals)) for v, vals in known.items() if vals}
    low = min(mean - sd for mean, sd in stats.values()) - 0.01
    upper = max(mean + sd for mean, sd in stats.values()) + 0.01

    def y(value: float) -> float:
        return bottom - (value - low) / (upper - low) * (bottom - top)

    def x(place: int) -> float:
        return left + 40 + place * (wide - left - 80) / (len(VIEWS) - 1)

    mean, sd = stats[FRESH]
    right = wide - 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="#fff"/>',
        f'<rect x="{left}" y="{y(mean + sd):.1f}" width="{right - left}" height="{y(mean - sd) - y(mean + sd):.1f}" '
        'fill="#e8a33d" opacity="0.25"/>',
        f'<line x1="{left}" x2="{right}" y1="{y(mean):.1f}" y2="{y(mean):.1f}" stroke="#b9770e" '
        'stroke-dasharray="6 3"/>',
        f'<text x="{right}" y="{y(mean) - 5:.1f}" text-anchor="end" fill="#b9770e">fresh views, live teacher</text>',
        f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#333"/>',
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{bottom}" stroke="#333"/>',
    ]
    tick = round(low + 0.01, 2)
    while tick < upper:
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>')
        parts.append(f'<line x1="{left - 3}" x2="{left}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#333"/>')
        tick += 0.02
    curve = " ".join(f"{x(i):.1f},{y(stats[v][0]):.1f}" for i, v in enumerate(VIEWS))
    parts.append(f'<polyline points="{curve}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
    for place, views in enumerate(VIEWS):
        mean, sd = stats[views]
        at = f"{x(place):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{y(mean - sd):.1f}" y2="{y(mean + sd):.1f}" stroke="#1f5fa8"/>')
        parts.append(f'<circle cx="{at}" cy="{y(mean):.1f}" r="4" fill="#1f5fa8"/>')
        parts.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{views}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{bottom + 38}" text-anchor="middle">stored views an image</text>')
    parts.append(
        f'<text x="16" y="{(top + bottom) / 2:.0f}" transform="rotate(-90 16 {(top + bottom) / 2:.0f})" '
        'text-anchor="middle">val metric</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
