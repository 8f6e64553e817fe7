"""A trial's student, taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.data.embed import text_tower_of
from orchestrator.errors import UserError, nearest
from orchestrator.models.load import Preprocessing, load_student
from orchestrator.models.texts import StudentTexts, has_text_tower
from orchestrator.select.export import Evidence, Wanted, export_student
from orchestrator.select.export.provenance import provenance_of
from orchestrator.select.results import choose, read_trials
from orchestrator.spec import Model
from orchestrator.store import store_at
from orchestrator.sweep.begun import scored_task
from orchestrator.sweep.ledger import open_sweep

SAMPLE = 8  # val images on which every export is compared


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
    task = scored_task(Path(folder), meta, store)
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
