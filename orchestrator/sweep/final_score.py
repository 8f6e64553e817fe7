"""The one look at the test images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.images import all_cpus
from orchestrator.data.labels import open_labels
from orchestrator.data.pixels import RenderedPixels
from orchestrator.data.views import Policy
from orchestrator.evaluate.forward import device_here
from orchestrator.evaluate.metrics import score
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.spec import METRIC_NAMES
from orchestrator.store import store_at
from orchestrator.sweep.begun import scored_task
from orchestrator.sweep.ledger import open_sweep


def read_test(folder: Path, student_path: str) -> dict[str, Any]:
    """A student's score on all test images, its standard error, and how many images val and test have.

    On a GPU if there is one, unless the sweep file keeps trials off it (`train.device: cpu`); else on all CPUs.
    """
    network, meta = load_student(Path(folder) / student_path)
    spec = open_sweep(folder)
    store = store_at(spec.store_address)
    task = scored_task(Path(folder), meta, store)
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    # Neither the device nor the threads are in the key of a stored score: they change the last bits of logits, and so
    # at most which of two classes or images comes first that are as good. This score is read once and kept.
    network.to(device_here("cpu" if spec.train.device == "cpu" else "cuda"))
    count, kind, plain = len(task.test), task.spec.kind, Policy(1.0, 0.0)
    with _threads(all_cpus()):  # images are decoded by as many
        # Test pixels stay out of the store: nothing but this one look reads them.
        pixels = RenderedPixels(task, task.test, plain, preprocessing)
        labels = open_labels(store, task, task.test, range(count), plain, 1, preprocessing.size, limit_gb=0)
        found = score(network, preprocessing, pixels, labels, count, kind, len(task.classes), with_error=True)
    return {
        "metric": METRIC_NAMES[kind],
        "value": found.value,
        "images": count,
        "standard_error": found.error,
        "val_images": len(task.val),
    }


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch threads; as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
