"""The report: every number is the recorded one, nothing in it is code of the user's, and it is made of anything."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from report_cases import big_sweep, made_up, real_sweep
from small import small_spec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from methods.knobs import Choice, Range
from orchestrator.errors import UserError
from orchestrator.evaluate.details import Details, error_tiles
from orchestrator.evaluate.metrics import mean_auroc, mean_iou
from orchestrator.select.report.page import COLUMNS, TEXTS
from orchestrator.sweep.event_files import write_event_files
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.report import write_report
from orchestrator.sweep.study_importance import importances
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.row import blank_row
from orchestrator.trial.run import run_trial


class Page(HTMLParser):
    """Tables by id or class (rows of (attributes, text) cells with the row's attributes), elements, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]]] = {}
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._cell = self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            by = found.get("data-by") or found.get("data-trial") or ""
            self._table = self.tables.setdefault(found.get("id") or f"{found.get('class')} {by}".strip(), [])
        elif tag == "tr":
            self._table.append((found, []))
        elif tag in ("td", "th"):
            self._table[-1][1].append((found, ""))
            self._cell = True
        elif tag == "script":
            self._script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")
        self._script = self._script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
            return
        self.texts.append(data)
        if self._cell:
            attributes, text = self._table[-1][1][-1]
            self._table[-1][1][-1] = (attributes, text + data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def swept(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return real_sweep(colours, tmp_path_factory.mktemp("runs"))


def page_of(folder: Path, out: Path, images: bool = True) -> Page:
    write_report(folder, out, "html", images)
    return Page(out.read_text(encoding="utf-8"))


def same(shown: str | None, value: Any) -> bool:
    return shown is None if value is None or pd.isna(value) else float(shown or "nan") == float(value)


# --- numbers -------------------------------------------------------------------------------------------------------


def test_every_number_of_the_leaderboard_is_the_recorded_one(swept: Path, tmp_path: Path) -> None:
    page = page_of(swept, tmp_path / "r.html")
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    head, *rows = page.tables["board"]
    keys = [attributes["data-k"] for attributes, _ in head[1]]
    assert {k for k in COLUMNS if k != "val_sd"} == set(keys)
    assert [a["id"] for a, _ in rows[:3]] == list(
        table[table["status"] == "complete"].sort_values(["val_metric", "params_total"], ascending=[False, True]).index
    )
    assert len(rows) == len(table) == 5
    compared = 0
    for attributes, cells in rows:
        row = table.loc[attributes["id"]]
        assert json.loads(attributes["data-knobs"]) == json.loads(row["config"])["knobs"]
        for key, (cell, text) in zip(keys, cells, strict=True):
            if key in TEXTS and key != "trial_id":
                assert (cell.get("title") or text) == (row[key] if isinstance(row[key], str) else ""), key
            elif key not in ("rank", "trial_id"):
                blank = row["status"] != "complete" and row[key] == 0
                assert (blank and "data-v" not in cell) or same(cell.get("data-v"), row[key]), (key, cell, row[key])
                compared += "data-v" in cell
                if key == "val_metric" and "data-v" in cell:
                    assert text == f"{row[key]:.4f}"
                if key == "params_total" and "data-v" in cell:
                    assert text == f"{row[key]:,}"
    assert compared > 40


def test_costs_add_up_to_what_the_rows_say(swept: Path, tmp_path: Path) -> None:
    page = page_of(swept, tmp_path / "r.html")
    table = pd.read_parquet(swept / "trials.parquet")
    sums = [
        "device_seconds",
        "store_seconds_paid",
        "store_seconds_saved",
        "teacher_forwards",
        "teacher_forwards_shared",
    ]
    for by in ("status", "method"):
        _, *rows = page.tables[f"costs {by}"]
        assert {a["data-name"] for a, _ in rows} == {*table[by], "all"}
        for attributes, cells in rows:
            mine = table if attributes["data-name"] == "all" else table[table[by] == attributes["data-name"]]
            values = [float(cell["data-v"]) for cell, _ in cells[1:]]
            assert values[0] == len(mine)
            assert values[2] == pytest.approx(mine["device_seconds"].sum() / table["device_seconds"].sum())
            assert [values[1], *values[3:]] == pytest.approx([mine[c].sum() for c in sums])
    assert any(text.startswith("1 trial failed: 2.5 device-seconds") for text in page.texts)


def test_the_front_and_each_methods_best_are_those_of_the_table(swept: Path, tmp_path: Path) -> None:
    page = page_of(swept, tmp_path / "r.html")
    table = pd.read_parquet(swept / "trials.parquet")
    complete = table[table["status"] == "complete"]
    for axis, front in page.data["fronts"].items():
        points = complete[["val_metric", axis]].to_numpy()
        want = {
            t
            for t, (v, c) in zip(complete["trial_id"], points, strict=True)
            if not any((a >= v and b <= c) and (a > v or b < c) for a, b in points)
        }
        assert set(front) == want
        shown = [a["data-trial"] for a, _ in page.tables["front-table"][1:] if a["data-axis"] == axis]
        assert shown == front
    for attributes, cells in page.tables["best"][1:]:
        row = complete.set_index("trial_id").loc[attributes["data-trial"]]
        assert row["val_metric"] == complete[complete["method"] == row["method"]]["val_metric"].max()
        assert [float(c["data-v"]) for c, _ in cells[2:6]] == [
            row[c] for c in ("val_metric", "params_total", "flops", "latency_ms")
        ]


def test_results_by_class_make_up_the_val_metric(swept: Path, tmp_path: Path) -> None:
    page = page_of(swept, tmp_path / "r.html")
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    found = [name for name in page.tables if name.startswith("by-class ")]
    assert len(found) == 3
    for name in found:
        _, *rows = page.tables[name]
        assert {a["data-name"] for a, _ in rows} == {"red", "green", "blue"}
        images = [float(cells[1][0]["data-v"]) for _, cells in rows]
        recalls = [float(cells[2][0]["data-v"]) for _, cells in rows]
        right = sum(i * r for i, r in zip(images, recalls, strict=True))
        assert right / sum(images) == pytest.approx(table.loc[name.removeprefix("by-class "), "val_metric"], abs=1e-6)


def test_learning_curves_are_those_that_training_wrote(swept: Path, tmp_path: Path) -> None:
    curves = page_of(swept, tmp_path / "r.html").data["curves"]
    history = json.loads((swept / "students" / "t0000" / "history.json").read_text())["history"]
    assert curves["t0000"]["losses"]["step"] == [p["step"] for p in history]
    assert curves["t0000"]["losses"]["loss"] == pytest.approx([p["loss"] for p in history], rel=1e-4)
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    assert curves["t0001"]["val"] == [[0.5, table.loc["t0001", "val_metric"]]]


def test_a_stopped_trial_shows_the_curves_that_it_had(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, methods={"finetune": {}}, search={"trials": 2, "scheduler": "asha"})
    folder = create(spec)
    ledger, context = Ledger(folder), SweepContext(spec, str(folder))
    configs = [TrialConfig(f"t000{n}", n, Cell("finetune", None, 0), {"lr": 1e-3 * (1 + n)}, 0) for n in range(2)]

    def stop(share: float, metric: float | None) -> None:
        if metric is not None:
            ledger.mark("t0001", share, metric)
        if share > 0.6:
            raise SystemExit

    ledger.write(run_trial(context, configs[0], lambda share, metric: None))
    with pytest.raises(SystemExit):
        run_trial(context, configs[1], stop)
    noted = [json.loads(line) for line in (folder / "trials" / "t0001.loss.jsonl").read_text().splitlines()]
    assert [point["step"] for point in noted] == [1, 2, 3, 4]  # of 6
    ledger.write(blank_row(spec, configs[1]) | {"status": "pruned", "reason": "stopped by asha"})
    ledger.publish()
    assert not (folder / "trials" / "t0000.loss.jsonl").exists()  # the whole curve lies beside its student
    curves = page_of(folder, tmp_path / "r.html").data["curves"]
    assert curves["t0001"]["losses"]["loss"] == pytest.approx([point["loss"] for point in noted], rel=1e-4)
    assert len(curves["t0001"]["val"]) == 4
    assert len(curves["t0000"]["losses"]["step"]) == 6
    write_event_files(folder)
    events = EventAccumulator(str(folder / "tensorboard" / "t0001-finetune")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (point["step"], pytest.approx(point["loss"])) for point in noted
    ]


def test_the_recommendation_is_the_best_trial_and_reads_no_test_image(swept: Path, tmp_path: Path) -> None:
    page = page_of(swept, tmp_path / "r.html")
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    best = page.data["recommended"]
    assert table.loc[best, "val_metric"] == table["val_metric"].max()
    assert f"Take {best}: {table.loc[best, 'method']}" in " ".join(page.texts)
    assert not (swept / "test.json").exists()


def test_the_table_formats_hold_every_row_and_knob(swept: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    for name in ("r.parquet", "r.csv"):
        write_report(swept, tmp_path / name, None)
        found = pd.read_parquet(tmp_path / name) if name == "r.parquet" else pd.read_csv(tmp_path / name)
        found = found.set_index("trial_id").loc[table.index]
        assert list(found["device_seconds"]) == list(table["device_seconds"])
        assert list(found["val_metric"].dropna()) == list(table["val_metric"].dropna())
        assert found["wecolora.rank"].dropna().to_dict() == {"t0001": 4}
    answer = write_report(swept, tmp_path / "r.md", None)
    text = (tmp_path / "r.md").read_text()
    assert f"- {answer['sentences'][0]}".replace("_", "\\_") in text
    for row in table.itertuples():
        assert re.search(rf"\| {row.Index} \| {row.method} \|", text)
    assert "The loss is \\<b>not\\</b> finite" in text


# --- what is in the page ---------------------------------------------------------------------------------------------


def test_the_page_names_nothing_outside_itself(swept: Path, tmp_path: Path) -> None:
    page = page_of(swept, tmp_path / "r.html")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_pictures_are_the_recorded_ones_and_can_be_left_out(swept: Path, tmp_path: Path) -> None:
    pictures = [a for t, a in page_of(swept, tmp_path / "r.html").elements if t == "img"]
    folders = [p for p in sorted((swept / "students").iterdir()) if (p / "errors.jpg").is_file()]
    assert len(pictures) == sum(len(error_tiles(p)) for p in folders) > 0
    for picture in pictures:
        assert picture["alt"].startswith("val image ")
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,"))))
        assert image.size == (96, 96)
    plain = page_of(swept, tmp_path / "plain.html", images=False)
    assert not [t for t, _ in plain.elements if t == "img"]
    assert "data:image" not in (tmp_path / "plain.html").read_text()
    assert "taken for" in " ".join(plain.texts)


EVIL = '</script><script>alert("x")</script>'


def test_a_users_words_are_never_markup(swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(swept, folder)
    details = folder / "students" / "t0000" / "details.json"
    details.write_text(details.read_text().replace('"red"', json.dumps(EVIL)))
    ledger = Ledger(folder)
    row = json.loads((folder / "trials" / "t0003.json").read_text())
    config = json.loads(row["config"]) | {"knobs": {EVIL: EVIL}}
    row |= {"trial_id": "t0005", "number": 5, "reason": EVIL, "config": json.dumps(config), "student": f'"{EVIL}'}
    ledger.write(row)
    ledger.publish()
    history = folder / "students" / "t0000" / "history.json"
    history.write_text(history.read_text().replace('"ce"', json.dumps(EVIL)))
    page = page_of(folder, tmp_path / "r.html")
    assert len(page.scripts) == 2
    assert EVIL in " ".join(page.texts)
    assert EVIL in page.data["curves"]["t0000"]["losses"]
    evil = next((a, c) for a, c in page.tables["board"] if a.get("id") == "t0005")
    assert json.loads(evil[0]["data-knobs"]) == {EVIL: EVIL}
    assert any(text == EVIL for _, text in evil[1])


def test_a_report_of_a_thousand_trials_stays_below_five_megabytes(colours: Path, tmp_path: Path) -> None:
    folder = big_sweep(colours, tmp_path, 1000)
    answer = write_report(folder, None, None, images=False)
    assert answer["out"] == str(folder / "report.html")
    assert answer["bytes"] == (folder / "report.html").stat().st_size < 5e6
    page = Page((folder / "report.html").read_text())
    assert len(page.tables["board"]) == 1001
    assert len(page.data["curves"]) == 1000


# --- any sweep -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "The sweep has no trials yet."),
        ([{"status": "failed", "reason": "it broke"}] * 2, "No trial is complete: 2 failed."),
        ([{"status": "running"}], "No trial is complete: 1 running."),
        ([{"status": "complete", "student_path": ""}], "No complete trial has kept its student."),
    ],
    ids=["empty", "all failed", "one running", "no metrics"],
)
def test_a_sweep_that_has_nothing_to_recommend_says_why(
    colours: Path, tmp_path: Path, rows: list[dict[str, Any]], sentence: str
) -> None:
    spec = small_spec(colours, tmp_path)
    folder = create(spec)
    ledger = Ledger(folder)
    for number, values in enumerate(rows):
        ledger.write(made_up(spec, number, "kd", **values))
    ledger.publish()
    page = page_of(folder, tmp_path / "r.html")
    assert sentence in page.texts
    assert ("board" in page.tables) == bool(rows)
    write_report(folder, tmp_path / "r.md", "md")
    assert sentence in (tmp_path / "r.md").read_text()
    for fmt in ("csv", "parquet"):
        write_report(folder, tmp_path / f"r.{fmt}", fmt)


def test_missing_metrics_are_dashes(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    folder = create(spec)
    ledger = Ledger(folder)
    blanks = {"val_metric": math.nan, "latency_ms": math.nan, "student_path": "students/t0000"}
    ledger.write(made_up(spec, 0, "kd", status="complete", **blanks))
    ledger.write(
        made_up(spec, 1, "kd", status="complete", **blanks | {"val_metric": 0.5, "student_path": "students/x"})
    )
    ledger.publish()
    page = page_of(folder, tmp_path / "r.html")
    assert any("Take t0001" in text for text in page.texts)
    assert "nan" not in " ".join(page.texts).lower().split()


def test_a_report_needs_neither_the_store_nor_the_data(swept: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(swept, alone)
    (alone / "study.db").unlink(missing_ok=True)
    text = (alone / "sweep.yaml").read_text()
    (alone / "sweep.yaml").write_text(re.sub(r"folder:\S+", "folder:/nowhere", text))
    assert len(page_of(alone, tmp_path / "r.html").tables["board"]) == 6


def test_an_older_sweep_without_details_and_columns_still_has_its_report(swept: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(swept, old)
    for path in [*old.glob("students/*/details.json"), *old.glob("students/*/errors.jpg"), old / "clock.json"]:
        path.unlink()
    table = pd.read_parquet(old / "trials.parquet")
    table.drop(columns=["repeats", "val_sd", "store_seconds_paid"]).to_parquet(old / "trials.parquet")
    page = page_of(old, tmp_path / "r.html")
    assert any("was run by a version that did not keep them" in text for text in page.texts)
    assert len(page.tables["board"]) == 6
    table.drop(columns=["flops"]).to_parquet(old / "trials.parquet")
    with pytest.raises(UserError, match="has no column flops"):
        write_report(old, tmp_path / "r.html", None)


def test_damaged_files_beside_students_leave_their_part_out(swept: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(swept, hurt)
    (hurt / "students" / "t0000" / "details.json").write_text('{"classes": [')
    (hurt / "students" / "t0001" / "errors.jpg").write_bytes(b"no picture")
    (hurt / "students" / "t0002" / "history.json").write_text("[]")
    (hurt / "trials" / "t0001.val.jsonl").write_text('{"share": 0.5, "val_metric": 0.25}\n{"share": 0.7')
    page = page_of(hurt, tmp_path / "r.html")
    assert "t0002" not in page.data["curves"] or not page.data["curves"]["t0002"]["losses"]
    assert page.data["curves"]["t0001"]["val"] == [[0.5, 0.25]]


def test_a_wrong_place_or_format_is_a_sentence_and_nothing_is_written(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no sweep folder .*Did you mean 'small'"):
        write_report(swept.parent / "smal", tmp_path / "r.html", None)
    with pytest.raises(
        UserError, match=r"'r\.pdf' ends in '\.pdf', which is none of \.html, \.md, \.csv and \.parquet"
    ):
        write_report(swept, tmp_path / "r.pdf", None)
    with pytest.raises(UserError, match="is a folder; name a file"):
        write_report(swept, tmp_path, None)
    with pytest.raises(UserError, match=r"the folder '.*nowhere' does not exist"):
        write_report(swept, tmp_path / "nowhere" / "r.html", None)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root may write in")
def test_a_folder_that_may_not_be_written_is_a_sentence(swept: Path) -> None:
    with pytest.raises(UserError, match=r"--out: '/proc/r\.html' cannot be written"):
        write_report(swept, Path("/proc/r.html"), None)


# --- what stands behind it -------------------------------------------------------------------------------------------


def test_the_choice_that_decides_has_the_largest_importance() -> None:
    rng = np.random.default_rng(0)
    space = {
        "lr": Range(low=1e-4, high=1e-1, log=True),
        "kind": Choice(values=("a", "b", "c")),
        "rank": Range(low=1, high=8, int=True),
        "fixed": 3,
    }
    choices = [
        {"lr": 10 ** rng.uniform(-4, -1), "kind": "abc"[rng.integers(3)], "rank": int(rng.integers(1, 9)), "fixed": 3}
        for _ in range(80)
    ]
    values = [-abs(math.log10(c["lr"]) + 2) + 0.01 * c["rank"] for c in choices]
    shares = importances(choices, values, space)
    assert next(iter(shares)) == "lr"
    assert shares["lr"] > 0.6
    assert set(shares) == {"lr", "kind", "rank"}
    assert sum(shares.values()) == pytest.approx(1)
    assert importances([{"fixed": 3}] * 4, [1.0, 2.0, 3.0, 4.0], {"fixed": 3}) == {}


def heard(kind: Any, classes: int, logits: torch.Tensor, truth: torch.Tensor, folder: Path) -> dict[str, Any]:
    details = Details(kind, classes)
    pixels = torch.arange(len(logits)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8) * 20
    for start in range(0, len(logits), 4):
        rows = np.arange(start, min(start + 4, len(logits)))
        details.hear(rows, pixels[rows], logits[rows], truth[rows])
    folder.mkdir(exist_ok=True)
    details.write(folder, tuple(f"c{i}" for i in range(classes)))
    return json.loads((folder / "details.json").read_text())


def test_details_of_classes_are_recall_precision_and_confusion(tmp_path: Path) -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    said = torch.tensor([0, 1, 0, 1, 1, 0])
    logits = torch.nn.functional.one_hot(said, 4).float() * torch.tensor([1, 5, 1, 1, 1, 2.0])[:, None]
    found = heard("classification", 4, logits, truth, tmp_path)
    assert found["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert [c["value"] for c in found["classes"]] == pytest.approx([2 / 3, 1, 0, None])
    assert [c["precision"] for c in found["classes"]] == pytest.approx([2 / 3, 2 / 3, None, None])
    assert [(w["row"], w["truth"], w["said"]) for w in found["worst"]] == [(1, [0], [1]), (5, [2], [0])]
    assert found["worst"][0]["value"] == pytest.approx(math.exp(5) / (math.exp(5) + 3))
    tiles = error_tiles(tmp_path)
    assert [np.asarray(t).mean().round() for t in tiles] == [20, 100]  # the pictures of rows 1 and 5, in that order


def test_details_of_several_labels_average_to_the_metric(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, truth = torch.randn(20, 3), (torch.rand(20, 3) > 0.5).float()
    found = heard("multilabel", 3, logits, truth, tmp_path)
    assert sum(c["value"] for c in found["classes"]) / 3 == pytest.approx(mean_auroc(logits.numpy(), truth.numpy()))
    worst = found["worst"][0]
    assert worst["truth"] != worst["said"]
    assert worst["truth"] == truth[worst["row"]].nonzero().flatten().tolist()


def test_details_of_masks_average_to_the_metric(tmp_path: Path) -> None:
    from orchestrator.evaluate.metrics import overlaps

    torch.manual_seed(0)
    logits, truth = torch.randn(9, 3, 6, 6), torch.randint(0, 2, (9, 6, 6)).to(torch.uint8)
    found = heard("segmentation", 3, logits, truth, tmp_path)
    both, either = overlaps(logits.argmax(1), truth, 3)
    known = [c["value"] for c in found["classes"] if c["value"] is not None]
    assert sum(known) / len(known) == pytest.approx(mean_iou(both.numpy(), either.numpy()))
    assert [w["value"] for w in found["worst"]] == sorted(w["value"] for w in found["worst"])


def test_an_image_of_which_no_pixel_counts_is_no_error(tmp_path: Path) -> None:
    logits, truth = torch.zeros(3, 2, 4, 4), torch.full((3, 4, 4), 255, dtype=torch.uint8)
    logits[:, 1] = 1
    truth[1, :2] = 0  # all wrong; nothing of images 0 and 2 is known
    found = heard("segmentation", 2, logits, truth, tmp_path)
    assert [(w["row"], w["value"]) for w in found["worst"]] == [(1, 0.0)]


def test_the_command_that_takes_a_student_away_is_quoted_and_names_the_folder_as_it_is(
    swept: Path, tmp_path: Path
) -> None:
    best = write_report(swept, tmp_path / "r.html", None)["recommended"]
    folder = tmp_path / "my runs" / f"mine-{best}"  # named as `reproduce.yaml` names a sweep: by its trial
    shutil.copytree(swept, folder)
    page = page_of(folder, tmp_path / "r.html")
    assert page.data["export"] == f"python -m orchestrator export '{folder}' OUT"


def test_a_report_of_a_running_sweep_has_the_rows_that_its_table_lacks(swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "running"
    shutil.copytree(swept, folder)
    row = json.loads((folder / "trials" / "t0003.json").read_text())
    Ledger(folder).write(row | {"trial_id": "t0005", "number": 5, "status": "running", "reason": ""})
    page = page_of(folder, tmp_path / "r.html")
    assert [a["id"] for a, _ in page.tables["board"][1:]].count("t0005") == 1
    assert "still running" in page.texts
