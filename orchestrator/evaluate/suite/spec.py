"""The suite: which tasks a network is evaluated on, and how. A YAML file, or a folder of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from orchestrator.errors import UserError, listed, nearest
from orchestrator.evaluate.suite.measure import Metric
from orchestrator.evaluate.suite.retrieval import parquet_columns
from orchestrator.evaluate.suite.shifts import NAMES, SEVERITIES
from orchestrator.spec import Section, Splits, Task, explain, read_mapping

FILE = "suite.yaml"
TASK_FILE = "task.yaml"


class SuiteTask(Section):
    """One task; a plain string stands for `{data: STRING}`."""

    name: str = Field(default="", description="What the tables call it; empty: the last part of `data`.")
    data: str = Field(
        description="As `task.data` of a sweep file; a relative path starts at the suite's own folder. For retrieval "
        "`parquet:PATH` with the columns image and caption (a text or a list of them)."
    )
    kind: Literal["classification", "multilabel", "retrieval"] | None = Field(
        default=None, description="Null: retrieval where a Parquet file has a caption and no label, else one class."
    )
    metric: Metric | None = Field(
        default=None,
        description="accuracy or mean_per_class; multilabel: auroc. Null: accuracy, or auroc.",
    )
    splits: Splits = Field(default_factory=Splits, description="As in a sweep file: same file, same test images.")
    seed: int = Field(default=0, ge=0, description="As `task.seed` of a sweep file: draws the split.")
    names: dict[str, str] = Field(default_factory=dict, description="Words for classes whose labels are none.")
    templates: list[str] = Field(
        default_factory=lambda: list(Task.model_fields["templates"].default),
        min_length=1,
        description="Sentences with {} for a class's words; a class is the mean of its sentences' embeddings.",
    )
    shifts: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> data with the same classes or some of them; its test split, or all of it if it has none.",
    )

    @field_validator("shifts")
    @classmethod
    def _not_synthetic(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in NAMES or not name:
                raise ValueError(f"{name!r} cannot name a shift: it is {'a synthetic one' if name else 'empty'}")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> SuiteTask:
        if self.kind == "retrieval":
            for key in ("metric", "shifts", "names"):
                if getattr(self, key):
                    raise ValueError(f"{key} is for tasks with classes, and kind is retrieval")
        elif self.metric is not None and (self.metric == "auroc") != (self.kind == "multilabel"):
            allowed = "auroc" if self.kind == "multilabel" else "accuracy and mean_per_class"
            raise ValueError(
                f"metric: {self.metric} does not fit kind {self.kind or 'classification'}; allowed: {allowed}"
            )
        return self

    @property
    def title(self) -> str:
        """Its name, or one made of its data."""
        return self.name or Path(self.data.partition(":")[2] or self.data).stem

    @property
    def measured_by(self) -> Metric:
        """The metric, resolved."""
        return self.metric or ("auroc" if self.kind == "multilabel" else "accuracy")

    @property
    def task(self) -> Task:
        """As in a sweep file, with every training image labelled."""
        keys = {k: getattr(self, k) for k in ("data", "splits", "seed", "names", "templates")}
        return Task(kind="multilabel" if self.kind == "multilabel" else "classification", shots=None, **keys)


def _as_task(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


class Suite(Section):
    """A suite file."""

    tasks: list[Annotated[SuiteTask, BeforeValidator(_as_task)]] = Field(
        min_length=1, description="What to evaluate on; a folder's suite.yaml may leave it out: each sub-folder is one."
    )
    probe: bool = Field(default=True, description="Fit the linear probe on each task that brings training images.")
    shots: list[int] = Field(
        default_factory=list, description="Few-shot probes, by images a class: [5, 20, 50] as in ELEVATER."
    )
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1, description="Draws of the images of a few-shot probe.")
    synthetic: list[str] = Field(default=list(NAMES), description=f"Shifts that need no data, of {listed(NAMES)}.")
    severities: list[int] = Field(default=[3], description="Of the synthetic shifts: 1 (weak) to 5.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where there is one.")

    @field_validator("shots", "seeds", "severities")
    @classmethod
    def _in_range(cls, value: list[int], info: Any) -> list[int]:
        least, most = {"shots": (2, None), "seeds": (0, None), "severities": (1, len(SEVERITIES))}[info.field_name]
        for one in value:
            if one < least or (most is not None and one > most):
                raise ValueError(f"{one} is {f'below {least}' if one < least else f'above {most}'}")
        return sorted(set(value))

    @field_validator("synthetic")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in NAMES:
                raise ValueError(
                    f"there is no synthetic shift {name!r}; there are {listed(NAMES)}.{nearest(name, NAMES)}"
                )
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        titles = [task.title for task in self.tasks]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"tasks: {titles.count(title)} are called {title!r}; give each its own `name`")
        return self


def read_suite(path: str | Path) -> Suite:
    """A suite file, or a folder: its sub-folders are the tasks, and its `suite.yaml`, if there is one, the rest.

    A sub-folder is an image folder, Parquet files, or has a `task.yaml` with the keys of a task (whose data is that
    sub-folder where it names none). Those whose names begin with `.` or `_` are no tasks: a place for shifted data.

    Raises:
        UserError: if there is no such suite, or it is wrong.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return _parsed(read_mapping(path, "suite"), path.absolute().parent, str(path))
    file = path / FILE
    raw = read_mapping(file, "suite") if file.is_file() else {}
    if "tasks" not in raw:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "_")))
        if not folders:
            raise UserError(f"The suite {str(path)!r} has no sub-folders: each task is one.")
        raw["tasks"] = [_from_folder(folder) for folder in folders]
    return _parsed(raw, path.absolute(), str(file if file.is_file() else path))


def _from_folder(folder: Path) -> dict[str, Any]:
    file = folder / TASK_FILE
    keys = read_mapping(file, "task file") if file.is_file() else {}
    if isinstance(keys.get("data"), str):
        keys["data"] = _placed(keys["data"], folder.absolute())
    if isinstance(keys.get("shifts"), dict):
        keys["shifts"] = {k: _placed(v, folder.absolute()) for k, v in keys["shifts"].items()}
    kind = "parquet" if any(folder.glob("*.parquet")) else "folder"
    return {"name": folder.name, "data": f"{kind}:{folder.absolute()}", **keys}


def _placed(data: Any, root: Path) -> Any:
    """`folder:PATH` and `parquet:PATH` with a path that starts at `root` where it is relative."""
    if not isinstance(data, str):
        return data
    kind, colon, text = data.partition(":")
    if not colon or not text or data.startswith("packaged/"):
        return data
    return f"{kind}:{root / Path(text).expanduser()}"


def _parsed(raw: dict[str, Any], root: Path, where: str) -> Suite:
    if isinstance(raw.get("tasks"), list):
        raw = raw | {"tasks": [_completed(_as_task(task), root) for task in raw["tasks"]]}
    try:
        suite = Suite.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, Suite, where)) from None
    for number, task in enumerate(suite.tasks):
        if task.kind == "retrieval":
            continue
        try:
            _ = task.task
        except ValidationError as error:
            raise UserError(explain(error, Task, f"tasks.{number} of {where}")) from None
        for name, data in task.shifts.items():
            try:
                Task(data=data)
            except ValidationError as error:
                raise UserError(explain(error, Task, f"tasks.{number}.shifts.{name} of {where}")) from None
    return suite


def _completed(task: Any, root: Path) -> Any:
    """The keys of a task with its paths placed and, where Parquet files tell, its kind."""
    if not isinstance(task, dict):
        return task
    task = dict(task)
    if "data" in task:
        task["data"] = _placed(task["data"], root)
    if isinstance(task.get("shifts"), dict):
        task["shifts"] = {name: _placed(data, root) for name, data in task["shifts"].items()}
    data = task.get("data")
    if task.get("kind") is None and isinstance(data, str) and data.startswith("parquet:"):
        place = Path(data.removeprefix("parquet:"))
        files = sorted(place.glob("*.parquet")) if place.is_dir() else [place] if place.is_file() else []
        columns = parquet_columns(files[0]) if files else []
        if "caption" in columns and "label" not in columns:
            task["kind"] = "retrieval"
    return task
