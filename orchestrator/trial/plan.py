"""From a configuration to its cell (method, teacher, student) and the addresses of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from pydantic import ValidationError

from methods import discover
from methods.contract import TEACHER, FitStage, ImageStage, Method, Setting, Stage, TaskInfo, Texts, TrainStage
from methods.knobs import MethodConfig
from orchestrator.data.corpus import corpus_at
from orchestrator.data.embed import kinds_of_texts, text_tower_of, texts_identity
from orchestrator.data.task import TaskData
from orchestrator.data.views import Policy
from orchestrator.errors import UserError
from orchestrator.models.load import describe, load_network, plan_network
from orchestrator.spec import Model, SweepSpec, check_method, explain
from orchestrator.train.job import pool_batch


@dataclass(frozen=True)
class Cell:
    """One method with one teacher and one student of the sweep file (None where it has none)."""

    method: str
    teacher: int | None
    student: int | None


@dataclass(frozen=True)
class TrialConfig:
    """One resolved configuration: what a trial is. Plain and picklable."""

    trial_id: str
    number: int
    cell: Cell
    knobs: dict[str, Any]
    seed: int

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> TrialConfig:
        raw = json.loads(text)
        return TrialConfig(**{**raw, "cell": Cell(**raw["cell"])})


def same_key(cell: Cell, knobs: Mapping[str, Any]) -> str:
    """What equal configurations have in common, whether a file or a field's default wrote the number: 4 is 4.0."""
    plain = {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in knobs.items()}
    return json.dumps([cell.method, cell.teacher, cell.student, plain], sort_keys=True)


def method_named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UserError: naming the nearest one.
    """
    known = discover()
    check_method(name, known)
    return known[name]


def setting_of(spec: SweepSpec, task: TaskInfo, cell: Cell) -> Setting:
    """What planning may know of a cell."""
    teacher = plan_network(spec.teachers[cell.teacher], "teacher")[0] if cell.teacher is not None else None
    student = plan_network(spec.students[cell.student], "student")[0] if cell.student is not None else None
    brought = replace(
        task,
        upstream=spec.upstream.given,
        texts=kinds_of_texts(spec),
        streamed=spec.corpus.images is not None,
        batch=spec.train.batch // spec.train.accumulate,  # of which a loss relates the rows
    )
    return Setting(brought, teacher, student)


def feasible_cells(spec: SweepSpec, task: TaskInfo) -> tuple[list[Cell], list[str]]:
    """Every cell that can be served, and a sentence for each that cannot."""
    cells: list[Cell] = []
    dropped: list[str] = []
    for name in spec.methods:
        method = method_named(name)
        if method.uses_teacher and not spec.teachers:
            dropped.append(f"{name} needs a teacher, and `teachers` is empty")
            continue
        if method.deploys == "student" and not spec.students:
            dropped.append(f"{name} needs a student, and `students` is empty")
            continue
        teachers = range(len(spec.teachers)) if method.uses_teacher else [None]
        students = range(len(spec.students)) if method.deploys == "student" else [None]
        for teacher in teachers:
            for student in students:
                cell = Cell(name, teacher, student)
                reason = method.refuses(setting_of(spec, task, cell))
                if reason is None:
                    cells.append(cell)
                else:
                    dropped.append(reason)
    return cells, list(dict.fromkeys(dropped))


def configure(spec: SweepSpec, config: TrialConfig) -> MethodConfig:
    """The method's own configuration object.

    Raises:
        UserError: naming the knob and its bound.
    """
    method = method_named(config.cell.method)
    try:
        return method.Config.model_validate(config.knobs)
    except ValidationError as error:
        raise UserError(explain(error, method.Config, f"methods.{config.cell.method}")) from None


def policy_of(spec: SweepSpec) -> Policy:
    """How this sweep draws views."""
    return Policy(spec.train.crop_scale, spec.train.color)


def source_reads(entry: Model, role: Any) -> dict[str, Any]:
    """What identifies a network that a stage is built from: its weights and how they are fed."""
    network = load_network(entry, role)
    left_out = ({"model"} if entry.model.startswith("local:") else set()) | (
        {"precision"} if entry.precision == "fp32" else set()
    )
    options = entry.model_dump(mode="json", exclude=left_out)
    reads = {"entry": options, "weights": network.weights_hash, "preprocessing": describe(network.preprocessing)}
    return reads | ({"built": network.built} if isinstance(network.built, dict) else {})


UPSTREAM = ("vq", "diffusion", "pipeline")
TEXT_SOURCES: tuple[Texts, ...] = get_args(Texts)


def upstream_hash(spec: SweepSpec, name: str) -> str:
    """What identifies an upstream generator of the sweep file."""
    from orchestrator.models.upstream import upstream_of  # brings diffusers, which most sweeps do not need

    return upstream_of(spec.upstream, name).weights_hash


def stage_reads(
    stage: Stage, spec: SweepSpec, task: TaskData, config: TrialConfig, inputs: dict[str, str]
) -> dict[str, Any]:
    """Exactly what a stage reads; its hash is the stage's key.

    Args:
        inputs: addresses of earlier stages by name.
    """
    cell = config.cell
    code: Any = {FitStage: "fit", ImageStage: "maker", TrainStage: "learner"}[type(stage)]
    code = getattr(stage, code)
    reads: dict[str, Any] = {
        "code": f"{code.__module__}.{code.__qualname__}",
        "version": stage.version,
        "params": dict(stage.params),
        "inputs": {name: inputs[name] for name in stage.inputs},
    }
    for name in UPSTREAM:
        if name in stage.reads:
            reads[name] = upstream_hash(spec, name)
    if isinstance(stage, ImageStage):
        split = task.train.take(task.labelled) if stage.images == "labelled" else task.train
        reads |= {"images": split.images_hash, "size": stage.size}
        return reads | ({"seed": config.seed} if stage.seeded else {})
    feed = stage if isinstance(stage, FitStage) else stage.feed
    if feed.outputs:
        reads["outputs"] = [asdict(o) for o in feed.outputs]
    if feed.of != TEACHER:
        reads["of"] = inputs[feed.of]
    if feed.pool:
        reads["pool"] = inputs[feed.pool]
    own = isinstance(stage, TrainStage) and stage.feed.teacher_images
    attached = feed.outputs or (isinstance(stage, TrainStage) and stage.feed.pool_outputs)
    if cell.teacher is not None and ((attached and feed.of == TEACHER) or own or "teacher" in stage.reads):
        reads["teacher"] = source_reads(spec.teachers[cell.teacher], "teacher")
    if cell.student is not None and "student" in stage.reads:
        reads["student"] = source_reads(spec.students[cell.student], "student")
    labels = "labels" in stage.reads or (isinstance(stage, TrainStage) and stage.feed.labels)
    streamed = spec.corpus.streams(feed.images)
    if streamed:
        assert spec.corpus.images is not None
        reads["corpus"] = {"images": corpus_at(spec.corpus.images, "images").identity, "dtype": spec.corpus.dtype}
    elif feed.images in ("all", "corpus"):
        reads["images"] = task.train.images_hash
    texts = [name for name in TEXT_SOURCES if name in stage.reads]
    if isinstance(stage, TrainStage):
        texts += [stage.feed.texts] if stage.feed.texts else []
        texts += ["captions"] if stage.feed.captions else []
        texts += stage.feed.tokens
    if texts:
        assert cell.teacher is not None
        tower = text_tower_of(spec.teachers[cell.teacher]).identity
        reads["texts"] = {name: [tower, texts_identity(spec, task, name)] for name in texts}
    if labels:
        reads["labels"] = task.labels_hash
    elif feed.images == "labelled":
        reads["images"] = task.train.take(task.labelled).images_hash
    if "teacher" in stage.reads or "student" in stage.reads:
        reads["num_classes"] = len(task.classes)
    if task.info.kind != "classification":
        reads["kind"] = task.info.kind
    if task.info.kind == "segmentation" and "student" in stage.reads:
        reads["decoder"] = task.spec.decoder
    if isinstance(stage, TrainStage):
        train = spec.train
        reads["feed"] = {"images": feed.images, "labels": stage.feed.labels, "fraction": stage.feed.labelled_fraction}
        if stage.feed.plain or streamed:
            reads["feed"]["plain"] = True
        if stage.feed.tokens:
            reads["feed"]["tokens"] = list(stage.feed.tokens)
        if stage.feed.texts:
            reads["feed"] |= {"text_batch": stage.feed.text_batch, "text_rows": stage.feed.text_rows}
        if stage.feed.pool:
            reads["feed"] |= {"pool_size": stage.feed.pool_size, "pool_ratio": stage.feed.pool_ratio}
            reads["feed"]["pool_outputs"] = [asdict(o) for o in stage.feed.pool_outputs]
        reads["recipe"] = asdict(stage.recipe)
        if (
            stage.recipe.weight_decay > 0
            and stage.trains == "student"
            and (exempt := _undecayed(spec.students[cell.student or 0]))
        ):
            reads["undecayed"] = exempt
        reads["steps"] = stage_steps(stage, spec, task)
        reads["batch"] = train.batch
        reads["views"] = None if train.fresh else train.views
        reads["policy"] = asdict(policy_of(spec))
        # Losses that relate rows left autocast in a later version; those of single precision stayed as they were.
        reads["precision"] = train.precision if train.precision == "fp32" else [train.precision, "losses in float32"]
        # Batch norm over each worker's own part is another computation; without workers it makes no difference.
        reads["workers"] = 1 if train.workers == 1 or train.sync_batchnorm else train.workers
        if train.compile:
            reads["compile"] = True
        if train.accumulate > 1:  # rows are related, and normalised, within a micro batch
            reads["accumulate"] = train.accumulate
        if stage.feed.pool:
            one = train.model_copy(update={"workers": 1})
            if pool_batch(train, stage.feed) != pool_batch(one, stage.feed):  # rounded so that the workers share it
                reads["workers"] = train.workers
        if feed.images == "none":
            reads |= {"views": None, "policy": None}
        if streamed:  # each worker has a stream of its own
            reads |= {"workers": train.workers, "window": spec.corpus.window, "views": None}
        reads["seed"] = config.seed
    return reads


def _undecayed(student: Model) -> list[str]:
    """Names of a student's parameters that weight decay spares, by its modules' own lists (`Learner.decays`)."""
    skeleton = plan_network(student, "student")[0].skeleton
    assert skeleton is not None
    lists = ((name, getattr(module, "no_weight_decay", None)) for name, module in skeleton.named_modules())
    return sorted(f"{name}.{one}".lstrip(".") for name, listed in lists if listed is not None for one in listed())


def stage_steps(stage: TrainStage, spec: SweepSpec, task: TaskData) -> int:
    """Optimizer steps of a training stage; epochs are passes over the images that it sees."""
    images = len(task.train)
    if spec.train.epochs is not None and spec.corpus.streams(stage.feed.images):
        assert spec.corpus.images is not None
        try:
            images = corpus_at(spec.corpus.images, "images").rows
        except UserError:
            if not spec.corpus.expect.images:
                raise
            images = spec.corpus.expect.images  # `check` reckons a corpus that is not here yet
    return max(1, round(spec.train.total_steps(images) * stage.recipe.budget))
