"""The peer: the same trials as a good engineer would script them with Optuna and PyTorch, the teacher live.

Two processes share an Optuna study (journal storage), one thread each. Images are decoded once and kept in memory;
random crops are drawn anew in each step, and the teacher runs on them under `inference_mode`.

    python -m benchmarks.peers.plain_optuna OUT_FOLDER --steps 150
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.transforms import v2

GRID: dict[str, list[Any]] = {
    "trial": [
        *({"method": "kd", "temperature": t, "lr": lr} for t in (2.0, 4.0, 8.0) for lr in (1e-3, 3e-3)),
        *({"method": "wecolora", "factor": k, "rank": r} for k in (2, 3) for r in (8, 16, 32)),
    ]
}
CROP = 0.35
SHOTS = 20


def load_data() -> dict[str, tuple[Tensor, np.ndarray]]:
    """uint8 [n, 3, 96, 96] and labels [n] by split of the packaged data."""
    from importlib.resources import files

    table = pq.read_table(str(files("orchestrator") / "packaged" / "clipart" / "images.parquet")).to_pylist()
    names = sorted({row["label"] for row in table})
    found: dict[str, tuple[list[Tensor], list[int]]] = {s: ([], []) for s in ("train", "val", "test")}
    for row in table:
        image = Image.open(io.BytesIO(row["image"])).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
        images, labels = found[row["split"]]
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(names.index(row["label"]))
    return {split: (torch.stack(images), np.array(labels)) for split, (images, labels) in found.items()}


def normalised(images: Tensor, size: int) -> Tensor:
    """uint8 to [-1, 1] at a size."""
    small = images if images.shape[-1] == size else v2.functional.resize(images, [size, size], antialias=True)
    return small.float() / 127.5 - 1


def batches(pool: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless shuffled batches of rows."""
    order = rng.permutation(pool)
    at = 0
    while True:
        if at + size > len(order):
            order, at = np.concatenate([order[at:], rng.permutation(pool)]), 0
        yield order[at : at + size]
        at += size


class Bench:
    """One process's data, teacher, and what is computed once in it."""

    def __init__(self, steps: int, batch: int) -> None:
        from orchestrator.packaged.models import vit_clipart

        self.steps, self.batch = steps, batch
        self.data = load_data()
        self.teacher = vit_clipart().eval().requires_grad_(False)
        self.crop = v2.RandomResizedCrop(96, scale=(CROP, 1.0), antialias=True)
        self.flip = v2.RandomHorizontalFlip()
        images, labels = self.data["train"]
        rng = np.random.default_rng(0)
        self.labelled = np.concatenate(
            [rng.permutation(np.flatnonzero(labels == c))[:SHOTS] for c in np.unique(labels)]
        )
        self.unlabelled = np.setdiff1d(np.arange(len(images)), self.labelled)
        features = self.features(self.teacher, images[self.labelled], 96)
        head = LogisticRegression(C=0.1, max_iter=500).fit(features, labels[self.labelled])
        self.weight, self.bias = torch.tensor(head.coef_).float(), torch.tensor(head.intercept_).float()

    @torch.inference_mode()
    def features(self, network: Any, images: Tensor, size: int) -> np.ndarray:
        parts = images.split(128)
        found = [network.forward_head(network.forward_features(normalised(p, size)), pre_logits=True) for p in parts]
        return torch.cat(found).numpy()

    def views(self, rows: np.ndarray) -> Tensor:
        images = self.data["train"][0]
        return torch.stack([self.flip(self.crop(images[i])) for i in rows])

    def kd(self, temperature: float, lr: float) -> float:
        images, labels = self.data["train"]
        student = timm.create_model("test_resnet", num_classes=9)
        optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, self.steps, pct_start=0.1)
        rng = np.random.default_rng(0)
        known = batches(self.labelled, self.batch // 4, rng)
        others = batches(self.unlabelled, self.batch - self.batch // 4, rng)
        student.train()
        for _ in range(self.steps):
            mine = next(known)
            pixels = self.views(np.concatenate([mine, next(others)]))
            with torch.inference_mode():
                feature = self.teacher.forward_head(
                    self.teacher.forward_features(normalised(pixels, 96)), pre_logits=True
                )
                target = F.softmax((feature @ self.weight.T + self.bias) / temperature, -1)
            logits = student(normalised(pixels, 48))
            kl = F.kl_div(F.log_softmax(logits / temperature, -1), target.clone(), reduction="batchmean")
            ce = F.cross_entropy(logits[: len(mine)], torch.from_numpy(labels[mine]))
            optimizer.zero_grad()
            (0.5 * ce + 0.5 * temperature**2 * kl).backward()
            optimizer.step()
            scheduler.step()
        student.eval()
        images, labels = self.data["val"]
        with torch.inference_mode():
            predicted = torch.cat([student(normalised(p, 48)).argmax(1) for p in images.split(128)])
        return float((predicted.numpy() == labels).mean())

    def wecolora(self, factor: int, rank: int) -> float:
        from peft import LoraConfig, get_peft_model

        student = copy.deepcopy(self.teacher)
        student.blocks = nn.Sequential(*list(student.blocks)[::factor])
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))")
        adapted: Any = get_peft_model(student, config)  # type: ignore[arg-type]
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, self.steps, pct_start=0.2)
        order = batches(np.arange(len(self.data["train"][0])), self.batch, np.random.default_rng(0))
        tokens: dict[str, Tensor] = {}
        tap = self.teacher.blocks[-1].register_forward_hook(lambda m, a, out: tokens.__setitem__("teacher", out))
        student.blocks[-1].register_forward_hook(lambda m, a, out: tokens.__setitem__("student", out))
        for _ in range(self.steps):
            pixels = normalised(self.views(next(order)), 96)
            with torch.inference_mode():
                self.teacher.forward_features(pixels)
            adapted.base_model.model.forward_features(pixels)
            optimizer.zero_grad()
            F.l1_loss(tokens["student"], tokens["teacher"].clone()).backward()
            optimizer.step()
            scheduler.step()
        tap.remove()
        merged = adapted.merge_and_unload().eval()
        images, labels = self.data["train"]
        probe = LogisticRegression(C=0.1, max_iter=500)
        probe.fit(self.features(merged, images[self.labelled], 96), labels[self.labelled])
        images, labels = self.data["val"]
        return float(probe.score(self.features(merged, images, 96), labels))

    def objective(self, trial: optuna.Trial) -> float:
        knobs = dict(GRID["trial"][trial.suggest_int("index", 0, len(GRID["trial"]) - 1)])
        torch.manual_seed(0)
        began = time.time()
        value = getattr(self, knobs.pop("method"))(**knobs)
        trial.set_user_attr("seconds", time.time() - began)
        return value


def work(folder: str, steps: int, batch: int) -> None:
    """One process of the search."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    bench = Bench(steps, batch)
    study = _study(folder)
    study.optimize(bench.objective, callbacks=[optuna.study.MaxTrialsCallback(len(GRID["trial"]), states=None)])


def _study(folder: str) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(f"{folder}/plain.db"))
    sampler = optuna.samplers.GridSampler({"index": list(range(len(GRID["trial"])))}, seed=0)
    return optuna.create_study(
        study_name="plain", storage=storage, sampler=sampler, load_if_exists=True, direction="maximize"
    )


def main() -> None:
    """Runs all trials on two processes and prints their number, the best value and the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.time()
    _study(str(options.folder))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(str(options.folder), options.steps, options.batch)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trials = [t for t in _study(str(options.folder)).trials if t.value is not None]
    seconds = [t.user_attrs["seconds"] for t in trials]
    values = {json.dumps(GRID["trial"][t.params["index"]]): t.value for t in trials}
    print(json.dumps({"seconds": time.time() - began, "trials": len(trials), "trial_seconds": seconds, "val": values}))


if __name__ == "__main__":
    main()
