"""A comparison of sweeps as a person reads it: in a terminal, and as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.select.comparison import ALL, Comparison
from orchestrator.select.leaderboard import count, real, significant
from orchestrator.select.report.page import grid, plain_text

SWEEPS = ["", "sweep", "complete", "best", "method", "val", "params", "latency, ms", "device-s", "saved s"]
METHODS = [
    "method",
    "",
    "sweeps",
    "mean of bests",
    "best",
    "of",
    "trials",
    "device-s",
    "difference",
    "95 % interval",
    "",
]


def sweep_rows(found: Comparison) -> list[list[str]]:
    """Cells under `SWEEPS`, a row a sweep."""
    rows = []
    for row in found.sweeps[found.sweeps["among"] == ALL].to_dict("records"):
        spread = "" if math.isnan(row["val_sd"]) else f" ± {row['val_sd']:.4f}"
        cells = [row["group"], row["sweep"], f"{row['complete']}/{row['trials']}"]
        cells += [row["trial_id"] or "-", row["method"] or "-", f"{real(row['val_metric'], 4)}{spread}"]
        cells += [count(row["params_total"]), significant(row["latency_ms"])]
        rows.append([*cells, real(row["device_seconds"], 1), real(row["store_seconds_saved"], 1)])
    return rows


def method_rows(found: Comparison) -> list[list[str]]:
    """Cells under `METHODS`, a row for each method in each group of sweeps."""
    rows = []
    for row in found.table.to_dict("records"):
        mean = real(row["mean"], 4) + ("" if math.isnan(row["sd"]) else f" ± {row['sd']:.4f}")
        where = f"{row['best_sweep']}:{row['best_trial']}" if row["best_trial"] else "-"
        cells = [row["among"], row["group"], f"{row['scored']}/{row['sweeps']}", mean, real(row["best"], 4), where]
        cells += [str(row["trials"]), real(row["device_seconds"], 1)]
        rows.append([*cells, *difference_cells(row)])
    return rows


def difference_cells(row: Mapping[Any, Any]) -> list[str]:
    """Difference, interval and verdict of a row of `Comparison.table`; blank for the group that others differ from."""
    if math.isnan(row["difference"]):
        return ["", "", ""]
    known = not math.isnan(row["low"])
    interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if known else "not known"
    verdict = ("more than noise" if row["certain"] else "may be chance") if known else ""
    return [f"{row['difference']:+.4f}", interval, verdict]


def key_rows(found: Comparison) -> list[list[str]]:
    """Each key that differs, with its value in every sweep."""
    return [[key, *map(shown_value, values)] for key, values in found.keys.items()]


def shown_value(value: Any) -> str:
    """A value of a sweep file in a cell: networks by name, what is long cut off."""
    if value is None:
        return "-"
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and "model" in v for v in value):
        text = ", ".join(_network(v) for v in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _network(entry: Mapping[str, Any]) -> str:
    more = [f"{k} {v}" for k, v in entry.items() if k != "model" and v not in (None, {})]
    return f"{entry['model']} ({', '.join(more)})" if more else str(entry["model"])


def footnotes(found: Comparison) -> list[str]:
    """What the columns mean."""
    first = next(iter(found.groups))
    notes = [f"val: the {found.metric} on val; each sweep's best is its complete trial with the largest."]
    if any(len(names) > 1 for names in found.groups.values()):
        notes.append("mean ± standard deviation of the bests of sweeps that differ only in their seeds.")
    if len(found.groups) > 1:
        notes.append(f"difference: of the means, from {first}; in doubt, take the cheaper one.")
    setups = {s for m in found.members for s in m.frame.loc[m.frame["status"] == "complete", "latency_setup"] if s}
    if len(setups) > 1:
        notes.append(f"Latencies were measured in different ways and do not compare: {'; '.join(sorted(setups))}.")
    return notes


def print_comparison(console: Console, found: Comparison) -> None:
    """Prints sentences and tables; made for 100 columns or more."""
    for sentence in found.sentences:
        console.print(Text(sentence), soft_wrap=True)
    blocks = [(SWEEPS, sweep_rows(found))]
    if found.keys:
        blocks.append((["key that differs", *(m.name for m in found.members)], key_rows(found)))
    blocks.append((METHODS, method_rows(found)))
    for head, rows in blocks:
        console.print()
        console.print(_table(head, rows))
    console.print()
    for note in footnotes(found):
        console.print(Text(note, style="dim"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def comparison_markdown(found: Comparison, made: str) -> str:
    """The same as Markdown."""
    blocks = [f"# {', '.join(m.name for m in found.members)}", f"Made {made}."]
    blocks += ["\n".join(f"- {plain_text(s)}" for s in found.sentences)]
    blocks += ["## The sweeps", grid(SWEEPS, sweep_rows(found))]
    if found.keys:
        blocks += ["## Keys that differ", grid(["key", *(m.name for m in found.members)], key_rows(found))]
    blocks += ["## By method", grid(METHODS, method_rows(found))]
    blocks += ["\n".join(f"- {plain_text(n)}" for n in footnotes(found))]
    return "\n\n".join(blocks) + "\n"


def plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain JSON; what is missing is null."""
    return json.loads(frame.to_json(orient="records", double_precision=15))
