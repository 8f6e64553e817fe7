"""The images with which a sweep began: those that all its trials, and whoever looks at its students, see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.data.task import TaskData, load_task
from orchestrator.errors import UserError, WorkError
from orchestrator.files import at_once, read_facts
from orchestrator.spec import Task
from orchestrator.store import Store, key_of
from orchestrator.trial.score import val_identity

FILE = "listing.json"  # the state of the images, as `data.task.listing_of` tells it, and what they are


def keep_images(folder: Path, task: TaskData) -> None:
    """Notes the images with which a sweep begins, if none are noted yet."""
    if not (folder / FILE).is_file():
        text = json.dumps({"listing": task.listing, "images": _identity(task)})
        at_once(folder / FILE, lambda to: to.write_text(text, encoding="utf-8"))


def keep_those_of(first: Path, folder: Path) -> None:
    """Notes for a sweep the images with which another one began."""
    found = read_facts(first / FILE)
    if found:
        at_once(folder / FILE, lambda to: to.write_text(json.dumps(found), encoding="utf-8"))


def begun_task(task: Task, folder: Path, store: Store) -> TaskData:
    """The images with which the sweep in a folder began; those of now if none are noted.

    Raises:
        UserError: if those of now are others, and the store has lost what they were.
    """
    found = read_facts(folder / FILE)
    if not found:
        return load_task(task, store)
    try:
        return load_task(task, store, listing=found["listing"])
    except WorkError:  # the catalogue is gone, and files have other times or other content
        now = load_task(task, store)
        if _identity(now) != found["images"]:
            raise UserError(
                f"task.data: the images of {task.data!r} are not those with which {str(folder)!r} began, and the store "
                "has lost which these were; put them back as they were, or begin another sweep."
            ) from None
        return now


def scored_task(folder: Path, meta: Mapping[str, Any], store: Store) -> TaskData:
    """The images that a student of a sweep was trained and scored on, by its `student.json`.

    Raises:
        UserError: if those of now are others: classes, train, val and test may be too.
    """
    task = begun_task(Task.model_validate(meta["task"]), folder, store)
    if meta.get("val") not in (None, val_identity(task)):
        raise UserError(
            f"task.data: the images of {meta['task']['data']!r} are not those that {meta['trial_id']} was scored on; "
            "put them back as they were, or sweep again."
        )
    return task


def _identity(task: TaskData) -> str:
    """Of what a sweep's trials are scored on, whichever labels of train they see, and of how many images train has."""
    return key_of([val_identity(task), task.test.images_hash, len(task.train)])
