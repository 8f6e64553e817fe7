"""What `train.compile` costs before the first step, and what a step takes with it and without.

    python -m benchmarks.compiled        # minutes on one core; published
    python -m benchmarks.compiled --networks resnet34 vit_small_patch16_224 --size 64   # of timm; written nowhere

CPU seconds of one thread for the steps, by turns in a process of its own for each network; the pause by the clock, with
an empty cache of the compiler, as a new machine has it. Steps that make the pause good: it over what a step saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.record import command_of, machine, markdown, network_of, publish, quiet_environment, timm_name, versions

NETWORKS = ("vit_tiny_patch16_224", "resnet18", "mobilenetv3_small_050", "convnext_atto")
BATCH, SIZE, CLASSES, STEPS = 32, 96, 20, 9


def measured(name: str, size: int) -> dict[str, float]:
    """Milliseconds of a step, plain and compiled, and seconds of the first compiled one."""
    import torch
    import torch.nn.functional as F

    from orchestrator.train.compiled import compiled

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = network_of(name, size, CLASSES)
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (BATCH,))

    def step() -> float:
        began = time.process_time()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1000 * (time.process_time() - began)

    def steps() -> float:
        step()
        return statistics.median(step() for _ in range(STEPS))

    plain = [steps()]
    with compiled(network, True):
        began = time.perf_counter()
        step()
        pause = time.perf_counter() - began
        shorter = steps()
    plain.append(steps())
    return {"plain_ms": statistics.median(plain), "compiled_ms": shorter, "pause_s": pause}


def main() -> None:
    """Measures each network in a process of its own, prints and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", type=timm_name, default=list(NETWORKS), help="names of timm")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only, options.size)))
        return
    rows = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "benchmarks.compiled", "--only", name, "--size", str(options.size)]
            environment = quiet_environment() | {"TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
    result = {
        "command": command_of("compiled", parser, options),
        "machine": machine(1),
        "versions": versions("torch", "timm"),
        "networks": rows,
    }
    print(table(result))
    if (options.networks, options.size) == (list(NETWORKS), SIZE):
        publish("compiled", result, table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    for name, row in result["networks"].items():
        saved = row["plain_ms"] - row["compiled_ms"]
        cells = [f"{row['plain_ms']:.0f}", f"{row['compiled_ms']:.0f}", f"{row['plain_ms'] / row['compiled_ms']:.2f} x"]
        good = f"{1000 * row['pause_s'] / saved:,.0f}" if saved > 0 else "never"
        rows.append([name, *cells, f"{row['pause_s']:.0f}", good])
    head = ["network", "a step, ms", "compiled, ms", "faster", "pause at the first step, s", "steps that make it good"]
    return f"`{result['command']}`: batch {BATCH}; {result['machine']}; {result['versions']}.\n\n{markdown(head, rows)}"


if __name__ == "__main__":
    main()
