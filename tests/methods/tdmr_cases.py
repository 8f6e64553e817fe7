"""What the tests of TDMR share."""

from __future__ import annotations

import torch
from tiny import (
    fitted,
    given_for,
    make_images,
    teacher_outputs,
)

from methods.contract import (
    Batch,
)
from methods.heads import POOLED
from methods.tdmr import (
    TDMR,
    TDMRConfig,
)

PAIRS = [("vit", "cnn"), ("cnn", "vit"), ("vit", "vit"), ("cnn", "cnn")]


def config(**knobs):
    return TDMRConfig(**{"proxy_epochs": 12, "proxy_dim": 16, **knobs})


def learner_of(case, **knobs):
    """Stage B's learner in training mode, its stage, and the proxy's tensors."""
    images, labels = make_images()
    proxy, stage = TDMR.stages(config(**knobs), case.setting)
    results = {proxy.name: fitted(proxy, case, images, labels, {})}
    torch.manual_seed(0)
    known = labels[: case.setting.task.labelled]
    return stage.learner(stage.params, given_for(stage, case, known, results)).train(), stage, results["proxy"]


def batch_of(case, n=16, labelled=10, seed=0):
    images, labels = make_images(n, seed=seed)
    labels = torch.where(torch.arange(n) < labelled, labels, -1)
    return Batch(images, labels, teacher_outputs(case.teacher, images, (POOLED,)))
