"""What half precision of a teacher saves, and what it changes: its outputs, and what students learn from them.

    python -m benchmarks.precision              # 15 minutes on two cores; writes benchmarks/results/ and the page
    python -m benchmarks.precision --teachers timm/resnet50 timm/vit_base_patch16_224 --size 96   # printed only

First the teacher's forward passes, by turns, in CPU seconds of one thread; then the same trials under the teacher's
outputs in single precision and in bfloat16, five seeds, differences taken seed by seed. Scored is the student on val.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.ablations.harness import Arm, run_arm
from benchmarks.record import command_of, machine, markdown, publish, versions

MARK = "precision"
PRECISIONS = ("fp32", "bf16", "fp16")
TEACHERS = (
    {"model": "packaged/vit_clipart"},
    {"model": "packaged/efficientnet_lite0", "image_size": 96},
    {"model": "timm/vit_small_patch16_224", "image_size": 64, "pretrained": False},
    {"model": "timm/resnet50", "image_size": 64, "pretrained": False},
)
BATCH, ROUNDS, PASSES = 64, 5, 3
SPEC: dict[str, Any] = {
    "name": "precision",
    "task": {"data": "packaged/clipart", "shots": 20},
    "students": [{"model": "timm/test_resnet", "image_size": 48}],
    "train": {"steps": 240, "batch": 64, "views": 4},
}
ARMS = (Arm("kd", "kd", {"lr": 3e-3}, 0, 0), Arm("tdmr", "tdmr", {"lr": 3e-3}, 0, 0))


def passes(entry: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of CPU for 64 images in each precision, and how far pooled features are from those of fp32."""
    from methods.outputs import Output
    from orchestrator.data.passes import live_outputs
    from orchestrator.models.load import load_network
    from orchestrator.spec import Model

    networks = {p: load_network(Model.model_validate({**entry, "precision": p}), "teacher") for p in PRECISIONS}
    size = networks["fp32"].preprocessing.size
    pixels = torch.randint(
        0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found: dict[str, Any] = {p: [] for p in PRECISIONS}
    outputs = {}
    for number in range(ROUNDS + 1):
        for precision, network in networks.items():
            began = time.process_time()
            for _ in range(PASSES):
                outputs[precision] = live_outputs(network, network.module, pixels, [Output("pooled")])["pooled"]
            if number:
                found[precision].append(1000 * (time.process_time() - began) / PASSES)
    largest = outputs["fp32"].abs().max()
    apart = {p: float((outputs[p] - outputs["fp32"]).abs().max() / largest) for p in PRECISIONS[1:]}
    return {"ms": {p: statistics.median(found[p]) for p in PRECISIONS}, "apart": apart}


def val(arm: Arm, precision: str, seed: int, storage: str) -> float:
    """Of one trial."""
    torch.set_num_threads(1)
    teachers = [{**TEACHERS[0], "precision": precision}]
    spec = {**SPEC, "teachers": teachers, "storage": storage, "name": f"precision-{precision}"}
    return float(run_arm(spec, arm, seed)["val_metric"])


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teachers", nargs="+", help="by name, their weights drawn anew: their passes alone, written nowhere"
    )
    parser.add_argument("--size", type=int, help="pixels, with --teachers; else their own")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--storage", default="runs")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: two at least, for a standard deviation.")
    torch.set_num_threads(1)
    entries = [{"model": name, "image_size": options.size, "pretrained": False} for name in options.teachers or ()]
    result: dict[str, Any] = {
        "command": command_of(MARK, parser, options, but=("storage",)),
        "machine": machine(1),
        "versions": versions("torch", "timm"),
        "passes": {f"{e['model']}": passes(e) for e in entries or TEACHERS},
        "val": {},
    }
    if entries:
        print(pass_table(result))
        return
    with ProcessPoolExecutor(2) as pool:
        for seed in range(options.seeds):
            jobs = {
                (arm.label, p): pool.submit(val, arm, p, seed, options.storage) for arm in ARMS for p in PRECISIONS[:2]
            }
            for (label, precision), job in jobs.items():
                result["val"].setdefault(label, {}).setdefault(precision, []).append(job.result())
                print(f"{label}, {precision}, seed {seed}: {job.result():.3f}", file=sys.stderr, flush=True)
    text = f"{pass_table(result)}\n\n{val_table(result)}"
    print(text)
    publish(MARK, result, text)


def pass_table(result: dict[str, Any]) -> str:
    """Costs and errors as Markdown."""
    rows = []
    for name, one in result["passes"].items():
        ms = one["ms"]
        halves = [f"{ms[p]:.0f} ({ms['fp32'] / ms[p]:.2f} x)" for p in PRECISIONS[1:]]
        rows.append([name, f"{ms['fp32']:.0f}", *halves, *(f"{one['apart'][p]:.1e}" for p in PRECISIONS[1:])])
    head = [
        "teacher",
        "fp32, ms",
        "bf16, ms (faster)",
        "fp16, ms (faster)",
        "bf16, largest error",
        "fp16, largest error",
    ]
    return (
        f"`{result['command']}`: {BATCH} images, median of {ROUNDS} rounds by turns, CPU time; errors of pooled "
        f"features, of the largest value; {result['machine']}; {result['versions']}.\n\n{markdown(head, rows)}"
    )


def val_table(result: dict[str, Any]) -> str:
    """What students score, as Markdown."""
    rows = []
    for label, one in result["val"].items():
        apart = [b - a for a, b in zip(one["fp32"], one["bf16"], strict=True)]
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in (one["fp32"], one["bf16"], apart)]
        rows.append([label, len(apart), *cells])
    head = ["method", "seeds", "val, teacher in fp32", "val, teacher in bf16", "difference, seed by seed"]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
