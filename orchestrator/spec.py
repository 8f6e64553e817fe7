"""The sweep file: its schema (pydantic, strict), reading it, and `--set` overrides.

The descriptions below are the documentation of the keys: `orchestrator check --keys` prints them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from orchestrator.errors import UserError, listed, nearest

PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Kind = Literal["classification", "multilabel", "segmentation"]
METRIC_NAMES: dict[Kind, str] = {
    "classification": "accuracy",
    "multilabel": "mean AUROC",
    "segmentation": "mIoU",
}
STUDY_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
METRICS: dict[str, Literal["max", "min"]] = {
    "val_metric": "max",
    "params_total": "min",
    "params_trained": "min",
    "flops": "min",
    "latency_ms": "min",
    "memory_mb": "min",
    "model_mb": "min",
    "device_seconds": "min",
}
UNITS: dict[str, str] = {
    "flops": "",
    "latency_ms": " ms",
    "memory_mb": " MB",
    "model_mb": " MB",
    "device_seconds": " s",
}


LATENCY = "latency_ms"  # on the first profile; on another one `latency_ms_NAME`


def is_metric(name: str) -> bool:
    """Whether a sweep may have such a metric."""
    return name in METRICS or name.startswith(f"{LATENCY}_")


def better(metric: str) -> Literal["max", "min"]:
    """What is better for a metric."""
    return METRICS[LATENCY if metric.startswith(LATENCY) else metric]


def latency_column(metric: str, what: Literal["iqr", "low", "high", "setup"]) -> str:
    """The column beside a latency: `latency_iqr_ms_edge` of `latency_ms_edge`."""
    return metric.replace(LATENCY, "latency_setup" if what == "setup" else f"latency_{what}_ms", 1)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everybody expects; PyYAML's own rule wants `1.0e-3`."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class Splits(Section):
    """How images without a ready-made split are divided."""

    val: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the images kept for choosing (the search sees it)."
    )
    test: float = Field(default=0.2, gt=0, lt=1, description="Share of the images read once, for the chosen student.")

    @model_validator(mode="after")
    def _leaves_something(self) -> Splits:
        if self.val + self.test >= 0.95:
            raise ValueError(f"val + test = {self.val + self.test:g} leaves no images for training; at most 0.95")
        return self


class Task(Section):
    """The user's data."""

    data: str = Field(
        description="`packaged/clipart`, `packaged/icons`, `folder:PATH` or `parquet:PATH`, with or without "
        "train/val/test. A folder has one subfolder a class; multilabel: a labels.csv (file,labels; labels separated "
        "by ;); segmentation: images/ and masks/ (the same name, PNG of class indices). Parquet has the columns image "
        "and label, or mask."
    )
    kind: Kind = Field(
        default="classification",
        description="One class an image (val_metric is the accuracy), several or none (multilabel: mean area under the "
        "ROC curve), or one a pixel (segmentation: mean intersection over union, mIoU).",
    )
    decoder: Literal["linear", "conv"] = Field(
        default="linear",
        description="Segmentation: what turns the network's tokens or map into classes: batch norm and a linear map, "
        "or four stages of convolutions.",
    )
    ignore_index: int = Field(
        default=255, ge=0, le=255, description="Segmentation: the value of a mask's pixels that do not count."
    )
    shots: int | None = Field(
        default=20,
        ge=1,
        description="Labelled images a class; null labels all of them. Multilabel and segmentation: images in which "
        "the class occurs, as many as there are; images without any class count as one more.",
    )
    unlabelled: bool = Field(default=True, description="Whether the other training images are used without labels.")
    splits: Splits = Field(default_factory=Splits, description="Shares, where the data brings no split of its own.")
    seed: int = Field(
        default=0, ge=0, description="Draws the split and the labelled images; another seed, another draw."
    )
    names: dict[str, str] = Field(
        default_factory=dict,
        description="Words for classes whose labels are none, as in {n01440764: tench}; for prompts.",
    )
    templates: list[str] = Field(
        default=["{}", "a picture of a {}", "an image of the {}", "a drawing of a {}", "an icon of a {}"],
        min_length=1,
        description="Sentences with {} for a class's words; a class is the mean of its sentences' embeddings.",
    )
    draw: int = Field(
        default=0,
        ge=0,
        description="Which draw of the labelled images, in the same split; `search.repeats` counts it up.",
    )

    @field_validator("data")
    @classmethod
    def _known_source(cls, value: str) -> str:
        kind, _, rest = value.partition(":")
        if value.startswith("packaged/") or (kind in ("folder", "parquet") and rest):
            return value
        raise ValueError(f"{value!r} is not a data source; allowed: packaged/clipart, folder:PATH, parquet:PATH")

    @field_validator("templates")
    @classmethod
    def _with_a_gap(cls, value: list[str]) -> list[str]:
        for template in value:
            if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
                raise ValueError(f"{template!r} is no template: it needs {{}} once, where a class's words go")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        for key in ("decoder", "ignore_index"):
            if self.kind != "segmentation" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {getattr(self, key)} is for segmentation only, and kind is {self.kind}")
        if self.data.startswith("packaged/") and self.kind != "classification":
            raise ValueError(f"kind: {self.kind} does not fit {self.data!r}, which has one class an image")
        return self


class Model(Section):
    """A teacher or a student by name; a plain string stands for `{model: STRING}`."""

    model: str = Field(
        description="`timm/NAME[.TAG]`, `open_clip/NAME[:TAG]`, `packaged/NAME`, or `local:PATH` (safetensors, or .pth "
        "read safely; of open_clip also a folder with an open_clip_config.json)."
    )
    pretrained: bool | None = Field(
        default=None,
        description="Load pre-trained weights (timm: from the hub). Null: yes for a teacher, no for a timm student.",
    )
    architecture: str | None = Field(
        default=None, description="For a `local:` file: the `timm/NAME` or `open_clip/NAME` that its weights fit."
    )
    image_size: int | None = Field(
        default=None, ge=16, le=2048, description="Side of the input in pixels; null: its own."
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further constructor arguments, as timm names them."
    )

    @field_validator("model")
    @classmethod
    def _known_prefix(cls, value: str) -> str:
        if value.startswith(("timm/", "open_clip/", "local:", "packaged/")) and len(value.split("/", 1)[-1]):
            return value
        raise ValueError(f"{value!r} is not a model; allowed: timm/NAME, open_clip/NAME, local:PATH, packaged/NAME")


def _as_model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


ModelEntry = Annotated[Model, BeforeValidator(_as_model)]


class Objective(Section):
    """One objective; a plain string stands for `{metric: STRING}`."""

    metric: str = Field(default="val_metric", description=f"One of {listed(METRICS)}, or latency_ms_PROFILE.")
    mode: Literal["max", "min"] | None = Field(default=None, description="Null: what is better for that metric.")

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if not is_metric(value):
            raise ValueError(f"unknown metric {value!r}; allowed: {listed(METRICS)}.{nearest(value, METRICS)}")
        return value

    @property
    def direction(self) -> Literal["max", "min"]:
        return self.mode or better(self.metric)


def _as_objective(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


class Limits(Section):
    """What the chosen student must keep; what does not is `infeasible`. Found out before training where that can be."""

    val_metric: float | None = Field(default=None, ge=0, le=1, description="At least this.")
    params_total: float | None = Field(default=None, gt=0, description="At most this many parameters.")
    params_trained: float | None = Field(default=None, gt=0, description="At most this many trained parameters.")
    flops: float | None = Field(default=None, gt=0, description="At most this many FLOPs an image, 2 a multiply-add.")
    latency_ms: float | None = Field(default=None, gt=0, description="At most this median latency; see `latency`.")
    latency: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="By further profile of `latency`, at most this median latency, ms; or each as latency_ms_PROFILE.",
    )
    memory_mb: float | None = Field(
        default=None,
        gt=0,
        description="At most this peak memory of a forward pass on one image, MB (1e6 bytes): weights, input and "
        "activations, without what kernels need for themselves.",
    )
    model_mb: float | None = Field(default=None, gt=0, description="At most this size of the weights' file, MB.")
    device_seconds: float | None = Field(
        default=None, gt=0, description="At most this many device-seconds of the trial; known afterwards only."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_metric_too(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = {k: v for k, v in value.items() if isinstance(k, str) and k.startswith(f"{LATENCY}_")}
        others = {k: v for k, v in value.items() if k not in named}
        given = others.get("latency")
        if not named or not isinstance(given, Mapping | None):
            return value
        return others | {"latency": {**(given or {}), **{k.removeprefix(f"{LATENCY}_"): v for k, v in named.items()}}}

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by metric."""
        named = {name: value for name, value in self if value is not None and name != "latency"}
        return named | {f"{LATENCY}_{profile}": value for profile, value in self.latency.items()}

    def excess(self, facts: Mapping[str, Any]) -> dict[str, float]:
        """By how much each limit is exceeded, as a share of it; not above 0 where it is kept.

        Args:
            facts: a trial's row, or a part of it; what is missing or not finite is left out.
        """
        found: dict[str, float] = {}
        for name, limit in self.given.items():
            value = facts.get(name)
            if value is None or not math.isfinite(float(value)):
                continue
            over = limit - float(value) if better(name) == "max" else float(value) - limit
            found[name] = over / limit if limit else over
        return found

    def broken(self, facts: Mapping[str, Any]) -> str:
        """A clause that names the limits which `facts` exceed, each with what was found; empty if none is."""
        parts = [
            f"{name} {shown(name, float(facts[name]))} is {'below' if better(name) == 'max' else 'above'} "
            f"limits.{name}: {shown(name, self.given[name])}{_noise(name, self.given[name], facts)}"
            for name, over in self.excess(facts).items()
            if over > 0
        ]
        return listed(parts) if parts else ""


def near_limits(given: Mapping[str, float], facts: Mapping[str, Any]) -> list[str]:
    """A sentence for each latency that is kept, but nearer to its limit than it could be measured.

    Args:
        given: limits by metric.
        facts: a trial's row.
    """
    return [
        f"{name} {shown(name, float(facts[name]))} keeps the limit of {shown(name, limit)}{noise}."
        for name, limit in given.items()
        if (noise := _noise(name, limit, facts)) and float(facts[name]) <= limit
    ]


def _noise(metric: str, limit: float, facts: Mapping[str, Any]) -> str:
    """A clause where a limit lies within what repeated measurements of a latency gave."""
    if not metric.startswith(LATENCY):
        return ""
    low, high = (float(facts.get(latency_column(metric, end), math.nan)) for end in ("low", "high"))  # type: ignore[arg-type]
    if not low <= limit <= high:
        return ""
    return f", within the noise of its measurement ({shown(metric, low)} to {shown(metric, high)})"


def shown(metric: str, value: float) -> str:
    """A metric's value with its unit: `1,234,567`, `4.56 ms`."""
    text = f"{value:,.0f}" if value.is_integer() or abs(value) >= 1e4 else f"{value:.4g}"
    return text + UNITS.get(LATENCY if metric.startswith(LATENCY) else metric, "")


class Latency(Section):
    """A profile of a device on which latency is measured; a limit or an objective of latency_ms means the first one."""

    profile: str = Field(
        default="",
        max_length=40,
        description="Its name, shown beside every latency. Of several, each but the first needs one of letters, "
        "digits, _ and -: its latency is the metric latency_ms_PROFILE.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: where the trial trains.")
    threads: int | None = Field(default=None, ge=1, description="Threads while measuring; null: `train.threads`.")
    batch: int = Field(default=1, ge=1, description="Images in each timed pass.")
    runtime: Literal["torch", "onnxruntime"] = Field(
        default="torch", description="What runs the student: the network itself, or what `export --format onnx` writes."
    )
    min_run_s: float = Field(default=0.5, gt=0, le=60, description="Seconds of timed passes, at least.")

    @model_validator(mode="after")
    def _onnx_on_cpu(self) -> Latency:
        if self.runtime == "onnxruntime" and self.device == "cuda":
            raise ValueError("runtime: onnxruntime measures on the CPU, and device is cuda; use cpu or auto")
        return self


def _one_or_several(value: Any) -> str:
    return "tagged-several" if isinstance(value, list) else "tagged-one"


Profiles = Annotated[
    Annotated[Latency, Tag("tagged-one")] | Annotated[list[Latency], Tag("tagged-several"), Field(min_length=1)],
    Discriminator(_one_or_several),
]


class Start(Section):
    """A configuration that is tried first."""

    method: str = Field(description="One of `methods`.")
    teacher: int | None = Field(default=None, ge=0, description="Its position in `teachers`, from 0; null: none.")
    student: int | None = Field(default=None, ge=0, description="Its position in `students`, from 0; null: none.")
    knobs: dict[str, Any] = Field(default_factory=dict, description="Values of its knobs; the others are drawn.")


class Search(Section):
    """How trials are proposed and stopped."""

    begin: list[Start] = Field(default_factory=list, description="Configurations that are tried before all others.")
    warm_start: str | None = Field(
        default=None,
        description="Folder of an earlier sweep on the same task with the same objectives and training budget: the "
        "search learns from those of its trials that this space allows, too.",
    )

    trials: int = Field(default=20, ge=1, description="Trials in all, the first ones (see `defaults_first`) included.")
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe", description="Optuna's TPE, random, or every combination."
    )
    defaults_first: bool = Field(
        default=True,
        description="Begin with each method at its default knobs, once for every teacher and student it can serve.",
    )
    scheduler: Literal["asha", "median", "none"] = Field(default="none", description="Early stopping of weak trials.")
    grace: float = Field(
        default=0.25, gt=0, lt=1, description="Share of its budget that a trial gets before it may stop."
    )
    reduction: int = Field(default=3, ge=2, le=10, description="ASHA keeps one in this many at each rung.")
    concurrency: int | None = Field(
        default=None, ge=1, description="Trials at a time; null: as many as the devices allow."
    )
    reproducible: bool = Field(
        default=True,
        description="Propose each trial from a fixed set of earlier results, so that the same file and seed propose "
        "the same trials whatever finishes first. False lets every free slot be filled at once.",
    )
    time_budget_s: float | None = Field(default=None, gt=0, description="No new trial after this many seconds.")
    device_hours: float | None = Field(
        default=None,
        gt=0,
        description="No new trial that would go over these device-hours; counted is what trials hold, failed ones too.",
    )
    budget: float | None = Field(
        default=None, gt=0, description="The same in money, by `cluster.prices`, in their currency."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sampler and of every trial.")
    repeats: int = Field(
        default=1,
        ge=1,
        le=20,
        description="Runs of each trial, with other labelled images and another seed: rows and search get the mean.",
    )
    study: str = Field(
        default="journal",
        description="Where Optuna's study lies: journal or sqlite (a file in the sweep's folder), postgresql, or "
        "postgresql://[USER@]HOST[:PORT]/DATABASE. What opens the database comes from the environment of the driver "
        "(ORCHESTRATOR_STUDY_URL, or libpq's PGHOST, PGUSER, PGPASSFILE, ...) or from `study_file`, never from here.",
    )
    study_file: str | None = Field(
        default=None, description="A file, such as a mounted secret, with the database's address and password."
    )
    study_patience_s: float = Field(
        default=300.0, ge=0, description="A lost database is tried again for so long; then the sweep ends, resumable."
    )

    @field_validator("study")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        scheme, there, rest = value.partition("://")
        if not there and value in ("journal", "sqlite", "postgresql"):
            return value
        if not there or scheme not in STUDY_SCHEMES:
            raise ValueError(
                "study is none of journal, sqlite, postgresql and postgresql://[USER@]HOST[:PORT]/DATABASE"
            )
        user, at, _ = rest.rpartition("@")
        if (at and ":" in user) or "password" in rest.partition("?")[2].lower():
            raise ValueError(
                "study holds a password, which would be copied into the sweep's folder: take it out, and give the "
                "whole address in the variable ORCHESTRATOR_STUDY_URL or in a file that study_file names"
            )
        return value.replace(scheme, "postgresql", 1)

    @model_validator(mode="after")
    def _file_of_a_database(self) -> Search:
        if self.study_file is not None and not self.study.startswith("postgresql"):
            raise ValueError(f"study_file is for study: postgresql, and study is {self.study}")
        return self


class Train(Section):
    """The budget that all methods share."""

    steps: int | None = Field(default=None, ge=1, description="Optimizer steps of a trial's budget; or give `epochs`.")
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Instead of steps: passes over the training images, or over the corpus that is streamed.",
    )
    batch: int = Field(default=64, ge=2, description="Global batch size, over all workers.")
    views: int = Field(
        default=4, ge=1, le=1000, description="Stored augmented views an image; view 0 is the plain image."
    )
    fresh: bool = Field(
        default=False,
        description="Draw a new view every epoch instead: the teacher runs live, and its row shows the cost.",
    )
    crop_scale: float = Field(default=0.35, gt=0, le=1, description="Smallest share of the image that a view may crop.")
    color: float = Field(default=0.0, ge=0, le=1, description="Strength of brightness, contrast and saturation jitter.")
    workers: int = Field(default=1, ge=1, description="Processes a trial; more than one trains under DDP (Ray Train).")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Elastic workers: where there is no room for `workers`, at the start or after a node was lost, a "
        "trial trains on the most that divide `workers`, and not on fewer than these. The global batch stays.",
    )
    wait_s: float = Field(
        default=60.0, gt=0, description="With min_workers: seconds to wait for workers before fewer are tried."
    )
    idle_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that a trial process keeps its workers, and their devices, for the next stage or trial.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where the cluster has one.")
    gpus_per_worker: float = Field(default=1.0, gt=0, description="A fraction puts several trials on one GPU.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="Autocast precision of training.")
    threads: int = Field(default=1, ge=1, description="Torch threads of each trial process; also the CPUs it reserves.")
    accumulate: int = Field(
        default=1,
        ge=1,
        description="Micro batches that a worker's part of a batch is cut into: less memory, more time. Losses that "
        "relate rows, and batch norm, see those of a micro batch (of all workers).",
    )
    oom_retry: bool = Field(
        default=False,
        description="Try a training stage that runs out of device memory once more, with micro batches half as large.",
    )
    checkpoint_s: float = Field(default=30.0, gt=0, description="Seconds between checkpoints of a training stage.")
    checkpoint_steps: int | None = Field(default=None, ge=1, description="Also after every so many optimizer steps.")
    sync_batchnorm: bool = Field(default=True, description="With several workers: batch norm over the global batch.")

    @model_validator(mode="after")
    def _one_budget(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps: {self.steps} and epochs: {self.epochs:g} are both given; give one of them")
        if self.batch % self.workers:
            raise ValueError(f"batch: {self.batch} is not divisible by workers: {self.workers}")
        if self.batch % (self.workers * self.accumulate):
            parts = f"workers: {self.workers} x accumulate: {self.accumulate}"
            raise ValueError(f"batch: {self.batch} is not divisible by {parts}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers: {self.workers}")
        if self.fewest < self.workers and not self.sync_batchnorm:
            raise ValueError(
                f"min_workers: {self.min_workers} and sync_batchnorm: false: batch norm over each worker's own rows "
                "would depend on their number"
            )
        return self

    @property
    def fewest(self) -> int:
        """Workers that a trial must have."""
        return self.min_workers or self.workers

    def total_steps(self, images: int) -> int:
        """Optimizer steps of a whole budget, for `images` training images."""
        if self.epochs is not None:
            return max(1, round(self.epochs * images / self.batch))
        return self.steps if self.steps is not None else 1000


class Upstream(Section):
    """Generators that were trained on upstream images, by whoever had these."""

    vq: str | None = Field(
        default=None,
        description="VQ model and latent transformer: `packaged/vq_clipart`, or `local:FOLDER` of `store prime`.",
    )
    diffusion: str | None = Field(default=None, description="A diffusion model: `local:FOLDER` of `store prime`.")
    pipeline: str | dict[str, Any] | None = Field(
        default=None, description="A diffusers pipeline by hub id or folder, or `{model: ID, ...}` with its options."
    )

    @property
    def given(self) -> tuple[str, ...]:
        """Which of them there are."""
        return tuple(name for name in Upstream.model_fields if getattr(self, name) is not None)


class Generate(Section):
    """The actors that generate images (Ray Data)."""

    actors: int = Field(default=1, ge=1, le=1024, description="At most this many generate at the same time.")
    cpus: float = Field(default=0.0, ge=0, description="CPUs that each reserves; 0 shares those of its trial.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that each reserves; leave as many free of trials.")


class Expect(Section):
    """A corpus that is not on this machine yet, as it is expected to be."""

    images: int = Field(default=0, ge=0, description="Images; 0: must be here.")
    image_bytes: int = Field(
        default=20_000,
        ge=1,
        description="Mean size of an encoded image; 20 kB is 224 to 256 px at quality 90, roughly.",
    )
    captions: int = Field(default=0, ge=0, description="How many of the images have a caption.")
    sentences: int = Field(default=0, ge=0, description="Sentences; 0: must be here.")
    sentence_bytes: int = Field(default=80, ge=1, description="Mean size of a stored sentence with its id.")


class Corpus(Section):
    """Images and sentences beyond the task's own, for the methods that learn from unpaired ones."""

    images: str | None = Field(
        default=None,
        description="A folder or address that `corpus build` wrote, or `packaged/icons/images`; null: the training "
        "images of the task.",
    )
    sentences: str | None = Field(
        default=None, description="The same of sentences, or `packaged/icons/sentences`; null: none."
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="Type in which the teacher's embeddings of the corpus are stored."
    )
    actors: int = Field(default=1, ge=1, le=4096, description="At most this many actors embed at the same time.")
    min_actors: int = Field(default=1, ge=1, le=4096, description="At least this many are kept while there is work.")
    cpus: float = Field(default=0.0, ge=0, description="CPUs that each actor reserves; 0 shares those of its trial.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that each actor reserves.")
    window: int = Field(
        default=4096,
        ge=1,
        description="Images among which the stream is shuffled; each worker holds so many in memory, decoded.",
    )
    memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="What each worker's stream may take, GB: the window, batches, and blocks that are decoded ahead. "
        "Null: a quarter of its machine's memory, divided by the workers that its CPUs allow (`train.threads` each).",
    )
    readers: int = Field(
        default=2, ge=0, le=1024, description="Ray Data tasks that decode ahead for each worker; 0: its own threads."
    )

    expect: Expect = Field(
        default_factory=Expect,
        description="What the folders will hold, where they are not here: `check` reckons with it and says so. A sweep "
        "refuses a folder that is not here.",
    )

    def streams(self, images: str) -> bool:
        """Whether a feed's `images` come from here; without a corpus they are the training images."""
        return images == "corpus" and self.images is not None

    @model_validator(mode="after")
    def _ordered(self) -> Corpus:
        if self.min_actors > self.actors:
            raise ValueError(f"min_actors: {self.min_actors} is more than actors: {self.actors}")
        return self


class Estimate(Section):
    """The machines for which `check` reckons a sweep with a corpus; nothing else reads this."""

    nodes: int = Field(default=1, ge=1, description="Nodes that embed and train.")
    gpus: int = Field(default=8, ge=1, description="GPUs of a node.")
    tflops: float = Field(
        default=312.0, gt=0, description="Peak of a GPU, TFLOP/s in 16 bits, as its maker states it; 312 is an A100's."
    )
    utilisation: float = Field(
        default=0.35, gt=0, le=1, description="Share of the peak that is reached; 0.35 is assumed, not measured."
    )
    cores: int = Field(default=96, ge=1, description="CPU cores of a node, for decoding.")
    decode: float = Field(
        default=150.0,
        gt=0,
        description="Images that a core decodes and renders in a second; 150 is assumed, low for images of 256 px.",
    )
    read_gb_s: float = Field(
        default=1.0, gt=0, description="GB that a node reads from the shared storage in a second; assumed."
    )
    memory_gb: float = Field(default=512.0, gt=0, description="Memory of a node.")


class StoreLimits(Section):
    """The shared store, and its limits."""

    remote: str | None = Field(
        default=None,
        description="Object storage for the store, such as s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, with ?region=... "
        "or ?endpoint_override=HOST:PORT&scheme=https; null: the folder `store` below `storage`. Keys come from the "
        "environment or the machine. Each node keeps copies in $ORCHESTRATOR_CACHE.",
    )
    max_gb: float | None = Field(
        default=None, gt=0, description="`store gc` shrinks the store to this; null: no limit."
    )
    min_free_gb: float = Field(default=0.5, ge=0, description="A stage is refused where it would leave less free disk.")
    pixels_gb: float = Field(default=4.0, ge=0, description="Rendered views are stored if they take at most this much.")

    @field_validator("remote")
    @classmethod
    def _an_address_without_secrets(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, there, rest = value.partition("://")
        if not there or scheme not in ("s3", "gs", "gcs", "file") or not rest.strip("/"):
            raise ValueError("remote is no address of the form s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH")
        place, _, query = rest.partition("?")
        user, at, _ = place.partition("/")[0].rpartition("@")
        if (at and user != "anonymous") or any(word in query.lower() for word in ("secret", "password", "token")):
            raise ValueError(
                "remote holds a key, which would be copied into the sweep's folder: take it out, and give it in the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or by the "
                "machine's role"
            )
        if ".." in place.split("/"):
            raise ValueError("remote leads out of its bucket with '..'")
        return value


class NodeType(Section):
    """Nodes of one kind."""

    max: int = Field(ge=0, description="At most this many at a time.")
    resources: dict[str, float] = Field(description="What Ray sees of one: CPU, GPU, memory (bytes), own resources.")


class Cluster(Section):
    """The cluster that a sweep runs on; a machine alone needs none of this."""

    file: str | None = Field(
        default=None,
        description="The file that the cluster was made from (Ray's launcher, a RayCluster or RayJob): its limits say "
        "how far a sweep may make it grow. Read when the sweep starts; then `nodes` holds them.",
    )
    nodes: dict[str, NodeType] = Field(default_factory=dict, description="Node types by name; instead of `file`.")
    prices: dict[str, float] = Field(
        default_factory=dict,
        description="Price of an hour of a node, by node type; `orchestrator cost` reckons by them.",
    )

    @field_validator("prices")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        for name, price in value.items():
            if price < 0:
                raise ValueError(f"the price of {name!r} is {price:g}; a price is 0 or more")
        return value

    @model_validator(mode="after")
    def _prices_of_something(self) -> Cluster:
        if self.prices and self.file is None and not self.nodes:
            raise ValueError("prices are for node types, and there are none; give file or nodes")
        return self


Knob = Any


class SweepSpec(Section):
    """A sweep file."""

    name: str = Field(description="The sweep's folder below `storage`: letters, digits, `.`, `_`, `-`; at most 64.")
    task: Task = Field(description="The user's data.")
    teachers: list[ModelEntry] = Field(default_factory=list, description="Frozen pre-trained networks; searched.")
    students: list[ModelEntry] = Field(default_factory=list, description="Networks that may be deployed; searched.")
    methods: dict[str, dict[str, Knob]] = Field(
        min_length=1,
        description="Method name -> its knobs: a fixed value, a list to choose from, or {low, high, log, int}. "
        "An empty mapping means the method's own default space. `orchestrator methods` lists them.",
    )
    upstream: Upstream = Field(default_factory=Upstream, description="Generators trained on upstream images.")
    objectives: list[Annotated[Objective, BeforeValidator(_as_objective)]] = Field(
        default_factory=lambda: [Objective()],
        min_length=1,
        description="One or several; the first ranks the leaderboard.",
    )
    limits: Limits = Field(default_factory=Limits, description="What the chosen student must keep.")
    latency: Profiles = Field(
        default_factory=Latency, description="The profile on which latency is measured, or a list of several."
    )
    search: Search = Field(default_factory=Search, description="How trials are proposed and stopped.")
    train: Train = Field(default_factory=Train, description="The budget that all methods share.")
    generate: Generate = Field(default_factory=Generate, description="The actors that generate images.")
    corpus: Corpus = Field(default_factory=Corpus, description="Images and sentences beyond the task's own.")
    estimate: Estimate = Field(default_factory=Estimate, description="Machines for the estimate that `check` prints.")
    store: StoreLimits = Field(default_factory=StoreLimits, description="The shared store, and its limits.")
    cluster: Cluster = Field(default_factory=Cluster, description="The cluster's limits and prices.")
    storage: str = Field(default="runs", description="Folder for sweeps and the store; a shared one on a cluster.")

    @field_validator("name")
    @classmethod
    def _short_name(cls, value: str) -> str:
        if value == "store" or not NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} cannot name a folder; allowed: letters, digits, '.', '_', '-', at most 64, not 'store'"
            )
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _distinct_objectives(self) -> SweepSpec:
        metrics = [o.metric for o in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objectives name {listed(metrics)}: each metric once")
        if len(metrics) > 1 and self.search.scheduler != "none":
            raise ValueError(
                f"search.scheduler: {self.search.scheduler} stops by one metric and cannot serve "
                f"{len(metrics)} objectives; use none"
            )
        return self

    @model_validator(mode="after")
    def _profiles_of_latency(self) -> SweepSpec:
        profiles = [self.latency] if isinstance(self.latency, Latency) else self.latency
        names = [profile.profile for profile in profiles]
        for at, name in enumerate(names[1:], 1):
            if not PROFILE.fullmatch(name):
                raise ValueError(
                    f"latency.{at}.profile: {name!r} cannot name a column; of several profiles, each but the first "
                    "needs a name of letters, digits, '_' and '-'"
                )
            if name in names[:at]:
                raise ValueError(f"latency.{at}.profile: {name!r} is the name of two profiles")
        for key, metrics in (("objectives", [o.metric for o in self.objectives]), ("limits", list(self.limits.given))):
            for metric in metrics:
                if metric.startswith(f"{LATENCY}_") and metric not in self.latencies:
                    raise ValueError(
                        f"{key}: {metric} is of no profile of latency; the latencies are {listed(self.latencies)}."
                        f"{nearest(metric, self.latencies)}"
                    )
        return self

    @property
    def latencies(self) -> dict[str, Latency]:
        """The profiles on which latency is measured, by metric: `latency_ms` is the first one."""
        profiles = [self.latency] if isinstance(self.latency, Latency) else self.latency
        return {LATENCY: profiles[0]} | {f"{LATENCY}_{profile.profile}": profile for profile in profiles[1:]}

    @model_validator(mode="after")
    def _budget_has_prices(self) -> SweepSpec:
        if self.search.budget is not None and not any(self.cluster.prices.values()):
            raise ValueError(f"search.budget: {self.search.budget:g} needs cluster.prices, and there are none")
        return self

    @model_validator(mode="after")
    def _elastic_reads_no_stream(self) -> SweepSpec:
        train = self.train
        if self.corpus.images is not None and train.fewest < train.workers:
            raise ValueError(
                f"train.min_workers: {train.min_workers} and corpus.images are both given; each worker of a streamed "
                "corpus has a stream of its own, so their number must stay: leave min_workers out"
            )
        return self

    @property
    def store_address(self) -> str:
        """Where the store lies: an address, or a folder."""
        return self.store.remote or str(Path(self.storage) / "store")

    def to_yaml(self) -> str:
        """The whole file with every default written out; reading it gives an equal spec."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def read_mapping(path: Path, what: str, hint: str = "") -> dict[str, Any]:
    """The keys of a YAML file that a person wrote.

    Args:
        path: of the file.
        what: it is called in errors.
        hint: how to go on where it is empty.

    Raises:
        UserError: if the file is missing, is not YAML, is empty, or holds no mapping.
    """
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"There is no {what} {str(path)!r}.{nearest(path.name, known)}") from None
    except IsADirectoryError:
        raise UserError(f"The {what} {str(path)!r} is a folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The {what} {str(path)!r} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"The {what} {str(path)!r} is not valid YAML{where}: {problem}.") from None
    if raw is None:
        raise UserError(f"The {what} {str(path)!r} is empty{hint}.")
    if not isinstance(raw, dict):
        raise UserError(f"The {what} {str(path)!r} holds a {type(raw).__name__}, not a mapping of keys.")
    return raw


def read_spec(path: str | Path, overrides: list[str] | None = None) -> SweepSpec:
    """Reads a sweep file and applies `key.path=value` overrides (values are YAML).

    Raises:
        UserError: if the file is missing, is not YAML, or does not fit the schema.
    """
    raw = read_mapping(Path(path), "sweep file", "; `orchestrator check --keys` prints its keys")
    for override in overrides or []:
        _override(raw, override)
    return parse_spec(raw, str(path))


def parse_spec(raw: dict[str, Any], where: str = "the sweep file") -> SweepSpec:
    """Validates a mapping; `where` names it in errors."""
    try:
        return SweepSpec.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, SweepSpec, where)) from None


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The values of `key=value` pairs by key, read as in a sweep file."""
    raw: dict[str, Any] = {}
    for override in overrides:
        _override(raw, override)
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r} is not of the form key.path=value.")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"--set {path}: {text!r} is not a YAML value.") from None
    node: Any = raw
    *parents, last = path.split(".")
    for i, key in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, key, path)]
        else:
            if key not in node or node[key] is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise UserError(f"--set {path}: {'.'.join(parents[: i + 1])} is {node!r}, which has no keys below it.")
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    else:
        node[last] = value


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"--set {path}: {key!r} is not a position in a list of {len(node)} (0 to {len(node) - 1}).")
    return int(key)


def explain(error: ValidationError, schema: type[BaseModel], where: str) -> str:
    """The first problem of a pydantic error as one sentence with the key, what was found, and the nearest key."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "missing":  # most often another key's misspelling, which says more
        problem = next((p for p in problems if p["type"] == "extra_forbidden"), problem)
    more = len(problems) - 1
    tail = f" ({more} more problem{'s' if more > 1 else ''} after this one.)" if more else ""
    loc = [part for part in problem["loc"] if not str(part).startswith(("function-", "constrained-", "tagged-"))]
    key = ".".join(str(part) for part in loc)
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _keys_at(schema, loc[:-1])
        return f"Unknown key {key!r} in {where}; allowed here: {listed(known)}.{nearest(str(loc[-1]), known)}{tail}"
    if kind == "missing":
        return f"The key {key!r} is missing in {where}.{tail}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if kind == "value_error" else f"; found {_shown(found)}"
    prefix = f"{key}: " if key else ""
    end = "" if message.endswith(("?", ".")) and not shown else "."
    if kind != "value_error":
        message = message[0].lower() + message[1:]
    return f"In {where}, {prefix}{message}{shown}{end}{tail}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(schema: type[BaseModel], loc: list[Any]) -> list[str]:
    """Names of the keys of the section that `loc` leads to."""
    current: Any = schema
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        current = _section_of(field.annotation) if field is not None else None
        if current is None:
            return []
    return list(current.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        section = _section_of(argument)
        if section is not None:
            return section
    return None


def documented_keys(section: type[BaseModel] = SweepSpec, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key of the sweep file: (dotted key, default as YAML or `required`, description)."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        kind = str(field.annotation)
        many = "[]" if "list" in kind else ".NAME" if "dict" in kind else ""
        key = f"{prefix}{name}{many if inner is not None else ''}"
        if inner is not None:
            rows.append((key, "required" if field.is_required() else "", field.description or ""))
            rows += documented_keys(inner, f"{key}.")
            continue
        default = "required" if field.is_required() else yaml.safe_dump(field.get_default(call_default_factory=True))
        rows.append((key, default.replace("...", "").strip(), field.description or ""))
    return rows
