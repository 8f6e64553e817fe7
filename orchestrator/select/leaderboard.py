"""The leaderboard as a person reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.errors import listed
from orchestrator.select.results import latencies, leaderboard, numbers, short_name, tally
from orchestrator.spec import LATENCY, METRIC_NAMES, Kind, Objective, latency_column


def _pair(row: Any) -> str:
    teacher, student = short_name(row["teacher"]), short_name(row["student"])
    if teacher and student:
        return f"{teacher} → {student}"
    return f"{teacher} → itself" if teacher else student or "-"


def count(value: Any) -> str:
    """`987`, `12.3k`, `4.65M`; `-` where missing."""
    if pd.isna(value):
        return "-"
    value = float(value)
    for above, scale, unit in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= above:
            return f"{significant(value / scale)}{unit}"
    return f"{value:.0f}"


def real(value: Any, digits: int) -> str:
    return "-" if pd.isna(value) else f"{float(value):,.{digits}f}"


def _val(row: Any) -> str:
    """`0.8123`, or over several repeats `0.8123 ± 0.0101`."""
    value = real(row["val_metric"], 4)
    return value if pd.isna(row["val_sd"]) else f"{value} ± {real(row['val_sd'], 4)}"


def significant(value: float, like: float | None = None) -> str:
    """Three significant digits without an exponent: `0.0123`, `4.56`, `12,346`; or as many decimals as `like` gets."""
    if pd.isna(value):
        return "-"
    measure = abs(float(value if like is None or pd.isna(like) else like))
    digits = max(0, 2 - math.floor(math.log10(measure))) if measure else 0
    return f"{float(value):,.{min(digits, 4)}f}"


def print_leaderboard(
    console: Console,
    frame: pd.DataFrame,
    objectives: Sequence[Objective] = (Objective(),),
    *,
    title: str = "",
    limit: int | None = None,
    kind: Kind = "classification",
) -> None:
    """Prints complete trials by rank, the others below with their reasons, and the units.

    Args:
        console: where to; made for 100 columns or more.
        frame: as `read_trials` gives it.
        objectives: the sweep's.
        title: a line above.
        limit: show only the best so many complete trials.
        kind: of the task: what the val metric is.
    """
    if title:
        console.print(Text(title, style="bold"))
    if frame.empty:
        console.print("The sweep has no trials yet.")
        return
    board = leaderboard(frame, objectives)
    complete = board[board["status"] == "complete"]
    shown = complete if limit is None else complete.head(limit)
    if len(shown):
        console.print(_complete_table(shown, objectives, console.width))
    if len(shown) < len(complete):
        console.print(f"... and {len(complete) - len(shown):,} more complete trials.")
    others = board[board["status"] != "complete"]
    if len(others):
        console.print()
        console.print(_others_table(others, console.width))
    console.print()
    for line in [f"Trials: {tally(frame)}.", *(footnotes(shown, objectives, kind) if len(shown) else [])]:
        console.print(Text(line, style="dim"))


def _table(width: int) -> Table:
    padding = (0, 1 if width >= 120 else 0, 0, 0)
    return Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False, header_style="bold")


def _complete_table(rows: pd.DataFrame, objectives: Sequence[Objective], width: int) -> Table:
    several = len(objectives) > 1
    trained = any(o.metric == "params_trained" for o in objectives)
    table = _table(width)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("trial", no_wrap=True)
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("teacher →\nstudent", overflow="fold", min_width=12)
    table.add_column("val", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    if trained:
        table.add_column("trained", justify="right", no_wrap=True)
    further = latencies(rows)[1:]
    profiles = [f"ms\n{metric.removeprefix(f'{LATENCY}_')}" for metric in further]
    for name in ("MFLOPs", "latency\nms (IQR)", *profiles, "steps", "device\ns", "teacher fw\npaid/shared"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        rank = "" if pd.isna(row["rank"]) else f"{row['rank']}{'*' if several and row['pareto'] else ''}"
        cells = [rank, row["trial_id"], row["method"], _pair(row), _val(row)]
        cells.append(count(row["params_total"]))
        if trained:
            cells.append(count(row["params_trained"]))
        cells += [
            "-" if pd.isna(row["flops"]) else significant(row["flops"] / 1e6),
            f"{significant(row['latency_ms'])} ({significant(row['latency_iqr_ms'], row['latency_ms'])})",
            *(significant(row[metric]) for metric in further),
            count(row["optimizer_steps"]),
            real(row["device_seconds"], 1),
            f"{count(row['teacher_forwards'])}/{count(row['teacher_forwards_shared'])}",
        ]
        table.add_row(*(Text(str(cell)) for cell in cells), style="bold" if row["rank"] == 1 else "")
    return table


def _others_table(rows: pd.DataFrame, width: int) -> Table:
    table = _table(width)
    for name in ("trial", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("teacher → student", overflow="fold", min_width=12)
    table.add_column("device s", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold", min_width=20)
    styles = {"failed": "red", "pruned": "yellow", "infeasible": "yellow"}
    for row in rows.to_dict("records"):
        cells = (row["method"], _pair(row), real(row["device_seconds"], 1), row["reason"] or "-")
        status = Text(str(row["status"]), style=styles.get(row["status"], ""))
        table.add_row(Text(str(row["trial_id"])), status, *(Text(str(cell)) for cell in cells))
    return table


def footnotes(rows: pd.DataFrame, objectives: Sequence[Objective], kind: Kind) -> list[str]:
    first = objectives[0]
    word = "largest" if first.direction == "max" else "smallest"
    notes = [f"Ranked by {first.metric}, {word} first; ties by parameters, then latency."]
    repeats = [str(n) for n in sorted({int(n) for n in rows["repeats"] if not pd.isna(n)} - {1})]
    spread = f", mean ± standard deviation over {listed(repeats)} seeds and draws of the labels" if repeats else ""
    notes.append(f"val: the {METRIC_NAMES[kind]} on val{spread}.")
    if len(objectives) > 1:
        notes.append(f"* on the Pareto front of {listed(o.metric for o in objectives)}.")
    notes.append("MFLOPs: 2 per multiply-add, for one image.")
    setups = sorted({s for s in rows["latency_setup"] if isinstance(s, str) and s})
    if len(setups) == 1:
        notes.append(f"Latency: median and interquartile range; {setups[0]}.")
    elif setups:
        notes.append(
            f"Latency: median and interquartile range; the setups differ and do not compare: {'; '.join(setups)}."
        )
    for metric in latencies(rows)[1:]:
        further = sorted({s for s in rows[latency_column(metric, "setup")] if isinstance(s, str) and s})
        notes.append(f"{metric}: median; {'; '.join(further) or 'not measured'}.")
    saved = float(np.nansum(numbers(rows, "store_seconds_saved")))
    notes.append(
        "Device s and teacher forwards paid: this trial's own; shared: forwards that it read from the store"
        + (f" (which saved these trials {saved:,.1f} s)." if saved > 0 else ".")
    )
    return notes
