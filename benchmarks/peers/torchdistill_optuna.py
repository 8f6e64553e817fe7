"""The peer: the KD trials by torchdistill's distillation box, driven by Optuna; data and scoring of the plain script.

    pip install -e '.[bench]'
    python -m benchmarks.peers.torchdistill_optuna OUT_FOLDER SWEEP.json

torchdistill's own parts: the box with its teacher and student, its loss `KDLoss`, optimiser, scheduler and data loader.
Rows without a label carry the label that cross-entropy leaves out. Images stay decoded in memory.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchdistill.core.distillation import get_distillation_box

from benchmarks.peers.plain_optuna import Bench, normalised, search

NO_LABEL = -100


class Crops(Dataset[tuple[Tensor, int]]):
    """A random crop of an image, and its label if it is one of the labelled images."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.images, labels = bench.data["train"]
        self.labels = np.full(len(labels), NO_LABEL)
        self.labels[bench.labelled] = labels[bench.labelled]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.bench.flip(self.bench.crop(self.images[index])), int(self.labels[index])


class Mixed(Sampler[int]):
    """Rows of all steps, a quarter of each labelled."""

    def __init__(self, data: Any) -> None:
        self.bench = data.org_dataset.bench  # torchdistill wraps every dataset

    def __len__(self) -> int:
        return self.bench.steps * self.bench.batch

    def __iter__(self) -> Any:
        for known, others in self.bench.batches():
            yield from np.concatenate([known, others]).tolist()


class Classifier(nn.Module):
    """uint8 images to logits at a network's own size."""

    def __init__(self, network: Any, size: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.size, self.weight, self.bias = network, size, weight, bias

    def forward(self, images: Tensor) -> Tensor:
        pixels = normalised(images, self.size, self.network)
        if self.weight is None:
            return self.network(pixels)
        pooled = self.network.forward_head(self.network.forward_features(pixels), pre_logits=True)
        return nn.functional.linear(pooled, self.weight, self.bias)


class TorchdistillBench(Bench):
    """The same trials with torchdistill's loop body."""

    def kd(self, temperature: float, lr: float, weight: float) -> float:
        student = self.student()
        config = {
            "num_epochs": 1,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": Mixed, "kwargs": {}},
                "kwargs": {"batch_size": self.batch, "num_workers": 0},
            },
            "val_data_loader": {},
            "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "AdamW", "kwargs": {"lr": lr, "weight_decay": 0.05, "fused": True}},
            "scheduler": {
                "key": "OneCycleLR",
                "kwargs": {"max_lr": lr, "total_steps": self.steps + 1, "pct_start": 0.1},
                "scheduling_step": 1,
            },
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {
                    "sub_terms": {
                        "kd": {
                            "criterion": {
                                "key": "KDLoss",
                                "kwargs": {
                                    "student_module_path": ".",
                                    "student_module_io": "output",
                                    "teacher_module_path": ".",
                                    "teacher_module_io": "output",
                                    "temperature": temperature,
                                    "alpha": 1 - weight,
                                    "beta": weight,
                                },
                            },
                            "weight": 1.0,
                        }
                    }
                },
            },
        }
        box = get_distillation_box(
            Classifier(self.teacher, self.size, self.weight, self.bias).eval(),
            Classifier(student, self.small),
            {"train": Crops(self)},
            config,
            torch.device(self.device),
            None,
            False,
            1,
        )
        box.pre_epoch_process(epoch=0)
        for images, targets, extra in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(images.to(self.device), targets.to(self.device), extra)
            box.post_forward_process(loss)
        box.post_epoch_process()
        return self.accuracy(student)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    search(TorchdistillBench)
