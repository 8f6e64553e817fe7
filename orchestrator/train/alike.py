"""Whether all ranks of a group would train the same."""

from __future__ import annotations

import hashlib
import inspect
import platform
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from orchestrator.errors import WorkError
from orchestrator.train.job import TrainJob


class UnlikeError(WorkError):
    """A rank would train something else than the first one."""


def identity_of(job: TrainJob) -> dict[str, str]:
    """What all ranks must agree on."""
    stage = job.stage
    try:
        code = inspect.getsource(stage.learner)
    except (OSError, TypeError):
        code = ""  # typed in a notebook, and sent to the ranks as it is
    what = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in ("spec", "stage", "device")}
    resolved = repr([job.spec.model_dump_json(), stage.learner.__qualname__, repr(stage), sorted(what.items())])
    return {
        "configuration": hashlib.sha256(resolved.encode()).hexdigest()[:16],
        "learner": hashlib.sha256(code.encode()).hexdigest()[:16],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm")},
    }


def check_alike(own: dict[str, str], rank: int, world: int) -> None:
    """Compares what the ranks have resolved; every rank must call it.

    Raises:
        UnlikeError: on every rank alike, naming the first rank that differs and rank 0.
    """
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (platform.node(), own))
    node, first = found[0]
    for other, (there, theirs) in enumerate(found):
        for name in first:
            if theirs.get(name) != first[name]:
                raise UnlikeError(
                    f"The {name} of rank {other} (node {there}) is {theirs.get(name)}, and that of rank 0 (node "
                    f"{node}) is {first[name]}: all nodes must have the same sweep file, code and libraries."
                )
