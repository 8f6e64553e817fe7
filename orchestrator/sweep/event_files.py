"""TensorBoard event files of a sweep, from its recorded rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from orchestrator.select.report.curves import history, val_marks
from orchestrator.select.results import short_name
from orchestrator.spec import is_metric
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.pictures import contact_sheets, pictures_of
from orchestrator.trial.plan import TrialConfig


def write_event_files(folder: Path) -> None:
    """Writes learning curves, HParams and pictures, of what has ended and has none yet.

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
