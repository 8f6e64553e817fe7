"""A training step and a pass of evaluation on images whose channels lie last in memory, against channels first.

    python -m benchmarks.layout        # a minute on one core; writes benchmarks/results/ and docs/performance.md
    python -m benchmarks.layout --networks resnet34 vit_small_patch16_224 --size 64     # of timm; written nowhere

Counted in CPU seconds of one thread, by turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.record import command_of, machine, markdown, network_of, publish, timm_name, versions

NETWORKS = ("resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224")
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
BATCH, SIZE, CLASSES, ROUNDS = 32, 96, 20, 9


def cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def compared(name: str, size: int) -> dict[str, float]:
    """Medians of `ROUNDS` by turns, after one of warm-up."""
    torch.manual_seed(0)
    network = network_of(name, size, CLASSES)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    labels = torch.randint(0, CLASSES, (BATCH,))
    images = torch.randn(BATCH, 3, size, size)
    given = {layout: images.contiguous(memory_format=form) for layout, form in LAYOUTS.items()}

    def step(layout: str) -> None:
        network.train()
        F.cross_entropy(network(given[layout]), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def look(layout: str) -> None:
        network.eval()
        network(given[layout])

    found: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        for layout in LAYOUTS:
            for what, call in (("train", step), ("eval", look)):
                seconds = cpu_seconds(lambda call=call, layout=layout: call(layout))  # type: ignore[misc]
                if turn:
                    found.setdefault(f"{what}_{layout}_s", []).append(seconds)
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> None:
    """Measures, prints and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", type=timm_name, default=list(NETWORKS), help="names of timm")
    parser.add_argument("--size", type=int, default=SIZE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: compared(name, options.size) for name in options.networks}
    about = {"command": command_of("layout", parser, options), "machine": machine(1)}
    about |= {"versions": versions("torch", "timm")}
    result = {**about, "batch": BATCH, "size": options.size, "rounds": ROUNDS, "networks": rows}
    print(table(result))
    if (options.networks, options.size) == (list(NETWORKS), SIZE):
        publish("layout", result, table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [name, *(f"{row[f'{what}_first_s'] / row[f'{what}_last_s']:.2f} x" for what in ("train", "eval"))]
        for name, row in result["networks"].items()
    ]
    made = ", ".join(result[name] for name in ("machine", "versions") if name in result)  # once they were one
    command = result.get("command", "python -m benchmarks.layout")
    return (
        f"`{command}`: batch {result['batch']} of {result['size']} px, median of {result['rounds']} by "
        "turns, CPU time with channels first over that with channels last; "
        f"{made}.\n\n{markdown(['network', 'training step', 'evaluation'], rows)}"
    )


if __name__ == "__main__":
    main()
