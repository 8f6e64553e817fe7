"""What trials of one sweep share: each distinct setting of an early stage is computed once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from small import small_spec

from orchestrator.spec import SweepSpec
from orchestrator.store import Store
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial


def run(spec: SweepSpec, method: str, student: int | None, number: int, **knobs: Any) -> dict[str, Any]:
    config = TrialConfig(f"t{number:04}", number, Cell(method, 0, student), knobs, 0)
    row = run_trial(SweepContext(spec, f"{spec.storage}/{spec.name}"), config)
    assert row["status"] == "complete", row["reason"]
    return row


def computed(spec: SweepSpec) -> Counter[str]:
    return Counter(entry.stage for entry in Store(Path(spec.storage) / "store").entries())


def test_trials_with_the_same_proxy_settings_share_stage_a(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    proxy = {"proxy_dim": 8, "proxy_epochs": 3}
    rows = [run(spec, "tdmr", 0, i, temperature=t, **proxy) for i, t in enumerate((2.0, 4.0, 8.0))]
    run(spec, "tdmr", 0, 3, proxy_dim=16, proxy_epochs=3)
    assert computed(spec)["proxy"] == 2
    assert computed(spec)["distil"] == 4
    assert rows[0]["teacher_forwards"] > 0
    assert [row["teacher_forwards"] for row in rows[1:]] == [0, 0]


def test_a_tuned_teacher_is_one_for_its_own_trial_and_for_all_that_it_teaches(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(colours, tmp_path)
    own = run(spec, "lora", None, 0)
    taught = [run(spec, m, 0, i, teacher_tuning="lora") for i, m in enumerate(("kd", "fitnet", "rkd", "tdmr"), 1)]
    run(spec, "kd", 0, 9, teacher_tuning="lora", temperature=2.0)
    assert computed(spec)["tune"] == 1
    assert own["optimizer_steps"] == 3  # half of the sweep's six: the tuning's own budget
    assert all(row["optimizer_steps"] == 3 + 6 for row in taught)


def test_the_order_in_which_trials_come_changes_nothing(colours: Path, tmp_path: Path) -> None:
    values = []
    for order in (("lora", "kd"), ("kd", "lora")):
        spec = small_spec(colours, tmp_path / "-".join(order))
        rows = {
            m: run(spec, m, 0 if m == "kd" else None, i, **({"teacher_tuning": "lora"} if m == "kd" else {}))
            for i, m in enumerate(order)
        }
        values.append({m: row["val_metric"] for m, row in rows.items()})
    assert values[0] == values[1]


def test_a_network_at_another_size_is_not_scored_as_the_first_one(colours: Path, tmp_path: Path) -> None:
    """Its weights are the same ones, and no stage comes before its score."""
    sizes = (32, 64)
    students = [{"model": "timm/test_resnet", "image_size": size} for size in sizes]
    spec = small_spec(colours, tmp_path, students=students, methods={"linear_probe": {}})
    rows = [run(spec, "linear_probe", i, i) for i in range(2)]
    assert rows[1]["flops"] > 3 * rows[0]["flops"]
    for row, size in zip(rows, sizes, strict=True):
        about = json.loads((tmp_path / "small" / row["student_path"] / "student.json").read_text())
        assert about["preprocessing"]["size"] == size
