"""Tiny timm networks, and a driver that runs a method's whole stage chain in memory."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from methods.contract import (
    IGNORE,
    TEACHER,
    Batch,
    Deployed,
    FitStage,
    Given,
    ImageStage,
    Kind,
    Learner,
    Method,
    NetworkInfo,
    Recipe,
    Setting,
    TaskInfo,
    TrainStage,
)
from methods.generators.diffusion import DiffusionPackage
from methods.generators.vq import VQPackage
from methods.knobs import MethodConfig
from methods.outputs import Output, intermediate_channels, read_outputs
from methods.parts.dense import segmenter

SIDE = 32
CLASSES = 5
EMBEDDING = 16
TEXTS = ("prompts", "sentences", "captions")


def vit(
    depth: int = 6, num_classes: int = CLASSES, *, seed: int = 0, dim: int = 48, **kwargs: Any
) -> VisionTransformer:
    """A transformer whose blocks all matter: timm's own start leaves them close to the identity."""
    torch.manual_seed(seed)
    network = VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=dim, depth=depth, num_heads=4, num_classes=num_classes, **kwargs
    )
    with torch.no_grad():
        for parameter in network.blocks.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        if num_classes:
            network.head.weight.normal_(std=dim**-0.5)
    return network.eval()


def hybrid_vit(depth: int = 6, num_classes: int = CLASSES, **kwargs: Any) -> VisionTransformer:
    """Convolutions with batch norm, then transformer blocks."""
    stem = partial(timm.create_model, "test_efficientnet", features_only=True, out_indices=(2,))
    return vit(depth, num_classes, embed_layer=lambda **k: HybridEmbed(stem(), **{**k, "patch_size": 1}), **kwargs)


def cnn(name: str = "test_efficientnet", num_classes: int = CLASSES, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=num_classes)
    network.train()
    with torch.no_grad():
        network(torch.randn(32, 3, SIDE, SIDE))  # batch statistics that are not the initial ones
    return network.eval()


def clip(num_classes: int = EMBEDDING, *, seed: int = 0) -> nn.Module:
    """Images to embeddings: what is seen of a dual encoder."""
    return cnn(num_classes=num_classes, seed=seed)


@dataclass(frozen=True)
class Rows:
    """A `Table` in memory."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    def rows(self, indices: Any) -> Tensor:
        return self.values[torch.as_tensor(indices)]


def texts_of(count: int = 40) -> Tensor:
    """Embeddings [count, d] of texts; with one direction in common, as those of real towers have."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, EMBEDDING, generator=generator) + 1


def describe(network: nn.Module, kind: str) -> NetworkInfo:
    return NetworkInfo(
        name=f"tiny/{kind}",
        kind=kind,  # type: ignore[arg-type]
        width=network.num_features,
        blocks=len(network.blocks) if kind == "vit" else 0,
        channels=intermediate_channels(network),
        image_size=SIDE,
        pretrained=True,
        embedding=EMBEDDING if kind == "clip" else 0,
        vocabulary=64 if kind == "clip" else 0,
        context=12 if kind == "clip" else 0,
    )


@dataclass(frozen=True)
class Case:
    """A teacher and a student that fit a method, and how to build an untrained network of either's architecture."""

    teacher: nn.Module
    student: nn.Module
    setting: Setting
    build: Mapping[str, Callable[..., nn.Module]]
    upstream: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def tiny_upstream(name: str) -> nn.Module:
    """An untrained upstream generator of 16 pixels: `vq` (4 x 4 codes of 32, many of them in use) or `diffusion`."""
    torch.manual_seed(5)
    if name == "diffusion":
        return DiffusionPackage.build({"size": 16, "channels": [8, 8], "attention": [], "groups": 4})
    package = VQPackage.build(
        {
            "size": 16,
            "f": 4,
            "codes": 32,
            "dim": 4,
            "channels": [8, 8, 8],
            "groups": 4,
            "prior_width": 16,
            "prior_layers": 1,
            "prior_heads": 2,
        }
    )
    with torch.no_grad():
        package.codebook.normal_()
    return package


def make_case(
    teacher: str = "vit",
    student: str = "cnn",
    unlabelled: int = 12,
    labelled: int = 20,
    upstream: Sequence[str] = (),
    task_kind: Kind = "classification",
) -> Case:
    builders: dict[str, Callable[..., nn.Module]] = {"vit": vit, "hybrid": hybrid_vit, "cnn": cnn, "clip": clip}
    kinds = {"vit": "vit", "hybrid": "vit", "cnn": "cnn", "clip": "clip"}
    networks = {"teacher": builders[teacher](seed=1), "student": builders[student](seed=2)}
    task = TaskInfo(task_kind, CLASSES, labelled, unlabelled, upstream=tuple(upstream), texts=TEXTS, batch=16)
    setting = Setting(
        task=task,
        teacher=describe(networks["teacher"], kinds[teacher]),
        student=describe(networks["student"], kinds[student]),
    )
    if task_kind == "segmentation":
        networks["student"] = segmenter(networks["student"], CLASSES).eval()
    return Case(
        **networks,
        setting=setting,
        build={"teacher": builders[teacher], "student": builders[student]},
        upstream={name: tiny_upstream(name) for name in upstream},
    )


def make_images(n: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, 3, S, S] whose class shows as a colour, and all labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    return colours[labels] + 0.5 * torch.randn(n, 3, SIDE, SIDE, generator=generator), labels


def labels_of(kind: Kind, labels: Tensor) -> Tensor:
    """Labels of another kind for images of these classes [n]: further classes [n, C], or masks [n, S, S]."""
    if kind == "multilabel":
        several = F.one_hot(labels, CLASSES) + F.one_hot((labels + 1) % CLASSES, CLASSES)
        return several.float() * (torch.arange(len(labels)) % 4 > 0)[:, None]
    if kind == "segmentation":
        masks = labels[:, None, None].repeat(1, SIDE, SIDE)
        masks[:, : SIDE // 2] = (masks[:, : SIDE // 2] + 1) % CLASSES
        masks[:, :, 0] = IGNORE
        return masks
    return labels


def tensor_hash(network: nn.Module) -> str:
    """Of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Chain:
    """What a run of a chain leaves: the deployed network, and for a look inside the last learner and loss curves."""

    deployed: Deployed | None
    learner: Learner | None = None
    frozen_before: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    results: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    pools: dict[str, Tensor] = field(default_factory=dict)


def given_for(
    stage: FitStage | ImageStage | TrainStage,
    case: Case,
    labels: Tensor,
    results: Mapping[str, Mapping[str, Tensor]],
    outputs: Mapping[str, Tensor] | None = None,
) -> Given:
    """Copies of exactly what the stage declares."""
    sources: dict[str, Any] = {"teacher": case.teacher, "student": case.student, "labels": labels, **case.upstream}
    sources |= dict.fromkeys(TEXTS, Rows(texts_of()))
    tables = isinstance(stage, FitStage) and stage.images == "corpus"
    outputs = {key: Rows(value) for key, value in (outputs or {}).items()} if tables else outputs  # type: ignore[assignment]
    return Given(
        values={name: copy.deepcopy(sources[name]) for name in stage.reads},
        num_classes=case.setting.task.num_classes,
        results={name: results[name] for name in stage.inputs},
        outputs=outputs,
        kind=case.setting.task.kind,
    )


_FITS: dict[str, dict[str, Tensor]] = {}


def fitted(
    stage: FitStage,
    case: Case,
    images: Tensor,
    labels: Tensor,
    results: Mapping[str, Mapping[str, Tensor]],
    chain: Chain | None = None,
    fresh: bool = False,
) -> dict[str, Tensor]:
    """The result of a `FitStage`, computed once for the same declaration and inputs unless `fresh`."""
    known = case.setting.task.labelled
    images = images[:known] if stage.images == "labelled" else images
    if stage.pool:
        assert chain is not None
        images = chain.pools[stage.pool]
    outputs = teacher_outputs(_whose(stage.of, case, chain), images, stage.outputs)
    inputs = {**outputs, "labels": labels[:known]}
    for name in stage.inputs:
        inputs.update({f"{name}.{k}": v for k, v in results[name].items()})
    digest = hashlib.sha256(repr(stage).encode())
    for name, tensor in sorted(inputs.items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    key = digest.hexdigest()
    if fresh or key not in _FITS:
        _FITS[key] = stage.fit(stage.params, given_for(stage, case, labels[:known], results, outputs))
    return {name: tensor.clone() for name, tensor in _FITS[key].items()}


def _whose(of: str, case: Case, chain: Chain | None) -> nn.Module:
    if of == TEACHER:
        return case.teacher
    assert chain is not None
    return chain.networks[of]


def made(stage: ImageStage, case: Case, images: Tensor, results: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """The pool of an `ImageStage`, [count, 3, S, S] in [-1, 1], at the size of the images."""
    sources = images[: case.setting.task.labelled] if stage.images == "labelled" else images
    count = stage.count or len(sources)
    rows = torch.arange(count) % len(sources)
    maker = stage.maker(stage.params, given_for(stage, case, torch.empty(0), results))
    small = F.interpolate(sources, size=stage.size, mode="bilinear", antialias=True).clamp(-1, 1)
    pool = maker(small[rows], list(range(count)))
    assert pool.shape == small[rows].shape
    assert pool.abs().max() <= 1
    return F.interpolate(pool, size=images.shape[-1], mode="bilinear", antialias=True)


@torch.no_grad()
def teacher_outputs(teacher: nn.Module, images: Tensor, outputs: tuple[Output, ...]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in read_outputs(teacher.eval(), images, outputs).items()} if outputs else {}


def build_optimizer(learner: Learner, recipe: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [p], "scale": learner.lr_scale(n), "weight_decay": recipe.weight_decay * learner.decays(n, p)}
        for n, p in learner.named_parameters()
        if p.requires_grad
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


def schedule(recipe: Recipe, step: int, steps: int) -> float:
    warm = round(recipe.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def run_chain(
    method: type[Method],
    config: MethodConfig,
    case: Case,
    images: Tensor,
    labels: Tensor,
    steps: int = 3,
    batch: int = 16,
    seed: int = 0,
) -> Chain:
    """Runs every stage of `method` in memory, as the contract says, and nothing else.

    Args:
        images, labels: [n, 3, S, S] and [n], the first `task.labelled` of which the method may see labels of.
        steps: for a budget of 1.
        batch: images a step; of a stage with labels, `labelled_fraction` of them labelled.
    """
    chain = Chain(deployed=None)
    known = case.setting.task.labelled
    for stage in method.stages(config, case.setting):
        torch.manual_seed(seed)
        if not isinstance(stage, TrainStage):
            prepare(stage, case, images, labels, chain)
            continue
        learner = stage.learner(stage.params, given_for(stage, case, labels[:known], chain.results))
        chain.learner = learner
        chain.frozen_before = {n: p.detach().clone() for n, p in learner.named_parameters() if not p.requires_grad}
        optimizer = build_optimizer(learner, stage.recipe)
        total = max(1, round(steps * stage.recipe.budget))
        learner.train()
        for step in range(total):
            for group in optimizer.param_groups:
                group["lr"] = stage.recipe.lr * group["scale"] * schedule(stage.recipe, step, total)
            torch.manual_seed(seed * 1_000_003 + step)
            one = draw(stage, case, images, labels, batch, chain)
            parts = learner(one, step / total)
            parts["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            chain.batches.append(one)
            chain.losses.append(parts["loss"].item())
            chain.parts.append({k: v.item() for k, v in parts.items()})
        learner.eval()
        publish(stage, learner, chain)
    return chain


def prepare(stage: FitStage | ImageStage, case: Case, images: Tensor, labels: Tensor, chain: Chain) -> None:
    """Runs a stage that trains nothing and keeps its result in the chain."""
    if isinstance(stage, FitStage):
        chain.results[stage.name] = fitted(stage, case, images, labels, chain.results, chain)
    else:
        chain.pools[stage.name] = made(stage, case, images, chain.results)


def publish(stage: TrainStage, learner: Learner, chain: Chain) -> None:
    """Keeps what a training stage leaves for later ones."""
    if stage.publishes == "tensors":
        chain.results[stage.name] = learner.tensors()
        return
    chain.deployed = learner.deployed()
    chain.networks[stage.name] = chain.deployed.network
    chain.results[stage.name] = {k: v.clone() for k, v in chain.deployed.network.state_dict().items()}


def draw(
    stage: TrainStage, case: Case, images: Tensor, labels: Tensor, batch: int, chain: Chain | None = None
) -> Batch:
    """A random batch as the stage's feed describes it, with live teacher outputs."""
    known = case.setting.task.labelled
    feed = stage.feed
    if feed.images == "labelled":
        rows = torch.randperm(known)[:batch]
    elif feed.labels and known < len(images):
        share = round(batch * feed.labelled_fraction)
        rows = torch.cat([torch.randperm(known)[:share], torch.randint(known, len(images), (batch - share,))])
    else:
        rows = torch.randperm(len(images))[:batch]
    shown = None
    if feed.labels:
        shown = labels[rows].clone()
        shown[rows >= known] = IGNORE if case.setting.task.kind == "segmentation" else -1
    teacher = _whose(feed.of, case, chain) if feed.outputs or feed.pool_outputs else case.teacher
    generated = None
    if feed.pool:
        assert chain is not None
        pool = chain.pools[feed.pool][: feed.pool_size or None]
        drawn = pool[torch.randint(0, len(pool), (round(batch * feed.pool_ratio),))]
        generated = Batch(drawn, None, teacher_outputs(teacher, drawn, feed.pool_outputs))
    live = images[rows] if feed.teacher_images else None
    texts = texts_of()[torch.randperm(len(texts_of()))[: feed.text_batch or batch]] if feed.texts else None
    outputs = teacher_outputs(teacher, images[rows], feed.outputs)
    captions = texts_of(len(images))[rows] if feed.captions else None
    return Batch(images[rows], shown, outputs, live, generated, texts, captions)
