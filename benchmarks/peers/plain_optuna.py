"""The peer: the same trials as a good engineer would script them with Optuna and PyTorch, the teacher live.

Processes share an Optuna study (journal storage), one thread each. Images are decoded once and kept in memory; random
crops are drawn anew in each step, and the teacher runs on them under `inference_mode`. What does not change from trial
to trial (the teacher's features of the labelled images, its head, TDMR's proxies) is computed once a process.

    python -m benchmarks.peers.plain_optuna OUT_FOLDER SWEEP.json

SWEEP.json: {data, teacher, teacher_size, student, student_size, shots, steps, batch, processes,
trials: [{method, ...}]}; data is packaged/NAME or folder:PATH.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
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
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.transforms import v2

CROP = 0.35
SIDE = 96  # least pixels at which images are kept
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
PROXY_EPOCHS = 100


def listed_images(data: str) -> Iterator[tuple[Any, str, str]]:
    """(file, label, split) of every image; a folder without train is train."""
    from importlib.resources import files

    if data.startswith("packaged/"):
        path = files("orchestrator") / "packaged" / data.removeprefix("packaged/") / "images.parquet"
        for row in pq.read_table(str(path)).to_pylist():
            yield io.BytesIO(row["image"]), row["label"], row["split"]
    else:
        root = Path(data.removeprefix("folder:")).expanduser()
        splits = ("train", "val", "test") if (root / "train").is_dir() else (".",)
        for split in splits:
            for path in sorted((root / split).glob("*/*")):
                if path.suffix.lower() in SUFFIXES:
                    yield path, path.parent.name, split if len(splits) > 1 else "train"


def divided(listing: list[tuple[Any, str, str]]) -> list[tuple[Any, str, str]]:
    """With a fifth of each class of train as test and as val, where there is none: as many as the other side takes."""
    lacking = [split for split in ("test", "val") if split not in {split for _, _, split in listing}]
    found, rng = list(listing), np.random.default_rng(0)
    for name in sorted({label for _, label, _ in listing}):
        rows = rng.permutation([i for i, (_, label, split) in enumerate(listing) if (label, split) == (name, "train")])
        many = round(len(rows) / 5)
        for number, split in enumerate(lacking):
            for row in rows[number * many : (number + 1) * many]:
                found[row] = (*found[row][:2], split)
    return found


def load_data(data: str, side: int = SIDE) -> dict[str, tuple[Tensor, np.ndarray]]:
    """uint8 [n, 3, side, side], the central squares, and labels [n] by split; a split without images is not there."""
    listing = divided(list(listed_images(data)))
    names = sorted({label for _, label, _ in listing})
    found: dict[str, tuple[list[Tensor], list[int]]] = {}
    for file, label, split in listing:
        image = ImageOps.fit(Image.open(file).convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        images, labels = found.setdefault(split, ([], []))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        labels.append(names.index(label))
    if not {"train", "val"} <= set(found):
        raise SystemExit(f"{data} has no images of train, or none of val: one folder a class, or train/val/test above.")
    return {split: (torch.stack(images), np.array(labels)) for split, (images, labels) in found.items()}


def normalised(images: Tensor, size: int, network: Any = None) -> Tensor:
    """uint8 to what a network of timm expects, without one to [-1, 1], at a size; channels last in memory."""
    small = images if images.shape[-1] == size else v2.functional.resize(images, [size, size], antialias=True)
    pixels = small.float().contiguous(memory_format=torch.channels_last)
    config = network.pretrained_cfg if network is not None else {"mean": (0.5,), "std": (0.5,)}
    mean, std = (255 * torch.tensor(config[name], device=pixels.device).view(1, -1, 1, 1) for name in ("mean", "std"))
    return pixels.sub_(mean).div_(std)


def batches(pool: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless shuffled batches of `size` rows, each as often as any other; of a small pool a batch has some twice."""
    order = rng.permutation(pool)
    at = 0
    while True:
        while at + size > len(order):
            order, at = np.concatenate([order[at:], rng.permutation(pool)]), 0
        yield order[at : at + size]
        at += size


def build(name: str, size: int, **options: Any) -> Any:
    """A network of timm, told its images' size if it takes one: most convolutional ones work at any."""
    name = name.removeprefix("timm/")
    try:
        return timm.create_model(name, img_size=size, **options)
    except TypeError:
        return timm.create_model(name, **options)


def build_teacher(name: str, size: int) -> Any:
    """The frozen teacher; one of timm without pre-trained weights is drawn from seed 0, as it is on the other side."""
    if name.startswith("packaged/"):
        from orchestrator.packaged import models

        teacher: Any = getattr(models, name.removeprefix("packaged/"))()
    else:
        torch.manual_seed(0)
        teacher = build(name, size)
    return teacher.eval().requires_grad_(False)


def two_sided(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A linear head with a row for each class; of two classes scikit-learn gives the second one's alone."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])


class Proxy(nn.Module):
    """TDMR's projector and head on standardised features."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, dim: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        wide = 2 * dim
        self.projector = nn.Sequential(
            nn.Linear(len(mean), wide), nn.BatchNorm1d(wide), nn.GELU(), nn.Linear(wide, dim)
        )
        self.head = nn.Linear(dim, classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector((features - self.mean) / self.std)
        return z, self.head(z)


class Bench:
    """One process's data, teacher, and what is computed once in it."""

    def __init__(self, sweep: dict[str, Any]) -> None:
        self.sweep, self.steps, self.batch = sweep, sweep["steps"], sweep["batch"]
        self.size, self.small = sweep["teacher_size"], sweep["student_size"]
        self.data = load_data(sweep["data"], max(SIDE, self.size, self.small))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher = build_teacher(sweep["teacher"], self.size).to(self.device)
        self.crop = v2.RandomResizedCrop(max(self.size, self.small), scale=(CROP, 1.0), antialias=True)
        self.flip = v2.RandomHorizontalFlip()
        images, labels = self.data["train"]
        images = images.to(self.device)  # so that a GPU cuts its crops itself
        self.data["train"] = images, labels
        rng = np.random.default_rng(0)
        self.labelled = np.concatenate(
            [rng.permutation(np.flatnonzero(labels == c))[: sweep["shots"]] for c in np.unique(labels)]
        )
        self.unlabelled = np.setdiff1d(np.arange(len(images)), self.labelled)
        self.classes = len(np.unique(labels))
        self.known = self.features(self.teacher, images[self.labelled], self.size)
        head = LogisticRegression(C=0.1, max_iter=500).fit(self.known, labels[self.labelled])
        self.weight, self.bias = (
            torch.tensor(part, dtype=torch.float32, device=self.device)
            for part in two_sided(head.coef_, head.intercept_)
        )
        self.proxies: dict[int, Proxy] = {}

    @torch.inference_mode()
    def features(self, network: Any, images: Tensor, size: int) -> np.ndarray:
        parts = images.to(self.device).split(128)
        found = [
            network.forward_head(network.forward_features(normalised(p, size, network)), pre_logits=True) for p in parts
        ]
        return torch.cat(found).cpu().numpy()

    def views(self, rows: np.ndarray) -> Tensor:
        images = self.data["train"][0]
        return torch.stack([self.flip(self.crop(images[i])) for i in rows])

    @torch.inference_mode()
    def pooled(self, pixels: Tensor) -> Tensor:
        teacher = self.teacher
        features = teacher.forward_features(normalised(pixels, self.size, teacher))
        return teacher.forward_head(features, pre_logits=True)

    def prepared(self, parameters: Any, lr: float, decay: float) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, self.steps, pct_start=0.1)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(a quarter of labelled rows, the others) of each step; where all rows are labelled, (all of them, none)."""
        rng = np.random.default_rng(0)
        many = self.batch // 4 if len(self.unlabelled) else self.batch
        known = batches(self.labelled, many, rng)
        others = batches(self.unlabelled, self.batch - many, rng)
        for _ in range(self.steps):
            one = next(known), next(others) if many < self.batch else self.unlabelled
            assert sum(map(len, one)) == self.batch
            yield one

    def accuracy(self, student: Any) -> float:
        student.eval()
        images, labels = self.data["val"]
        with torch.inference_mode():
            predicted = torch.cat(
                [student(normalised(p, self.small, student)).argmax(1) for p in images.to(self.device).split(128)]
            )
        return float((predicted.cpu().numpy() == labels).mean())

    def student(self) -> Any:
        return build(self.sweep["student"], self.small, num_classes=self.classes).to(self.device).train()

    def kd(self, temperature: float, lr: float, weight: float) -> float:
        labels = self.data["train"][1]
        student = self.student()
        optimizer, scheduler = self.prepared(student.parameters(), lr, 0.05)
        for mine, others in self.batches():
            pixels = self.views(np.concatenate([mine, others]))
            target = F.softmax((self.pooled(pixels) @ self.weight.T + self.bias) / temperature, -1)
            logits = student(normalised(pixels, self.small, student))
            kl = F.kl_div(F.log_softmax(logits / temperature, -1), target, reduction="batchmean")
            ce = F.cross_entropy(logits[: len(mine)], torch.from_numpy(labels[mine]).to(self.device))
            optimizer.zero_grad()
            ((1 - weight) * ce + weight * temperature**2 * kl).backward()
            optimizer.step()
            scheduler.step()
        return self.accuracy(student)

    def proxy(self, dim: int) -> Proxy:
        """TDMR's first stage: the number of epochs is chosen on a held-out fifth."""
        if dim not in self.proxies:
            features = torch.from_numpy(self.known)
            labels = torch.from_numpy(self.data["train"][1][self.labelled])
            out = torch.arange(len(labels)) % 5 == 0
            held: list[tuple[float, int]] = []

            def fitted(rows: Tensor, epochs: int, held_out: Tensor | None = None) -> Proxy:
                torch.manual_seed(0)
                one = Proxy(features[rows].mean(0), features[rows].std(0) + 1e-3, dim, self.classes)
                optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=1e-4)
                for epoch in range(epochs):
                    one.train()
                    optimizer.zero_grad()
                    F.cross_entropy(one(features[rows])[1], labels[rows]).backward()
                    optimizer.step()
                    if held_out is not None:
                        with torch.no_grad():
                            right = one.eval()(features[held_out])[1].argmax(1) == labels[held_out]
                        held.append((-right.float().mean().item(), epoch + 1))
                return one.eval().requires_grad_(False)

            fitted(~out, PROXY_EPOCHS, out)
            self.proxies[dim] = fitted(torch.ones_like(out), min(held)[1]).to(self.device)
        return self.proxies[dim]

    def tdmr(self, proxy_dim: int, lr: float, lambda_end: float) -> float:
        labels = self.data["train"][1]
        student, proxy = self.student(), self.proxy(proxy_dim)
        channels = [stage["num_chs"] for stage in student.feature_info]
        depths = min(4, len(channels))
        taken = [math.ceil((k + 1) * len(channels) / depths) - 1 for k in range(depths)]
        adapters = nn.ModuleList(nn.Linear(channels[i], proxy_dim) for i in taken).to(self.device)
        optimizer, scheduler = self.prepared([*student.parameters(), *adapters.parameters()], lr, 5e-4)
        for step, (mine, others) in enumerate(self.batches()):
            pixels = self.views(np.concatenate([mine, others]))
            with torch.inference_mode():
                z, scores = proxy(self.pooled(pixels))
                z, target = F.normalize(z, dim=-1), F.softmax(scores / 4, -1)
            z, target = z.clone(), target.clone()
            final, maps = student.forward_intermediates(normalised(pixels, self.small, student), indices=taken)
            logits = student.forward_head(final)
            ce = F.cross_entropy(logits[: len(mine)], torch.from_numpy(labels[mine]).to(self.device))
            kl = 16 * F.kl_div(F.log_softmax(logits / 4, -1), target, reduction="batchmean")
            active = min(depths, 1 + math.floor(step / self.steps * depths / 0.8 + 1e-9))
            feature = sum(
                (1 - F.cosine_similarity(adapter(one.mean((2, 3))), z)).mean() / depths
                for adapter, one in list(zip(adapters, maps, strict=True))[:active]
            )
            optimizer.zero_grad()
            ((1 - lambda_end) * ce + lambda_end * (feature + kl)).backward()
            optimizer.step()
            scheduler.step()
        return self.accuracy(student)

    def wecolora(self, factor: int, rank: int, lr: float) -> float:
        from peft import LoraConfig, get_peft_model

        student = copy.deepcopy(self.teacher)
        kept = list(student.blocks)[::factor]
        student.blocks = nn.Sequential(*kept) if isinstance(student.blocks, nn.Sequential) else nn.ModuleList(kept)
        maps = [f"blocks.{name}" for name, part in student.blocks.named_modules() if isinstance(part, nn.Linear)]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=maps)
        adapted: Any = get_peft_model(student, config)  # type: ignore[arg-type]
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, self.steps, pct_start=0.2)
        order = batches(np.arange(len(self.data["train"][0])), self.batch, np.random.default_rng(0))
        tokens: dict[str, Tensor] = {}
        tap = self.teacher.blocks[-1].register_forward_hook(lambda m, a, out: tokens.__setitem__("teacher", out))
        student.blocks[-1].register_forward_hook(lambda m, a, out: tokens.__setitem__("student", out))
        for _ in range(self.steps):
            pixels = normalised(self.views(next(order)), self.size, self.teacher)
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
        probe.fit(self.features(merged, images[self.labelled], self.size), labels[self.labelled])
        images, labels = self.data["val"]
        return float(probe.score(self.features(merged, images, self.size), labels))

    def objective(self, trial: optuna.Trial) -> float:
        trials = self.sweep["trials"]
        knobs = dict(trials[trial.suggest_int("index", 0, len(trials) - 1)])
        torch.manual_seed(0)
        began = time.time()
        value = getattr(self, knobs.pop("method"))(**knobs)
        trial.set_user_attr("seconds", time.time() - began)
        return value


def work(folder: str, sweep: dict[str, Any], bench: type[Bench], number: int) -> None:
    """One process of the search; where there are several GPUs, each has its own."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    callback = optuna.study.MaxTrialsCallback(len(sweep["trials"]), states=None)
    _study(folder, sweep).optimize(bench(sweep).objective, callbacks=[callback])


def _study(folder: str, sweep: dict[str, Any]) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(f"{folder}/study.db"))
    sampler = optuna.samplers.GridSampler({"index": list(range(len(sweep["trials"])))}, seed=0)
    return optuna.create_study(
        study_name="plain", storage=storage, sampler=sampler, load_if_exists=True, direction="maximize"
    )


def search(bench: type[Bench]) -> None:
    """Runs all trials on the sweep's processes and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sweep", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sweep = json.loads(options.sweep.read_text(encoding="utf-8"))
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.time()
    _study(str(options.folder), sweep)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(str(options.folder), sweep, bench, number))
        for number in range(sweep["processes"])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trials = [t for t in _study(str(options.folder), sweep).trials if t.value is not None]
    seconds = [t.user_attrs["seconds"] for t in trials]
    values = {json.dumps(sweep["trials"][t.params["index"]]): t.value for t in trials}
    print(json.dumps({"seconds": time.time() - began, "trials": len(trials), "trial_seconds": seconds, "val": values}))


if __name__ == "__main__":
    search(Bench)
