"""What the study hears when a sweep is broken off: no more than it would have heard, so that it goes on the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from small import small_spec, study_of
from test_study import row

from orchestrator.sweep import tune as module
from orchestrator.sweep.folder import create
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.study import Study
from orchestrator.trial.context import SweepContext
from orchestrator.trial.row import blank_row


class BrokenOff:
    """In Tune's place: three trials at a time, each done before the one that began before it; then a Ctrl-C.

    Args:
        trials: to be done.
    """

    trials = 0

    def __init__(self, trainable: Any, tune_config: Any, run_config: Any) -> None:
        self.bridge = tune_config.search_alg

    def fit(self) -> None:
        bridge, going, names = self.bridge, [], map(str, itertools.count())
        for _ in range(self.trials):
            while len(going) < 3 and isinstance(bridge.suggest(next(names)), dict):
                going.append(next(reversed(bridge.open)))
            trial = going.pop(-2 if len(going) > 1 else 0)
            config = bridge.open[trial]
            ended = row("complete", val_metric=0.1 + 0.01 * config.number, student_path="students/x")
            bridge.ledger.write(blank_row(bridge.context.spec, config) | ended)
            bridge.on_trial_complete(trial, {})


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nodes_now", lambda: [])
    monkeypatch.setattr(module, "concurrency_of", lambda *_: 3)
    monkeypatch.setattr(module.tune, "Tuner", BrokenOff)
    monkeypatch.setattr(module.tune, "with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr(module.tune, "with_resources", lambda trainable, _: trainable)


def proposals(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[int]) -> list[dict[str, Any]]:
    """The knobs of all proposals of a sweep whose driver has so many trials done in each of its lives."""
    spec = small_spec(
        colours,
        tmp_path,
        methods={"finetune": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}}},
        search={"trials": 14, "reproducible": True},
    )
    folder = create(spec)
    study: Study | None = None
    for number, trials in enumerate(lives, 1):
        monkeypatch.setattr(BrokenOff, "trials", trials)
        study = study_of(spec, folder)
        assert module.run_search(SweepContext(spec, str(folder)), study) == (number == len(lives))
    assert study is not None
    assert len(Ledger(folder).rows()) == 14
    return [config.knobs for config, _ in study.proposed()]


def test_a_sweep_that_was_broken_off_proposes_what_an_undisturbed_one_does(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cluster: None
) -> None:
    whole = proposals(colours, tmp_path / "whole", monkeypatch, [14])
    assert len({knobs["lr"] for knobs in whole}) == 14
    assert proposals(colours, tmp_path / "broken", monkeypatch, [8, 6]) == whole
