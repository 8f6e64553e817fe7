"""Several sweeps side by side: each one's best, by method, and whether what they differ by is more than noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from orchestrator.errors import UserError, listed
from orchestrator.evaluate.details import FILE
from orchestrator.evaluate.outcomes import compare_groups
from orchestrator.select.results import clause_of, known_metric, nearest_miss, numbers, ranked, read_trials, within
from orchestrator.select.uncertainty import Lead, T, paired_gains
from orchestrator.spec import METRIC_NAMES, SweepSpec, read_spec

ALL = "all methods"
VAL_KEYS = ("kind", "data", "splits", "ignore_index")  # of `task`: with `seed`, they say which images are in val
# What does not change a trial's result, and what makes another seed of the same sweep.
PLACES = ("name", "storage", "store", "cluster", "estimate", "generate")
STUDY_PLACES = ("search.study", "search.study_file", "search.study_patience_s")
SEEDS = ("search.seed", "task.seed", "task.draw")
COSTS = ("device_seconds", "store_seconds_saved")
FACTS = ("trial_id", "method", "val_metric", "val_sd", "repeats", "params_total", "flops", "latency_ms")


@dataclass(frozen=True)
class Member:
    """One of the sweeps that are compared.

    Attributes:
        name: of its folder, with as much of the path as tells it from the others.
        folder: its own.
        spec: its file.
        frame: its trials.
        val: identity of its val images; empty if none was recorded.
        images: of val; 0 if not recorded.
    """

    name: str
    folder: Path
    spec: SweepSpec
    frame: pd.DataFrame
    val: str
    images: int

    @property
    def seed(self) -> tuple[int, int, int]:
        """What may differ between two sweeps that are seeds of one."""
        return self.spec.search.seed, self.spec.task.seed, self.spec.task.draw


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


def read_members(folders: Sequence[Path]) -> list[Member]:
    """The sweeps in `folders`.

    Raises:
        UserError: if one is no sweep, there are fewer than two, or one is given twice.
    """
    places = [folder.expanduser().absolute() for folder in folders]
    if len(places) < 2:
        raise UserError("Comparing takes two sweeps or more; give the folder of another one.")
    for at, place in enumerate(places):
        if place in places[:at]:
            raise UserError(f"The sweep {str(folders[at])!r} is given twice.")
    frames = [read_trials(folder) for folder in folders]
    names = _names(places)
    specs = [read_spec(place / "sweep.yaml") for place in places]
    return [
        Member(name, place, spec, frame, *_val_of(place, frame))
        for name, place, spec, frame in zip(names, places, specs, frames, strict=True)
    ]


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    depth = 1
    while True:
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _val_of(folder: Path, frame: pd.DataFrame) -> tuple[str, int]:
    """Identity and number of val images, as the first student that says it has it."""
    val, images = "", 0
    for path in frame["student_path"]:
        if not path:
            continue
        val = val or str(_read(folder / path / "student.json").get("val", ""))
        images = images or int(_read(folder / path / FILE).get("images", 0))
        if val and images:
            break
    return val, images


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_comparable(members: Sequence[Member]) -> bool:
    """Whether all were scored on the same val images; False: each seed has its own, split from the same data.

    Raises:
        UserError: if their val metrics do not compare, naming the key that differs.
    """
    first, same = members[0], True
    for other in members[1:]:
        known = bool(first.val and other.val)
        if other.spec.task.kind == first.spec.task.kind and known and first.val == other.val:
            continue
        for key in VAL_KEYS:
            here, there = getattr(first.spec.task, key), getattr(other.spec.task, key)
            if here != there:
                raise UserError(
                    f"The sweeps {first.name!r} and {other.name!r} do not compare: task.{key} is {_plain(here)} in the "
                    f"one and {_plain(there)} in the other, so they were scored on different data."
                )
        if first.spec.task.seed != other.spec.task.seed:
            same = False
        elif known:
            raise UserError(
                f"The sweeps {first.name!r} and {other.name!r} do not compare: task.data is {first.spec.task.data!r} "
                "in both, but it held other val images or labels when the second one ran."
            )
    return same


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A mapping's leaves by dotted key; lists are leaves, and networks are their names where that says all."""
    if isinstance(value, Mapping) and value:
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
    return {prefix[:-1]: value}


def differing(members: Sequence[Member]) -> dict[str, list[Any]]:
    """Keys of the sweep files whose values differ, each with its value in every sweep (None: not there)."""
    files = [flat(m.spec.model_dump(mode="json", exclude={"name", "storage"})) for m in members]
    names = dict.fromkeys(name for file in files for name in file)
    found = {name: [file.get(name) for file in files] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def seeds_of_one(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Sweeps that differ only in their seeds, together, by a letter; in the order of their first ones."""
    found: dict[str, list[Member]] = {}
    for member in members:
        leaves = flat(member.spec.model_dump(mode="json", exclude=set(PLACES)))
        key = json.dumps({k: v for k, v in leaves.items() if k not in (*STUDY_PLACES, *SEEDS)}, sort_keys=True)
        found.setdefault(key, []).append(member)
    return {_letter(at): group for at, group in enumerate(found.values())}


def _letter(at: int) -> str:
    return ("" if at < 26 else _letter(at // 26 - 1)) + chr(ord("A") + at % 26)


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


Run = tuple[Member, pd.Series]


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


def difference(mine: list[Run], reference: list[Run], same: bool) -> Lead | None:
    """How far the mean of some sweeps' bests is above that of others, with a 95 % interval; None where either is empty.

    Noise of the images is that of a paired bootstrap over the val images where each student's outcomes were kept, else
    of independent accuracies. Noise of the seeds is that of the sweeps of each group (paired where both groups have the
    same seeds), or of a lone sweep's repeats. With one sweep and one run on both sides it is not known, and left out.

    Args:
        mine, reference: sweeps with their best rows.
        same: whether all were scored on the same val images.
    """
    if not mine or not reference:
        return None
    value = _mean(mine) - _mean(reference)
    kind = mine[0][0].spec.task.kind
    images = min(m.images for m, _ in (*mine, *reference))
    found = None
    if same:
        found = compare_groups(
            kind, *([m.folder / str(r["student_path"]) for m, r in side] for side in (mine, reference))
        )
    seeds, freedom = _seed_noise(mine, reference)
    if found is not None:
        if seeds is None and abs(found.value - value) < 1e-9:  # the bootstrap's own interval need not be symmetric
            return Lead(value, found.low, found.high, True, found.images, 1)
        error = found.error
    elif images:
        sides = [_image_noise(side, images, same) for side in (mine, reference)]
        error = math.hypot(*sides)
        if not same and min(len(mine), len(reference)) > 1:
            error = 0.0  # each seed has its own images: the spread over seeds holds their noise
    else:
        return Lead(value, math.nan, math.nan, False, 0, 1)
    quantile = T[freedom - 1] if freedom <= len(T) else 1.96
    half = math.hypot(1.96 * error, quantile * seeds) if seeds is not None else 1.96 * error
    count = found.images if found is not None else images
    return Lead(value, value - half, value + half, found is not None, count, min(len(mine), len(reference)))


def _mean(runs: list[Run]) -> float:
    return statistics.fmean(float(row["val_metric"]) for _, row in runs)


def _image_noise(runs: list[Run], images: int, same: bool) -> float:
    errors = [math.sqrt(max(p * (1 - p), 0.0) / images) for _, row in runs if (p := float(row["val_metric"])) >= 0]
    return statistics.fmean(errors) if same else math.hypot(*errors) / len(errors)


def _seed_noise(mine: list[Run], reference: list[Run]) -> tuple[float | None, int]:
    """Standard error of the difference by the seeds, with its degrees of freedom; None where no spread is known."""
    by_seed = [{m.seed: float(row["val_metric"]) for m, row in side} for side in (mine, reference)]
    pairs = by_seed[0].keys() == by_seed[1].keys() and len(by_seed[0]) == len(mine) == len(reference)
    paired = [by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]] if pairs else []
    if len(paired) == 1:
        paired = paired_gains(mine[0][1], reference[0][1])
    if len(paired) > 1:
        return statistics.stdev(paired) / math.sqrt(len(paired)), len(paired) - 1
    spreads = [_spread(side) for side in (mine, reference)]
    known = [(variance, runs) for variance, runs in spreads if variance is not None]
    if not known:
        return None, 1
    # A side without a spread of its own is taken to have the other's.
    parts = [((known[0][0] if variance is None else variance) / runs, runs) for variance, runs in spreads]
    total = sum(part for part, _ in parts)
    ((_, runs),) = known if len(known) == 1 else ((0.0, 2),)
    if len(known) == 1 or not total:
        return math.sqrt(total), max(runs - 1, 1)
    return math.sqrt(total), max(1, math.floor(total**2 / sum(part**2 / (n - 1) for part, n in parts)))


def _spread(runs: list[Run]) -> tuple[float | None, int]:
    """Variance of a single run, and how many there are: over the sweeps, or of a lone one over its repeats."""
    values = [float(row["val_metric"]) for _, row in runs]
    if len(values) > 1:
        return statistics.variance(values), len(values)
    row = runs[0][1]
    repeats, sd = int(row["repeats"]), float(row["val_sd"])
    return (sd**2, repeats) if repeats > 1 and math.isfinite(sd) else (None, 1)


def _plain(value: Any) -> str:
    text = json.dumps(value if not hasattr(value, "model_dump") else value.model_dump(mode="json"))
    return text.replace('"', "'")


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
