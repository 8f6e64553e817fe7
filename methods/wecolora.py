"""WeCoLoRA: copy every k-th block of a transformer, then adapt the copy with low-rank pairs and no labels."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import (
    Batch,
    Deployed,
    Feed,
    Given,
    Learner,
    Method,
    Recipe,
    Setting,
    Stage,
    TrainStage,
    freeze,
)
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.outputs import Output, read_outputs

Offset = Literal["first", "last"]
Targets = Literal["qv", "qkv", "attn", "all"]
Loss = Literal["l1", "l2", "smooth_l1", "cosine"]


class WeCoLoRAConfig(MethodConfig):
    """Knobs of WeCoLoRA. Defaults are those of the authors' command [code] unless said otherwise."""

    factor: int = knob(
        2, "Keep one block in this many (1 keeps all: a control).", search=Choice(values=(2, 3, 4)), ge=1, le=24
    )
    offset: Offset = knob(
        "first",
        "Which block of each group is copied: the first (authors' code) or the last (paper's figure).",
        search=Choice(values=("first", "last")),
    )
    rank: int = knob(
        32,
        "Rank of every low-rank pair; the authors use 128 at width 768.",
        search=Choice(values=(4, 8, 16, 32, 64, 128, 256)),
        ge=1,
        le=1024,
    )
    targets: Targets = knob(
        "all",
        "Adapted maps: q,v / q,k,v / these and the attention output / these and the MLP's layers (the paper's six).",
        search=Choice(values=("qv", "qkv", "attn", "all")),
    )
    init: Literal["copy", "random"] = knob(
        "copy",
        "Kept blocks start as the teacher's, or anew (the paper's control without weight copy); what is before and "
        "after the blocks is the teacher's either way.",
    )
    train: Literal["pairs", "all"] = knob(
        "pairs",
        "What is trained: the low-rank pairs, or all weights of the kept blocks without pairs (our form of the paper's "
        "control WeCo+KD). Class token, embeddings and the final norm stay frozen either way.",
    )
    target: Literal["prenorm", "postnorm"] = knob(
        "prenorm",
        "Compare the last tokens before or after the final norm.",
        search=Choice(values=("prenorm", "postnorm")),
    )
    loss: Loss = knob("l1", "Distance between tokens.", search=Choice(values=("l1", "l2", "smooth_l1", "cosine")))
    multi_block: float = knob(
        0.0, "Weight of the same distance after every earlier kept block.", search=Range(low=0, high=1), ge=0, le=1
    )
    lr: float = knob(4e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1)
    weight_decay: float = knob(0.05, "AdamW's weight decay.", search=Range(low=0, high=0.1), ge=0, le=1)
    warmup: float = knob(0.2, "Share of the steps with a rising rate.", search=Range(low=0, high=0.2), ge=0, lt=1)
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


def kept_blocks(depth: int, factor: int, offset: Offset) -> list[int]:
    """0-based teacher blocks that the student copies.

    `first`: 0, k, 2k, … — ceil(L/k) blocks [code]. `last`: k-1, 2k-1, … — floor(L/k) blocks, L-1 among them where k
    divides L [fig]. The two sources disagree; all published numbers come from the code path [inferred].
    """
    return list(range(0 if offset == "first" else factor - 1, depth, factor))


def target_blocks(depth: int, factor: int, offset: Offset) -> list[int]:
    """For each kept block, the teacher block whose output it should give: the last one of its group.

    That is `[k-1::k]` for either offset, and L-1 for the last kept block. The authors' option has the phase `[1::k]`,
    which is right for k = 2 only [code].
    """
    kept = kept_blocks(depth, factor, offset)
    return [i * factor + factor - 1 for i in range(len(kept) - 1)] + [depth - 1]


def truncated(teacher: nn.Module, kept: list[int]) -> nn.Module:
    """A copy of a timm vision transformer with only the blocks `kept`; everything else is copied unchanged."""
    student = copy.deepcopy(teacher)
    blocks = student.blocks
    assert isinstance(blocks, nn.Sequential | nn.ModuleList)
    chosen = [blocks[i] for i in kept]
    student.blocks = nn.Sequential(*chosen) if isinstance(blocks, nn.Sequential) else nn.ModuleList(chosen)
    if isinstance(getattr(student, "feature_info", None), list):
        student.feature_info = student.feature_info[: len(kept)]  # type: ignore[assignment, index]
    if hasattr(student, "_model_args"):  # timm's note of how to build this network again
        student._model_args = {**student._model_args, "depth": len(kept)}  # type: ignore[assignment, dict-item]
    return student


class LowRankPair(nn.Module):
    """`x` [..., in] → `B A x` [..., out]: A Kaiming-uniform (a = √5), B zero, no bias, no dropout, scale 1 [code]."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B)


class AdaptedLinear(nn.Module):
    """A frozen linear map with low-rank pairs on equal slices of its output: `y = W x + b + B A x`.

    Args:
        base: the map, [..., in] → [..., out].
        rank: of every pair.
        slices: how many equal slices the output has: 3 for a fused qkv, whose parts get independent pairs.
        adapted: which slices get one.
    """

    def __init__(self, base: nn.Linear, rank: int, slices: int = 1, adapted: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.base = base
        self.width = base.out_features // slices
        self.slices = slices
        self.pairs = nn.ModuleDict({str(i): LowRankPair(base.in_features, self.width, rank) for i in adapted})
        self.used = False  # whether anything was computed with the pairs

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self._joined([pair(x) for pair in self.pairs.values()], dim=-1)

    @property
    def weight(self) -> Tensor:
        """[out, in] `W + B A`, for blocks that do not call their map but compute with its weight (timm's BEiT, EVA)."""
        return self.base.weight + self._joined([pair.B @ pair.A for pair in self.pairs.values()], dim=0)  # type: ignore[union-attr, operator]

    @property
    def bias(self) -> Tensor | None:
        """[out] of the map."""
        return self.base.bias

    def _joined(self, parts: list[Tensor], dim: int) -> Tensor:
        """What the pairs give, slice by slice along `dim`; zeros where a slice has no pair."""
        self.used = True
        if self.slices == 1:
            return parts[0]
        given = dict(zip(self.pairs, parts, strict=True))
        whole = [given[str(i)] if str(i) in given else torch.zeros_like(parts[0]) for i in range(self.slices)]
        return torch.cat(whole, dim=dim)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain linear map with the pairs added to its weight (in place on `base`)."""
        for name, pair in self.pairs.items():
            assert isinstance(pair, LowRankPair)
            rows = slice(int(name) * self.width, (int(name) + 1) * self.width)
            self.base.weight[rows] += (pair.B.double() @ pair.A.double()).to(self.base.weight.dtype)
        return self.base


def adapt(network: nn.Module, rank: int, targets: Targets) -> None:
    """Freezes a timm vision transformer and puts low-rank pairs on its blocks' maps, in place.

    `all` has six pairs a block (three on the fused qkv): 18 · rank · D scalars a block at MLP ratio 4 [code]. Where q,
    k and v are maps of their own, each has its pair; a gated MLP has one for each of its linear maps [inferred].

    Raises:
        ValueError: if a block lacks one of these maps.
    """
    freeze(network)
    blocks = network.blocks
    assert isinstance(blocks, nn.Sequential | nn.ModuleList)
    for block in blocks:
        if _has(block, "attn.q_proj"):
            for name in ("q", "v") if targets == "qv" else ("q", "k", "v"):
                _wrap(block, f"attn.{name}_proj", rank)
        else:
            _wrap(block, "attn.qkv", rank, 3, (0, 2) if targets == "qv" else (0, 1, 2))
        if targets in ("attn", "all"):
            _wrap(block, "attn.proj", rank)
        if targets == "all":
            for name in ("fc1_g", "fc1_x", "fc2") if _has(block, "mlp.fc1_g") else ("fc1", "fc2"):
                _wrap(block, f"mlp.{name}", rank)


@functools.lru_cache(maxsize=64)
def why_not_adapted(skeleton: nn.Module, name: str, image_size: int, targets: Targets, pairs_only: bool) -> str | None:
    """Why a copy of the teacher's first block cannot be adapted, found by a pass on the meta device; None if it can.

    Args:
        skeleton: the teacher's modules, whose blocks are alike.
        name: the teacher's.
        image_size: its input's side, in pixels.
        targets: the adapted maps.
        pairs_only: whether there are low-rank pairs; else all weights of the block are trained.
    """
    if getattr(skeleton, "rope_mixed", False):
        return f"each block of {name} has rotary embeddings of its own, which a shallower copy would mix up"
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        plain = truncated(skeleton, [0]).to("meta").eval()
        student = copy.deepcopy(plain)
        try:
            if pairs_only:
                adapt(student, 1, targets)
        except ValueError as error:
            return f"{str(error).rstrip('.')} ({name})"
        if (failure := _failure(student, image_size)) is not None:
            if _failure(plain, image_size) is not None:
                return None  # it is the meta device that it cannot run on
            return f"{name} does not run with low-rank pairs on its blocks: {type(failure).__name__}: {failure}"
    idle = [at for at, module in student.named_modules() if isinstance(module, AdaptedLinear) and not module.used]
    return f"{name} leaves out {idle[0]!r}, so that it would not be trained" if idle else None


@torch.no_grad()
def _failure(network: nn.Module, size: int) -> Exception | None:
    """What a forward pass to its last tokens raises, on the meta device."""
    try:
        read_outputs(network, torch.empty(1, 3, size, size), [Output("tokens")])
    except Exception as error:  # a network's own code may raise anything
        return error
    return None


def merge(network: nn.Module) -> nn.Module:
    """Folds every `AdaptedLinear` of `network` into its plain linear map, in place; returns the network."""
    for name, module in list(network.named_modules()):
        if isinstance(module, AdaptedLinear):
            network.set_submodule(name, module.merged())
    return network


def token_distance(student: Tensor, teacher: Tensor, kind: Loss) -> Tensor:
    """Mean distance of tokens [B, N, D] over batch, tokens and channels; `l1` is the paper's [code]."""
    student, teacher = student.float(), teacher.float()
    if kind == "l1":
        return F.l1_loss(student, teacher)
    if kind == "l2":
        return F.mse_loss(student, teacher)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, teacher)
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


class WeCoLoRALearner(Learner):
    """The truncated copy with its low-rank pairs; the loss compares tokens and sees no label.

    `loss`: distance of the last tokens [B, N, D] + `multi_block` · mean distance after the earlier kept blocks (always
    before the norm; the averaging is ours [inferred]).
    """

    steady = True

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        teacher = given.teacher
        depth = len(teacher.blocks)  # type: ignore[arg-type]
        self.student = truncated(teacher, kept_blocks(depth, params["factor"], params["offset"]))
        if params["init"] == "random":
            for module in self.student.get_submodule("blocks").modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
        self.pairs_only = params["train"] == "pairs"
        if self.pairs_only:
            adapt(self.student, params["rank"], params["targets"])
        else:
            freeze(self.student)
            self.student.get_submodule("blocks").requires_grad_(True)
        self.distance: Loss = params["loss"]
        self.multi_block: float = params["multi_block"]
        self.last, earlier = _compared(depth, params)
        self.pairs = [(Output("tokens", layer=i), output) for i, output in enumerate(earlier)]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        own = read_outputs(self.student, batch.images, [self.last, *(mine for mine, _ in self.pairs)])
        final = token_distance(own[self.last.key], batch.outputs[self.last.key], self.distance)
        if not self.pairs:
            return {"loss": final, "last_block": final}
        distances = [
            token_distance(own[mine.key], batch.outputs[theirs.key], self.distance) for mine, theirs in self.pairs
        ]
        earlier = torch.stack(distances).mean()
        return {"loss": final + self.multi_block * earlier, "last_block": final, "earlier_blocks": earlier}

    def deployed(self) -> Deployed:
        network = merge(copy.deepcopy(self.student)).eval()
        return Deployed(network=network, base="teacher", changes={"depth": len(network.blocks)})  # type: ignore[arg-type]

    def frozen(self) -> list[nn.Module]:
        return [self.student]


class WeCoLoRA(Method):
    """Weight copy and low-rank adaptation for few-shot distillation of vision transformers.

    Every k-th block of the teacher is copied and frozen; independent low-rank pairs on q, k, v, the attention output
    and both MLP layers learn to reproduce the teacher's last tokens (L1, all tokens, before the final norm) on
    unlabelled images [code]. The pairs are merged into the weights, so the student is a plain, shallower teacher. Its
    head is the common probe's; the paper probes too (batch norm and a linear layer under LARS [code], not ours).

    The controls are not quite the authors': theirs train every weight, ours (`train: all`) those of the kept blocks.
    Class token, positional and patch embedding and the final norm stay the teacher's, frozen, also under
    `init: random`.

    Segmentation is announced in the paper and not in the code: ours probes the student's patch tokens with the common
    linear or convolutional decoder [inferred].

    It serves transformers whose blocks are alike, DINOv3, EVA and BEiT among them; the paper's are plain ones. Refused
    are those whose maps it cannot adapt, and rotary embeddings that differ from block to block.

    Where a network normalises after pooling (timm's `fc_norm`), `target: postnorm` equals `prenorm`.
    """

    name = "wecolora"
    family = "remapping"
    paper = "Grigore et al., Weight Copy and Low-Rank Adaptation for Few-Shot Distillation of ViTs, WACV 2025"
    Config = WeCoLoRAConfig
    deploys = "teacher"
    needs_labels = False
    trains_head = False
    teacher_kinds = ("vit",)
    tasks = ("classification", "multilabel", "segmentation")

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, WeCoLoRAConfig)
        assert setting.teacher is not None
        if config.init == "random" and config.train == "pairs":
            return "init: random freezes random weights under train: pairs; use train: all"
        name, blocks = setting.teacher.name, setting.teacher.blocks
        if config.factor > blocks:
            return f"factor {config.factor} is larger than the {blocks} blocks of {name}"
        skeleton, size = setting.teacher.skeleton, setting.teacher.image_size
        if skeleton is None or why_not_adapted(skeleton, name, size, "all", True) is None:
            return None
        return why_not_adapted(skeleton, name, size, config.targets, config.train == "pairs")

    @classmethod
    def stages(cls, config: WeCoLoRAConfig, setting: Setting) -> list[Stage]:
        assert setting.teacher is not None
        params = config.model_dump(exclude={"lr", "weight_decay", "warmup", "budget"}, mode="json")
        last, earlier = _compared(setting.teacher.blocks, params)
        return [
            TrainStage(
                name="distil",
                version=2,
                learner=WeCoLoRALearner,
                params=params,
                feed=Feed(images="all", labels=False, outputs=(last, *earlier)),
                recipe=Recipe(
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    betas=(0.9, 0.95),
                    warmup=config.warmup,
                    budget=config.budget,
                ),
                trains="teacher",
                reads=("teacher",),
            )
        ]


def _compared(depth: int, params: Mapping[str, Any]) -> tuple[Output, list[Output]]:
    """The teacher's outputs that the student is compared with: after the last block, and after the earlier groups."""
    last = Output("tokens", layer=-1, norm=params["target"] == "postnorm")
    if params["multi_block"] == 0:
        return last, []
    groups = target_blocks(depth, params["factor"], params["offset"])
    return last, [Output("tokens", layer=i) for i in groups[:-1]]


def _has(block: nn.Module, name: str) -> bool:
    """Whether a block has a linear map of this name."""
    try:
        return isinstance(block.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _wrap(block: nn.Module, name: str, rank: int, slices: int = 1, adapted: tuple[int, ...] = (0,)) -> None:
    base = block.get_submodule(name) if _has(block, name) else None
    if not isinstance(base, nn.Linear) or base.out_features % slices:
        raise ValueError(f"WeCoLoRA adapts the linear map {name!r} of each transformer block, and one has no such map.")
    block.set_submodule(name, AdaptedLinear(base, rank, slices, adapted))
