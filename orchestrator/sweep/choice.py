"""The recommendation, with its one look at the test images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, nearest
from orchestrator.files import at_once
from orchestrator.select.results import (
    Direction,
    as_accuracy,
    candidates_of,
    margin_note,
    over_repeats,
    ranked,
    read_trials,
    standard_error,
    top,
    within,
)
from orchestrator.select.uncertainty import lead_of, lead_sentence
from orchestrator.spec import METRIC_NAMES, METRICS, Kind, SweepSpec, better, latency_column, near_limits
from orchestrator.sweep.ledger import open_sweep

BASELINES = ("finetune", "linear_probe")


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
    name, direction = chosen_by(spec, metric)
    kept = spec.limits.given | dict(limits or {})
    best = top(frame, name, direction, kept)
    row = best.iloc[0]
    test, reads = _test_once(folder, row["trial_id"], row["student_path"])
    networks = " -> ".join(n for n in (row["teacher"], row["student"]) if isinstance(n, str))
    kind = spec.task.kind
    sentences = [
        f"Take {row['trial_id']}: {row['method']} ({networks}), {METRIC_NAMES[kind]} on val {row['val_metric']:.3f}"
        f"{spread(row)}, "
        f"on test {test['value']:.3f} over {test['images']} images (standard error {test['standard_error']:.3f}).",
        f"{int(row['params_total']):,} parameters, {row['flops'] / 1e6:.1f} MFLOPs an image (2 per multiply-add), "
        f"{latencies_of(row, spec)}.",
        *near_limits(kept, row),
    ]
    lead = None
    if name == "val_metric" and len(best) > 1:
        lead = lead_of(Path(folder), row, best.iloc[1], test["val_images"], kind)
        sentences.append(lead_sentence(row, best.iloc[1], lead))
    if lead is None or best.iloc[1]["method"] == row["method"]:  # that of another method is then a further one
        note = margin_note(frame, row, name, test["val_images"], kept, kind)
        sentences += [note] if note else []
    sentences += against_baseline(frame, row, test["val_images"], kind, kept)
    if reads > 1:
        sentences.append(f"The test images were now read for {reads} different choices: the last score is optimistic.")
    sentences.append(f"Next: python -m orchestrator export {folder} OUT_DIR --trial {row['trial_id']}")
    names = ["trial_id", "method", "teacher", "student", "val_metric", "val_sd", "repeats", "params_total", "flops"]
    names += ["memory_mb", "model_mb"]
    names += [name for name in row.index if name.startswith("latency_")]
    names += ["student_path", "config"]
    facts = {k: None if isinstance(row[k], float) and math.isnan(row[k]) else row[k] for k in names}
    plain = json.loads(json.dumps(facts, default=lambda v: v.item()))
    runner_up = {"trial_id": str(best.iloc[1]["trial_id"]), **lead.facts()} if lead is not None else None
    plain |= {"runner_up": runner_up, "limits": kept}
    return plain | {"metric": name, "test": test, "test_choices": reads, "sentences": sentences}


def chosen_by(spec: SweepSpec, metric: str | None) -> tuple[str, Direction]:
    """The metric to choose by, the sweep's first objective if none is named, and what of it is better.

    Raises:
        UserError: if the sweep has no such metric.
    """
    first = spec.objectives[0]
    if metric is None or metric == first.metric:
        return first.metric, first.direction
    known = list(dict.fromkeys([*METRICS, *spec.latencies]))
    if metric not in known:
        raise UserError(f"--metric: unknown metric {metric!r}; allowed: {', '.join(known)}.{nearest(metric, known)}")
    return metric, better(metric)


def against_baseline(
    frame: Any, row: Any, images: int, kind: Kind, limits: Mapping[str, float] | None = None
) -> list[str]:
    """Whether transfer beat training on the labels alone, and by more than the noise of `images` images.

    Args:
        frame: all trials.
        row: the chosen one, by whatever metric.
        images: of val.
        kind: of the task.
        limits: kept by what it is compared with, as by the chosen one.
    """
    found = within(candidates_of(frame, bool(limits)), limits or {})
    chose_baseline = row["method"] in BASELINES
    rivals = found[(found["method"].isin(BASELINES) != chose_baseline) & found["val_metric"].notna()]
    if rivals.empty or math.isnan(row["val_metric"]):
        return []
    rival = ranked(rivals, "val_metric", "max").iloc[0]
    gain = float(row["val_metric"]) - float(rival["val_metric"])
    apart = _apart(gain, row, rival, images, kind)
    kept = " that keeps the limits" if limits else ""
    name = f"{rival['trial_id']} ({rival['method']})"
    if chose_baseline and gain >= 0:
        return [f"No transfer method{kept} beat training on the labels alone: the best, {name}, is {apart}."]
    which = "transfer method" if chose_baseline else "network trained on the labels alone"
    return [f"The best {which}{kept}, {name}, reaches val {rival['val_metric']:.3f}, which is {apart}."]


def _apart(gain: float, row: Any, rival: Any, images: int, kind: Kind) -> str:
    """Where a rival's val metric is from that of the chosen row, which is `gain` higher, and whether that is noise."""
    if gain == 0:
        return "as good"
    noise = math.hypot(standard_error(rival, images), standard_error(row, images))
    verdict = "more than" if abs(gain) > 2 * noise else "within"
    error = f"{noise:.3f}{as_accuracy(kind)} on {images} images{over_repeats(row)}"
    return f"{abs(gain):.3f} {'below' if gain > 0 else 'above'}, {verdict} twice its standard error ({error})"


def latencies_of(row: Any, spec: SweepSpec) -> str:
    """`1.23 ms (cpu, 1 thread, batch 1)`, of every profile."""
    parts = []
    for metric in spec.latencies:
        setup = row.get(latency_column(metric, "setup"), "")
        parts.append(f"{float(row.get(metric, math.nan)):.2f} ms ({setup})" if setup else "latency not measured")
    return "; ".join(parts)


def spread(row: Any) -> str:
    """What stands behind a val metric that is the mean of several repeats."""
    if int(row["repeats"]) < 2:
        return ""
    return f" ± {row['val_sd']:.3f} over {int(row['repeats'])} repeats (the network is the first one's)"


def _test_once(folder: Path, trial_id: str, student_path: str) -> tuple[dict[str, Any], int]:
    """The trial's score on test, from `test.json` if it was read before, and of how many trials it was read."""
    path = Path(folder) / "test.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "val_images" not in known.get(trial_id, {}):
        from orchestrator.sweep.final_score import read_test  # it imports torch, which a second look does not need

        known[trial_id] = read_test(folder, student_path)
        at_once(path, lambda temporary: temporary.write_text(json.dumps(known), encoding="utf-8"))
    return known[trial_id], len(known)
