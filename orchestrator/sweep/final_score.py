"""The images that a student was scored on, and the one look at those of test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.labels import open_labels
from orchestrator.data.pixels import RenderedPixels
from orchestrator.data.task import TaskData, load_task
from orchestrator.data.views import Policy
from orchestrator.errors import UserError
from orchestrator.evaluate.metrics import score
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.spec import METRIC_NAMES, Task
from orchestrator.store import Store, store_at
from orchestrator.sweep.folder import begun_with
from orchestrator.sweep.ledger import open_sweep
from orchestrator.trial.score import val_identity


def scored_task(folder: Path, meta: Mapping[str, Any], store: Store) -> TaskData:
    """The images that a student of a sweep was trained and scored on, by its `student.json`.

    Raises:
        UserError: if those of now are others: classes, train, val and test may be too.
    """
    task = load_task(Task.model_validate(meta["task"]), store, listing=begun_with(Path(folder)))
    if meta.get("val") not in (None, val_identity(task)):
        raise UserError(
            f"task.data: the images of {meta['task']['data']!r} are not those that {meta['trial_id']} was scored on; "
            "put them back as they were, or sweep again."
        )
    return task


def read_test(folder: Path, student_path: str) -> dict[str, Any]:
    """A student's score on all test images, its standard error, and how many images val and test have."""
    network, meta = load_student(Path(folder) / student_path)
    store = store_at(open_sweep(folder).store_address)
    task = scored_task(folder, meta, store)
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
