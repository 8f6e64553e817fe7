"""Architecture remapping: a differentiable search for the student's blocks, then distillation into what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methods.contract import Batch, Deployed, Given, Recipe, Setting, Stage, Structure, TrainStage, supervised_loss
from methods.kd import KD, KDConfig, KDLearner, uneven_distillation_loss
from methods.knobs import Choice, Range, knob
from methods.parts.cells import CHOICES, CellNetwork, operation
from methods.ranks import even_labels, places

SEARCH = "search"
ALPHAS = "alphas"


class DARTSConfig(KDConfig):
    """Knobs of the search and of the network that is searched; those of the loss are logit distillation's."""

    stages: int = knob(3, "How often the map is halved after the stem.", search=Choice(values=(2, 3)), ge=1, le=5)
    cells: int = knob(2, "Searched blocks in each stage.", search=Choice(values=(1, 2, 3)), ge=1, le=6)
    width: int = knob(
        24,
        "Channels of the first stage; each further one has twice as many.",
        search=Choice(values=(16, 24, 32)),
        ge=4,
        le=256,
    )
    search_lr: float = knob(
        3e-3,
        "Peak learning rate of the weights during the search.",
        search=Range(low=1e-3, high=1e-2, log=True),
        gt=0,
        le=1,
    )
    alpha_lr: float = knob(
        3e-2, "Peak learning rate of the choices.", search=Range(low=3e-3, high=1e-1, log=True), gt=0, le=10
    )
    search_budget: float = knob(0.5, "Share of the sweep's steps that the search takes.", gt=0, le=4)


class SuperNetwork(CellNetwork):
    """Every block is the mixture `Σ softmax(α)_o · o(x)` of all choices (Eq. 2 [memory]).

    `alphas` [blocks, choices] starts at 0, all choices alike; the authors draw 1e-3 · N(0, 1) [memory].
    """

    def __init__(self, blocks: int, stages: int, width: int, num_classes: int) -> None:
        super().__init__(["skip"] * blocks, stages, width, num_classes)
        self.cells = nn.ModuleList(nn.ModuleList(operation(c, w) for c in CHOICES) for w in self.widths)
        self.alphas = nn.Parameter(torch.zeros(blocks, len(CHOICES)))

    def cell(self, index: int, x: Tensor) -> Tensor:
        shares = self.alphas[index].softmax(0)
        options = self.cells[index]
        assert isinstance(options, nn.ModuleList)
        mixed = shares[0] * options[0](x)
        for share, option in zip(shares[1:], options[1:], strict=True):
            mixed = mixed + share * option(x)
        return mixed


def chosen(alphas: Tensor) -> list[str]:
    """The strongest choice of each block, of `alphas` [blocks, choices]."""
    return [CHOICES[i] for i in alphas.argmax(1).tolist()]


def discretised(network: SuperNetwork) -> CellNetwork:
    """The network of the strongest choices, with the weights that they have in the mixture."""
    choices = chosen(network.alphas)
    stages, width = len(network.halvings), network.widths[0]
    result = CellNetwork(choices, stages, width, network.num_classes)
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("cells.") and n != ALPHAS}
    for i, choice in enumerate(choices):
        prefix = f"cells.{i}.{CHOICES.index(choice)}."
        held = {n: t for n, t in network.state_dict().items() if n.startswith(prefix)}
        state.update({f"cells.{i}.{n.removeprefix(prefix)}": t for n, t in held.items()})
    result.load_state_dict(state, strict=True)
    return result.train(network.training)


class SearchLearner(KDLearner):
    """First-order bilevel search in one loop: half of the batch's rows move the weights, the others the choices.

    The loss is `L(w; one half, α fixed) + L(α; the other, w fixed)`, L logit distillation's, so one backward gives
    each its own gradient and no other. DARTS holds out half of the training data for α; here every image is in
    either half from step to step [inferred], so that few labels are not halved. Batch statistics see both halves.

    In a worker group each half is that of the global batch, however many of its rows, and of its labels, a rank has.
    """

    student: SuperNetwork

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.alpha_scale: float = params["alpha_scale"]

    def network(self, params: Mapping[str, Any], given: Given) -> nn.Module:
        stages: int = params["stages"]
        return SuperNetwork(stages * params["cells"], stages, params["width"], given.num_classes)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        own = dict(self.student.named_parameters())
        alphas = {ALPHAS: own.pop(ALPHAS).detach()}
        weights = {name: tensor.detach() for name, tensor in own.items()}
        lower = self._side(alphas, _rows(batch, 0))
        upper = self._side(weights, _rows(batch, 1))
        return {
            "loss": lower["loss"] + upper["loss"],
            "weights": lower["loss"],
            "alphas": upper["loss"],
            "ce": lower["ce"],
            "kd": lower["kd"],
        }

    def _side(self, fixed: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return self.distillation(functional_call(self.student, fixed, (batch.images,)), batch)

    def distillation(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        with even_labels(False):  # as many labels in a rank's batch are not as many in its halves
            ce = supervised_loss(logits, batch.labels, self.kind)
        kd = uneven_distillation_loss(logits, self.soft_teacher(batch.outputs), self.temperature, self.kind)
        return {"loss": (1 - self.weight) * ce + self.weight * kd, "ce": ce, "kd": kd}

    def tensors(self) -> dict[str, Tensor]:
        return {ALPHAS: self.student.alphas.detach().clone()}

    def lr_scale(self, name: str) -> float:
        return self.alpha_scale if name.endswith(ALPHAS) else 1.0

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return super().decays(name, parameter) and not name.endswith(ALPHAS)

    def deployed(self) -> Deployed:
        """The mixture itself. The stage publishes its choices, so nobody deploys it."""
        return Deployed(self.student.eval(), "student")


class CellLearner(KDLearner):
    """Logit distillation of the network that the search found, from random weights."""

    def network(self, params: Mapping[str, Any], given: Given) -> nn.Module:
        choices = chosen(given.result(SEARCH)[ALPHAS])
        self.arguments = {"choices": choices, "stages": params["stages"], "width": params["width"]}
        return CellNetwork(**self.arguments, num_classes=given.num_classes)

    def deployed(self) -> Deployed:
        structure = Structure("methods.parts.cells:cell_network", self.arguments)
        return Deployed(self.student.eval(), "student", structure=structure)


def _rows(batch: Batch, half: int) -> Batch:
    """Half of the rows, labelled and unlabelled ones dealt out evenly; on some ranks of a group it may have none.

    By the parity of the ones in a row's binary place in the global batch, where labelled rows come first: a row's half
    does not depend on how many workers there are. Of a rank's rows that follow each other in pairs one is in either
    half on 1, 2, 4, ... workers. No rule has both for other numbers: on two workers place 0 and 2 are apart, on one
    0 and 1, and 2 and 3; so 0 and 3 are together, which on three workers are a pair.
    """
    assert batch.labels is not None
    parity = torch.tensor([place.bit_count() % 2 for place in places(len(batch.images)).tolist()])
    rows = (parity == half).nonzero().flatten().to(batch.images.device)
    outputs = {name: tensor[rows] for name, tensor in batch.outputs.items()}
    return Batch(batch.images[rows], batch.labels[rows], outputs)


class DARTS(KD):
    """A differentiable search over block choices under the distillation loss, then distillation from scratch.

    Stage `search` trains a network whose blocks are mixtures, weights and choices in turn (first order); `distil`
    trains the network of the strongest choices. The deployed network is this package's own small convolutional one:
    of the sweep's student only the image size and preprocessing are used. The paper searches cells with many edges on
    CIFAR-10; ours has one choice a block among a 3×3 convolution, a separable 5×5, an inverted bottleneck and a skip
    [inferred]. Known weakness [memory]: with many search steps skips tend to win.
    """

    name = "darts"
    paper = "Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019"
    Config = DARTSConfig
    deployed_size = "own"
    tasks = ("classification", "multilabel")

    @classmethod
    def smallest(cls, config: KDConfig, setting: Setting) -> Structure:
        assert isinstance(config, DARTSConfig)
        skips = ["skip"] * (config.stages * config.cells)
        arguments = {"choices": skips, "stages": config.stages, "width": config.width}
        return Structure("methods.parts.cells:cell_network", arguments)

    @classmethod
    def stages(cls, config: KDConfig, setting: Setting) -> list[Stage]:
        assert isinstance(config, DARTSConfig)
        *earlier, distil = super().stages(config, setting)
        assert isinstance(distil, TrainStage)
        # The stages read the student although they build their own network: what it is fed belongs to their keys.
        params = {**distil.params, "stages": config.stages, "cells": config.cells, "width": config.width}
        search = replace(
            distil,
            name=SEARCH,
            version=4,
            learner=SearchLearner,
            params={**params, "alpha_scale": config.alpha_lr / config.search_lr},
            recipe=Recipe(lr=config.search_lr, weight_decay=config.weight_decay, budget=config.search_budget),
            publishes="tensors",
        )
        final = replace(distil, version=1, learner=CellLearner, params=params, inputs=(*distil.inputs, SEARCH))
        return [*earlier, search, final]
