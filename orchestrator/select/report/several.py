"""The report of several sweeps: one page, and one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from orchestrator.errors import listed
from orchestrator.select.comparison import ALL, Comparison
from orchestrator.select.comparison_text import difference_cells, footnotes, key_rows
from orchestrator.select.leaderboard import count
from orchestrator.select.leaderboard import footnotes as board_notes
from orchestrator.select.report.gather import CLASSES, Gathered, axis_title
from orchestrator.select.report.page import (
    CLASS_TITLES,
    TEXTS,
    cell,
    columns_of,
    export_command,
    methods_with_losses,
    percent,
    rendered,
    table_row,
)
from orchestrator.select.report.table import table
from orchestrator.select.results import numbers, pareto, ranked
from orchestrator.spec import Objective

FACTS = ("val_metric", "val_sd", "params_total", "flops", "latency_ms", "device_seconds", "store_seconds_saved")


def several_html(found: Comparison, parts: Sequence[Gathered]) -> str:
    """One page of several sweeps, as `html` of one.

    Args:
        found: their comparison.
        parts: what each one's own report would show, in the same order.
    """
    names = [m.name for m in found.members]
    board = joint_board(names, parts)
    complete = board[board["status"] == "complete"]
    axes = {axis: axis_title(axis) for part in parts for axis in part.fronts}
    plane = {axis: [Objective(), Objective(metric=axis)] for axis in axes}
    own = {axis: {name: pareto(complete[complete["sweep"] == name], plane[axis]) for name in names} for axis in axes}
    whole = found.sweeps[found.sweeps["among"] == ALL].to_dict("records")
    shown = {trial for fronts in own.values() for front in fronts.values() for trial in front}
    shown |= {f"{r['sweep']}/{r['trial_id']}" for r in found.sweeps.to_dict("records") if r["trial_id"]}
    curves = {
        trial: curve
        for name, part in zip(names, parts, strict=True)
        for number, curve in part.curves.items()
        if (trial := f"{name}/{number}") in shown
    }
    data = {
        "metric": found.metric,
        "axes": axes,
        "fronts": {axis: sorted({t for front in fronts.values() for t in front}) for axis, fronts in own.items()},
        "own": own,
        "by": "sweep",
        "kinds": names,
        "bests": [f"{r['sweep']}/{r['trial_id']}" for r in whole if r["trial_id"]],
        "curves": curves,
        "progress": {name: progress(part.board) for name, part in zip(names, parts, strict=True)},
        "exports": {m.name: export_command(m.folder) for m in found.members},
    }
    columns = {"sweep": "sweep", **columns_of(board)}
    kind = parts[0].spec.task.kind
    notes = board_notes(complete, [Objective()], kind)
    class_heads, class_rows = _class_rows({r["sweep"]: r["trial_id"] for r in whole}, names, parts)
    return rendered(
        "several.html.jinja",
        data,
        title=listed(names),
        c=found,
        made=parts[0].made,
        running=[name for name, part in zip(names, parts, strict=True) if part.running],
        axes=axes,
        front_rows=_front_rows(complete, own),
        sweep_rows=[_sweep_row(row) for row in whole],
        key_rows=key_rows(found),
        method_rows=[_method_row(row) for row in found.table.to_dict("records")],
        whole=ALL,
        notes=footnotes(found),
        board_notes=["#: the rank within its sweep.", *notes[1:]],
        columns=[{"key": k, "title": t, "number": k not in ("sweep", *TEXTS)} for k, t in columns.items()],
        rows=[_board_row(row, columns_of(board)) for row in board.to_dict("records")],
        methods=sorted(board["method"].unique()),
        curve_methods=methods_with_losses(board, curves),
        has_val=any(curve["val"] for curve in curves.values()),
        share_rows=_share_rows(parts),
        class_heads=class_heads,
        class_rows=class_rows,
        class_title=CLASS_TITLES[kind][0],
        class_limit=CLASSES,
        statuses=list(dict.fromkeys(board["status"])),
        sweeps=names,
        parts=[{"name": name, "found": part} for name, part in zip(names, parts, strict=True)],
    )


def progress(board: pd.DataFrame) -> list[tuple[float, float]]:
    """(device-seconds of all trials until then, best val metric so far) at each trial that raised it, and at the end.

    Trials count in the order in which they ended, where that is recorded, else in that of their numbers.
    """
    ended = numbers(board, "ended") if "ended" in board else np.full(len(board), math.nan)
    order = np.lexsort((numbers(board, "number"), ended))
    spent, best = 0.0, -math.inf
    points: list[tuple[float, float]] = []
    seconds, values = numbers(board, "device_seconds"), numbers(board, "val_metric")
    complete = (board["status"] == "complete").to_numpy()
    for at in order:
        spent += float(np.nan_to_num(seconds[at]))
        if complete[at] and values[at] > best:
            best = float(values[at])
            points.append((spent, best))
    return [*points, (spent, best)] if points else []


def joint_board(names: Sequence[str], parts: Sequence[Gathered]) -> pd.DataFrame:
    """Rows of all sweeps, complete ones first and best first, with `sweep`; `trial_id` is SWEEP/TRIAL."""
    boards = [
        part.board.assign(sweep=name, trial_id=[f"{name}/{trial}" for trial in part.board["trial_id"]])
        for name, part in zip(names, parts, strict=True)
    ]
    board = pd.concat([b for b in boards if len(b)], ignore_index=True)
    done = (board["status"] == "complete").to_numpy()
    return pd.concat([ranked(board[done], "val_metric", "max"), board[~done]], ignore_index=True)


def joint_table(names: Sequence[str], parts: Sequence[Gathered]) -> pd.DataFrame:
    """The leaderboards of several sweeps below each other, as `table` has each, with `sweep` first."""
    tables = [table(part).assign(sweep=name) for name, part in zip(names, parts, strict=True) if len(part.board)]
    joint = pd.concat(tables, ignore_index=True)
    return joint[["sweep", *(c for c in joint.columns if c != "sweep")]]


def _board_row(row: Mapping[Any, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    sweep, trial = str(row["sweep"]), str(row["trial_id"]).rpartition("/")[2]
    made = table_row({**row, "trial_id": trial}, columns)
    name = {"key": "sweep", "number": False, "text": sweep, "title": "", "css": ""}
    return made | {"id": row["trial_id"], "cells": [name, *made["cells"]]}


def _front_rows(complete: pd.DataFrame, own: Mapping[str, Mapping[str, Sequence[str]]]) -> list[dict[str, Any]]:
    by_id = {row["trial_id"]: row for row in complete.to_dict("records")}
    return [
        {
            "axis": axis,
            "title": axis_title(axis),
            "sweep": sweep,
            "id": trial,
            "trial": trial.rpartition("/")[2],
            "method": by_id[trial]["method"],
            "val": cell(by_id[trial]["val_metric"], "val_metric"),
            "cost": cell(by_id[trial][axis], axis) | ({"text": count(by_id[trial][axis])} if axis == "flops" else {}),
        }
        for axis, fronts in own.items()
        for sweep, front in fronts.items()
        for trial in front
    ]


def _share_rows(parts: Sequence[Gathered]) -> list[dict[str, Any]]:
    """Of each choice, the share that it explains in each sweep; blank where a sweep does not know."""
    known = [{(one.among, c): s for one in part.study.importances for c, s in one.shares.items()} for part in parts]
    return [
        {
            "among": among,
            "choice": choice,
            "cells": [percent(shares.get((among, choice), math.nan)) for shares in known],
        }
        for among, choice in dict.fromkeys(key for shares in known for key in shares)
    ]


def _class_rows(
    bests: Mapping[str, str | None], names: Sequence[str], parts: Sequence[Gathered]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The sweeps whose best has results by class, and their values of each class; none where fewer than two have."""
    found = {
        name: {c["name"]: c["value"] for c in details["classes"]}
        for name, part in zip(names, parts, strict=True)
        for details in part.details
        if details["trial_id"] == bests[name] and details["classes"]
    }
    if len(found) < 2:
        return [], []
    rows = []
    for name in dict.fromkeys(name for values in found.values() for name in values):
        values = [values.get(name) for values in found.values()]
        held = [value for value in values if value is not None]
        spread = max(held) - min(held) if held else 0.0
        rows.append({"name": name, "spread": spread, "cells": [cell(value, "value") for value in values]})
    return list(found), sorted(rows, key=lambda row: -row["spread"])


def _sweep_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    counts = [cell(row[name], name) for name in ("complete", "trials")]
    return {
        "group": row["group"],
        "sweep": row["sweep"],
        "trial": row["trial_id"] or "",
        "id": f"{row['sweep']}/{row['trial_id']}",
        "method": row["method"] or "",
        "cells": [*counts, *(cell(row[name], name) for name in FACTS)],
    }


def _method_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    signed = [cell(row[name], "val_metric") for name in ("difference", "low", "high")]
    for one, name in zip(signed, ("difference", "low", "high"), strict=True):
        one["text"] = "" if math.isnan(row[name]) else f"{row[name]:+.4f}"
    cells = [cell(row["scored"], "trials")]
    cells += [cell(row[name], "val_metric") for name in ("mean", "sd", "best")]
    cells += [cell(row["trials"], "trials"), cell(row["device_seconds"], "device_seconds"), *signed]
    place = f"{row['best_sweep']}/{row['best_trial']}" if row["best_trial"] else ""
    verdict = difference_cells(row)[2]
    return {"among": row["among"], "group": row["group"], "id": place, "cells": cells, "verdict": verdict}
