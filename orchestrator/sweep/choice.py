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
    as_accuracy,
    margin_note,
    over_repeats,
    read_trials,
    standard_error,
    top,
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
    first = spec.objectives[0]
    name = metric or first.metric
    known = list(dict.fromkeys([*METRICS, *spec.latencies]))
    if name not in known:
        raise UserError(f"--metric: unknown metric {name!r}; allowed: {', '.join(known)}.{nearest(name, known)}")
    direction = first.direction if name == first.metric else better(name)
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
    sentences += against_baseline(frame, row, test["val_images"], kind)
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
