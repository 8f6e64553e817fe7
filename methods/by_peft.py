"""What the methods that tune a teacher by peft share: which maps are adapted, wrapping, merging."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from methods.wrapping import WrappingLearner, check_foldable

if TYPE_CHECKING:
    from peft import PeftConfig

Targets = Literal["qkv", "attn", "mlp", "all"]
_QKV = r"(qkv|[qkv]_proj)"  # fused, or three maps
_MLP = r"(fc1|fc1_g|fc1_x|fc2)"  # plain, or gated
BLOCK_MAPS: dict[str, str] = {
    "qkv": rf"attn\.{_QKV}",
    "attn": rf"attn\.({_QKV}|proj)",
    "mlp": rf"mlp\.{_MLP}",
    "all": rf"(attn\.({_QKV}|proj)|mlp\.{_MLP})",
}


def target_modules(network: nn.Module, targets: Targets) -> list[str]:
    """Full names of the modules of a timm network (its classifier already linear) that are adapted.

    In a transformer only maps inside `blocks`: peft's own matching by suffix would take the patch embedding's `proj`
    for an attention output. Elsewhere linear maps and convolutions, but not grouped ones, the first one (the stem) or
    the classifier.

    Raises:
        ValueError: if there are none.
    """
    names: list[str]
    if has_block_maps(network):
        pattern = re.compile(rf"blocks\.\d+\.{BLOCK_MAPS[targets]}")
        names = [name for name, _ in network.named_modules() if pattern.fullmatch(name)]
    elif targets in ("qkv", "attn"):
        names = []
    else:
        head = network.get_classifier()  # type: ignore[operator]
        maps = [
            (name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and m is not head
        ]
        names = [name for name, m in maps[1:] if isinstance(m, nn.Linear) or _mixes(m, pointwise=targets == "mlp")]
    if not names:
        raise ValueError(f"The network has no module for the targets {targets!r}.")
    return names


def has_block_maps(network: nn.Module) -> bool:
    """Whether it is a transformer whose blocks have timm's `attn.qkv`, fused or as three maps."""
    maps = re.compile(rf"\.attn\.{_QKV}")
    return hasattr(network, "blocks") and any(maps.search(name) for name, _ in network.named_modules())


def exactly(names: list[str]) -> str:
    """The regular expression by which peft finds modules of these full names and no others."""
    return "|".join(map(re.escape, names))


class StandIn(nn.Module):
    """What a network sees of a module that peft has wrapped: rehearsals need no peft, which takes long to import."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


class PeftLearner(WrappingLearner):
    """The frozen teacher inside a peft model, with a trained head, under the task's loss; logits [B, C].

    The head is not among peft's targets. Batch norm stays in evaluation mode, and dropout other than peft's own.
    """

    wrapper = StandIn

    @classmethod
    def wrapped(cls, params: Mapping[str, Any], network: nn.Module) -> list[str]:
        names = target_modules(network, params["targets"])
        check_foldable(network, names)
        return names

    @abstractmethod
    def peft_config(self, names: list[str], params: Mapping[str, Any]) -> PeftConfig:
        """The tuner of the modules of these names. peft is imported in here, not with the module."""

    def adapt(self, network: nn.Module, params: Mapping[str, Any]) -> nn.Module:
        from peft import get_peft_model

        return get_peft_model(network, self.peft_config(self.wrapped(params, network), params))  # type: ignore[arg-type]

    def fold(self, network: nn.Module) -> nn.Module:
        return network.merge_and_unload()  # type: ignore[operator]

    def dropouts(self) -> list[nn.Module]:
        modules = self.student.named_modules()
        return [m for name, m in modules if isinstance(m, nn.Dropout) and re.search(r"\.(lora|vera)_dropout\.", name)]


def _mixes(module: nn.Module, pointwise: bool) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and (not pointwise or module.kernel_size == (1, 1))
