"""SSF: a learned scale and shift after every map and norm of the frozen teacher, folded away in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.anatomy import FROZEN_NORMS, NORMS, is_transformer
from methods.knobs import Choice, Range, knob
from methods.tuning import TunedTeacher, TuningConfig
from methods.wrapping import WrappingLearner, check_foldable

BLOCK_POINTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


class SSFConfig(TuningConfig):
    """Knobs of SSF."""

    noise: float = knob(
        0.02,
        "Standard deviation of both at the start; above 0 the teacher is not itself at first, as in the authors' code.",
        search=Choice(values=(0.0, 0.02)),
        ge=0,
        le=1,
    )
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=100)


class ScaledShifted(nn.Module):
    """`γ ⊙ base(x) + β` over the channels of a linear map, a convolution or a norm.

    A norm may have its activation inside (timm's `BatchNormAct2d`): γ and β then act before it. A base without a bias
    has nothing to fold β into and gets γ only.

    Args:
        base: the module; its `weight` has one row a channel.
        noise: γ ~ N(1, noise), β ~ N(0, noise).
    """

    shift: nn.Parameter | None

    def __init__(self, base: nn.Module, noise: float = 0.0) -> None:
        super().__init__()
        self.base = base
        channels = len(base.weight)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.empty(channels).normal_(1.0, noise))
        self.shift = None if _bias(base) is None else nn.Parameter(torch.empty(channels).normal_(0.0, noise))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear | nn.Conv2d):
            tail = (-1, 1, 1) if isinstance(self.base, nn.Conv2d) else (-1,)
            y = self.base(x) * self.scale.view(tail)
            return y if self.shift is None else y + self.shift.view(tail)
        return functional_call(self.base, self._affine(self.scale, self.shift), (x,))

    def _affine(self, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
        """The base's `weight` and `bias` with scale and shift in them."""
        weight, bias = self.base.weight, _bias(self.base)
        assert isinstance(weight, Tensor)
        result = {"weight": weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.ndim - 1))}
        if shift is not None:
            assert bias is not None
            result["bias"] = bias.to(scale.dtype) * scale + shift
        return result

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The base with γ and β in its own tensors (in place)."""
        shift = None if self.shift is None else self.shift.double()
        for name, tensor in self._affine(self.scale.double(), shift).items():
            getattr(self.base, name).copy_(tensor)
        return self.base


def points(network: nn.Module) -> list[str]:
    """Full names of the modules that get a scale and a shift.

    In a vision transformer the paper's: patch embedding, norm1, qkv, proj, norm2, fc1 and fc2 of every block, and the
    final norm (`fc_norm` where it comes after pooling). In other networks every norm, linear map and convolution with a
    bias, but not the classifier: what has none is followed by a norm that has one.

    Raises:
        ValueError: if a transformer's block lacks one of them.
    """
    modules = dict(network.named_modules())
    if not is_transformer(network):
        head = network.get_classifier()  # type: ignore[operator]
        return [n for n, m in modules.items() if m is not head and _is_affine(m) and _bias(m) is not None]
    blocks = network.blocks
    assert isinstance(blocks, nn.Sequential | nn.ModuleList)
    names = ["patch_embed.proj"]
    names += [f"blocks.{i}.{point}" for i in range(len(blocks)) for point in BLOCK_POINTS]
    missing = [name for name in names if name not in modules or not _is_affine(modules[name])]
    if missing:
        raise ValueError(
            f"ssf scales and shifts {', '.join(BLOCK_POINTS)} of every block, and {type(network).__name__} has no "
            f"{missing[0]!r}."
        )
    return names + [name for name in ("norm", "fc_norm") if name in modules and _is_affine(modules[name])]


def _is_affine(module: nn.Module) -> bool:
    """A linear map, a convolution, or a norm with a weight, which is a buffer where the norm is frozen."""
    kinds = (nn.Linear, nn.Conv2d, *NORMS, *FROZEN_NORMS)
    return isinstance(module, kinds) and isinstance(module.weight, Tensor)


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


class SSFLearner(WrappingLearner):
    """The frozen teacher with `y ← γ ⊙ y + β` at `points`, and a trained head; logits [B, C].

    A ViT of width D and L blocks at MLP ratio 4 gets 2 · (L · 11D + 2D) scalars. γ ~ N(1, 0.02), β ~ N(0, 0.02): not
    the identity at the start [code]. Both fold exactly into the module before them. The authors train with AdamW at
    1e-3, decay 0.05 and, for CIFAR-100, an average of the weights [code]; here there is no average.
    """

    wrapper = ScaledShifted

    @classmethod
    def wrapped(cls, params: Mapping[str, Any], network: nn.Module) -> list[str]:
        names = points(network)
        check_foldable(network, names)
        return names

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        for name in self.wrapped(params, network):
            network.set_submodule(name, ScaledShifted(network.get_submodule(name), params["noise"]))
        return network

    def fold(self, network: nn.Module) -> nn.Module:
        inserted = [(name, m) for name, m in network.named_modules() if isinstance(m, ScaledShifted)]
        for name, module in inserted:
            network.set_submodule(name, module.folded())
        return network


class SSF(TunedTeacher):
    """Scaling and shifting the teacher's features, trained on the labelled images; the folded teacher is deployed."""

    name = "ssf"
    family = "parameter"
    paper = "Lian et al., Scaling & Shifting Your Features, NeurIPS 2022"
    Config = SSFConfig
    learner = SSFLearner
