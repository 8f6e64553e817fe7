"""TensorBoard and optuna-dashboard show a sweep with its own names, on the loopback, and end with the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browser import Watched, chromium
from report_cases import real_sweep
from servers import free_port
from small import small_spec

from orchestrator.errors import UserError
from orchestrator.sweep.dashboards import HOST, ray_dashboard, serving
from orchestrator.sweep.folder import RAY_DASHBOARD, create
from orchestrator.sweep.pictures import confusion_picture

pytest.importorskip("optuna_dashboard", reason="there is no optuna-dashboard here: pip install '.[dashboard]'")


@pytest.fixture(scope="module")
def swept(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return real_sweep(colours, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def urls(swept: Path) -> Iterator[dict[str, str]]:
    with serving(swept, ["tensorboard", "optuna"], {"tensorboard": free_port(), "optuna": free_port()}) as servers:
        yield {server.name: server.url for server in servers}


def asked(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_hparams_has_every_trial_with_its_knobs_and_final_metrics(swept: Path, urls: dict[str, str]) -> None:
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    base = urls["TensorBoard"] + "/data/plugin/hparams"
    experiment = asked(f"{base}/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"Method", "Teacher", "Student", "kd.temperature", "kd.lr", "wecolora.rank", "finetune.lr"} <= names
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    shown = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {"result/val_metric", "result/params_total", "result/latency_ms", "result/device_seconds"} <= shown
    query = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS"], "colParams": columns}
    groups = asked(f"{base}/session_groups", query | {"startIndex": 0, "sliceSize": 100})["sessionGroups"]
    assert len(groups) == 5
    for group in groups:
        trial = group["sessions"][0]["name"].partition("-")[0]
        assert group["hparams"]["Method"] == table.loc[trial, "method"]
        values = {v["name"]["tag"]: v["value"] for v in group["metricValues"]}
        if table.loc[trial, "status"] == "complete":
            for metric in ("val_metric", "latency_ms", "device_seconds"):
                assert values[f"result/{metric}"] == pytest.approx(table.loc[trial, metric], rel=1e-6)


def test_tensorboard_has_curves_and_pictures_of_each_complete_trial(swept: Path, urls: dict[str, str]) -> None:
    base = urls["TensorBoard"] + "/data/plugin"
    images, scalars = asked(f"{base}/images/tags"), asked(f"{base}/scalars/tags")
    for run in ("t0000-finetune", "t0001-wecolora", "t0002-kd"):
        assert "val/confusion_matrix" in {tag.split("/image")[0] for tag in images[run]}
        assert "val/by_percent_of_budget" in scalars[run]
        assert "train/loss" in scalars[run]
    assert any(tag.startswith("val/worst_errors") for tag in images["t0002-kd"])
    history = json.loads((swept / "students" / "t0000" / "history.json").read_text())["history"]
    points = asked(f"{base}/scalars/scalars?run=t0000-finetune&tag=train%2Floss")
    assert [(p[1], p[2]) for p in points] == [(int(p["step"]), pytest.approx(p["loss"], rel=1e-6)) for p in history]


def test_optuna_dashboard_has_readable_names_states_and_metrics(swept: Path, urls: dict[str, str]) -> None:
    table = pd.read_parquet(swept / "trials.parquet").set_index("trial_id")
    base = urls["optuna-dashboard"] + "/api/studies"
    (summary,) = asked(base)["study_summaries"]
    assert summary["study_name"] == "small"
    study = asked(f"{base}/{summary['study_id']}?after=0")
    assert study["objective_names"] == ["val_metric"]
    assert [t["state"] for t in study["trials"]] == ["Complete", "Complete", "Complete", "Fail", "Pruned"]
    for trial in study["trials"]:
        attributes = {a["key"]: a["value"].strip('"') for a in trial["user_attrs"]}
        row = table.loc[attributes["trial"]]
        parameters = {p["name"]: p["param_external_value"] for p in trial["params"]}
        assert parameters["method"] == row["method"]
        assert attributes["reason"] == row["reason"]
        if row["method"] == "kd":
            assert float(parameters["kd.temperature"]) == json.loads(row["config"])["knobs"]["temperature"]
        if row["status"] == "complete":
            assert trial["values"][0] == row["val_metric"]
            assert float(attributes["latency_ms"]) == row["latency_ms"]


def test_both_are_what_a_person_sees(urls: dict[str, str]) -> None:
    with chromium() as browser:
        board = Watched(browser)
        board.page.goto(urls["TensorBoard"] + "/#hparams")
        board.page.get_by_text("t0002-kd").first.wait_for(timeout=60_000)
        board.page.get_by_text("kd.temperature").first.wait_for(timeout=60_000)
        board.shot("tensorboard_hparams")
        optuna = Watched(browser)
        optuna.page.goto(urls["optuna-dashboard"] + "/dashboard/studies/0/trials")
        optuna.page.get_by_text("Trial 2", exact=True).first.click(timeout=60_000)
        optuna.page.get_by_text("kd.temperature").first.wait_for(timeout=60_000)
        optuna.shot("optuna_dashboard")
        for watched in (board, optuna):
            local = (f"http://{HOST}:", "data:", "blob:")
            assert [url for url in watched.requests if not url.startswith(local)] == []


def test_the_command_prints_addresses_and_ends_its_tools_on_ctrl_c(swept: Path) -> None:
    port = free_port()
    options = ["--only", "tensorboard", "--tensorboard-port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "dashboard", str(swept), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit none
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0].split() == ["TensorBoard", f"http://{HOST}:{port}"]
    assert "the sweep does not run now" in lines[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=5)


def test_the_address_of_rays_dashboard_is_told_while_it_answers(tmp_path: Path) -> None:
    assert ray_dashboard(tmp_path) is None
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        address = f"{HOST}:{server.getsockname()[1]}"
        (tmp_path / RAY_DASHBOARD).write_text(address)
        assert ray_dashboard(tmp_path) == f"http://{address}"
    assert ray_dashboard(tmp_path) is None


def test_what_cannot_be_shown_is_a_sentence(swept: Path, colours: Path, tmp_path: Path) -> None:
    def start(folder: Path, **ports: int) -> None:
        with serving(folder, ["tensorboard", "optuna"], dict(ports)):
            raise AssertionError("started")

    with pytest.raises(UserError, match="There is no sweep folder"):
        start(tmp_path / "none")
    with pytest.raises(UserError, match="has no trials yet: there is nothing to show"):
        start(create(small_spec(colours, tmp_path)))
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"--tensorboard-port: {port} is taken on {HOST}"):
            start(swept, tensorboard=port)


def test_a_confusion_picture_is_dark_where_a_row_is(tmp_path: Path) -> None:
    picture = confusion_picture([[8, 0], [2, 2]], ["a class with a very long name", "b"])
    assert picture.dtype == np.uint8
    side = picture.shape[0]
    cells = [[picture[side - 60 + 30 * t + 3, side - 60 + 30 * s + 3, 0] for s in (0, 1)] for t in (0, 1)]
    assert cells == [[0, 255], [128, 128]]
