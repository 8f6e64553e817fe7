"""FNA's parameter remapping: a smaller or bigger relative of the teacher starts from the teacher's own weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from methods.contract import Given, Setting, Stage, TrainStage
from methods.kd import KD, KDConfig, KDLearner
from methods.knobs import Choice, knob
from methods.parts.dense import Segmenter

RELATIVES = {"mobilenetv2": "efficientnet"}  # networks that timm builds of the same stages
LEAST_REMAPPED = 0.5  # share of the student's scalars below the head; fewer, and the two are no relatives


class FNAConfig(KDConfig):
    """Knobs of weight remapping: those of the training are logit distillation's."""

    share: float = knob(
        1.0,
        "Share of the student's tensors, from the input on, that come from the teacher; the others stay as they are.",
        search=Choice(values=(0.5, 0.75, 1.0)),
        gt=0,
        le=1,
    )
    noise: float = knob(
        0.0,
        "Noise on remapped weights, as a share of each tensor's standard deviation.",
        search=Choice(values=(0.0, 0.01, 0.02)),
        ge=0,
        le=1,
    )


def family(name: str) -> str | None:
    """The first word of a network's name, e.g. `resnet` of `timm/test_resnet`; None where the name is a file's."""
    if name.startswith("local:"):
        return None
    word = re.sub(r"^(test|tf)_", "", name.rpartition("/")[2])
    known = [ancestor for start, ancestor in RELATIVES.items() if word.startswith(start)]
    found = re.match(r"[a-z]+", word)
    return known[0] if known else found.group() if found else None


def counterparts(target: Mapping[str, Tensor], seed: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor of `target` that has one, the seed's tensor at the same place, by name.

    A place is a path of module names. Where a list of layers is shorter in the seed, layer i is the seed's layer
    min(i, n_seed - 1) [code].
    """
    children: dict[str, set[str]] = {}
    for name in seed:
        parts = name.split(".")
        for i, part in enumerate(parts):
            children.setdefault(".".join(parts[:i]), set()).add(part)
    result: dict[str, str] = {}
    for name in target:
        path: list[str] = []
        for part in name.split("."):
            known = children.get(".".join(path), set())
            last = max((int(c) for c in known if c.isdigit()), default=-1)
            path.append(str(last) if part.isdigit() and part not in known and int(part) > last >= 0 else part)
        if ".".join(path) in seed:
            result[name] = ".".join(path)
    return result


def remapped(target: Tensor, seed: Tensor, parts: int = 1) -> Tensor:
    """`target` with the seed's values in its first channels.

    Of every dimension the first min(target, seed) entries are copied; of a convolution's kernel the centre, with
    zeros around it where the target's is larger [code]. What the seed does not reach keeps the target's values.

    Args:
        target, seed: tensors of as many dimensions; [out, in, kh, kw] for a convolution.
        parts: how many equal parts the first dimension has that are remapped each for itself (3 for a fused qkv).
    """
    if parts > 1:
        pairs = zip(target.chunk(parts), seed.chunk(parts), strict=True)
        return torch.cat([remapped(mine, theirs) for mine, theirs in pairs])
    if target.ndim == 4:
        for dim in (2, 3):
            seed = _centred(seed, dim, target.shape[dim])
    corner = tuple(slice(min(mine, theirs)) for mine, theirs in zip(target.shape, seed.shape, strict=True))
    result = target.clone()
    result[corner] = seed[corner].to(target.dtype)
    return result


def _centred(kernel: Tensor, dim: int, size: int) -> Tensor:
    """The kernel cropped about its centre, or padded with zeros, to `size` along `dim`."""
    have = kernel.shape[dim]
    if have >= size:
        return kernel.narrow(dim, (have - size) // 2, size)
    shape = list(kernel.shape)
    shape[dim] = size
    result = kernel.new_zeros(shape)
    result.narrow(dim, (size - have) // 2, have).copy_(kernel)
    return result


@torch.no_grad()
def remap(student: nn.Module, teacher: nn.Module, share: float = 1.0, noise: float = 0.0) -> float:
    """Writes the teacher's weights and statistics into the student, in place; both are timm networks.

    The classifier stays the student's. A position embedding of another raster is resampled, for FNA knows no
    transformers [inferred].

    Args:
        share: of the student's tensors, from the input on.
        noise: on remapped weights of two or more dimensions, as a share of their standard deviation.

    Returns:
        The share of the student's scalars below its head that have a counterpart, whatever `share` is.
    """
    head = {id(t) for network in (student, teacher) for t in network.get_classifier().parameters()}  # type: ignore[operator]
    mine = {n: t for n, t in _tensors(student).items() if id(t) not in head}
    theirs = {n: t for n, t in _tensors(teacher).items() if id(t) not in head}
    known: dict[str, Tensor] = {}
    for name, source in counterparts(mine, theirs).items():
        seed = _fitting(name, mine[name], theirs[source], student, teacher)
        if seed is not None:
            known[name] = seed
    first = set(list(mine)[: math.ceil(share * len(mine))])
    for name, seed in known.items():
        if name not in first:
            continue
        value = remapped(mine[name], seed, 3 if re.search(r"\bqkv\.(weight|bias)$", name) else 1)
        if noise and value.ndim >= 2:
            value = value + noise * value.std() * torch.randn_like(value)
        mine[name].copy_(value)
    return sum(mine[n].numel() for n in known) / max(sum(t.numel() for t in mine.values()), 1)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, in the order in which the network holds them."""
    stored = network.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def _fitting(name: str, target: Tensor, seed: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor | None:
    """The seed's tensor if it can be remapped to the target's."""
    if target.ndim != seed.ndim:
        return None
    if name == "pos_embed" and target.shape[1] != seed.shape[1]:
        grids = [getattr(getattr(n, "patch_embed", None), "grid_size", None) or () for n in (student, teacher)]
        if () in grids:
            return None
        mine, theirs = (list(grid) for grid in grids)
        prefix = seed.shape[1] - math.prod(theirs)
        if prefix != target.shape[1] - math.prod(mine):
            return None
        return resample_abs_pos_embed(seed, mine, theirs, num_prefix_tokens=prefix)
    if target.ndim == 4 and (target.shape[1] == 3) != (seed.shape[1] == 3):
        return None  # one of the two looks at pixels, the other at features
    return seed


class FNALearner(KDLearner):
    """Logit distillation of a student that starts from the teacher's remapped weights."""

    def network(self, params: Mapping[str, Any], given: Given) -> nn.Module:
        student = given.student
        mine = student.backbone if isinstance(student, Segmenter) else student
        reached = remap(mine, given.teacher, params["share"], params["noise"])
        reason = _too_far(reached)
        if reason:
            raise ValueError(reason)
        return student


def _too_far(reached: float) -> str | None:
    """Why a student of which only the share `reached` has a counterpart is refused."""
    if reached >= LEAST_REMAPPED:
        return None
    return (
        f"fna copies weights between networks of one family, and only {reached:.0%} of the student's weights "
        f"have a counterpart in the teacher (at least {LEAST_REMAPPED:.0%} are needed)"
    )


class FNA(KD):
    """Parameter remapping: the student, of the teacher's family, takes over its weights, then distils.

    Depth: layer i copies the seed's layer min(i, n - 1). Width: the first channels. Kernel: the centre, cropped or
    padded with zeros [code]. Not function-preserving unless the two are equal. In the paper the target is found by a
    search and trained for detection or segmentation; here it is the sweep's student, trained as in logit distillation
    [inferred]. A fused qkv is remapped part by part, and heads of another size are not regrouped [inferred].
    """

    name = "fna"
    paper = "Fang et al., Fast Neural Network Adaptation via Parameter Remapping and Architecture Search, ICLR 2020"
    Config = FNAConfig
    teacher_kinds = ("vit", "cnn")

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        reason = super().refuses(setting)
        teacher, student = setting.teacher, setting.student
        if reason is not None or teacher is None or student is None:
            return reason
        families = {family(teacher.name), family(student.name)} - {None}
        if teacher.kind == student.kind and (teacher.kind == "vit" or len(families) < 2):
            if teacher.skeleton is None or student.skeleton is None:
                return None
            return _too_far(remap(copy.deepcopy(student.skeleton), teacher.skeleton))
        return f"{cls.name} copies weights within a family, and {student.name} is no relative of {teacher.name}"

    @classmethod
    def stages(cls, config: KDConfig, setting: Setting) -> list[Stage]:
        assert isinstance(config, FNAConfig)
        *earlier, distil = super().stages(config, setting)
        assert isinstance(distil, TrainStage)
        params = {**distil.params, "share": config.share, "noise": config.noise}
        return [
            *earlier,
            replace(distil, version=1, learner=FNALearner, params=params, reads=("teacher", "student")),
        ]
