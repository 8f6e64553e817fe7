"""Several sweeps side by side: each one's best, by method, and how far they are apart, in tables and sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from orchestrator.errors import UserError, listed
from orchestrator.select.comparison_noise import Run, difference
from orchestrator.select.members import Member, check_comparable, differing, seeds_of_one
from orchestrator.select.results import clause_of, known_metric, nearest_miss, numbers, ranked, within
from orchestrator.select.uncertainty import Lead
from orchestrator.spec import METRIC_NAMES

ALL = "all methods"
COSTS = ("device_seconds", "store_seconds_saved")
FACTS = ("trial_id", "method", "val_metric", "val_sd", "repeats", "params_total", "flops", "latency_ms")


@dataclass(frozen=True)
class Comparison:
    """Several sweeps side by side.

    Attributes:
        members: the sweeps, as they were given.
        groups: by letter, names of sweeps that differ only in their seeds; the first one is what others differ from.
        keys: keys of the sweep files that differ, each with its value in every sweep.
        sweeps: a row for each method (and `all methods`) in each sweep.
        table: a row for each method in each group: mean and sd of the sweeps' bests, and the difference.
        limits: that each best one keeps: the most of each metric, or the least of one that is better when larger.
        sentences: what a person should read.
    """

    members: list[Member]
    groups: dict[str, list[str]]
    keys: dict[str, list[Any]]
    sweeps: pd.DataFrame
    table: pd.DataFrame
    limits: dict[str, float]
    sentences: list[str]

    @property
    def metric(self) -> str:
        """What the val metric is."""
        return METRIC_NAMES[self.members[0].spec.task.kind]


def compare(members: Sequence[Member], limits: Mapping[str, float] | None = None) -> Comparison:
    """The sweeps side by side. The best trial of a sweep, or of a method in it, is its complete one with the best val
    metric.

    Args:
        members: the sweeps.
        limits: only trials that keep them are looked at, in place of the sweeps' own: those that were infeasible under
            these may be a sweep's best.

    Raises:
        UserError: if they do not compare, none has a complete trial that keeps the limits, or a limit is of a metric
            that a sweep does not have.
    """
    limits = {known_metric(name, m.frame): value for m in members for name, value in (limits or {}).items()}
    same = check_comparable(members)
    groups = seeds_of_one(members)
    letters = {m.name: letter for letter, group in groups.items() for m in group}
    methods = sorted({str(x) for m in members for x in m.frame["method"]})
    rows, bests = [], {}
    for among in (ALL, *methods):
        for member in members:
            row, best = _row(member, among, limits)
            rows.append({"among": among, "group": letters[member.name], "sweep": member.name, **row})
            bests[among, member.name] = best
    sweeps = pd.DataFrame(rows)
    if sweeps["val_metric"].isna().all():
        raise UserError(_why_none(members, limits))
    for column in ("repeats", "params_total", "flops"):
        sweeps[column] = sweeps[column].astype("Int64")
    table = []
    for among in (ALL, *methods):
        runs = {
            letter: [(m, b) for m in group if (b := bests[among, m.name]) is not None]
            for letter, group in groups.items()
        }
        reference = next(iter(runs.values()))
        for letter, mine in runs.items():
            if not any(sweeps.loc[(sweeps["among"] == among) & (sweeps["group"] == letter), "trials"]):
                continue
            lead = None if mine is reference else difference(mine, reference, same)
            table.append({"among": among, "group": letter, **_summary(mine, lead, sweeps, among, letter)})
    names = {letter: [m.name for m in group] for letter, group in groups.items()}
    result = Comparison(list(members), names, differing(members), sweeps, pd.DataFrame(table), limits, [])
    return Comparison(**{**vars(result), "sentences": _sentences(result, same)})


def _row(member: Member, among: str, limits: Mapping[str, float]) -> tuple[dict[str, Any], pd.Series | None]:
    mine = member.frame if among == ALL else member.frame[member.frame["method"] == among]
    complete = within(_scored(mine, limits), limits)
    best = ranked(complete, "val_metric", "max").iloc[0] if len(complete) else None
    facts: dict[str, Any] = {"trials": len(mine), "complete": len(complete)}
    for name in FACTS:
        value = None if best is None or pd.isna(best[name]) else best[name]
        facts[name] = math.nan if value is None and name in ("val_metric", "val_sd", "latency_ms") else value
    return facts | {name: float(numbers(mine, name)[~pd.isna(numbers(mine, name))].sum()) for name in COSTS}, best


def _scored(frame: pd.DataFrame, limits: Mapping[str, float]) -> pd.DataFrame:
    """Rows with a student and a val metric; those beyond a sweep's own limits too where others are given."""
    statuses = ["complete", "infeasible"] if limits else ["complete"]
    return frame[frame["status"].isin(statuses).to_numpy() & ~pd.isna(numbers(frame, "val_metric"))]


def _why_none(members: Sequence[Member], limits: Mapping[str, float]) -> str:
    rows = [_scored(m.frame, limits).assign(sweep=m.name) for m in members]
    scored = pd.concat([r.assign(trial_id=r["sweep"] + ":" + r["trial_id"]) for r in rows])
    if scored.empty:
        return f"None of the sweeps {listed(m.name for m in members)} has a complete trial."
    return nearest_miss(scored, limits)


def _summary(runs: list[Run], lead: Lead | None, sweeps: pd.DataFrame, among: str, letter: str) -> dict[str, Any]:
    mine = sweeps[(sweeps["among"] == among) & (sweeps["group"] == letter)]
    values = [float(row["val_metric"]) for _, row in runs]
    best = max(runs, key=lambda run: float(run[1]["val_metric"]), default=None)
    blank = Lead(math.nan, math.nan, math.nan, False, 0, 0)
    shown = lead or blank
    return {
        "sweeps": len(mine),
        "scored": len(runs),
        "mean": statistics.fmean(values) if values else math.nan,
        "sd": statistics.stdev(values) if len(values) > 1 else math.nan,
        "best": max(values, default=math.nan),
        "best_sweep": best[0].name if best else "",
        "best_trial": str(best[1]["trial_id"]) if best else "",
        "trials": int(mine["trials"].sum()),
        **{name: float(mine[name].sum()) for name in COSTS},
        "difference": shown.value,
        "low": shown.low,
        "high": shown.high,
        "certain": None if lead is None or math.isnan(lead.low) else lead.certain,
        "paired": None if lead is None else lead.paired,
    }


def _sentences(found: Comparison, same: bool) -> list[str]:
    said = []
    if found.limits:
        clauses = listed(clause_of(metric, value) for metric, value in found.limits.items())
        said.append(f"Only trials with {clauses} are looked at.")
    whole = found.table[found.table["among"] == ALL]
    best = whole.loc[whole["best"].idxmax()]
    said.append(
        f"The best of all is {best['best_sweep']}'s {best['best_trial']}, {found.metric} on val {best['best']:.4f}."
    )
    for letter, names in found.groups.items():
        if len(names) > 1:
            said.append(f"{letter}: {listed(names)} differ only in their seeds and are taken together.")
    first = next(iter(found.groups))
    for row in whole.to_dict("records"):
        if row["group"] != first and not math.isnan(row["difference"]):
            said.append(f"{_name(found, row['group'])} {lead_words(row, _name(found, first))}")
    if not same:
        said.append("The val images differ between the seeds (task.seed), so no two students are compared by image.")
    lone = all(len(names) == 1 for names in found.groups.values())
    if lone and not (found.sweeps["repeats"].fillna(1) > 1).any():
        said.append("Each sweep is one seed: how much another seed would change is not in the intervals.")
    counts = found.sweeps.loc[found.sweeps["among"] == ALL, "complete"]
    if counts.max() > counts.min():
        kept = " within the limits" if found.limits else ""
        said.append(
            f"They have {listed(counts)} complete trials{kept}: the best of more is better by luck alone, which no "
            "interval here takes off."
        )
    return said


def _name(found: Comparison, letter: str) -> str:
    names = found.groups[letter]
    return f"{letter} ({names[0]})" if len(names) == 1 else f"{letter} ({len(names)} seeds)"


def lead_words(row: Mapping[str, Any], other: str) -> str:
    """`is 0.031 above A; 95 % interval ...: more than noise.` of a row of `Comparison.table`."""
    value = row["difference"]
    where = "level with" if value == 0 else f"{abs(value):.4f} {'above' if value > 0 else 'below'}"
    if row["certain"] is None:
        return f"is {where} {other}; no val images were recorded to tell whether that is noise."
    how = "image by image" if row["paired"] else "taking the images as independent"
    verdict = "more than noise" if row["certain"] else "may be chance"
    return f"is {where} {other}; 95 % interval {row['low']:+.4f} to {row['high']:+.4f}, {how}: {verdict}."
