"""Training an upstream generator as stages of the store: its pixels, its weights, its codes, its prior."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.contract import Given, Recipe
from methods.generators.diffusion import DiffusionConfig, DiffusionPackage
from methods.generators.priming import DiffusionPriming, Priming, PriorPriming, VQPriming
from methods.generators.vq import BETA, VQConfig, VQPackage
from methods.knobs import MethodConfig, knob
from orchestrator.data.upstream import UpstreamFeeder, to_unit, upstream_pixels
from orchestrator.models.load import Network
from orchestrator.store import Entry, Records, Store, key_of, write_records
from orchestrator.train.feed import Feeder
from orchestrator.train.loop import Checkpoint, Report, fit

VERSION = 1
MEASURED = 512  # held-out images at most
Tell = Callable[[str], None]


class Training(MethodConfig):
    """What every kind of package is trained with."""

    flip: bool = knob(True, "Mirror half of the images.")
    holdout: float = knob(0.05, "Share of the images kept for measuring.", gt=0, lt=0.5)
    seed: int = knob(0, "Of weights, order and noise.", ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = knob("fp32", "Autocast precision.")
    half: bool = knob(True, "Publish the weights in 16 bits.")
    threads: int = knob(1, "Torch threads.", ge=1)
    checkpoint_s: float = knob(30.0, "Seconds between checkpoints.", gt=0)


class VQSettings(VQConfig, Training):
    """A VQ package: its shape and its training. Rates, batch sizes and steps are our choice; OTA's were not found."""

    batch: int = knob(16, "Images a step.", ge=1, le=4096)
    lr: float = knob(1e-3, "Peak learning rate of the VQ; AdamW, no weight decay.", gt=0, le=1)
    beta: float = knob(BETA, "Weight of the encoder's term of the codebook loss.", ge=0, le=10)
    revive_after: int = knob(60, "Steps after which an unused code is set to a latent of the batch.", ge=1)
    feature_weight: float = knob(0.0, "Weight of the distance of a frozen network's maps; 0 for none.", ge=0, le=100)
    feature_network: str = knob("packaged/efficientnet_lite0", "That network.")
    gan_weight: float = knob(0.0, "Weight of the adversarial term; 0 for none, VQGAN's is 0.8.", ge=0, le=10)
    gan_start: float = knob(0.5, "Share of the steps before it is on.", ge=0, le=1)
    prior_steps: int = knob(0, "Steps of the latent transformer; 0 for as many as the VQ has.", ge=0)
    prior_batch: int = knob(32, "Images a step of it.", ge=1, le=4096)
    prior_lr: float = knob(1e-3, "Its peak learning rate.", gt=0, le=1)
    prior_weight_decay: float = knob(0.05, "Its weight decay.", ge=0, le=1)
    pkeep: float = knob(1.0, "Share of its input codes that are not replaced by random ones.", gt=0, le=1)


class DiffusionSettings(DiffusionConfig, Training):
    """A diffusion package: its shape and its training."""

    batch: int = knob(32, "Images a step.", ge=1, le=4096)
    lr: float = knob(2e-4, "Peak learning rate; AdamW.", gt=0, le=1)
    ema: float = knob(0.999, "Decay of the weights' moving average, which is what is published.", ge=0, lt=1)


def prime_vq(
    store: Store, data: str, settings: VQSettings, steps: int, features: Network | None, tell: Tell
) -> tuple[VQPackage, dict[str, Any]]:
    """A trained VQ package and the facts of its training.

    Args:
        store: where the stages lie; a stage that is there is not computed again.
        data: upstream images, see `upstream_pixels`.
        settings: shape and training.
        steps: of the VQ; the prior has its own number.
        features: the network of the feature distance, if `feature_weight` is above 0.
        tell: takes lines of progress.
    """
    stages = _Stages(store, data, settings, settings.size, tell)
    config = _config(VQConfig, settings)
    own = {k: v for k, v in config.items() if not k.startswith("prior_")}
    params: dict[str, Any] = {"config": own, "beta": settings.beta, "revive_after": settings.revive_after}
    values: dict[str, Any] = {}
    if settings.feature_weight > 0:
        assert features is not None
        values["teacher"] = copy.deepcopy(features.module)
        mean, std = features.preprocessing.mean, features.preprocessing.std
        params |= {"feature_weight": settings.feature_weight, "feature_mean": list(mean), "feature_std": list(std)}
    if settings.gan_weight > 0:
        params |= {"gan_weight": settings.gan_weight, "gan_start": settings.gan_start}
    # Adversarial training wants little momentum, as VQGAN's authors have it [secondary].
    betas = (0.5, 0.9) if settings.gan_weight > 0 else (0.9, 0.99)
    recipe = Recipe(lr=settings.lr, weight_decay=0, betas=betas, warmup=0.05, clip=1.0)
    vq = stages.train(
        "upstream_vq",
        {"params": params, "features": features.identity if features and values else None},
        lambda: VQPriming(params, Given(values=values, num_classes=0)),
        stages.pixels(settings.batch),
        recipe,
        steps,
    )
    codes = _codes(store, stages, own, vq)
    params = {"config": config, "pkeep": settings.pkeep, "vq": vq.stage}
    rows = stages.kept
    if settings.flip:
        rows = np.concatenate([rows, rows + stages.count])
    table = Records(codes.path / "codes.arrow")
    prior = stages.train(
        "upstream_prior",
        {"params": params, "codes": codes.key},
        lambda: PriorPriming(params, Given(values={}, num_classes=0, results={vq.stage: _tensors(vq)})),
        UpstreamFeeder(table, rows, settings.prior_batch, settings.seed, flip=False),
        Recipe(
            lr=settings.prior_lr, weight_decay=settings.prior_weight_decay, betas=(0.9, 0.95), warmup=0.05, clip=1.0
        ),
        settings.prior_steps or steps,
        lambda learner: measure_vq(learner.student, stages, table),
    )
    package = VQPackage.build(config)
    package.load_state_dict(_tensors(prior))
    seconds = vq.meta["about"]["loop_seconds"] + prior.meta["about"]["loop_seconds"]
    facts = {"steps": steps, "prior_steps": settings.prior_steps or steps, "loop_seconds": round(seconds)}
    return package, stages.facts() | facts | prior.meta["about"]["facts"]


def prime_diffusion(
    store: Store, data: str, settings: DiffusionSettings, steps: int, tell: Tell
) -> tuple[DiffusionPackage, dict[str, Any]]:
    """A trained diffusion package and the facts of its training; arguments as `prime_vq`."""
    stages = _Stages(store, data, settings, settings.size, tell)
    params: dict[str, Any] = {"config": _config(DiffusionConfig, settings), "ema": settings.ema}
    entry = stages.train(
        "upstream_diffusion",
        {"params": params},
        lambda: DiffusionPriming(params, Given(values={}, num_classes=0)),
        stages.pixels(settings.batch),
        Recipe(lr=settings.lr, weight_decay=0.01, warmup=0.05, clip=1.0),
        steps,
    )
    package = DiffusionPackage.build(params["config"])
    package.load_state_dict(_tensors(entry))
    loss = measure_diffusion(package, stages)
    facts = {"steps": steps, "loop_seconds": round(entry.meta["about"]["loop_seconds"]), "heldout_loss": round(loss, 4)}
    return package, stages.facts() | facts


class _Stages:
    """What the stages of one package share: its images, which of them are held out, and how a stage is trained."""

    def __init__(self, store: Store, data: str, settings: Training, size: int, tell: Tell) -> None:
        torch.set_num_threads(settings.threads)
        self.store, self.settings, self.tell = store, settings, tell
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.images = upstream_pixels(store, data, size)
        self.table = Records(self.images.path / "pixels.arrow")
        self.count = len(self.table)
        # The order is that of the contents' hashes, so the last ones are a random draw that anybody can repeat.
        held = max(1, round(self.count * settings.holdout))
        self.kept, self.held = np.arange(self.count - held), np.arange(self.count - held, self.count)
        tell(f"{self.count} upstream images of {size} px; {held} of them are held out.")

    def facts(self) -> dict[str, Any]:
        return {"images": self.count, "heldout": len(self.held), "images_hash": self.images.key}

    def pixels(self, batch: int) -> UpstreamFeeder:
        return UpstreamFeeder(self.table, self.kept, batch, self.settings.seed, self.settings.flip)

    def heldout(self) -> Tensor:
        """[n, 3, S, S] in [-1, 1]; at most 512."""
        return to_unit(self.table.rows(self.held[:MEASURED]))

    def train(
        self,
        stage: str,
        reads: Mapping[str, Any],
        make: Callable[[], Priming],
        feeder: UpstreamFeeder,
        recipe: Recipe,
        steps: int,
        measure: Callable[[Priming], dict[str, Any]] | None = None,
    ) -> Entry:
        """The stage's entry in the store; trained from its last checkpoint if it is not there."""
        settings = self.settings
        reads = {
            **reads,
            "pixels": self.images.key,
            "kept": len(self.kept),
            "recipe": asdict(recipe),
            "steps": steps,
            "batch": feeder.batch,
            "flip": settings.flip,
            "seed": settings.seed,
            "precision": settings.precision,
            "version": VERSION,
        }
        key = key_of(reads)

        def write(folder: Path) -> dict[str, Any]:
            began = time.perf_counter()
            torch.manual_seed(settings.seed)
            learner = make()
            history = fit(
                learner,
                cast(Feeder, feeder),
                recipe,
                steps,
                device=self.device,
                precision=settings.precision,
                seed=settings.seed,
                checkpoint=Checkpoint(self.store.scratch(stage, key) / "checkpoint.pt", settings.checkpoint_s),
                report=_progress(stage, self.tell),
                report_every=max(1, min(steps // 20, 100)),
            )
            learner.cpu()
            tensors = {k: v.detach().contiguous().clone() for k, v in learner.tensors().items()}
            save_file(tensors, folder / "model.safetensors")
            (folder / "history.json").write_text(json.dumps(history.points), encoding="utf-8")
            facts = measure(learner) if measure is not None else {}
            seconds = time.perf_counter() - began
            return {"steps": steps, "loop_seconds": history.loop_seconds, "facts": facts, "seconds": seconds}

        entry = self.store.compute(stage, key, write, reads=reads)
        if not entry.computed:
            self.tell(f"{stage}: found in the store, {entry.meta['seconds']:.0f} s saved.")
        return entry


def _progress(stage: str, tell: Tell) -> Callable[[Report], None]:
    last: list[tuple[float, int]] = []

    def report(state: Report) -> None:
        now = time.perf_counter()
        left = ""
        if last:
            rate = (now - last[0][0]) / (state.step - last[0][1])
            left = f", about {rate * (state.steps - state.step) / 60:.1f} min left"
        last[:] = last[:1] or [(now, state.step)]
        parts = ", ".join(f"{name} {value:.4f}" for name, value in state.parts.items())
        tell(f"{stage}: {state.step}/{state.steps} steps, {parts}{left}")

    return report


def _config(kind: type[MethodConfig], settings: MethodConfig) -> dict[str, Any]:
    return settings.model_dump(mode="json", include=set(kind.model_fields))


def _tensors(entry: Entry) -> dict[str, Tensor]:
    return load_file(entry.path / "model.safetensors")


def _codes(store: Store, stages: _Stages, config: Mapping[str, Any], vq: Entry) -> Entry:
    """The store entry with the codes of every image, [2N, n] int64: first as they are, then mirrored."""
    reads = {"vq": vq.key, "pixels": stages.images.key, "version": VERSION}

    def write(folder: Path) -> dict[str, Any]:
        package = VQPackage.build(config)
        package.load_state_dict(_tensors(vq), strict=False)  # the prior is not there yet
        package.to(stages.device)
        stages.tell(f"upstream_codes: encoding {2 * stages.count} images.")

        def batches() -> Any:
            for mirrored in (False, True):
                for rows in np.array_split(np.arange(stages.count), math.ceil(stages.count / 256)):
                    images = to_unit(stages.table.rows(rows))
                    yield package.indices((images.flip(-1) if mirrored else images).to(stages.device)).cpu()

        write_records(folder / "codes.arrow", 2 * stages.count, batches(), "int64")
        return {}

    return store.compute("upstream_codes", key_of(reads), write, reads=reads)


@torch.no_grad()
def measure_vq(package: VQPackage, stages: _Stages, codes: Records) -> dict[str, Any]:
    """Held-out reconstruction and likelihood, and how much of the codebook the training images use."""
    images = stages.heldout()
    own = codes.rows(stages.held[:MEASURED])
    mean = torch.zeros(images.shape[1:])
    counts = torch.zeros(package.codes)
    for rows in np.array_split(stages.kept, math.ceil(len(stages.kept) / 256)):
        mean += to_unit(stages.table.rows(rows)).sum(0)
        counts += torch.bincount(codes.rows(rows).flatten(), minlength=package.codes)
    mean /= len(stages.kept)
    share = counts / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    nll = torch.stack([package.prior_loss(part) * len(part) for part in own.split(64)]).sum() / len(own)
    return {
        "heldout_psnr": round(float(psnr(package.decode(own), images).mean()), 2),
        "heldout_psnr_of_mean_image": round(float(psnr(mean.expand_as(images), images).mean()), 2),
        "codes_used": round(float((counts > 0).float().mean()), 4),
        "code_perplexity": round(float(entropy.exp()), 1),
        "heldout_nll": round(float(nll), 4),
        "heldout_nll_of_code_frequencies": round(float(-share.clamp_min(1e-12).log()[own].mean()), 4),
        "uniform_nll": round(math.log(package.codes), 4),
    }


def psnr(made: Tensor, images: Tensor) -> Tensor:
    """[B] peak signal-to-noise ratio in dB of images [B, 3, S, S] in [-1, 1]."""
    return -10 * ((made - images) / 2).square().flatten(1).mean(1).clamp_min(1e-12).log10()


@torch.no_grad()
def measure_diffusion(package: DiffusionPackage, stages: _Stages) -> float:
    """Mean squared error of the predicted noise on held-out images; predicting none has 1."""
    images = stages.heldout()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = [package.loss(part) * len(part) for part in images.split(64)]
    return float(torch.stack(losses).sum() / len(images))
