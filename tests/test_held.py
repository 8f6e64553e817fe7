"""What trials hold of a cluster, what that costs, and when no further trial fits a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import small_spec

from orchestrator.errors import UserError
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.sweep.capacity import check_shape, concurrency, known_cluster, quantity, read_nodes, trials_at_a_time
from orchestrator.sweep.held import Held

CLUSTERS = Path(__file__).parent.parent / "clusters"
NODES = {
    "small": {"max": 3, "resources": {"CPU": 4.0}},
    "big": {"max": 2, "resources": {"CPU": 16.0, "GPU": 2.0}},
}
PRICES = {"small": 0.4, "big": 4.0}


def spec_of(tmp_path: Path, **changes: Any) -> SweepSpec:
    return small_spec(tmp_path, tmp_path / "runs", cluster={"nodes": NODES, "prices": PRICES}, **changes)


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_trial_is_billed_for_what_it_held_through_failures_and_lives_of_the_driver(tmp_path: Path) -> None:
    time, spec = Time(), spec_of(tmp_path, train={"steps": 1, "threads": 2})
    held = Held(tmp_path, spec, "cpu", time)
    for passed, running in ((10.0, ["t0"]), (5.0, ["t0", "t1"]), (100.0, []), (20.0, ["t1"])):
        time.now += passed
        held.tick(running)
    held.save(force=True)
    assert held.device_seconds("t0") == 2 * 15
    assert held.device_seconds("t1") == 2 * 25
    time.now += 1000  # no driver ran
    again = Held(tmp_path, spec, "cpu", time)
    time.now += 5
    again.tick(["t1"])
    assert again.device_seconds("t1") == 2 * 30
    assert again.device_seconds("unknown") == 0


def test_money_is_the_share_of_the_node_at_its_price(tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text(
        json.dumps(
            {
                "device": "cpu",
                "trials": {
                    "known": {"seconds": 3600.0, "node_type": "small"},
                    "unknown": {"seconds": 3600.0, "node_type": ""},
                },
            }
        )
    )
    two = Held(tmp_path, spec_of(tmp_path, train={"steps": 1, "threads": 2}), "cpu")
    assert two.money("known") == pytest.approx(0.4 * 2 / 4)
    assert two.money("unknown") == pytest.approx(4.0 * 2 / 16), "at the dearest that holds it"
    group = Held(tmp_path, spec_of(tmp_path, train={"steps": 1, "workers": 2, "batch": 12}), "cuda")
    assert group.money("known") == pytest.approx(2 * 4.0 * 1 / 2), "a group's nodes are not told: two of two GPUs"


@pytest.mark.parametrize(("limit", "over"), [(59.0, True), (60.0, False), (61.0, False), (45.0, True)])
def test_no_trial_begins_that_would_go_over_the_budget(tmp_path: Path, limit: float, over: bool) -> None:
    # Two done with 20 and 10, one going with 5: the mean is 15, so it will take 10 more and the next one 15.
    times = {"t0": 20.0, "t1": 10.0, "t2": 5.0}
    trials = {name: {"seconds": seconds, "node_type": ""} for name, seconds in times.items()}
    (tmp_path / "held.json").write_text(json.dumps({"device": "cpu", "trials": trials}))
    spec = spec_of(tmp_path, search={"device_hours": limit / 3600})
    assert Held(tmp_path, spec, "cpu").exhausted(["t0", "t1"], ["t2"]) is over
    money = spec_of(tmp_path, search={"budget": limit / 3600 * 4 / 16})
    assert Held(tmp_path, money, "cpu").exhausted(["t0", "t1"], ["t2"]) is over


def test_without_a_finished_trial_a_budget_is_only_what_is_spent(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, search={"device_hours": 1.0})
    held = Held(tmp_path, spec, "cpu")
    assert not held.exhausted([], ["t0"])
    held.trials["t0"] = {"seconds": 3600.0, "node_type": ""}
    assert held.exhausted([], ["t0"])


def test_a_cluster_that_may_grow_counts_as_grown(tmp_path: Path) -> None:
    head = [{"CPU": 0.0}]
    spec = spec_of(tmp_path, train={"steps": 1, "threads": 3})
    # A node of 4 CPUs holds one trial of 3, one of 16 holds five.
    assert concurrency(spec, "cpu", head) == 3 * 1 + 2 * 5
    assert concurrency(spec_of(tmp_path, search={"concurrency": 4}), "cpu", head) == 4
    assert trials_at_a_time(spec, "cpu", [{"CPU": 2.0}, {"CPU": 2.0}]) == 0, "a process lies on one node"
    half = spec_of(tmp_path, train={"steps": 1, "gpus_per_worker": 0.5})
    assert concurrency(half, "cuda", head) == 2 * 4
    alone = small_spec(tmp_path, tmp_path)
    assert concurrency(alone, "cpu", [{"CPU": 2.0}]) == 2


def test_a_trial_for_which_the_cluster_never_has_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs nodes with 20 CPU and the cluster never has them \(most on a node: 16 CPU"
    ):
        check_shape(spec_of(tmp_path, train={"steps": 1, "threads": 20}), "cpu", [])
    check_shape(spec_of(tmp_path, train={"steps": 1, "threads": 16}), "cpu", [])
    wide = {"steps": 1, "workers": 5, "batch": 20}
    with pytest.raises(UserError, match=r"1 CPU and 1 GPU, 5 times,"):
        check_shape(spec_of(tmp_path, train=wide), "cuda", [])


@pytest.mark.parametrize(
    "name", ["aws.yaml", "gcp.yaml", "azure.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
)
def test_limits_are_read_from_the_clusters_own_file(name: str) -> None:
    nodes = read_nodes(CLUSTERS / name)
    assert list(nodes) == ["head", "drivers", "cpu-trials", "gpu-trials", "gpu-groups"]
    assert nodes["head"].resources["CPU"] == 0
    assert nodes["drivers"].resources["driver"] == 16
    assert [kind.max for kind in nodes.values()] == [1, 2, 8, 8, 4]
    assert [kind.resources.get("GPU", 0) for kind in nodes.values()] == [0, 0, 0, 1, 4]


def test_quantities_of_kubernetes_are_numbers() -> None:
    assert [quantity(q) for q in ("500m", "2Gi", "16", 4, "1.5M")] == [0.5, 2 * 2**30, 16, 4, 1.5e6]
    with pytest.raises(UserError, match="'lots' is no quantity"):
        quantity("lots")


def test_prices_and_files_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    spec = small_spec(tmp_path, tmp_path, cluster={"file": str(CLUSTERS / "aws.yaml"), "prices": {"gpu-trial": 1.0}})
    with pytest.raises(UserError, match=r"no node type 'gpu-trial'.*Did you mean 'gpu-trials'\?"):
        known_cluster(spec.cluster)
    on_premise = {"file": str(CLUSTERS / "on_premise.yaml"), "prices": {"head": 1.0}}
    with pytest.raises(UserError, match="has no node types that prices could be for"):
        known_cluster(small_spec(tmp_path, tmp_path, cluster=on_premise).cluster)
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="no file of Ray's cluster launcher"):
        read_nodes(tmp_path / "other.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_nodes(tmp_path / "gone.yaml")
    for changes, message in (
        ({"search": {"budget": 5}}, r"search\.budget: 5 needs cluster\.prices"),
        ({"cluster": {"prices": {"a": 1}}}, "prices are for node types, and there are none"),
        ({"cluster": {"nodes": NODES, "prices": {"small": -1}}}, "the price of 'small' is -1"),
    ):
        with pytest.raises(UserError, match=message):
            parse_spec(small_spec(tmp_path, tmp_path).model_dump(mode="json") | changes)
