"""The one look at the test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orchestrator.data.labels import open_labels
from orchestrator.data.pixels import RenderedPixels
from orchestrator.data.views import Policy
from orchestrator.evaluate.metrics import score
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.spec import METRIC_NAMES
from orchestrator.store import store_at
from orchestrator.sweep.begun import scored_task
from orchestrator.sweep.ledger import open_sweep


def read_test(folder: Path, student_path: str) -> dict[str, Any]:
    """A student's score on all test images, its standard error, and how many images val and test have."""
    network, meta = load_student(Path(folder) / student_path)
    store = store_at(open_sweep(folder).store_address)
    task = scored_task(Path(folder), meta, store)
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    # Test pixels stay out of the store: nothing but this one look reads them.
    plain = Policy(1.0, 0.0)
    pixels = RenderedPixels(task, task.test, plain, preprocessing)
    torch.set_num_threads(1)
    count, kind = len(task.test), task.spec.kind
    labels = open_labels(store, task, task.test, range(count), plain, 1, preprocessing.size, limit_gb=0)
    found = score(network, preprocessing, pixels, labels, count, kind, len(task.classes), with_error=True)
    return {
        "metric": METRIC_NAMES[kind],
        "value": found.value,
        "images": count,
        "standard_error": found.error,
        "val_images": len(task.val),
    }
