"""Sweeps whose trials train on worker groups: early stopping reaches them, and what they held is given back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import small_spec

from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.run import create, prepare, run

pytestmark = pytest.mark.ray
LIMIT_S = 120


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    from orchestrator.sweep.tune import start_ray

    start_ray(1)
    yield
    ray.shutdown()


def held() -> list[str]:
    """Placement groups that are not removed, and CPUs that are in use."""
    import ray
    from ray.util import placement_group_table

    groups = [g["placement_group_id"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    busy = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
    return groups + ([f"{busy} CPUs"] if busy else [])


def test_asha_stops_the_work_of_a_group_and_gets_back_what_it_held(colours: Path, tmp_path: Path) -> None:
    spec = small_spec(
        colours,
        tmp_path,
        methods={"finetune": {"lr": [0.003, 1e-6, 2e-6]}},
        search={"trials": 3, "sampler": "grid", "scheduler": "asha", "reduction": 2, "concurrency": 1},
        train={"steps": 80, "batch": 12, "views": 2, "workers": 2},
    )
    folder = create(spec)
    run(prepare(spec), folder)
    rows = Ledger(folder).rows()
    assert [r["status"] for r in rows] == ["complete", "pruned", "pruned"], [r["reason"] for r in rows]
    assert rows[0]["optimizer_steps"] == 80
    for row in rows[1:]:
        assert row["reason"].startswith("stopped by asha at ")
        assert float(row["reason"].split(" at ")[1].split("%")[0]) < 60  # it did not train to its end
        assert row["student_path"] == ""
        assert row["val_metric"] < rows[0]["val_metric"]
    deadline = time.monotonic() + LIMIT_S  # the process of the last one is ended by Ray, in its own time
    while held():
        assert time.monotonic() < deadline, held()
        time.sleep(0.5)
    store = Path(spec.storage) / "store"
    assert sorted(p.name for p in (store / "finetune").iterdir()) == [
        p.name for p in (store / "finetune").iterdir() if (p / "meta.json").is_file()
    ]
    assert len(list((store / "finetune").iterdir())) == 1  # nothing of the stopped ones was published
