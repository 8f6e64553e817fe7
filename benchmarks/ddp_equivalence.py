"""One process, two workers and four on the same global batches: the losses of every training stage of every method.

    python -m benchmarks.ddp_equivalence

Methods are found, not listed. Each stage is trained by `orchestrator.train.loop.fit` on tiny networks, under gloo on
CPUs, from what the stages before it left untrained. No dropout or drop path is on, since each rank draws its own.

In 64 bits: in 32 the order of a sum over ranks changes its last bits, and where a gradient is next to nothing AdamW
turns these into a whole step. `--dtype float32` shows by how much.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-5
BATCH = 16
LOSSES = "loss of each step"

Runs = dict[str, dict[str, torch.Tensor]]  # losses [steps] and final tensors, by "method stage"


class Cut:
    """A rank's rows of the same global batch in every step, as the loop asks for them."""

    live_forwards = 0

    def __init__(self, draw: Callable[[int], Any], rank: int, world: int) -> None:
        self.draw, self.rank, self.world = draw, rank, world

    def __call__(self, step: int, device: str) -> Any:
        from orchestrator.train.loop import part_of

        return part_of(self.draw(step), self.rank, self.world)

    def close(self) -> None: ...


def runs_of(methods: Sequence[str], steps: int, dtype: str = "float64", rank: int = 0, world: int = 1) -> Runs:
    """Each training stage's losses of the global batch, and what it has trained."""
    exact = getattr(torch, dtype)
    sys.path.insert(0, str(ROOT / "tests" / "methods"))
    from test_conformance import built, case_for
    from tiny import draw, make_images

    from methods import discover
    from orchestrator.train.loop import fit

    found: Runs = {}
    for name in methods:
        method = discover()[name]
        for stage, learner, chain in built(method, method.Config(), case := case_for(method)):

            def batch(step: int, stage: Any = stage, chain: Any = chain, case: Any = case) -> Any:
                torch.manual_seed(step)
                return _to(draw(stage, case, *make_images(), BATCH, chain), exact)

            history = fit(
                learner.to(exact),
                Cut(batch, rank, world),  # type: ignore[arg-type]
                stage.recipe,
                steps,
                rank=rank,
                world=world,
                report_every=1,
            )
            losses = torch.tensor([point["loss"] for point in history.points])
            found[f"{name} {stage.name}"] = {**learner.state_dict(), LOSSES: losses}
    return found


def _to(batch: Any, dtype: torch.dtype) -> Any:
    """The same batch with its fractions in `dtype`."""

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(one) for key, one in value.items()}
        return _to(value, dtype) if value is not None else None

    return replace(batch, **{f.name: cast(getattr(batch, f.name)) for f in fields(batch)})


def _rank(rank: int, world: int, folder: str, methods: Sequence[str], steps: int, dtype: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = runs_of(methods, steps, dtype, rank, world)
    if rank == 0:
        torch.save(found, Path(folder) / f"{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def group_runs(methods: Sequence[str], steps: int, world: int, dtype: str = "float64") -> Runs:
    """`runs_of` on a group of `world` processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, tuple(methods), steps, dtype), nprocs=world)
        found: Runs = torch.load(Path(folder) / f"{world}.pt", weights_only=True)
    return found


def worst(one: Runs, other: Runs) -> dict[str, float]:
    """The largest difference of a step's loss, of a weight or of a buffer, by stage; infinite where one lacks it."""
    if one.keys() != other.keys():
        return dict.fromkeys(one.keys() ^ other.keys(), float("inf"))
    return {name: max(_apart(one[name][key], other[name][key]) for key in tensors) for name, tensors in one.items()}


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


def main() -> int:
    from methods import discover

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--methods", nargs="+", default=sorted(discover()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone = runs_of(options.methods, options.steps, options.dtype)
    silent = [name for name in options.methods if not any(key.split()[0] == name for key in alone)]
    differences, losses = {}, 0.0
    for world in options.workers:
        began = time.perf_counter()
        group = group_runs(options.methods, options.steps, world, options.dtype)
        differences[world] = worst(alone, group)
        losses = max(losses, *(_apart(alone[name][LOSSES], group[name][LOSSES]) for name in alone))
        print(f"{world} workers: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{len(alone)} training stages of {len(options.methods) - len(silent)} methods, {options.steps} steps.")
    print(f"No training stage: {', '.join(silent) or 'none'}.\n")
    print("| method stage | " + " | ".join(f"{w} workers" for w in differences) + " |")
    print("| --- |" + " --- |" * len(differences))
    for name in alone:
        print(f"| {name} | " + " | ".join(f"{found[name]:.1e}" for found in differences.values()) + " |")
    top = max(value for found in differences.values() for value in found.values())
    print(f"\nLargest difference: {top:.1e}; of a loss alone: {losses:.1e}, {TOLERANCE:.0e} allowed.")
    return 0 if losses <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
