"""Limits: told to Optuna as constraints, and what cannot keep them is not trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from optuna.trial import TrialState
from small import small_spec, study_of
from small_clip import clip_folder
from test_study import row
from torch import nn

from methods.parts.cells import CellNetwork
from orchestrator.errors import UserError
from orchestrator.evaluate import cost
from orchestrator.evaluate.cost import Latency, costs, model_bytes, parameters, peak_bytes
from orchestrator.spec import METRICS, Limits, SweepSpec, near_limits, parse_spec
from orchestrator.store import Store
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.repeat import run_repeats
from orchestrator.trial.row import judged

CONVNEXT, VIT = ({"model": f"timm/{name}", "image_size": 32} for name in ("test_convnext", "test_vit"))


def run_one(spec: SweepSpec, cell: Cell, knobs: dict[str, Any] | None = None) -> dict[str, Any]:
    folder = Path(spec.storage) / spec.name
    return run_repeats(SweepContext(spec, str(folder)), TrialConfig("t0000", 0, cell, knobs or {}, 0))


def stages(spec: SweepSpec) -> set[str]:
    return {e.stage for e in Store(Path(spec.storage) / "store").entries()}


def test_the_excess_is_a_share_of_the_limit_and_the_val_metrics_is_a_least() -> None:
    limits = Limits(val_metric=0.8, params_total=1000.0, latency_ms=4.0)
    facts = {"val_metric": 0.6, "params_total": 900, "latency_ms": 5.0, "flops": 1e12}
    assert limits.excess(facts) == pytest.approx({"val_metric": 0.25, "params_total": -0.1, "latency_ms": 0.25})
    assert limits.broken(facts) == (
        "val_metric 0.6 is below limits.val_metric: 0.8 and latency_ms 5 ms is above limits.latency_ms: 4 ms"
    )
    assert limits.excess({"val_metric": math.nan, "params_total": None}) == {}
    assert limits.broken({"params_total": 1000, "latency_ms": 4.0, "val_metric": 0.8}) == ""


def test_peak_memory_is_weights_and_what_is_alive_at_the_same_time() -> None:
    plane = 32 * 32 * 4
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    weights = 4 * (3 * 8 * 9 + 8 + 8 + 1)
    # input and both maps of 8 channels; when the last map is made, the first one is gone
    assert peak_bytes(network, 32) == weights + 3 * plane + 2 * 8 * plane
    assert model_bytes(network) == weights
    real = timm.create_model("test_resnet")
    with torch.device("meta"):
        drawn = timm.create_model("test_resnet")
    assert costs(drawn, 64) == costs(real, 64)


def test_a_network_that_exceeds_a_limit_is_left_out_before_anything_runs(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        students=[CONVNEXT, {"model": "timm/resnet18", "image_size": 32}],
        limits={"params_total": 1_000_000},
    )
    prepared = prepare(spec)
    assert {c.student for c in prepared.cells if c.method != "wecolora"} == {0}
    said = [s for s in prepared.dropped if s.startswith("kd with timm/resnet18: ")]
    assert said == ["kd with timm/resnet18: params_total 11,178,051 is above limits.params_total: 1,000,000"]
    with pytest.raises(UserError, match=r"^limits: nothing can keep them: finetune with timm/test_convnext: model_mb "):
        prepare(small_spec(colours, tmp_path, methods={"finetune": {}, "kd": {}}, limits={"model_mb": 0.01}))


def test_a_network_that_is_too_slow_is_not_trained_and_its_row_says_why(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, limits={"latency_ms": 1e-3}, search={"trials": 1, "repeats": 3})
    found = run_one(spec, Cell("kd", 0, 0))
    assert found["status"] == "infeasible", found["reason"]
    assert found["latency_ms"] > 1e-3
    assert found["params_total"] > 0
    assert "is above limits.latency_ms: 0.001 ms (cpu (" in found["reason"]
    assert found["reason"].endswith("; nothing was trained")
    assert (found["optimizer_steps"], found["student_path"], found["repeats"]) == (0, "", 1)
    assert math.isnan(found["val_metric"])
    assert stages(spec) <= {"latency", "catalogue"}
    free = small_spec(colours, tmp_path, search={"trials": 1})
    assert run_one(free, Cell("kd", 0, 0))["latency_ms"] == found["latency_ms"]  # measured once, for both


def test_what_a_method_makes_of_its_teacher_is_weighed_before_it_is_trained(colours: Path, tmp_path: Path) -> None:
    small = run_one(small_spec(colours, tmp_path), Cell("wecolora", 0, None), {"factor": 3, "rank": 4})
    assert small["status"] == "complete", small["reason"]
    limits = {"params_total": small["params_total"]}
    spec = small_spec(colours, tmp_path / "limited", limits=limits)
    big = run_one(spec, Cell("wecolora", 0, None), {"factor": 2, "rank": 4})
    assert (big["status"], big["optimizer_steps"]) == ("infeasible", 0), big["reason"]
    assert big["params_total"] > small["params_total"]
    assert "distil" not in stages(spec)
    again = run_one(spec, Cell("wecolora", 0, None), {"factor": 3, "rank": 4})
    assert (again["status"], again["params_total"]) == ("complete", small["params_total"])


def test_a_zero_shot_student_is_weighed_with_its_prototypes_before_it_is_trained(colours: Path, tmp_path: Path) -> None:
    teacher = {"model": f"local:{clip_folder(tmp_path / 'clip')}"}
    only = {"teachers": [teacher], "methods": {"embedding_regression": {}}}
    small = run_one(small_spec(colours, tmp_path, **only), Cell("embedding_regression", 0, 0))
    assert small["status"] == "complete", small["reason"]
    limits = {name: small[name] for name in ("params_total", "flops", "memory_mb", "model_mb")}
    assert prepare(small_spec(colours, tmp_path, **only, limits=limits)).unchecked == []  # all of it keeps what it is
    for name, value in limits.items():
        with pytest.raises(UserError, match=rf"nothing can keep them: embedding_regression .* is above limits\.{name}"):
            prepare(small_spec(colours, tmp_path, **only, limits={name: 0.999 * value}))


def test_what_a_search_finds_is_weighed_by_the_least_that_it_can_find(colours: Path, tmp_path: Path) -> None:
    knobs = {"width": 8, "stages": 2, "cells": 1}
    spec = small_spec(colours, tmp_path, methods={"darts": knobs}, limits={"params_total": 8e3})
    found = run_one(spec, Cell("darts", 0, 0), knobs)
    least = CellNetwork(["skip", "skip"], 2, 8, 3)
    if found["status"] == "complete":
        assert parameters(least) <= found["params_total"] <= 8e3
    tight = small_spec(colours, tmp_path / "tight", methods={"darts": knobs}, limits={"params_total": 1e3})
    refused = run_one(tight, Cell("darts", 0, 0), knobs)
    assert (refused["status"], refused["optimizer_steps"]) == ("infeasible", 0)
    assert refused["params_total"] == parameters(least)
    assert "without what the method adds; nothing was trained" in refused["reason"]
    (sentence,) = prepare(spec).unchecked
    assert sentence.startswith("limits: what darts deploys is known in part before training")


def test_a_limit_that_only_training_tells_keeps_the_student_and_its_values(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path, limits={"val_metric": 1.0, "device_seconds": 1e-6})
    found = run_one(spec, Cell("finetune", None, 0))
    assert found["status"] == "infeasible"
    assert "is above limits.device_seconds" in found["reason"]
    assert found["student_path"] == "students/t0000"
    assert found["val_metric"] >= 0


def test_optuna_hears_limits_as_constraints_and_infeasible_is_no_failure(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        objectives=["val_metric", "latency_ms"],
        limits={"latency_ms": 4, "params_total": 1e9},
        methods={"finetune": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}},
        search={"trials": 20},
    )
    study = study_of(spec, tmp_path / "s")
    for _ in range(3):
        study.ask()
    study.tell(0, row("complete", val_metric=0.5, latency_ms=2.0, params_total=10))
    study.tell(1, row("infeasible", val_metric=0.9, latency_ms=8.0, params_total=10))
    study.tell(2, row("infeasible", val_metric=math.nan, latency_ms=6.0, params_total=10))  # it was not trained
    trials = study._study.get_trials(deepcopy=False)
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert [t.constraints["latency_ms"] for t in trials] == [-0.5, 1.0, 0.5]
    assert all(t.constraints["params_total"] < 0 for t in trials)
    assert [t.number for t in study._study.best_trials] == [0]  # the other one has a better val metric
    assert [t.user_attrs["status"] for t in trials] == ["complete", "infeasible", "infeasible"]


def test_the_search_turns_to_where_the_limit_is_kept(colours: Path, tmp_path: Path) -> None:
    """Larger lr: a better val metric and a higher latency, in this made-up response."""
    spec = small_spec(
        colours,
        tmp_path,
        limits={"latency_ms": 1.5},
        methods={"finetune": {"lr": {"low": 1e-4, "high": 1e-2}}},
        search={"trials": 40},
    )
    study = study_of(spec, tmp_path / "s")
    seen = []
    for number in range(40):
        lr = study.ask().knobs["lr"]
        latency = lr * 1000
        seen.append(latency)
        status = "complete" if latency <= 1.5 else "infeasible"
        study.tell(number, row(status, val_metric=lr * 100 if latency <= 1.5 else math.nan, latency_ms=latency))
    assert sum(1.4 < latency < 1.6 for latency in seen[20:]) >= 14, seen  # none of the 20 by chance
    best = max(t.values[0] for t in study._study.get_trials(states=(TrialState.COMPLETE,)))
    assert best > 0.149  # of 0.15


PROFILES = [
    {"profile": "edge", "threads": 1, "batch": 1, "min_run_s": 0.03},
    {"profile": "server", "threads": 2, "batch": 8, "runtime": "onnxruntime", "min_run_s": 0.03},
]
EVERY_METRIC = [*METRICS, "latency_ms_server"]


@pytest.fixture(scope="module")
def measured(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    storage = tmp_path_factory.mktemp("measured")
    found = run_one(small_spec(colours, storage, latency=PROFILES, methods={"finetune": {}}), Cell("finetune", None, 0))
    assert found["status"] == "complete", found["reason"]
    return storage, found


def test_each_profile_has_columns_of_its_own(measured: tuple[Path, dict[str, Any]]) -> None:
    _, found = measured
    assert found["latency_setup"].startswith("edge: cpu (")
    assert found["latency_setup"].endswith(", 1 thread, batch 1")
    assert found["latency_setup_server"].startswith("server: cpu (")
    assert found["latency_setup_server"].endswith(", 2 threads, batch 8, onnxruntime")
    for end in ("", "_server"):
        assert 0 < found[f"latency_low_ms{end}"] <= found[f"latency_ms{end}"] <= found[f"latency_high_ms{end}"]
    reads = [e.meta["reads"] for e in Store(measured[0] / "store").entries() if e.stage == "latency"]
    assert {(r["threads"], r["batch"], r["runtime"]) for r in reads} == {(1, 1, "torch"), (2, 8, "onnxruntime")}


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_every_metric_can_be_an_objective_and_a_limit_that_optuna_hears(
    metric: str, colours: Path, measured: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """One trial within the limit, one beyond it (infeasible, not failed) and a real failure."""
    assert math.isfinite(measured[1][metric])
    limit = 0.5 if metric == "val_metric" else 1e9
    within, beyond = (0.75, 0.25) if metric == "val_metric" else (5e8, 1.5e9)
    spec = small_spec(
        colours, tmp_path, latency=PROFILES, methods={"finetune": {}}, objectives=[metric], limits={metric: limit}
    )
    assert parse_spec(yaml.safe_load(spec.to_yaml())) == spec
    assert spec.objectives[0].direction == ("max" if metric == "val_metric" else "min")
    assert spec.limits.given == {metric: limit}
    study = study_of(spec, tmp_path / "s")
    for _ in range(3):
        study.ask()
    study.tell(0, judged(spec, row("complete", **{metric: within})))
    study.tell(1, judged(spec, row("complete", **{metric: beyond})))
    study.tell(2, row("failed"))
    trials = study._study.get_trials(deepcopy=False)
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert [t.user_attrs["status"] for t in trials] == ["complete", "infeasible", "failed"]
    assert [t.constraints.get(metric) for t in trials] == [pytest.approx(-0.5), pytest.approx(0.5), None]
    assert [t.values for t in trials[:2]] == [[within], [beyond]]
    assert study._study.best_trial.number == 0


@pytest.mark.parametrize(
    ("metric", "least"), [("memory_mb", 1e-3), ("latency_ms_server", 1e-4), ("params_trained", 10)]
)
def test_a_limit_of_a_network_ends_a_trial_before_training_and_of_training_after(
    metric: str, least: float, colours: Path, measured: tuple[Path, dict[str, Any]]
) -> None:
    spec = small_spec(colours, measured[0], latency=PROFILES, methods={"finetune": {}}, limits={metric: least})
    found = run_one(spec, Cell("finetune", None, 0))
    assert found["status"] == "infeasible"
    assert f"limits.{metric}: " in found["reason"]
    assert (found["optimizer_steps"] == 0) == (metric != "params_trained")


def test_a_latency_near_its_limit_is_measured_longer_and_says_so(
    colours: Path, measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, _ = measured
    rounds = []

    def timed(call: Any, device: str, threads: int, batch: int, min_run_time: float, rounds_: int) -> Latency:
        rounds.append((rounds_, min_run_time))
        median = 2.0 if rounds_ == 3 else 2.1
        return Latency(median, 0.1, device, threads, batch, 10, median - 0.2, median + 0.2)

    monkeypatch.setattr(cost, "timed", timed)
    latency = {"profile": "near", "min_run_s": 0.06}
    rows = {}
    for limit in (2.05, 2.15):
        spec = small_spec(colours, storage, latency=latency, methods={"finetune": {}}, limits={"latency_ms": limit})
        rows[limit] = run_one(spec, Cell("finetune", None, 0))
    assert rounds == [(3, 0.06), (9, pytest.approx(0.18))]  # once each, shared by both
    assert rows[2.05]["status"] == "infeasible"
    assert rows[2.05]["latency_ms"] == 2.1
    assert "limits.latency_ms: 2.05 ms, within the noise of its measurement (1.9 ms to 2.3 ms)" in rows[2.05]["reason"]
    assert rows[2.15]["status"] == "complete"
    assert near_limits({"latency_ms": 2.15}, rows[2.15]) == [
        "latency_ms 2.1 ms keeps the limit of 2.15 ms, within the noise of its measurement (1.9 ms to 2.3 ms)."
    ]
    assert near_limits({"latency_ms": 2.5}, rows[2.15]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"latency": {"runtime": "onnxruntime", "device": "cuda"}},
            "latency: runtime: onnxruntime measures on the CPU",
        ),
        ({"latency": [*PROFILES, PROFILES[0]]}, "latency.2.profile: 'edge' is the name of two profiles"),
        ({"latency": [PROFILES[0], {"threads": 2}]}, "latency.1.profile: '' cannot name a column"),
        ({"latency": []}, "latency: list should have at least 1 item"),
        ({"latency": [{"thread": 1}]}, "Unknown key 'latency.0.thread' in the sweep file; allowed here: profile,"),
        (
            {"latency": PROFILES, "limits": {"latency_ms_servr": 3}},
            "limits: latency_ms_servr is of no profile of latency; the latencies are latency_ms and latency_ms_server. "
            "Did you mean 'latency_ms_server'?",
        ),
        ({"objectives": ["latency_ms_edge"]}, "objectives: latency_ms_edge is of no profile of latency"),
        ({"limits": {"latency_mss": 3}}, "Unknown key 'limits.latency_mss'"),
    ],
)
def test_wrong_profiles_are_a_sentence(colours: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        small_spec(colours, tmp_path, **changes)
    assert words in str(error.value)
