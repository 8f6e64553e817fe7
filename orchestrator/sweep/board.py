"""After the search: event files, the recommendation with its one look at the test images, and export."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.embed import text_tower_of
from orchestrator.data.labels import open_labels
from orchestrator.data.pixels import RenderedPixels
from orchestrator.data.task import load_task
from orchestrator.data.views import Policy
from orchestrator.errors import UserError, nearest
from orchestrator.evaluate.metrics import score
from orchestrator.models import load_student
from orchestrator.models.load import Preprocessing
from orchestrator.models.texts import StudentTexts, has_text_tower
from orchestrator.select.export import export_student
from orchestrator.select.report.curves import val_marks
from orchestrator.select.results import (
    as_accuracy,
    choose,
    margin_note,
    over_repeats,
    read_trials,
    short_name,
    standard_error,
    top,
)
from orchestrator.select.uncertainty import lead_of, lead_sentence
from orchestrator.spec import METRIC_NAMES, METRICS, Kind, Model, Task
from orchestrator.store import store_at
from orchestrator.sweep.ledger import Ledger, at_once
from orchestrator.sweep.pictures import contact_sheets, pictures_of
from orchestrator.sweep.run import open_sweep
from orchestrator.trial.plan import TrialConfig

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
            for point in _history(folder, row):
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
    return {f"result/{m}": float(row[m]) for row in rows for m in METRICS if math.isfinite(float(row.get(m, math.nan)))}


def _history(folder: Path, row: dict[str, Any]) -> list[dict[str, float]]:
    path = folder / row["student_path"] / "history.json"
    if not row["student_path"] or not path.is_file():
        return []
    return json.loads(path.read_text(encoding="utf-8"))["history"]


def recommend(folder: Path, metric: str | None = None, limits: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The best complete trial under limits, with its score on the test images, which are read once for each choice.

    Args:
        folder: the sweep's.
        metric: what to choose by; None: the sweep's first objective.
        limits: by metric, in place of the sweep's own limit of that metric.

    Raises:
        UserError: if the sweep has no such trial or the metric is unknown.
    """
    spec = open_sweep(folder)
    frame = read_trials(folder)
    first = spec.objectives[0]
    name = metric or first.metric
    if name not in METRICS:
        raise UserError(f"--metric: unknown metric {name!r}; allowed: {', '.join(METRICS)}.{nearest(name, METRICS)}")
    direction = first.direction if name == first.metric else METRICS[name]
    kept = spec.limits.given | dict(limits or {})
    best = top(frame, name, direction, kept)
    row = best.iloc[0]
    test, reads = _test_once(folder, row["trial_id"], row["student_path"])
    networks = " -> ".join(n for n in (row["teacher"], row["student"]) if isinstance(n, str))
    task = load_task(spec.task, store_at(spec.store_address))
    kind = spec.task.kind
    sentences = [
        f"Take {row['trial_id']}: {row['method']} ({networks}), {METRIC_NAMES[kind]} on val {row['val_metric']:.3f}"
        f"{spread(row)}, "
        f"on test {test['value']:.3f} over {test['images']} images (standard error {test['standard_error']:.3f}).",
        f"{int(row['params_total']):,} parameters, {row['flops'] / 1e6:.1f} MFLOPs an image (2 per multiply-add), "
        f"{row['latency_ms']:.2f} ms ({row['latency_setup']}).",
    ]
    lead = None
    if name == "val_metric" and len(best) > 1:
        lead = lead_of(Path(folder), row, best.iloc[1], len(task.val), kind)
        sentences.append(lead_sentence(row, best.iloc[1], lead))
    if lead is None or best.iloc[1]["method"] == row["method"]:  # that of another method is then a further one
        note = margin_note(frame, row, name, len(task.val), kept, kind)
        sentences += [note] if note else []
    sentences += against_baseline(frame, row, len(task.val), kind)
    if reads > 1:
        sentences.append(f"The test images were now read for {reads} different choices: the last score is optimistic.")
    sentences.append(f"Next: python -m orchestrator export {folder} OUT_DIR --trial {row['trial_id']}")
    names = ["trial_id", "method", "teacher", "student", "val_metric", "val_sd", "repeats", "params_total", "flops"]
    names += ["memory_mb", "model_mb"]
    names += ["latency_ms", "latency_iqr_ms", "latency_setup", "student_path", "config"]
    facts = {k: None if isinstance(row[k], float) and math.isnan(row[k]) else row[k] for k in names}
    plain = json.loads(json.dumps(facts, default=lambda v: v.item()))
    runner_up = {"trial_id": str(best.iloc[1]["trial_id"]), **lead.facts()} if lead is not None else None
    plain |= {"runner_up": runner_up, "limits": kept}
    return plain | {"metric": name, "test": test, "test_choices": reads, "sentences": sentences}


def against_baseline(frame: Any, row: Any, images: int, kind: Kind) -> list[str]:
    """Whether transfer beat training on the labels alone, and by more than the noise of `images` images."""
    complete = frame[(frame["status"] == "complete") & frame["val_metric"].notna()]
    chose_baseline = row["method"] in BASELINES
    rivals = complete[complete["method"].isin(BASELINES) != chose_baseline]
    if rivals.empty:
        return []
    rival = rivals.loc[rivals["val_metric"].idxmax()]
    gain = float(row["val_metric"]) - float(rival["val_metric"])
    noise = math.sqrt(standard_error(rival, images) ** 2 + standard_error(row, images) ** 2)
    verdict = "more than" if gain > 2 * noise else "within"
    error = f"{verdict} twice its standard error ({noise:.3f}{as_accuracy(kind)} on {images} images{over_repeats(row)})"
    if chose_baseline:
        name = f"{rival['trial_id']} ({rival['method']})"
        return [
            f"No transfer method beat training on the labels alone: the best, {name}, is {-gain:.3f} below, {error}."
        ]
    value = float(rival["val_metric"])
    return [
        f"The best network trained on the labels alone reaches val {value:.3f}: the difference {gain:+.3f} is {error}."
    ]


def spread(row: Any) -> str:
    """What stands behind a val metric that is the mean of several repeats."""
    if int(row["repeats"]) < 2:
        return ""
    return f" ± {row['val_sd']:.3f} over {int(row['repeats'])} repeats (the network is the first one's)"


def _texts_beside(student: Path, meta: Mapping[str, Any]) -> tuple[StudentTexts, Model] | None:
    """The text tower that was trained beside a student, with the teacher whose tokenizer it uses."""
    if not has_text_tower(student):
        return None
    teacher = Model.model_validate(meta["teacher_entry"])
    return StudentTexts(student, text_tower_of(teacher)), teacher


def _test_once(folder: Path, trial_id: str, student_path: str) -> tuple[dict[str, Any], int]:
    path = Path(folder) / "test.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if trial_id not in known:
        network, meta = load_student(Path(folder) / student_path)
        store = store_at(open_sweep(folder).store_address)
        task = load_task(Task.model_validate(meta["task"]), store)
        preprocessing = Preprocessing.from_json(meta["preprocessing"])
        # Test pixels stay out of the store: nothing but this one look reads them.
        plain = Policy(1.0, 0.0)
        pixels = RenderedPixels(task, task.test, plain, preprocessing)
        torch.set_num_threads(1)
        count, kind = len(task.test), task.spec.kind
        labels = open_labels(store, task, task.test, range(count), plain, 1, preprocessing.size, limit_gb=0)
        found = score(network, preprocessing, pixels, labels, count, kind, len(task.classes), with_error=True)
        known[trial_id] = {
            "metric": METRIC_NAMES[kind],
            "value": found.value,
            "images": count,
            "standard_error": found.error,
        }
        at_once(path, lambda temporary: temporary.write_text(json.dumps(known), encoding="utf-8"))
    return known[trial_id], len(known)


def export_trial(folder: Path, out_dir: Path, trial: str | None, fmt: str) -> dict[str, Any]:
    """Exports one trial's student, the best one if none is named.

    Raises:
        UserError: if there is no such trial or it has no student.
    """
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
    network, meta = load_student(Path(folder) / row["student_path"])
    store = store_at(spec.store_address)
    task = load_task(Task.model_validate(meta["task"]), store)
    preprocessing = Preprocessing.from_json(meta["preprocessing"])
    pixels = RenderedPixels(task, task.val, Policy(1.0, 0.0), preprocessing)
    rows = np.arange(min(4, len(task.val)))
    sample = preprocessing.normalise(pixels.batch(rows, np.zeros(len(rows), dtype=np.int64)))
    report = export_student(
        network, meta, out_dir, fmt, sample, _texts_beside(Path(folder) / row["student_path"], meta)
    )
    return {"trial_id": str(row["trial_id"]), **report}
