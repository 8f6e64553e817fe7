"""The report in a real browser: it loads nothing, sorts, filters, and opens a trial by mouse and by keyboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from browser import Watched, chromium
from compare_cases import hand_made, outcomes
from report_cases import big_sweep, real_sweep
from test_report import EVIL

from orchestrator.sweep.compare import write_several
from orchestrator.sweep.report import write_report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def swept(browser: Any, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return real_sweep(colours, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def big(browser: Any, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = big_sweep(colours, tmp_path_factory.mktemp("big"), 1000)
    write_report(folder, folder / "report.html", None, images=False)
    return folder


def opened(browser: Any, path: Path, width: int = 1280, **options: Any) -> Watched:
    watched = Watched(browser, width, **options)
    watched.page.goto(path.as_uri())
    if options.get("java_script_enabled", True):
        watched.page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    return watched


def visible_trials(page: Any) -> list[str]:
    return page.eval_on_selector_all("#board tbody tr:not([hidden])", "rows => rows.map(row => row.id)")


def test_a_report_sorts_filters_and_opens_a_point_without_any_request(
    browser: Any, swept: Path, tmp_path: Path
) -> None:
    write_report(swept, tmp_path / "r.html", None)
    watched = opened(browser, tmp_path / "r.html")
    page = watched.page
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    ranked = visible_trials(page)
    assert len(ranked) == 5

    page.click("#board th[data-k=params_total] button")
    assert page.get_attribute("#board th[data-k=params_total]", "aria-sort") == "ascending"
    done = [t for t in visible_trials(page) if table.loc[t, "status"] == "complete"]
    sizes = [table.loc[t, "params_total"] for t in done]
    assert sizes == sorted(sizes)
    assert [table.loc[t, "status"] for t in visible_trials(page)][:3] == ["complete"] * 3  # missing values come last
    page.click("#board th[data-k=params_total] button")
    done = [t for t in visible_trials(page) if table.loc[t, "status"] == "complete"]
    assert [table.loc[t, "params_total"] for t in done] == sizes[::-1]

    page.fill("#find", "timm/test_convnext kd")  # the network's full name is found, though the short one is shown
    assert set(visible_trials(page)) == set(table.index[table["method"] == "kd"])
    page.select_option("#of-status", "failed")
    assert visible_trials(page) == ["t0003"]
    assert page.inner_text("#count") == "1 of 5 trials"
    page.fill("#find", "")
    page.select_option("#of-status", "")
    assert len(visible_trials(page)) == 5

    best = page.evaluate("data.recommended")
    point = page.locator(f"#front-chart g.point[data-id={best}]")
    point.hover()
    assert page.locator("#tip").is_visible()
    assert f"{table.loc[best, 'val_metric']:.4f}" in page.inner_text("#tip")
    point.click()
    assert page.inner_text("#trial-name") == f"{best}: {table.loc[best, 'method']}"
    body = page.inner_text("#trial-body")
    assert f"{table.loc[best, 'params_total']:,}" in body
    assert f"--trial {best}" in body
    watched.shot("report_trial")
    page.keyboard.press("Escape")
    assert not page.locator("#trial").is_visible()
    watched.shot("report_desktop", full_page=True)
    page.evaluate("document.documentElement.style.filter = 'grayscale(1)'")
    watched.shot("report_greyscale", full_page=True)
    assert watched.complaints == []
    outside = [url for url in watched.requests if not url.startswith("data:")]
    assert outside == [(tmp_path / "r.html").as_uri()]
    page.close()


def test_every_part_can_be_reached_and_used_by_keyboard(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    page = opened(browser, tmp_path / "r.html").page
    reached = []
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.dataset.id || document.activeElement.tagName"
            )
        )
        if reached[-1] == "BODY":
            break
    front = page.evaluate("data.fronts.params_total")
    assert {"theme", "front-axis", "find", "of-method", "of-status", "curve-method", "slice-method", *front} <= set(
        reached
    )
    page.focus(f"g.point[data-id={front[0]}]")
    page.keyboard.press("Enter")
    assert page.inner_text("#trial-name").startswith(front[0])
    page.keyboard.press("Escape")
    page.focus("#board th[data-k=device_seconds] button")
    page.keyboard.press("Enter")
    assert page.get_attribute("#board th[data-k=device_seconds]", "aria-sort") == "ascending"
    page.close()


def test_the_front_can_be_drawn_against_another_cost(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    page = opened(browser, tmp_path / "r.html").page
    for axis in ("latency_ms", "flops", "device_seconds", "params_total"):
        page.select_option("#front-axis", axis)
        marked = page.eval_on_selector_all(
            "#front-chart g.point[tabindex='0']", "points => points.map(p => p.dataset.id)"
        )
        assert sorted(marked) == sorted(page.evaluate(f"data.fronts.{axis}"))
        assert page.locator("#front-chart g.point").count() == 3
    page.close()


def test_a_point_tells_what_its_axis_does_in_the_same_unit(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    page = opened(browser, tmp_path / "r.html").page
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    units = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
    for axis, title in page.evaluate("Object.entries(data.axes)"):
        page.select_option("#front-axis", axis)
        for trial in table.index[table["status"] == "complete"]:
            point = page.locator(f"#front-chart g.point[data-id={trial}]")
            point.focus()
            shown = page.inner_text("#tip").splitlines()[2].removeprefix(f"{title} ")
            assert f", {title} {shown}" in (point.get_attribute("aria-label") or "")
            number = shown.rstrip("kMG")
            told = float(number) * units[shown[len(number) :]]
            assert told == pytest.approx(table.loc[trial, axis], rel=1e-3), axis
    page.close()


def test_charts_of_nearly_equal_and_of_very_many_values_are_drawn(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    page = opened(browser, tmp_path / "r.html").page
    for low, high in ((0.7, 0.7000000000000001), (-0.7000000000000001, -0.7), (1e12, 1e12 + 0.0002), (0, 5e-324)):
        assert page.evaluate(f"scale([{low}, {high}], 0, 100, false).ticks.length") < 20
    assert page.evaluate("scale([0.7, 0.7000000000000001], 0, 100, false).place(0.7)") == pytest.approx(50)
    many = "Array.from({ length: 500000 }, (_, i) => i + 1)"
    assert page.evaluate(f"scale({many}, 0, 100, false).ticks.length") > 3
    assert page.evaluate(f"wide({many})")
    page.close()


def test_a_trial_is_taken_away_by_the_whole_name_of_its_sweeps_folder(
    browser: Any, colours: Path, swept: Path, tmp_path: Path
) -> None:
    best = write_report(swept, tmp_path / "r.html", None)["recommended"]
    folder = tmp_path / "my runs" / f"mine-{best}"
    shutil.copytree(swept, folder)
    write_report(folder, tmp_path / "r.html", None)
    page = opened(browser, tmp_path / "r.html").page
    for trial in ("t0000", "t0001", "t0002"):
        page.evaluate(f"open('{trial}')")
        command = f"python -m orchestrator export '{folder}' OUT --trial {trial}"
        assert page.inner_text("#trial-body code") == command
        page.keyboard.press("Escape")
    page.close()
    two = [hand_made(colours, tmp_path / "my runs", f"{name}-t0000", [("kd", outcomes(0.5))]) for name in "ab"]
    write_several(two, tmp_path / "s.html", None)
    page = opened(browser, tmp_path / "s.html").page
    page.evaluate("open('b-t0000/t0000')")
    assert f"export '{two[1]}' OUT --trial t0000" in page.inner_text("#trial-body")
    page.close()


def test_a_phone_shows_the_page_without_sideways_scrolling(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    watched = opened(browser, tmp_path / "r.html", 390, has_touch=True, color_scheme="dark")
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390
    background = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(20, 24, 29)"
    watched.shot("report_phone", full_page=True)
    watched.page.locator("#front-chart g.point[tabindex='0']").first.tap()
    assert watched.page.locator("#trial").is_visible()
    assert watched.complaints == []
    watched.page.close()


def test_in_print_nothing_is_folded_and_no_control_is_left(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    watched = opened(browser, tmp_path / "r.html", color_scheme="dark")
    page = watched.page
    folded = page.locator("details:not([open])").count()
    assert folded > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print")
    assert not page.locator("#find").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    watched.shot("report_print", full_page=True)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded
    page.close()


def test_without_scripts_the_tables_are_there(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    page = opened(browser, tmp_path / "r.html", java_script_enabled=False).page
    assert page.locator("#board tbody tr").count() == 5
    assert page.locator("noscript").is_visible()
    page.close()


def test_a_class_that_is_a_script_does_nothing(browser: Any, swept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(swept, folder)
    for details in folder.glob("students/*/details.json"):
        details.write_text(details.read_text().replace('"red"', json.dumps(EVIL)))
    write_report(folder, tmp_path / "r.html", None)
    watched = opened(browser, tmp_path / "r.html")
    watched.page.click("#board tbody a >> nth=0")
    assert watched.page.locator("#trial").is_visible()
    assert watched.complaints == []
    assert EVIL in watched.page.inner_text(f"#classes-{watched.page.evaluate('data.recommended')}")
    watched.page.close()


def test_a_report_of_nothing_and_an_unknown_trial_are_sentences(browser: Any, swept: Path, tmp_path: Path) -> None:
    write_report(swept, tmp_path / "r.html", None)
    watched = Watched(browser)
    watched.page.goto((tmp_path / "r.html").as_uri() + "#t0099")
    assert watched.page.inner_text("#said") == "This report has no trial t0099."
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(swept / "sweep.yaml", empty)
    write_report(empty, tmp_path / "e.html", None)
    watched.page.goto((tmp_path / "e.html").as_uri())
    assert "The sweep has no trials yet." in watched.page.inner_text("#take")
    assert watched.complaints == []
    watched.page.close()


def test_a_thousand_trials_are_drawn_sorted_and_filtered(browser: Any, big: Path) -> None:
    watched = opened(browser, big / "report.html")
    page = watched.page
    assert page.locator("#board tbody tr").count() == 1000
    assert page.locator("#front-chart g.point").count() == 1000
    page.click("#board th[data-k=device_seconds] button")
    assert visible_trials(page)[:2] == ["t0000", "t0001"]
    page.select_option("#of-method", "wecolora")
    assert len(visible_trials(page)) == 333
    assert page.locator("#front-chart g.point").count() == 333
    watched.shot("report_thousand")
    assert watched.complaints == []
    page.close()


def test_a_report_of_several_tells_sweeps_apart_filters_them_and_loads_nothing(
    browser: Any, colours: Path, tmp_path: Path
) -> None:
    base = outcomes(0.6)
    folders = [
        hand_made(colours, tmp_path, name, [("kd", outcomes(0.5 + at / 10, at, like=base)), ("finetune", base)], **more)
        for at, (name, more) in enumerate({"first": {}, "longer": {"train": {"steps": 9, "batch": 12}}}.items())
    ]
    write_several(folders, tmp_path / "r.html", None)
    watched = opened(browser, tmp_path / "r.html")
    page = watched.page
    assert page.inner_text("#front-legend").split() == ["first", "longer"]
    marks = {}
    for name in ("first", "longer"):
        found = page.eval_on_selector_all(
            f"#front-chart g.point[data-id^='{name}/'] path", "paths => paths.map(p => p.getAttribute('d'))"
        )
        (marks[name],) = set(found)
    assert marks["first"] != marks["longer"]  # shapes, so that greyscale tells them apart
    dashes = page.eval_on_selector_all("#front-chart path.own", "p => p.map(e => e.getAttribute('stroke-dasharray'))")
    assert len(set(dashes)) == 2
    spent = page.eval_on_selector_all("#progress-chart path.own", "p => p.map(e => e.dataset.kind)")
    assert spent == ["first", "longer"]
    assert page.locator("#by-class tbody tr").count() == 2
    page.select_option("#of-sweep", "longer")
    assert {trial.split("/")[0] for trial in visible_trials(page)} == {"longer"}
    assert page.locator("#front-chart g.point").count() == 2
    page.click("#board tbody tr:not([hidden]) a >> nth=0")
    assert page.inner_text("#trial-name").startswith("longer/t000")
    assert f"export {folders[1]} OUT --trial t000" in page.inner_text("#trial-body")
    page.keyboard.press("Escape")
    page.evaluate("document.documentElement.style.filter = 'grayscale(1)'")
    watched.shot("several_greyscale", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    watched.shot("several_phone", full_page=True)
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [(tmp_path / "r.html").as_uri()]
    page.close()
