"""The peer: fine-tuning on two workers as a good engineer would write it, for torchrun and for a Ray `TorchTrainer`.

Images are decoded once and kept in memory at the network's size; no augmentation, plain DDP.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.peers.plain_ddp OUT.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

SIZE, LR = 96, 1e-3


def train(config: dict[str, Any]) -> None:
    """Trains on the rank that this process is; rank 0 writes its seconds to `config["out"]`."""
    import timm

    from benchmarks.peers.plain_optuna import load_data, normalised

    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    steps, batch = config["steps"], config["batch"]
    images, labels = load_data(config["data"])["train"]
    pixels, classes = normalised(images, SIZE), torch.from_numpy(labels).long()
    torch.manual_seed(0)
    many = int(classes.max()) + 1
    try:
        network = timm.create_model(config["network"], img_size=SIZE, num_classes=many)
    except TypeError:  # a convolutional one, which works at any size
        network = timm.create_model(config["network"], num_classes=many)
    network = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,), generator=order)[rank::world]
        loss = F.cross_entropy(network(pixels[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    loop = time.perf_counter() - began
    if rank == 0:
        Path(config["out"]).write_text(json.dumps({"loop": loop, "loss": float(loss)}), encoding="utf-8")


def fit(config: dict[str, Any]) -> dict[str, float]:
    """One `TorchTrainer`, from beginning to end: its wall seconds and those of its loop."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    began = time.perf_counter()
    trainer = TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=f"plain-{time.time_ns()}", storage_path=config["storage"]),
    )
    trainer.fit()
    return {"wall": time.perf_counter() - began, **json.loads(Path(config["out"]).read_text(encoding="utf-8"))}


def trial(config: dict[str, Any]) -> None:
    """The same inside a Tune trial, as Ray's documentation nests it."""
    from ray import tune

    found = fit(config | {"out": f"{config['out']}.{config['number']}"})
    tune.report({"loop": found["loop"], "ended": time.time()})


def main() -> None:
    """A rank of torchrun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--network", default="test_vit", help="of timm")
    parser.add_argument("--data", default="packaged/clipart", help="packaged/NAME or folder:PATH")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    dist.init_process_group("gloo")
    train(vars(options))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
