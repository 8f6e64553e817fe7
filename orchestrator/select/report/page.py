"""The report as one HTML file that loads nothing, and as Markdown."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.errors import listed
from orchestrator.select.leaderboard import count, real, significant
from orchestrator.select.report.gather import SUMS, Gathered, axis_title, knobs_of
from orchestrator.select.results import latencies, short_name
from orchestrator.spec import Kind

COLUMNS = {
    "rank": "#",
    "trial_id": "trial",
    "method": "method",
    "teacher": "teacher",
    "student": "student",
    "status": "status",
    "val_metric": "val",
    "val_sd": "± sd",
    "params_total": "params",
    "params_trained": "trained",
    "flops": "MFLOPs",
    "latency_ms": "latency, ms",
    "latency_iqr_ms": "IQR, ms",
    "memory_mb": "memory, MB",
    "model_mb": "file, MB",
    "optimizer_steps": "steps",
    "images_seen": "images seen",
    "device_seconds": "device-s",
    "store_seconds_saved": "saved s",
    "teacher_forwards": "teacher fw",
    "teacher_forwards_shared": "shared fw",
    "reason": "reason",
}
TEXTS = ("trial_id", "method", "teacher", "student", "status", "reason")
OPTIONAL = ("val_sd", "memory_mb", "model_mb", "reason")  # left out where no row has one
CLASS_TITLES: dict[Kind, tuple[str, str]] = {
    "classification": ("recall", "precision"),
    "multilabel": ("AUROC", ""),
    "segmentation": ("IoU", ""),
}
NO_DETAILS = "the sweep has no complete trial, or was run by a version that did not keep them."


def html(found: Gathered) -> str:
    """One page: styles, script, numbers and pictures inside; its security policy lets it load nothing."""
    kind, board = found.spec.task.kind, found.board
    found = replace(found, details=[with_cells(d, kind) for d in found.details])
    return rendered(
        "page.html.jinja",
        _charts(found),
        f=found,
        axes={m: axis_title(m) for m in found.fronts},
        columns=[{"key": k, "title": t, "number": k not in TEXTS} for k, t in columns_of(board).items()],
        rows=[table_row(row, columns_of(board)) for row in board.to_dict("records")],
        methods=sorted(board["method"].unique()),
        statuses=list(dict.fromkeys(board["status"])),
        front_rows=_front_rows(found),
        best_rows=[_best(found, row) for row in found.best.to_dict("records")],
        curve_methods=methods_with_losses(board, found.curves),
        has_val=any(c["val"] for c in found.curves.values()),
        slice_methods=list(dict.fromkeys(board["method"])),
        unreckoned=_unreckoned(found),
        cost_sentences=cost_sentences(found),
        cost_rows=_cost_rows(found),
        class_titles=CLASS_TITLES[kind],
        why_no_details=NO_DETAILS,
    )


def rendered(template: str, data: Mapping[str, Any], **values: Any) -> str:
    """A page of a template: styles, script and `data` inside."""
    environment = Environment(
        loader=PackageLoader("orchestrator.select.report", "."), autoescape=True, undefined=StrictUndefined
    )
    assert environment.loader is not None
    script, css = (environment.loader.get_source(environment, name)[0] for name in ("page.js", "page.css"))
    script = script.replace("\r\n", "\n")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        css=Markup(css),  # ours, as is the script
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        data=Markup(_json_in_html(data)),
        **values,
    )


def methods_with_losses(board: pd.DataFrame, curves: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Methods of which a trial's loss is known, in the board's order."""
    known = [trial for trial, curve in curves.items() if curve["losses"]]
    return list(dict.fromkeys(board.loc[board["trial_id"].isin(known), "method"]))


def _json_in_html(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _charts(found: Gathered) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "axes": {m: axis_title(m) for m in found.fronts},
        "fronts": found.fronts,
        "recommended": found.study.recommended,
        "curves": found.curves,
        "export": export_command(found.folder),
    }


def export_command(folder: Path) -> str:
    """What takes a student of a sweep away, but for its `--trial`, which the page's script adds."""
    return f"python -m orchestrator export {shlex.quote(str(folder))} OUT"


def columns_of(board: pd.DataFrame) -> dict[str, str]:
    """Columns of the leaderboard with their titles; those that no row has are left out."""
    empty = {c for c in OPTIONAL if board[c].isna().all() or (board[c].astype(str) == "").all()}
    found: dict[str, str] = {}
    for key, title in COLUMNS.items():
        if key not in empty:
            found[key] = title
        if key == "latency_iqr_ms":
            found |= {metric: axis_title(metric) for metric in latencies(board)[1:]}
    return found


def cell(value: Any, key: str, like: Any = None) -> dict[str, Any]:
    """A number as it is recorded (`value`) and as it is shown (`text`); none where it is missing."""
    if value is None or pd.isna(value) or (isinstance(value, float) and not math.isfinite(value)):
        return {"key": key, "number": True, "value": None, "text": "-"}
    plain = int(value) if isinstance(value, int) or float(value).is_integer() else float(value)
    return {"key": key, "number": True, "value": repr(plain), "text": shown(plain, key, like)}


def shown(value: float, key: str, like: Any = None) -> str:
    """A number of the column `key`, as a person reads it; `-` where it is missing."""
    if pd.isna(value):
        return "-"
    if key in ("val_metric", "val_sd", "value", "precision"):
        return real(value, 4)
    if key == "flops":
        return significant(value / 1e6)
    if key.startswith("latency_") or key in ("memory_mb", "model_mb"):
        return significant(value, like)
    if key in ("device_seconds", "store_seconds_saved", "store_seconds_paid"):
        return real(value, 1)
    return f"{value:,.0f}"


def table_row(row: Mapping[Any, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A trial's row of the leaderboard: cells, knobs, and whether it is the first of its sweep."""
    cells = []
    for key in columns:
        if key in TEXTS:
            text = row[key] if isinstance(row[key], str) else ""
            css = {"teacher": "net", "student": "net", "reason": "why", "status": str(row["status"])}.get(key, "")
            network = key in ("teacher", "student")
            title = text if network else ""
            cells.append(
                {"key": key, "number": False, "text": short_name(text) if network else text, "title": title, "css": css}
            )
        else:
            blank = row["status"] != "complete" and key in ("params_total", "params_trained", "flops") and not row[key]
            like = row["latency_ms"] if key == "latency_iqr_ms" else None
            cells.append(cell(None if blank else row[key], key, like))
    knobs = json.dumps(knobs_of(row), sort_keys=True)
    return {
        "id": row["trial_id"],
        "cells": cells,
        "knobs": knobs,
        "first": row["rank"] is not pd.NA and row["rank"] == 1,
    }


def _front_rows(found: Gathered) -> list[dict[str, Any]]:
    by_id = {row["trial_id"]: row for row in found.board.to_dict("records")}
    return [
        {
            "axis": axis,
            "title": axis_title(axis),
            "trial": trial,
            "method": by_id[trial]["method"],
            "val": cell(by_id[trial]["val_metric"], "val_metric"),
            "cost": cell(by_id[trial][axis], axis) | ({"text": count(by_id[trial][axis])} if axis == "flops" else {}),
        }
        for axis, front in found.fronts.items()
        for trial in front
    ]


def _best(found: Gathered, row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "id": row["trial_id"],
        "method": row["method"],
        "val": cell(row["val_metric"], "val_metric"),
        "params": cell(row["params_total"], "params_total"),
        "flops": cell(row["flops"], "flops"),
        "latency": cell(row["latency_ms"], "latency_ms"),
        "trials": int((found.board["method"] == row["method"]).sum()),
        "knobs": ", ".join(f"{k} {_knob(v)}" for k, v in knobs_of(row).items()) or "none",
    }


def _knob(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _unreckoned(found: Gathered) -> list[str]:
    """Why there are no importances, with the methods that a reason concerns."""
    reasons: dict[str, list[str]] = {}
    for one in found.study.importances:
        if not one.shares:
            reasons.setdefault(one.reason, []).append(f"{one.among} ({one.trials})")
    return [f"{listed(names)}: {reason}" for reason, names in reasons.items()]


def cost_sentences(found: Gathered) -> list[str]:
    """What the sweep took, what sharing saved, and what came to nothing."""
    (whole,) = found.costs["all"]
    by = {row["name"]: row for row in found.costs["status"]}
    total = whole["device_seconds"]
    ran = "" if math.isnan(found.study.seconds) else f"; the sweep ran {real(found.study.seconds, 0)} s"
    said = [f"{real(total, 1)} device-seconds in {whole['trials']} trials{ran}."]
    saved, shared = whole["store_seconds_saved"], whole["teacher_forwards_shared"]
    if not math.isnan(saved):
        share = f", where computing everything would have taken {real(saved + total, 1)}" if saved > 0 else ""
        said.append(
            f"Sharing saved {real(saved, 1)} seconds{share}; {count(shared)} teacher forwards were read instead of "
            f"made, {count(whole['teacher_forwards'])} were made."
        )
    for status, words in (("failed", "failed"), ("pruned", "stopped early"), ("infeasible", "beyond a limit")):
        if status in by:
            spent = by[status]["device_seconds"]
            share = f" ({spent / total:.0%})" if total else ""
            many = by[status]["trials"]
            said.append(f"{many} trial{'' if many == 1 else 's'} {words}: {real(spent, 1)} device-seconds{share}.")
    return said


def _cost_rows(found: Gathered) -> dict[str, list[dict[str, Any]]]:
    total = found.costs["all"][0]["device_seconds"]
    result = {}
    for key in ("status", "method"):
        rows = [*found.costs[key], *found.costs["all"]]
        result[key] = [
            {
                "name": row["name"],
                "total": at == len(rows) - 1,
                "cells": [
                    cell(row["trials"], "trials"),
                    cell(row["device_seconds"], "device_seconds"),
                    percent(row["device_seconds"] / total if total else math.nan),
                    *(cell(row[name], name) for name in SUMS[1:]),
                ],
            }
            for at, row in enumerate(rows)
        ]
    return result


def percent(value: float) -> dict[str, Any]:
    """A share as a cell."""
    return cell(value, "share") | ({"text": f"{value:.0%}"} if math.isfinite(value) else {})


def with_cells(details: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Results by class with numbers as cells, shades of the confusion matrix, and captions of errors."""
    cells = [
        {
            "name": c["name"],
            "images": cell(c["images"], "images"),
            "value": cell(c["value"], "value"),
            "precision": cell(c.get("precision"), "precision"),
        }
        for c in details["classes"]
    ]
    heat = []
    for line in details["confusion"] or []:
        held = max(1, sum(line))
        heat.append([{"count": n, "shade": f"{0.75 * n / held:.3f}"} for n in line])
    return details | {"cells": cells, "heat": heat, "errors": [_error(e, kind) for e in details["worst"]]}


def _error(error: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    where, value = f"val image {error['row']}", error["value"]
    truth, said = (", ".join(error[k]) or "none" for k in ("truth", "said"))
    if kind == "segmentation":
        caption = f"mean IoU {value:.3f}"
    elif kind == "multilabel":
        caption = f"{truth}; said {said} (loss {value:.2f})"
    else:
        caption = f"{truth}, taken for {said} ({value:.0%} sure)"
    return {"picture": error["picture"], "caption": f"{caption}; {where}", "alt": f"{where}: {caption}"}


def markdown(found: Gathered) -> str:
    """The report without charts and pictures."""
    kind = found.spec.task.kind
    blocks = [f"# {found.spec.name}", f"{found.counts}{'; still running' if found.running else ''}. Made {found.made}."]
    blocks.append("\n".join(f"- {plain_text(s)}" for s in found.study.sentences))
    if len(found.board):
        columns = columns_of(found.board)
        rows = [[c["text"] for c in table_row(r, columns)["cells"]] for r in found.board.to_dict("records")]
        blocks += [
            "## Leaderboard",
            grid(list(columns.values()), rows),
            "\n".join(f"- {plain_text(n)}" for n in found.notes),
        ]
        front = [[r["title"], r["trial"], r["method"], r["val"]["text"], r["cost"]["text"]] for r in _front_rows(found)]
        blocks += ["## Pareto front", grid(["against", "trial", "method", found.metric, "costs"], front)]
        best = [_best(found, row) for row in found.best.to_dict("records")]
        names = ("val", "params", "flops", "latency")
        lines = [[b["method"], b["id"], *(b[n]["text"] for n in names), str(b["trials"]), b["knobs"]] for b in best]
        head = ["method", "trial", found.metric, "params", "MFLOPs", "latency, ms", "trials", "knobs"]
        blocks += ["## The best of each method", grid(head, lines)]
        shares = [
            [i.among, str(i.trials), name, f"{share:.0%}"]
            for i in found.study.importances
            for name, share in i.shares.items()
        ]
        if shares:
            blocks += ["## What mattered", grid(["among", "trials", "choice", "share"], shares)]
        head = ["", "trials", "device-s", "share", "store s paid", "store s saved", "teacher forwards", "shared"]
        costs = [
            [r["name"], *(c["text"] for c in r["cells"])]
            for key in ("status", "method")
            for r in _cost_rows(found)[key]
        ]
        blocks += ["## What it cost", "\n".join(f"- {s}" for s in cost_sentences(found)), grid(head, costs)]
        for details in found.details[:1]:
            titles = [t for t in CLASS_TITLES[kind] if t]
            classes = with_cells(details, kind)["cells"]
            lines = [
                [c["name"], c["images"]["text"], c["value"]["text"], c["precision"]["text"]][: 2 + len(titles)]
                for c in classes
            ]
            blocks += [f"## Results by class of {details['trial_id']}", grid(["class", "images", *titles], lines)]
    blocks.append("## How to reproduce")
    blocks += [f"{what}\n```\n{command}\n```" for what, command in found.study.commands]
    blocks.append(f"`sweep.yaml`:\n```yaml\n{found.study.yaml.strip()}\n```")
    return "\n\n".join(block for block in blocks if block) + "\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(plain_text(str(c)) for c in line) + " |" for line in lines)


def plain_text(text: str) -> str:
    """Text that is text in Markdown too."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|<`*_[":
        text = text.replace(mark, "\\" + mark)
    return text
