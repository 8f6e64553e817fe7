"""TDMR's expensive variant: a learnable prompt on the pixels, trained with the proxy through the frozen teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import Batch, Deployed, Feed, Given, Learner, Recipe, TrainStage, freeze
from methods.heads import POOLED
from methods.outputs import read_outputs
from methods.proxy import Proxy, load_proxy, proxy_loss, proxy_tensors
from methods.ranks import gathered

PROMPT = "prompt"
PROMPT_RATE = 10.0  # the prompt learns so much faster than P and W [inferred]
PROMPT_BUDGET = 0.5  # share of the sweep's steps [inferred]

PromptKind = Literal["padding", "additive"]


class Prompt(nn.Module):
    """A learnable frame δ of `pixels` pixels on images [B, 3, S, S] that are normalised as the teacher expects.

    `padding`: the whole image is made smaller and lies inside the frame. `additive`: the frame is added to the image's
    own border; with `pixels` >= S / 2 to all of it. δ starts at 0.
    """

    def __init__(self, size: int, pixels: int, kind: PromptKind) -> None:
        super().__init__()
        self.pixels, self.kind = pixels, kind
        self.delta = nn.Parameter(torch.zeros(3, size, size))
        frame = torch.ones(size, size)
        if 2 * pixels < size:
            frame[pixels : size - pixels, pixels : size - pixels] = 0
        self.frame: Tensor
        self.register_buffer("frame", frame, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] with the prompt."""
        if self.kind == "padding":
            inside = images.shape[-1] - 2 * self.pixels
            small = F.interpolate(images, size=inside, mode="bilinear", antialias=True, align_corners=False)
            images = F.pad(small, (self.pixels,) * 4)
        return images + self.delta * self.frame


class Reprogrammed(nn.Module):
    """Images as the frozen teacher expects them, with a prompt, to features [B, D]; called, to p [B, C]."""

    def __init__(self, teacher: nn.Module, prompt: Prompt, proxy: Proxy) -> None:
        super().__init__()
        self.teacher, self.prompt, self.proxy = freeze(teacher), prompt, proxy

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, D] of the prompted images."""
        return read_outputs(self.teacher, self.prompt(images), [POOLED])[POOLED.key].float()

    def forward(self, images: Tensor) -> Tensor:
        return self.proxy.head(self.proxy(self.features(images)))


class PromptLearner(Learner):
    """Stage A with a prompt: δ, P and W under `L_A`, every step through the frozen teacher.

    The geometry that α keeps is that of the prompted images' features. Batch statistics of P are those of the global
    batch, and running averages afterwards, since no stored features exist [inferred].
    """

    student: Reprogrammed

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.kind = given.kind
        self.alpha: float = params["alpha"]
        prompt = Prompt(params["size"], params["pixels"], params["prompt_kind"])
        proxy = Proxy(params["width"], params["dim"], given.num_classes, params["projector"], params["normalise"])
        self.student = Reprogrammed(given.teacher, prompt, proxy)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        features = gathered(self.student.features(batch.images))
        return proxy_loss(self.student.proxy, features, gathered(batch.labels), self.kind, self.alpha)

    def deployed(self) -> Deployed:
        raise TypeError("The stage `prompt` leaves tensors for the stage after it and deploys nothing.")

    def tensors(self) -> dict[str, Tensor]:
        """`delta` [3, S, S], and the proxy as `fit_proxy` leaves it, with one snapshot and without class means."""
        state = {f"0.{name}": tensor for name, tensor in proxy_tensors(self.student.proxy).items()}
        return {
            **state,
            "epochs": torch.zeros(1, dtype=torch.int64),
            "delta": self.student.prompt.delta.detach().clone(),
        }

    def lr_scale(self, name: str) -> float:
        return PROMPT_RATE if name == "student.prompt.delta" else 1.0

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return name != "student.prompt.delta" and super().decays(name, parameter)

    def frozen(self) -> list[nn.Module]:
        return [self.student.teacher]


def prompt_stage(params: Mapping[str, Any], lr: float, weight_decay: float) -> TrainStage:
    """The stage that trains prompt and proxy; `params` are those of `PromptLearner`."""
    return TrainStage(
        name=PROMPT,
        version=3,
        learner=PromptLearner,
        params=params,
        feed=Feed(images="labelled", labels=True),
        recipe=Recipe(lr=lr, weight_decay=weight_decay, budget=PROMPT_BUDGET),
        trains="teacher",
        reads=("teacher",),
        publishes="tensors",
        live_teacher=True,
    )


def load_reprogrammed(params: Mapping[str, Any], tensors: Mapping[str, Tensor], teacher: nn.Module) -> Reprogrammed:
    """What `PromptLearner` left, with the teacher, all of it frozen and in evaluation mode."""
    prompt = Prompt(params["size"], params["pixels"], params["prompt_kind"])
    prompt.load_state_dict({"delta": tensors["delta"]})
    network = Reprogrammed(teacher, prompt, load_proxy(params, tensors, -1))
    freeze(network)
    return network
