"""After the search: event files, the recommendation with its one look at the test images, and export."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.data.embed import text_tower_of
from orchestrator.data.task import load_task
from orchestrator.errors import UserError, nearest
from orchestrator.models import load_student
from orchestrator.models.load import Preprocessing
from orchestrator.models.texts import StudentTexts, has_text_tower
from orchestrator.select.export import Evidence, Wanted, export_student
from orchestrator.select.export.provenance import provenance_of
from orchestrator.select.report.curves import history, val_marks
from orchestrator.select.results import (
    choose,
    read_trials,
    short_name,
)
from orchestrator.spec import Model, Task, is_metric
from orchestrator.store import store_at
from orchestrator.sweep.ledger import Ledger, open_sweep
from orchestrator.sweep.pictures import contact_sheets, pictures_of
from orchestrator.trial.plan import TrialConfig

SAMPLE = 8  # val images on which every export is compared
BASELINES = ("finetune", "linear_probe")


def finish(folder: Path) -> None:
    """Writes TensorBoard event files (learning curves, HParams, pictures) from the recorded rows.

    The experiment's own file names every knob of every method: TensorBoard shows the columns that it names.
    """
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    rows = [row for row in Ledger(folder).rows() if row["status"] != "running"]
    root = folder / "tensorboard"
    for old in root.glob("events.*"):
        old.unlink()
    if not rows:
        return
    every = {name: value for row in rows for name, value in _choices(row).items()}
    with SummaryWriter(str(root), write_to_disk=True) as writer:
        writer.file_writer.add_summary(hparams(every, dict.fromkeys(_results(rows), 0.0))[0])
        for name, picture in contact_sheets(folder):
            writer.add_image(name, picture, 0, dataformats="HWC")
    for row in rows:
        target = root / f"{row['trial_id']}-{row['method']}"
        if target.exists():
            continue
        results = _results([row])
        with SummaryWriter(str(target), write_to_disk=True) as writer:
            # `add_hparams` opens a second file, which has the first one's name within a second of it.
            for summary in hparams(_choices(row), results)[1:]:
                writer.file_writer.add_summary(summary)
            for name, value in results.items():
                writer.add_scalar(name, value, row["optimizer_steps"])
            for point in history(folder, row["trial_id"], row["student_path"]):
                for part, value in point.items():
                    if part != "step":
                        writer.add_scalar(f"train/{part}", value, int(point["step"]))
            for share, value in val_marks(folder, row["trial_id"]):
                writer.add_scalar("val/by_percent_of_budget", value, round(100 * share))
            for name, picture in pictures_of(folder / row["student_path"]) if row["student_path"] else ():
                writer.add_image(name, picture, row["optimizer_steps"], dataformats="HWC")


def _choices(row: dict[str, Any]) -> dict[str, Any]:
    """What HParams shows as chosen: method, networks, and the method's knobs under its name."""
    config = TrialConfig.from_json(row["config"])
    knobs = {f"{row['method']}.{k}": v for k, v in config.knobs.items()}
    teacher, student = short_name(row["teacher"]) or "-", short_name(row["student"]) or "-"
    # TensorBoard sorts by name and shows the first few: capitals come before the knobs.
    return {"Method": row["method"], "Teacher": teacher, "Student": student, **knobs}


def _results(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics that the rows have, in a group beside the learning curves."""
    return {f"result/{m}": float(row[m]) for row in rows for m in row if is_metric(m) and math.isfinite(float(row[m]))}


def _texts_beside(student: Path, meta: Mapping[str, Any]) -> tuple[StudentTexts, Model] | None:
    """The text tower that was trained beside a student, with the teacher whose tokenizer it uses."""
    if not has_text_tower(student):
        return None
    teacher = Model.model_validate(meta["teacher_entry"])
    return StudentTexts(student, text_tower_of(teacher)), teacher


def export_trial(folder: Path, out_dir: Path, trial: str | None, fmt: str, **options: Any) -> dict[str, Any]:
    """Exports one trial's student, the best one if none is named.

    Args:
        folder: the sweep's.
        out_dir: a folder that does not exist yet.
        trial: which.
        fmt: `safetensors`, `onnx` or `pt2`.
        options: the other fields of `select.export.Wanted`.

    Raises:
        UserError: if there is no such trial or it has no student, or an option does not fit.
        WorkError: if what was written does not do what the student does.
    """
    wanted = Wanted(fmt, **options)
    spec = open_sweep(folder)
    frame = read_trials(folder)
    if trial is None:
        row = choose(frame, spec.objectives[0].metric, spec.objectives[0].direction, spec.limits.given)
    else:
        found = frame[frame["trial_id"] == trial]
        if found.empty:
            ids = list(frame["trial_id"])
            raise UserError(f"--trial: there is no trial {trial!r} in {str(folder)!r}.{nearest(trial, ids)}")
        row = found.iloc[0]
    if not row["student_path"]:
        raise UserError(
            f"The trial {row['trial_id']} is {row['status']} and has no student to export ({row['reason']})."
        )
    student = Path(folder) / row["student_path"]
    network, meta = load_student(student)
    store = store_at(spec.store_address)
    task = load_task(Task.model_validate(meta["task"]), store)
    evidence = Evidence(task, store, Preprocessing.from_json(meta["preprocessing"]))
    tested = Path(folder) / "test.json"
    known = json.loads(tested.read_text(encoding="utf-8")) if tested.is_file() else {}
    origin = provenance_of(spec, task, row, known.get(str(row["trial_id"])), Path(out_dir).name)
    report = export_student(
        network,
        meta,
        out_dir,
        fmt,
        evidence.val(SAMPLE),
        _texts_beside(student, meta),
        wanted=wanted,
        evidence=evidence,
        provenance=origin,
    )
    return {"trial_id": str(row["trial_id"]), **report}
