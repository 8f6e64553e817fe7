"""Learners of the methods that tune a teacher, on tiny networks, without a chain of stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from tiny import CLASSES, build_optimizer, cnn, describe, hybrid_vit, make_case, make_images, vit
from torch import nn

from methods import discover
from methods.contract import Batch, Deployed, Given, Setting
from methods.heads import TEACHER_HEAD, load_head
from methods.tuning import TunedTeacher, TuningLearner


def frozen_hybrid(num_classes: int = CLASSES, **kwargs) -> nn.Module:
    """A transformer on a convolutional stem whose batch norms are constants, like the packaged one."""
    network = hybrid_vit(num_classes=num_classes, **kwargs)
    network.patch_embed.backbone = freeze_batch_norm_2d(network.patch_embed.backbone.requires_grad_(False))
    return network


VITS: dict[str, Callable[..., nn.Module]] = {
    "plain": partial(vit, depth=2),
    "hybrid": partial(hybrid_vit, depth=2),
    "frozen_hybrid": partial(frozen_hybrid, depth=2),
    "layer_scale": partial(vit, depth=2, init_values=0.1),
    "avg_fc_norm": partial(vit, depth=2, global_pool="avg"),
    "avg_norm_no_class_token": partial(vit, depth=2, global_pool="avg", fc_norm=False, class_token=False),
    "pre_norm": partial(vit, depth=2, pre_norm=True),
    "map_pool": partial(vit, depth=2, global_pool="map", class_token=False),
    "no_qkv_bias": partial(vit, depth=2, qkv_bias=False),
}
VITS["registers"] = lambda num_classes=CLASSES, reg_tokens=0, **kwargs: vit(
    2, num_classes, reg_tokens=reg_tokens or 3, no_embed_class=True, **kwargs
)
CNNS: dict[str, Callable[..., nn.Module]] = {
    "efficientnet": cnn,
    "resnet": partial(cnn, "test_resnet"),
    "convnext": partial(cnn, "test_convnext"),
}


def head_for(network: nn.Module) -> dict[str, torch.Tensor]:
    """The result of `teacher_head`, drawn at random."""
    generator = torch.Generator().manual_seed(3)
    width = network.num_features
    return {
        "weight": torch.randn(CLASSES, width, generator=generator) * width**-0.5,
        "bias": torch.randn(CLASSES, generator=generator),
    }


def with_head(network: nn.Module) -> nn.Module:
    """A copy of the network under that head: what every learner starts from."""
    head = head_for(network)
    return load_head(copy.deepcopy(network), head["weight"], head["bias"]).eval()


def setting_for(network: nn.Module, kind: str = "vit") -> Setting:
    return replace(make_case().setting, teacher=describe(network, kind))


def planned(name: str, kind: str = "cnn", **kwargs) -> Setting:
    """A setting whose teacher is a timm network as planning sees it: modules without weights."""
    with torch.device("meta"):
        network = timm.create_model(name, **kwargs).eval()
    size = network.pretrained_cfg["input_size"][-1]
    teacher = replace(describe(network, kind), name=f"timm/{name}", image_size=size, skeleton=network)
    return replace(make_case().setting, teacher=teacher)


def refusal(method: str, setting: Setting, **knobs) -> str | None:
    """What the method says at planning of that setting."""
    chosen = discover()[method]
    return chosen.invalid(chosen.Config(**knobs), setting)


def learner_of(name: str, network: nn.Module, kind: str = "vit", **knobs) -> TuningLearner:
    """The learner of the method `name` on a copy of the network, in training mode."""
    method = discover()[name]
    assert issubclass(method, TunedTeacher)
    params = method.params(method.Config(**knobs), setting_for(network, kind))
    results = {TEACHER_HEAD: head_for(network)} if params["head_init"] == "probe" else {}
    torch.manual_seed(0)
    given = Given(values={"teacher": copy.deepcopy(network)}, num_classes=CLASSES, results=results)
    return method.learner(params, given).train()


def train(learner: TuningLearner, steps: int = 3, lr: float = 1e-2) -> None:
    """A few steps of the method's own optimiser on the tiny task; leaves evaluation mode."""
    images, labels = make_images(16)
    method = next(m for m in discover().values() if getattr(m, "learner", None) is type(learner))
    optimizer = build_optimizer(learner, method.recipe(method.Config(lr=lr)))
    learner.train()
    for _ in range(steps):
        learner(Batch(images, labels), 0.0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    learner.eval()


def perturb(learner: nn.Module, std: float = 0.02) -> nn.Module:
    """Moves everything that is trained, so that nothing is where it starts; evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return learner.eval()


def rebuilt(deployed: Deployed, build: Callable[..., nn.Module]) -> nn.Module:
    """A fresh network as an export makes it, with the deployed weights."""
    network = build(num_classes=CLASSES, **deployed.changes)
    if deployed.structure is not None:
        network = deployed.structure.apply(network)
    network.load_state_dict(deployed.network.state_dict(), strict=True)
    return network.eval()
