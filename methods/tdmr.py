"""TDMR: the teacher is reprogrammed into a proxy space, from which a student is distilled step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.contract import (
    TEACHER,
    Batch,
    Deployed,
    Feed,
    Given,
    Kind,
    Learner,
    Method,
    Recipe,
    Setting,
    Stage,
    TrainStage,
    supervised_loss,
)
from methods.heads import POOLED
from methods.kd import LABELLED_DESCRIPTION, distillation_loss
from methods.knobs import Choice, MethodConfig, Range, knob
from methods.outputs import Output, intermediate_channels, read_outputs
from methods.proxy import PROXY, Proxy, load_proxy, proxy_stage
from methods.ranks import gathered
from methods.reprogram import PROMPT, PromptKind, Reprogrammed, load_reprogrammed, prompt_stage
from methods.transport import transport_cost
from methods.tuning import NONE, TeacherTuning, tuning_knob, tuning_refuses, tunings

Mode = Literal["none", "depth", "weight", "snapshot", "depth+weight"]
Distance = Literal["cosine", "mse", "similarity"]
StageWeights = Literal["uniform", "rising", "last"]

SIMILARITY_TEMPERATURE = 0.1  # of cosine similarities [inferred]
NEARLY = 1e-9  # a switch point that is a step of training counts as reached, whatever its floating point digits
SCORES = Output("logits")


class TDMRConfig(MethodConfig):
    """Knobs of TDMR. Those of the proxy cost seconds; those of the distillation a training of the student each."""

    proxy_dim: int = knob(
        64, "Dimensions of the proxy space.", search=Choice(values=(32, 64, 128, 256, 512)), ge=1, le=4096
    )
    projector: Literal["linear", "mlp"] = knob(
        "mlp", "One linear map, or Linear-BN-GELU-Linear.", search=Choice(values=("linear", "mlp"))
    )
    normalise: bool = knob(False, "Whether proxy vectors are brought to length 1.")
    alpha: float = knob(
        0.0,
        "Weight of 1 - CKA(z, f), which keeps the teacher's geometry in the proxy.",
        search=Choice(values=(0.0, 0.1, 0.3, 1.0)),
        ge=0,
        le=10,
    )
    proxy_lr: float = knob(1e-3, "AdamW's rate for the proxy.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1)
    proxy_weight_decay: float = knob(1e-4, "AdamW's weight decay for the proxy.", ge=0, le=1)
    proxy_epochs: int = knob(100, "Most epochs of the proxy; held-out images choose how many.", ge=1, le=1000)
    snapshots: int = knob(4, "Proxies of rising epoch that are kept for the mode `snapshot`.", ge=1, le=16)
    prototypes: bool = knob(False, "Whether each proxy vector is replaced by the mean of its class.")
    input_prompt: int = knob(
        0,
        "Pixels of a learnable prompt around the teacher's input; above 0 the teacher runs (and is differentiated) in "
        "every step: very expensive.",
        ge=0,
        le=64,
    )
    prompt_kind: PromptKind = knob(
        "padding", "padding: the image is made smaller, inside the prompt; additive: the prompt is added to its border."
    )
    mode: Mode = knob(
        "depth",
        "What changes as training goes on: the compared depths (shallow to deep), the teacher's share (1 to "
        "lambda_end), the proxy (easy to hard), or nothing.",
        search=Choice(values=("none", "depth", "weight", "snapshot", "depth+weight")),
    )
    switch: float = knob(
        0.8, "Share of the training after which all depths, or the last proxy, are reached.", gt=0, le=1
    )
    lambda_end: float = knob(
        0.5,
        "Share of the teacher's terms (at the end, in modes with `weight`); 0 trains on labels alone.",
        search=Range(low=0, high=1),
        ge=0,
        le=1,
    )
    beta: float = knob(1.0, "Weight of the feature terms.", search=Range(low=0.1, high=10, log=True), ge=0, le=100)
    gamma: float = knob(
        1.0, "Weight of the class probabilities' term.", search=Range(low=0.1, high=10, log=True), ge=0, le=100
    )
    temperature: float = knob(
        4.0, "Softens both class distributions.", search=Range(low=1, high=8, log=True), ge=1, le=100
    )
    depths: int = knob(4, "Places in the student, evenly over its intermediate maps, that are compared.", ge=1, le=16)
    stage_weights: StageWeights = knob(
        "uniform",
        "Weights of the depths, together 1: alike, rising with depth, or the last depth only.",
        search=Choice(values=("uniform", "rising", "last")),
    )
    distance: Distance = knob(
        "cosine", "Between a depth's vector and its proxy vector; `similarity` compares the batch's similarities."
    )
    transport: float = knob(
        0.0, "Weight of an optimal transport cost that is added at each depth; 0: none.", ge=0, le=10
    )
    labelled_fraction: float = knob(0.25, LABELLED_DESCRIPTION, search=Choice(values=(0.25, 0.5, 0.75)), ge=0, le=1)
    teacher_tuning: TeacherTuning = tuning_knob()
    lr: float = knob(1e-3, "Peak learning rate.", search=Range(low=1e-4, high=1e-2, log=True), gt=0, le=1)
    weight_decay: float = knob(5e-4, "AdamW's weight decay.", search=Choice(values=(0.0, 5e-4, 5e-3, 5e-2)), ge=0, le=1)
    budget: float = knob(1.0, "Share of the sweep's steps; above 1 costs more than the other methods.", gt=0, le=4)


def active_depths(progress: float, count: int, switch: float, mode: Mode) -> int:
    """`K(u) = min(K, 1 + floor(u · K / switch))` in modes with `depth`, else K."""
    if mode not in ("depth", "depth+weight"):
        return count
    return min(count, 1 + math.floor(progress * count / switch + NEARLY))


def teacher_share(progress: float, end: float, mode: Mode) -> float:
    """λ(u): half a cosine from 1 to `end` in modes with `weight`, else `end` throughout."""
    if mode not in ("weight", "depth+weight"):
        return end
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def snapshot_at(progress: float, count: int, switch: float) -> int:
    """Which of `count` proxies teaches: each for as long, the last one from `switch` · (count - 1) / count on."""
    return min(count - 1, math.floor(progress * count / switch + NEARLY))


def depth_weights(count: int, schedule: StageWeights) -> list[float]:
    """ω_1 to ω_K, which sum to 1 [inferred], so that β means the same for any K."""
    if schedule == "last":
        return [0.0] * (count - 1) + [1.0]
    raw = [k + 1.0 if schedule == "rising" else 1.0 for k in range(count)]
    return [w / sum(raw) for w in raw]


def depths_of(count: int, intermediates: int) -> list[int]:
    """The 0-based intermediate maps that are compared, evenly spaced, the last one always among them."""
    count = min(count, intermediates)
    return [math.ceil((k + 1) * intermediates / count) - 1 for k in range(count)]


def feature_distance(own: Tensor, target: Tensor, kind: Distance) -> Tensor:
    """ℓ_k: how far rows [B, d] are from the proxy vectors [B, d]; 0 where they are the same.

    `cosine` is `1 - cos`. `mse` is the squared distance of the vectors at length 1, which is twice that: another β,
    kept to match a later reading of the paper. `similarity` is the KL divergence of each row's distribution over
    the other rows of the global batch, softmax(cos / 0.1), from the proxy's.
    """
    own, target = F.normalize(own.float(), dim=-1), F.normalize(target.float(), dim=-1)
    if kind == "cosine":
        return (1 - (own * target).sum(-1)).mean()
    if kind == "mse":
        return (own - target).square().sum(-1).mean()
    if len(own) < 3:  # fewer than two others: no distribution
        return own.sum() * 0.0
    with torch.autocast(own.device.type, enabled=False):  # the temperature makes ten of each step of half precision
        mine, theirs = (F.log_softmax(_others(x @ x.T) / SIMILARITY_TEMPERATURE, dim=-1) for x in (own, target))
        return F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def _others(square: Tensor) -> Tensor:
    """[B, B - 1] a matrix [B, B] without its diagonal."""
    count = len(square)  # a view: chosen by a mask, a GPU would have to tell how many are left
    return square.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)


class TDMRLearner(Learner):
    """Stage B: `L_B(u) = (1 - λ(u)) · CE + λ(u) · [β · Σ_{k<=K(u)} ω_k ℓ_k + γ · τ² KL(p ‖ student)]`.

    h_k is the mean over a map's raster and a linear map to d. (A 1×1 convolution before the mean would be a second
    linear map without anything between the two.) CE sees the rows with a label, the other terms every row. z and p are
    computed here, by the frozen P and W in evaluation mode, from the teacher's features of the very view that the
    student sees; P itself was fitted on view 0. With an input prompt the frozen teacher runs here as well.
    """

    def __init__(self, params: Mapping[str, Any], given: Given) -> None:
        super().__init__(params, given)
        self.student = given.student
        self.kind: Kind = given.kind
        self.params: Mapping[str, Any] = params
        self.live: Reprogrammed | None = None
        if params["prompt"]["pixels"] == 0:
            fitted = given.result(PROXY)
            wanted = range(len(fitted["epochs"])) if params["mode"] == "snapshot" else (-1,)
            self.proxies = nn.ModuleList(load_proxy(params["proxy"], fitted, i) for i in wanted)
        else:
            live = load_reprogrammed({**params["proxy"], **params["prompt"]}, given.result(PROMPT), given.teacher)
            self.live, self.proxies = live, nn.ModuleList([live.proxy])
        channels = intermediate_channels(self.student)
        self.maps = [Output("map", layer=i, grid=1) for i in params["layers"]]
        self.weights = depth_weights(len(self.maps), params["stage_weights"])
        self.adapters = nn.ModuleList(nn.Linear(channels[o.layer], params["proxy"]["dim"]) for o in self.maps)
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            adapter.requires_grad_(weight > 0)

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        assert batch.labels is not None
        share = teacher_share(progress, self.params["lambda_end"], self.params["mode"])
        if share == 0:
            ce = supervised_loss(self.student(batch.images), batch.labels, self.kind)
            return {"loss": ce, "ce": ce}
        own = read_outputs(self.student, batch.images, [*self.maps, SCORES])
        z, scores = self.targets(batch, progress)
        vectors = [h(own[o.key].flatten(1)) for h, o in zip(self.adapters, self.maps, strict=True)]
        return self.combine(own[SCORES.key], vectors, z, scores, batch.labels, progress)

    @torch.no_grad()
    def targets(self, batch: Batch, progress: float) -> tuple[Tensor, Tensor]:
        """z [B, d] and p [B, C] of the teacher's view of the batch, in float32 whatever the precision of training."""
        proxy = self.proxies[snapshot_at(progress, len(self.proxies), self.params["switch"])]
        assert isinstance(proxy, Proxy)
        if self.live is not None:
            assert batch.teacher_images is not None
            features = self.live.features(batch.teacher_images)
        else:
            features = batch.outputs[POOLED.key]
        with torch.autocast(features.device.type, enabled=False):
            z = proxy(features)
            scores = proxy.head(z)
            if self.params["prototypes"]:
                assert batch.labels is not None
                z = proxy.prototype(scores, batch.labels, self.kind)
        return z, scores

    def combine(
        self,
        logits: Tensor,
        vectors: list[Tensor],
        z: Tensor,
        scores: Tensor,
        labels: Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        """The loss of the student's logits [B, C] and of its K depths' vectors [B, d] towards z and p.

        A depth that is not yet compared is in no graph: its adapter gets no gradient.
        """
        mode, distance = self.params["mode"], self.params["distance"]
        share = teacher_share(progress, self.params["lambda_end"], mode)
        ce = supervised_loss(logits, labels, self.kind)
        kd = distillation_loss(logits, scores, self.params["temperature"], self.kind)
        feature = torch.zeros_like(kd)
        parts: dict[str, Tensor] = {}
        for k in range(active_depths(progress, len(vectors), self.params["switch"], mode)):
            if self.weights[k] == 0:
                continue
            mine, theirs = gathered(vectors[k]), gathered(z)
            one = feature_distance(mine, theirs, distance)
            if self.params["transport"] > 0:
                one = one + self.params["transport"] * transport_cost(mine, theirs)
            feature = feature + self.weights[k] * one
            parts[f"depth_{k + 1}"] = one
        loss = (1 - share) * ce + share * (self.params["beta"] * feature + self.params["gamma"] * kd)
        return {"loss": loss, "ce": ce, "kd": kd, "feature": feature, **parts}

    def deployed(self) -> Deployed:
        return Deployed(self.student.eval(), "student")  # adapters, P, W and the teacher stay behind

    def frozen(self) -> list[nn.Module]:
        return [self.proxies] if self.live is None else [self.proxies, self.live]


class TDMR(Method):
    """Task-driven model reprogramming, in our reading.

    Of the paper only the abstract could be read, so this is TDMR-style. Known [paper]: the teacher is not fine-tuned
    but reprogrammed, its knowledge projected into a proxy space; a target model of any architecture is then taught from
    that space by progressive distillation, on downstream data only. Ours [inferred]: everything inside the two stages.
    Stage A fits P and W on the frozen teacher's stored pooled features of the labelled images, and is shared by every
    trial with the same proxy knobs. Stage B trains the student on labels, proxy vectors at K depths and the proxy's
    class probabilities; what is active changes as it goes on (`mode`). Unlabelled images teach too.

    Options that the abstract neither confirms nor refutes: an input prompt, optimal transport, class means as proxies,
    and (not TDMR's, which claims its thrift from the untouched teacher) a teacher that is tuned first.
    """

    name = "tdmr"
    family = "remapping"
    paper = "Xu et al., Towards Efficient Task-Driven Model Reprogramming with Foundation Models, arXiv 2304.02263"
    Config = TDMRConfig
    deployed_size = "base"
    teacher_kinds = ("vit", "cnn", "clip", "other")

    @classmethod
    def refuses(cls, setting: Setting) -> str | None:
        student = setting.student
        if student is not None and student.intermediates == 0:
            return f"{cls.name} compares the student at several depths, and {student.name} gives no intermediate maps"
        return super().refuses(setting)

    @classmethod
    def invalid(cls, config: MethodConfig, setting: Setting) -> str | None:
        assert isinstance(config, TDMRConfig)
        assert setting.teacher is not None
        if config.input_prompt > 0:
            size, prompt = setting.teacher.image_size, f"input_prompt {config.input_prompt}"
            if config.teacher_tuning != NONE:
                return f"{prompt} runs the teacher as it comes, and teacher_tuning is {config.teacher_tuning!r}"
            if config.mode == "snapshot":
                return f"{prompt} trains one proxy, and mode 'snapshot' needs several"
            if config.prototypes:
                return f"{prompt} leaves no stored features, and prototypes are means of these"
            if config.prompt_kind == "padding" and 2 * config.input_prompt >= size:
                return f"{prompt} on both sides leaves nothing of the {size} pixels of {setting.teacher.name}"
        return tuning_refuses(config.teacher_tuning, setting)

    @classmethod
    def stages(cls, config: TDMRConfig, setting: Setting) -> list[Stage]:
        teacher, student = setting.teacher, setting.student
        assert teacher is not None
        assert student is not None
        proxy = {
            "dim": config.proxy_dim,
            "projector": config.projector,
            "normalise": config.normalise,
        }
        prompt = {"size": teacher.image_size, "pixels": config.input_prompt, "prompt_kind": config.prompt_kind}
        live = config.input_prompt > 0
        earlier: list[Stage] = []
        of = TEACHER
        if live:
            learned = {**proxy, **prompt, "width": teacher.width, "alpha": config.alpha}
            earlier = [prompt_stage(learned, config.proxy_lr, config.proxy_weight_decay)]
        else:
            if config.teacher_tuning != NONE:
                tuning = tunings()[config.teacher_tuning]
                earlier = tuning.stages(tuning.Config(), setting)
                of = earlier[-1].name
            fitted = {
                **proxy,
                "alpha": config.alpha,
                "lr": config.proxy_lr,
                "weight_decay": config.proxy_weight_decay,
                "epochs": config.proxy_epochs,
                "snapshots": config.snapshots,
            }
            earlier = [*earlier, proxy_stage(fitted, of)]
        terms = config.model_dump(
            include={
                "mode",
                "switch",
                "lambda_end",
                "beta",
                "gamma",
                "temperature",
                "stage_weights",
                "distance",
                "transport",
                "prototypes",
            },
            mode="json",
        )
        return [
            *earlier,
            TrainStage(
                name="distil",
                version=2,
                learner=TDMRLearner,
                params={
                    **terms,
                    "proxy": proxy,
                    "prompt": prompt,
                    "layers": depths_of(config.depths, student.intermediates),
                },
                feed=Feed(
                    images="all",
                    labels=True,
                    labelled_fraction=config.labelled_fraction,
                    outputs=() if live else (POOLED,),
                    of=of,
                    teacher_images=live,
                ),
                recipe=Recipe(lr=config.lr, weight_decay=config.weight_decay, budget=config.budget),
                trains="student",
                reads=("student", "teacher") if live else ("student",),
                inputs=(earlier[-1].name,),
                live_teacher=live,
            ),
        ]
