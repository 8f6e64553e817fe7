"""Priming: what trains an upstream generator on upstream images [OTA fig: stage 1]. Learners of the one training loop.

`Batch.images` are [B, 3, S, S] in [-1, 1], except for the prior, whose "images" are codes [B, n]. A generator is not
deployed: `tensors()` gives the weights to publish.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import Batch, Deployed, Given, Learner, freeze
from methods.generators.diffusion import DiffusionPackage
from methods.generators.vq import BETA, VQPackage
from methods.outputs import Output, intermediate_channels, read_outputs


class Priming(Learner):
    """A learner whose result is the weights of a generator package, which is its `student`."""

    student: Any

    def deployed(self) -> Deployed:
        raise TypeError("An upstream generator is published, not deployed: take `tensors()`.")

    def tensors(self) -> dict[str, Tensor]:
        """The package's state."""
        return dict(self.student.state_dict())


class VQPriming(Priming):
    """Encoder, codebook and decoder: `L1 + codebook [+ feature distance] [+ λ · w · adversarial]`.

    VQGAN's loss is L1 + LPIPS + codebook + adversarial [secondary: taming]; what OTA used was not found. LPIPS is a
    network with weights of its own, which are not ours to bring: `feature_weight` puts the same distance on the maps
    of any frozen timm network in its place. The adversarial term needs no weights; it is off by default, since it pays
    after long training only (VQGAN turns it on after 10,000 or 250,001 steps [secondary]).

    Codes that no latent was nearest to for `revive_after` steps are set to random latents of the batch; at the first
    step these are all unused ones, which is the codebook's initialisation. Not in VQGAN [inferred]: without it a small
    codebook collapses to a few codes.

    Args:
        params: `config` of the package, `beta`, `revive_after`, `feature_weight`, `feature_mean`, `feature_std`,
            `gan_weight` (w, VQGAN's 0.8 [secondary]), `gan_start` (share of the steps).
        given: `teacher`, the network of the feature distance, if `feature_weight` is above 0.
    """

    idle: Tensor

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = VQPackage.build(params["config"])
        self.student.prior.requires_grad_(False)
        self.beta: float = params.get("beta", BETA)
        self.revive_after: int = params["revive_after"]
        self.register_buffer("idle", torch.full((self.student.codes,), self.revive_after))
        self.feature_weight: float = params.get("feature_weight", 0.0)
        self.features: FeatureDistance | None = None
        if self.feature_weight > 0:
            self.features = FeatureDistance(given.teacher, params["feature_mean"], params["feature_std"])
        self.gan_weight: float = params.get("gan_weight", 0.0)
        self.gan_start: float = params.get("gan_start", 0.5)
        self.critic = PatchDiscriminator() if self.gan_weight > 0 else None

    def tensors(self) -> dict[str, Tensor]:
        """The state without the prior's, which is not trained here."""
        return {k: v for k, v in self.student.state_dict().items() if k.startswith("vq.")}

    def frozen(self) -> list[nn.Module]:
        return [self.features] if self.features is not None else []

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`loss` and its parts; `used`: share of the codes that this batch used."""
        images = batch.images
        parts = self.student.vq_loss(images, self.beta)
        made, indices = parts.pop("reconstruction"), parts.pop("indices")
        if self.training:
            self._revive(parts.pop("latents").detach(), indices)
        parts.pop("latents", None)
        rebuilt = parts["l1"]
        if self.features is not None:
            parts["feature"] = self.features(made, images)
            rebuilt = rebuilt + self.feature_weight * parts["feature"]
        parts["loss"] = rebuilt + parts["codebook"]
        if self.critic is not None and progress >= self.gan_start:
            generator, critic = adversarial_losses(self.critic, made, images)
            if self.training:
                last = self.student.vq.decoder.conv_out.weight
                balance = adaptive_weight(rebuilt, generator, last)
                parts["loss"] = parts["loss"] + self.gan_weight * balance * generator
            # One step for both: each term reaches only its own side's weights.
            parts["loss"] = parts["loss"] + critic
            parts |= {"generator": generator, "critic": critic}
        parts["used"] = torch.tensor(indices.unique().numel() / len(self.idle), device=images.device)
        return parts

    @torch.no_grad()
    def _revive(self, latents: Tensor, indices: Tensor) -> None:
        self.idle += 1
        self.idle[indices.unique()] = 0
        dead = (self.idle > self.revive_after).nonzero()[:, 0]
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = torch.randint(len(flat), (len(dead),), device=flat.device)
        self.student.codebook[dead] = flat[chosen]
        self.idle[dead] = 0


class PriorPriming(Priming):
    """The latent transformer: next-code likelihood on the codes of upstream images, `Batch.images` [B, n] int64.

    Args:
        params: `config` of the package, `pkeep`, and `vq`, the stage whose package it completes.
        given: the result of that stage.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = VQPackage.build(params["config"])
        state = given.result(params["vq"])
        self.student.vq.load_state_dict({k.removeprefix("vq."): v for k, v in state.items()})
        freeze(self.student.vq)
        self.pkeep: float = params["pkeep"]

    def frozen(self) -> list[nn.Module]:
        return [self.student.vq]

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        loss = self.student.prior_loss(batch.images, self.pkeep if self.training else 1.0)
        return {"loss": loss}


class DiffusionPriming(Priming):
    """The noise predictor; `tensors()` gives the moving average of its weights, which samples better [memory].

    Args:
        params: `config` of the package, `ema` (the average's decay; after n steps at most (1 + n) / (10 + n)).
        given: nothing.
    """

    averaged: Tensor
    updates: Tensor

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = DiffusionPackage.build(params["config"])
        self.decay: float = params["ema"]
        # A buffer is in every checkpoint; a frozen copy of the network would not be.
        self.register_buffer("averaged", nn.utils.parameters_to_vector(self.student.parameters()).detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        if self.training:
            self._average()
        return {"loss": self.student.loss(batch.images)}

    @torch.no_grad()
    def _average(self) -> None:
        """Takes in the weights as the last step left them."""
        steps = self.updates.double()  # as a number of Python's it would make each step wait for the device
        now = nn.utils.parameters_to_vector(self.student.parameters())
        self.averaged.lerp_(now, (1 - ((1 + steps) / (10 + steps)).clamp_max(self.decay)).to(now.dtype))
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        averaged = copy.deepcopy(self)
        averaged._average()
        nn.utils.vector_to_parameters(averaged.averaged, averaged.student.parameters())
        return dict(averaged.student.state_dict())


class FeatureDistance(nn.Module):
    """Mean squared distance of a frozen network's maps, each position scaled to unit length, summed over the maps.

    LPIPS without its learned weights of the channels. The network expects (x - mean) / std of pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = freeze(network)
        self.outputs = [Output("map", layer=i) for i in range(len(intermediate_channels(network)))]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        """A scalar for two batches [B, 3, S, S] in [-1, 1]."""
        with torch.no_grad():
            wanted = self._maps(images)
        found = self._maps(made)
        distances = [(found[k] - wanted[k]).square().sum(1).mean() for k in wanted]
        return torch.stack(distances).sum()

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        normalised = ((images + 1) / 2 - self.mean) / self.std
        maps = read_outputs(self.network, normalised, self.outputs)
        return {k: F.normalize(v.float(), dim=1) for k, v in maps.items()}


class PatchDiscriminator(nn.Module):
    """Images [B, 3, S, S] to one logit for each patch [B, 1, s, s], high where it looks real.

    Three strided convolutions, as VQGAN's [secondary], but with group norms: batch norm would mix real and made images.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
                nn.GroupNorm(8, outputs),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def adversarial_losses(critic: nn.Module, made: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's loss `-mean(D(made))` and the discriminator's hinge loss [secondary: taming].

    The first has a gradient in `made` only, the second in the discriminator's weights only.
    """
    held = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    generator = -torch.func.functional_call(critic, held, (made,)).float().mean()
    real, fake = critic(images).float(), critic(made.detach()).float()
    return generator, 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(rebuilt: Tensor, generator: Tensor, last: Tensor) -> Tensor:
    """`||∇ L_rec|| / (||∇ L_GAN|| + 1e-4)` at the decoder's last weights, at most 10⁴ [secondary: taming]; no graph."""
    own = torch.autograd.grad(rebuilt, last, retain_graph=True)[0].float().norm()
    other = torch.autograd.grad(generator, last, retain_graph=True)[0].float().norm()
    return (own / (other + 1e-4)).clamp(0, 1e4).detach()
