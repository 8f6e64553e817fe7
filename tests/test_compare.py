"""Several sweeps side by side: what differs, each one's best, and whether the difference is more than noise."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compare_cases import IMAGES, hand_made, outcomes
from test_report import Page, same
from typer.testing import CliRunner

from orchestrator import Sweep, compare
from orchestrator.cli import app
from orchestrator.errors import UserError
from orchestrator.select.results import read_trials
from orchestrator.select.uncertainty import lead_of
from orchestrator.sweep.compare import compare_sweeps, write_several
from orchestrator.sweep.ledger import Ledger

METHODS = {"finetune": {}, "kd": {"temperature": [1.0, 2.0]}}
STEPS = {"steps": 12, "batch": 12, "views": 2}


def two(data: Path, storage: Path, lead: float = 0.0, **changes: Any) -> list[Path]:
    """`b` trains twice as long as `a`, and its kd is `lead` better on the same images."""
    first = outcomes(0.6)
    better = outcomes(0.6 + lead, 1, like=first)
    a = hand_made(data, storage, "a", [("finetune", outcomes(0.5)), ("kd", first)])
    trials = [("finetune", outcomes(0.55)), ("kd", better), ("kd", outcomes(0.3))]
    return [a, hand_made(data, storage, "b", trials, **{"train": STEPS} | changes)]


def test_every_number_is_that_of_the_trials_and_the_keys_that_differ_are_named(colours: Path, tmp_path: Path) -> None:
    a, b = two(colours, tmp_path, 0.2)
    found = compare([a, Sweep(b)])
    assert found.attrs["keys"] == {"train.steps": [6, 12]}
    assert found.attrs["groups"] == {"A": ["a"], "B": ["b"]}
    rows = found.set_index(["among", "sweep"])
    for folder in (a, b):
        table = pd.read_parquet(folder / "trials.parquet")
        for among in ("all methods", "finetune", "kd"):
            mine = table if among == "all methods" else table[table["method"] == among]
            best = mine.loc[mine["val_metric"].idxmax()]
            row = rows.loc[among, folder.name]
            for name in ("trial_id", "method", "val_metric", "params_total", "latency_ms"):
                assert row[name] == best[name]
            assert (row["trials"], row["complete"]) == (len(mine), (mine["status"] == "complete").sum())
            assert row["device_seconds"] == pytest.approx(mine["device_seconds"].sum())
            assert row["mean"] == row["val_metric"]
    assert rows.loc["kd", "b"]["difference"] == pytest.approx(0.2)
    assert math.isnan(rows.loc["kd", "a"]["difference"])


def test_one_image_by_image_finds_what_independent_accuracies_do_not(colours: Path, tmp_path: Path) -> None:
    """12 images of 400 more, none less: a paired test sees it; 0.03 of two independent accuracies would be chance."""
    found = compare(two(colours, tmp_path / "paired", 0.03)).set_index(["among", "sweep"])
    row = found.loc["kd", "b"]
    assert row["certain"]
    error = math.sqrt(0.03 * 0.97 / IMAGES)
    assert row["low"] == pytest.approx(0.03 - 1.96 * error, abs=0.004)
    found = compare(two(colours, tmp_path / "not kept", 0.03, kept=False)).set_index(["among", "sweep"])
    row = found.loc["kd", "b"]
    assert not row["certain"]
    error = math.sqrt(0.6 * 0.4 / IMAGES + 0.63 * 0.37 / IMAGES)
    assert (row["high"] - row["low"]) / 2 == pytest.approx(1.96 * error)


def test_sweeps_that_differ_only_in_their_seeds_are_one_with_mean_and_sd(colours: Path, tmp_path: Path) -> None:
    base = outcomes(0.6)
    seeds = {"search": {"trials": 5, "seed": 1}}, {"task": {"data": f"folder:{colours}", "shots": 4, "draw": 2}}
    folders = []
    for at, changes in enumerate(({}, *seeds)):
        for name, lead, more in (("a", 0.0, {}), ("b", 0.05, {"train": STEPS})):
            right = outcomes(0.6 + lead + 0.02 * at, at, like=base)
            folders.append(hand_made(colours, tmp_path, f"{name}{at}", [("kd", right)], **changes, **more))
    found = compare_sweeps(folders)
    assert found.groups == {"A": ["a0", "a1", "a2"], "B": ["b0", "b1", "b2"]}
    assert set(found.keys) == {"train.steps", "search.seed", "task.draw"}
    rows = found.table.set_index(["among", "group"])
    assert rows.loc["kd", "A"]["mean"] == pytest.approx(0.62)
    assert rows.loc["kd", "A"]["sd"] == pytest.approx(0.02)
    row = rows.loc["kd", "B"]  # each pair of seeds differs by 0.05 exactly, so only the images make noise
    assert row["difference"] == pytest.approx(0.05)
    assert row["certain"]
    assert row["best_sweep"] == "b2"
    # Without the partner of one seed they are no pairs: the seeds' own spread counts, by Student's t.
    unpaired = compare_sweeps(folders[:-1]).table.set_index(["among", "group"]).loc["kd", "B"]
    assert not unpaired["certain"]
    assert "A: a0, a1 and a2 differ only in their seeds and are taken together." in found.sentences


def repeated(folder: Path, trial: str, values: list[float]) -> pd.Series:
    """The row of a trial as if it had been repeated, with these val metrics."""
    path = folder / "trials" / f"{trial}.json"
    row = json.loads(path.read_text())
    row |= {"val_metric": statistics.mean(values), "val_sd": statistics.stdev(values)}
    row |= {"val_values": json.dumps(values), "repeats": len(values)}
    path.write_text(json.dumps(row))
    Ledger(folder).publish()
    return read_trials(folder).set_index("trial_id", drop=False).loc[trial]


@pytest.mark.parametrize("kept", [True, False], ids=["image by image", "independent"])
def test_a_repeat_that_agrees_leaves_the_interval_of_the_images_as_it_is(
    colours: Path, tmp_path: Path, kept: bool
) -> None:
    right = outcomes(0.6)
    folder = hand_made(colours, tmp_path, "a", [("kd", outcomes(0.7, 1, like=right)), ("kd", right)], kept=kept)
    one = read_trials(folder).set_index("trial_id", drop=False)
    alone = lead_of(folder, one.loc["t0000"], one.loc["t0001"], IMAGES, "classification")
    rows = [repeated(folder, "t0000", [0.7, 0.7002]), repeated(folder, "t0001", [0.6, 0.6])]
    twice = lead_of(folder, rows[0], rows[1], IMAGES, "classification")
    assert (alone.paired, alone.repeats, twice.repeats) == (kept, 1, 2)
    assert twice.high - twice.low == pytest.approx(alone.high - alone.low, rel=0.02)
    # The seeds' noise alone: Student's t of two, 12.7, times the standard error of the differences 0.10 and 0.12.
    rows = [repeated(folder, "t0000", [0.7, 0.72]), repeated(folder, "t0001", [0.6, 0.6])]
    noisy = lead_of(folder, rows[0], rows[1], IMAGES, "classification")
    half = math.hypot((twice.high - twice.low) / 2, 12.706 * 0.01)
    assert (noisy.high - noisy.low) / 2 == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize("kept", [True, False], ids=["image by image", "independent"])
@pytest.mark.parametrize("values", [[0.7, 0.72, 0.69], None], ids=["both repeated", "one repeated"])
def test_two_trials_have_the_interval_that_two_sweeps_of_them_have(
    colours: Path, tmp_path: Path, kept: bool, values: list[float] | None
) -> None:
    right = outcomes(0.6)
    better = outcomes(0.7, 1, like=right)
    both = hand_made(colours, tmp_path, "both", [("kd", better), ("kd", right)], kept=kept)
    second = repeated(both, "t0001", [0.6, 0.59, 0.62])
    first = repeated(both, "t0000", values) if values else read_trials(both).iloc[0]
    lead = lead_of(both, first, second, IMAGES, "classification")
    a = hand_made(colours, tmp_path, "a", [("kd", right)], kept=kept)
    b = hand_made(colours, tmp_path, "b", [("kd", better)], kept=kept, train=STEPS)
    repeated(a, "t0000", [0.6, 0.59, 0.62])
    if values:
        repeated(b, "t0000", values)
    row = compare([a, b]).set_index(["among", "sweep"]).loc["kd", "b"]
    assert (lead.low, lead.high) == pytest.approx((row["low"], row["high"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"data": "packaged/clipart", "shots": 4}, "val": "w"}, r"task\.data is 'folder:.*' in the one and"),
        ({"task": {"data": "DATA", "splits": {"val": 0.3}}, "val": ""}, r"task\.splits is .*'val': 0\.2"),
        ({"val": "w"}, r"task\.data is .* in both, but it held other val images or labels"),
    ],
)
def test_sweeps_on_other_val_images_are_refused_by_the_key_that_differs(
    colours: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    if changes.get("task", {}).get("data") == "DATA":
        changes["task"]["data"] = f"folder:{colours}"
    with pytest.raises(UserError, match=rf"The sweeps 'a' and 'b' do not compare: {words}"):
        compare(two(colours, tmp_path, **changes))


def test_data_that_only_moved_compares_and_splits_of_other_seeds_are_not_paired(colours: Path, tmp_path: Path) -> None:
    assert len(compare(two(colours, tmp_path / "moved", task={"data": "folder:/elsewhere", "shots": 4}))) == 6
    own = {"task": {"data": f"folder:{colours}", "shots": 4, "seed": 3}, "val": "w"}
    found = compare_sweeps(two(colours, tmp_path / "seeds", 0.2, **own))
    assert not found.table["paired"].dropna().any()
    assert any("differ between the seeds (task.seed)" in sentence for sentence in found.sentences)


def test_the_command_prints_writes_and_refuses(colours: Path, tmp_path: Path) -> None:
    a, b = map(str, two(colours, tmp_path, 0.2))
    run = CliRunner().invoke
    done = run(app, ["compare", a, b, "--json", "--out", str(tmp_path / "c.parquet")])
    facts = json.loads(done.stdout)
    assert facts["keys"] == {"train.steps": {"a": 6, "b": 12}}
    written = pd.read_parquet(tmp_path / "c.parquet")
    assert [r["val_metric"] for r in facts["rows"]] == pytest.approx(list(written["val_metric"]))
    done = run(app, ["compare", a, b, "--out", str(tmp_path / "c.md")])
    text = (tmp_path / "c.md").read_text()
    for words in ("train.steps", "b:t0001", "+0.2000", "more than noise"):
        assert words in done.stdout
        assert words in text
    for given, words in (
        ([a], "takes two sweeps or more"),
        ([a, a], "is given twice"),
        ([a, b, "--out", str(tmp_path / "c.pdf")], r"'c\.pdf' ends in '\.pdf'"),
        ([a, str(tmp_path)], "is not a sweep: it has no sweep.yaml"),
    ):
        with pytest.raises(UserError, match=words):
            run(app, ["compare", *given], catch_exceptions=False)


def test_under_a_limit_the_best_is_one_that_keeps_it(colours: Path, tmp_path: Path) -> None:
    """The third trial of `b`, the largest network, is its best; 1,001 parameters leave it and its kd aside."""
    trials = [("finetune", outcomes(0.5)), ("kd", outcomes(0.6)), ("kd", outcomes(0.8))]
    a = hand_made(colours, tmp_path, "a", trials[:2])
    b = hand_made(colours, tmp_path, "b", trials, train=STEPS)
    free = compare([a, b]).set_index(["among", "sweep"])
    kept = compare([a, b], {"params_total": 1001}).set_index(["among", "sweep"])
    assert (free.loc["all methods", "b"]["val_metric"], kept.loc["all methods", "b"]["val_metric"]) == (0.8, 0.6)
    assert kept.loc["kd", "b"]["difference"] == pytest.approx(0.0)
    assert kept.loc["all methods", "b"]["complete"] == 2
    done = CliRunner().invoke(app, ["compare", str(a), str(b), "--max-params", "1000"])
    assert "Only trials with at most 1,000 parameters are looked at." in done.stdout
    with pytest.raises(UserError, match=r"at most 900 parameters; the smallest has 1,000 \(a:t0000\)"):
        compare([a, b], {"params_total": 900})
    with pytest.raises(UserError, match="Unknown metric 'latency'"):
        compare([a, b], {"latency": 900})


def test_a_sweep_without_a_complete_trial_stands_beside_the_others(colours: Path, tmp_path: Path) -> None:
    a = hand_made(colours, tmp_path, "a", [])
    with pytest.raises(UserError, match="None of the sweeps a and b has a complete trial"):
        compare([a, hand_made(colours, tmp_path, "b", [])])
    found = compare([a, hand_made(colours, tmp_path, "c", [("kd", outcomes(0.5))])])
    assert np.isnan(found["difference"]).all()


def test_every_number_of_a_report_of_several_is_the_recorded_one(colours: Path, tmp_path: Path) -> None:
    folders = two(colours, tmp_path, 0.2)
    answer = write_several(folders, None, None)
    assert answer["out"] == str(folders[0] / "report_of_several.html")
    assert answer["recommended"] == {"a": "t0001", "b": "t0001"}
    page = Page(Path(answer["out"]).read_text(encoding="utf-8"))
    tables = {f.name: pd.read_parquet(f / "trials.parquet").set_index("trial_id") for f in folders}
    head, *rows = page.tables["board"]
    keys = [attributes["data-k"] for attributes, _ in head[1]]
    assert [a["id"] for a, _ in rows[:3]] == ["b/t0001", "a/t0001", "b/t0000"]  # best first, whatever the sweep
    assert len(rows) == 7
    for attributes, cells in rows:
        sweep, trial = attributes["id"].split("/")
        row = tables[sweep].loc[trial]
        shown = dict(zip(keys, cells, strict=True))
        assert (shown["sweep"][1], shown["trial_id"][1], shown["status"][1]) == (sweep, trial, row["status"])
        for name in ("val_metric", "latency_ms", "device_seconds", "store_seconds_saved"):
            assert same(shown[name][0].get("data-v"), row[name])
    for attributes, cells in page.tables["sweep-table"][1:]:
        mine = tables[attributes["data-sweep"]]
        best = mine.loc[mine["val_metric"].idxmax()]
        numbers = [float(c["data-v"]) for c, _ in cells if "data-v" in c]
        want = [(mine["status"] == "complete").sum(), len(mine), *best[["val_metric", "params_total", "flops"]]]
        sums = [mine[name].sum() for name in ("device_seconds", "store_seconds_saved")]
        assert numbers == pytest.approx([*want, best["latency_ms"], *sums])
    seen = set()
    for attributes, cells in page.tables["by-method"][1:]:
        sweep = {"A": "a", "B": "b"}[attributes["data-group"]]
        mine = (
            tables[sweep]
            if attributes["data-among"] == "all methods"
            else tables[sweep][tables[sweep]["method"] == attributes["data-among"]]
        )
        assert float(cells[5][0]["data-v"]) == mine["val_metric"].max()
        assert float(cells[8][0]["data-v"]) == pytest.approx(mine["device_seconds"].sum())
        seen.add(attributes["data-among"])
    assert seen == {"all methods", "finetune", "kd"}
    for axis, fronts in page.data["own"].items():
        for sweep, front in fronts.items():
            done = tables[sweep][tables[sweep]["status"] == "complete"]
            points = done[["val_metric", axis]].to_numpy()
            want = {
                f"{sweep}/{t}"
                for t, (v, c) in zip(done.index, points, strict=True)
                if not any((a >= v and b <= c) and (a > v or b < c) for a, b in points)
            }
            assert set(front) == want
    for name, points in page.data["progress"].items():  # numbers are the order here: none has the time of its end
        table = tables[name].sort_values("number")
        spent, best = table["device_seconds"].cumsum(), table["val_metric"].cummax()
        at = [i for i in range(len(table)) if table["val_metric"].iloc[i] > best.shift(fill_value=-1.0).iloc[i]]
        want = [(spent.iloc[i], best.iloc[i]) for i in at] + [(spent.iloc[-1], best.max())]
        assert [x for point in points for x in point] == pytest.approx([x for point in want for x in point])
    for attributes, cells in page.tables["by-class"][1:]:
        for folder, (shown, _) in zip(folders, cells[1:], strict=True):
            details = json.loads((folder / "students" / "t0001" / "details.json").read_text())
            (held,) = [c["value"] for c in details["classes"] if c["name"] == attributes["data-name"]]
            assert float(shown["data-v"]) == held
    write_several(folders, tmp_path / "all.csv", None)
    joint = pd.read_csv(tmp_path / "all.csv")
    assert joint.groupby("sweep")["device_seconds"].sum().to_dict() == pytest.approx(
        {name: table["device_seconds"].sum() for name, table in tables.items()}
    )
