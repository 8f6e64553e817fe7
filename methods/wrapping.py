"""Tuning by modules put around the teacher's own, and a rehearsal of that before anything is trained or loaded."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import Conv2dSame, Linear
from torch import nn

from methods.contract import NetworkInfo
from methods.tuning import TuningLearner, headed_skeleton

# What computes with its weight as it is: W's update, or a scale of its rows, is then one of what it gives. timm's
# StdConv2d and ScaledStdConv2d normalise their weight first.
_PLAIN = (nn.Linear.forward, nn.Conv2d.forward, Linear.forward, Conv2dSame.forward)


class WrappingLearner(TuningLearner):
    """The base of the methods that put modules around some of the teacher's, and fold them into these in the end.

    Class attributes:
        wrapper: what is put around a module, or what stands for it in a rehearsal; takes the module.
    """

    wrapper: ClassVar[type[nn.Module]]

    @classmethod
    @abstractmethod
    def wrapped(cls, params: Mapping[str, Any], network: nn.Module) -> list[str]:
        """Full names of the modules of a network (its classifier linear) that `adapt` wraps.

        Raises:
            ValueError: if it lacks them, or what is put around them could not be folded.
        """

    @classmethod
    def rehearse(cls, params: Mapping[str, Any], teacher: NetworkInfo, num_classes: int) -> str | None:
        try:
            names = cls.wrapped(params, headed_skeleton(teacher, num_classes))
        except ValueError as error:
            return str(error).rstrip(".")
        return why_not_wrapped(teacher, num_classes, tuple(names), cls.wrapper)  # type: ignore[arg-type]  # it is hashable


def check_foldable(network: nn.Module, names: Sequence[str]) -> None:
    """Checks that an update of a module's weight is one of what it computes, for each linear map and convolution.

    Raises:
        ValueError: if one of them computes with something else than its weight.
    """
    for name in names:
        module = network.get_submodule(name)
        if isinstance(module, nn.Linear | nn.Conv2d) and type(module).forward not in _PLAIN:
            raise ValueError(
                f"{name!r} is a {type(module).__name__}, which does not compute with its weight as it is (a "
                "standardised one, for instance), so that what is learned around it could not be merged into it."
            )


@functools.lru_cache(maxsize=256)
def why_not_wrapped(
    teacher: NetworkInfo, num_classes: int, names: tuple[str, ...], wrapper: type[nn.Module]
) -> str | None:
    """Why modules of the teacher cannot be wrapped, found by a forward pass on the meta device; None if they can.

    Some networks never call a module but compute with its weight: `F.linear(x, self.qkv.weight, bias)`. What is put
    around it is then left out silently. Others read attributes that a wrapper has not.

    Args:
        teacher: with its skeleton.
        num_classes: of the task.
        names: of the modules.
        wrapper: class of what is put around them.
    """
    network = copy.deepcopy(headed_skeleton(teacher, num_classes))
    called = _wrap(network, names, wrapper)
    failure = _failure(network, teacher.image_size)
    kind = type(network).__name__
    if failure is None:
        missing = next((name for name in names if name not in called), None)
        if missing is None:
            return None
        return (
            f"{kind} never calls {missing!r} but reads its weight or leaves it out, so that nothing can act around it"
        )
    if _failure(copy.deepcopy(headed_skeleton(teacher, num_classes)), teacher.image_size) is not None:
        return None  # it is the meta device that it cannot run on
    owner = next((n for n in names if network.get_submodule(n) is getattr(failure, "obj", None)), None)
    if owner is not None:
        return (
            f"{kind} does not only call {owner!r} but looks into it, so that nothing can be put around it ({failure})"
        )
    return f"{kind} does not run with modules put around {names[0]!r} and others: {type(failure).__name__}: {failure}"


def _wrap(network: nn.Module, names: Sequence[str], wrapper: type[nn.Module]) -> set[str]:
    """Wraps modules of a network on the meta device; the set, empty as yet, gets the names of those that are called."""
    called: set[str] = set()
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        for name in names:
            module = wrapper(network.get_submodule(name))
            module.register_forward_hook(lambda *_, name=name: called.add(name))  # type: ignore[misc]
            network.set_submodule(name, module)
    return called


@torch.no_grad()
def _failure(network: nn.Module, size: int) -> Exception | None:
    """What a forward pass of a network on the meta device raises."""
    try:
        with torch.device("meta"):
            network(torch.empty(1, 3, size, size))
    except Exception as error:  # a network's own code may raise anything
        return error
    return None
