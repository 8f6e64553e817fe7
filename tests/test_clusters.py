"""Claims about clusters/: its files fit the schemas of those who read them, cost nothing idle, and are closed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.spec import parse_spec
from orchestrator.sweep.capacity import read_nodes

CLUSTERS = Path(__file__).parent.parent / "clusters"
CLOUDS = ["aws", "gcp", "azure"]
LAUNCHER = [CLUSTERS / f"{name}.yaml" for name in [*CLOUDS, "on_premise"]] + [CLUSTERS / "local" / "cluster.yaml"]
KUBERAY = sorted((CLUSTERS / "kuberay").glob("*.yaml"))
RAY = "2.60.0"

# Fields of KubeRay 1.6's custom resources (ray-operator/apis/ray/v1), those below a pod's template left to Kubernetes.
AUTH = {"mode": str, "secretName": str, "enableK8sTokenAuth": bool}
AUTOSCALER = {
    "version": ("v1", "v2"),
    "upscalingMode": ("Default", "Aggressive", "Conservative"),
    "idleTimeoutSeconds": int,
    "resources": dict,
    "image": str,
    "imagePullPolicy": str,
    "securityContext": dict,
    "env": list,
    "envFrom": list,
    "volumeMounts": list,
}
HEAD = {
    "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
    "headService": dict,
    "enableIngress": bool,
    "resources": dict,
    "labels": dict,
    "rayStartParams": dict,
    "template": dict,
}
GROUP = {
    "groupName": str,
    "suspend": bool,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "numOfHosts": int,
    "idleTimeoutSeconds": int,
    "resources": dict,
    "labels": dict,
    "rayStartParams": dict,
    "template": dict,
    "scaleStrategy": dict,
}
CLUSTER = {
    "rayVersion": str,
    "suspend": bool,
    "managedBy": str,
    "upgradeStrategy": dict,
    "authOptions": AUTH,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": AUTOSCALER,
    "headServiceAnnotations": dict,
    "gcsFaultToleranceOptions": dict,
    "headGroupSpec": HEAD,
    "workerGroupSpecs": [GROUP],
}
JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "jobId": str,
    "metadata": dict,
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "submitterConfig": dict,
    "submitterPodTemplate": dict,
    "entrypointResources": str,
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "clusterSelector": dict,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "ttlSecondsAfterFinished": int,
    "shutdownAfterJobFinishes": bool,
    "suspend": bool,
    "managedBy": str,
    "deletionStrategy": dict,
    "rayClusterSpec": CLUSTER,
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def misfits(value: Any, schema: Any, where: str = "spec") -> list[str]:
    """What of `value` the schema has no room for."""
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{where}: {value!r}"]
    if isinstance(schema, list):
        return [m for i, item in enumerate(value) for m in misfits(item, schema[0], f"{where}[{i}]")]
    if isinstance(schema, dict):
        unknown = [f"{where}.{key} is no field" for key in value if key not in schema]
        return unknown + [
            m for key in value if key in schema for m in misfits(value[key], schema[key], f"{where}.{key}")
        ]
    return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]


def cluster_specs() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in KUBERAY:
        for document in documents(path):
            if document["kind"] == "RayCluster":
                found.append((path.name, document["spec"]))
            if document["kind"] == "RayJob":
                found.append((path.name, document["spec"]["rayClusterSpec"]))
    return found


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_launcher_files_fit_rays_own_schema(path: Path) -> None:
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


def test_the_schema_would_refuse_a_misspelt_key() -> None:
    config = prepare_config(yaml.safe_load(LAUNCHER[0].read_text())) | {"idle_timeout_minuets": 5}
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        validate_config(config)


@pytest.mark.parametrize("path", LAUNCHER[:4], ids=lambda path: path.stem)
def test_launcher_files_have_a_token_and_open_no_port_of_their_own(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "0.0.0.0" not in path.read_text()


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_cluster_without_work_is_its_head_and_drivers_are_not_on_spot(name: str) -> None:
    config = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    types = config["available_node_types"]
    spot = [t for t, node in types.items() if re.search("'spot'|preemptible|'Spot'", str(node["node_config"]))]
    assert sorted(spot) == ["cpu-trials", "gpu-groups", "gpu-trials"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert [t for t, node in types.items() if "driver" in node["resources"]] == ["drivers"]
    assert all(node.get("min_workers", 0) == 0 for node in types.values())
    assert sum(node["max_workers"] for node in types.values()) == config["max_workers"]
    assert not config["provider"].get("cache_stopped_nodes", False)


def test_kuberay_files_use_fields_of_the_custom_resources_only() -> None:
    schemas = {"RayCluster": CLUSTER, "RayJob": JOB}
    seen = []
    for path in KUBERAY:
        for document in documents(path):
            if document["kind"] in schemas:
                assert document["apiVersion"] == "ray.io/v1"
                assert misfits(document["spec"], schemas[document["kind"]]) == [], path.name
                seen.append(document["kind"])
    assert sorted(seen) == ["RayCluster", "RayJob"]
    assert misfits({"autoscalerOptions": {"version": "v3"}, "head": {}}, CLUSTER) == [
        "spec.head is no field",
        "spec.autoscalerOptions.version: 'v3'",
    ]


def test_kuberay_clusters_are_closed_scale_to_the_head_and_keep_drivers_off_spot() -> None:
    for name, spec in cluster_specs():
        assert spec["authOptions"]["mode"] == "token", name
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["rayVersion"] == RAY
        head = spec["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP"
        assert head["rayStartParams"]["num-cpus"] == "0"
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert list(groups) == ["drivers", "cpu-trials", "gpu-trials", "gpu-groups"]
        for group in groups.values():
            assert (group["replicas"], group["minReplicas"]) == (0, 0)
            assert group["idleTimeoutSeconds"] > 0
        # The params go through a shell: quotes for it around the JSON.
        assert json.loads(json.loads(groups["drivers"]["rayStartParams"]["resources"])) == {"driver": 16}
        keeps = {"head": head, **groups}
        kept = [n for n, group in keeps.items() if group["template"]["metadata"]["labels"].get("keep") == "yes"]
        assert kept == ["head", "drivers"]
        for n, group in keeps.items():
            pod = group["template"]["spec"]
            assert pod["restartPolicy"] == "Never"
            assert ("tolerations" in pod) == (n not in kept), "spot nodes are tainted"
            for container in pod["containers"]:
                resources = container["resources"]
                assert resources["requests"] == resources["limits"]
                assert {"name": "sweeps", "mountPath": "/shared"} in container["volumeMounts"]


def test_the_disruption_budget_covers_drivers_and_nothing_else() -> None:
    (budget,) = [d for d in documents(CLUSTERS / "kuberay" / "storage.yaml") if d["kind"] == "PodDisruptionBudget"]
    wanted = budget["spec"]["selector"]["matchLabels"]
    for _, spec in cluster_specs():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            labels = group["template"]["metadata"]["labels"]
            covered = wanted.items() <= labels.items()
            assert covered == (group.get("groupName", "head") in ("head", "drivers"))


def test_both_kuberay_files_describe_the_same_cluster() -> None:
    (_, cluster), (_, job) = cluster_specs()
    pod = job["headGroupSpec"]["template"]["spec"]
    pod["volumes"] = [v for v in pod["volumes"] if v["name"] != "sweep"]
    pod["containers"][0]["volumeMounts"] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] != "sweep"]
    assert job == cluster


def test_the_sweep_file_inside_the_rayjob_is_valid() -> None:
    (config,) = [d for d in documents(CLUSTERS / "kuberay" / "rayjob.yaml") if d["kind"] == "ConfigMap"]
    spec = parse_spec(yaml.safe_load(config["data"]["sweep.yaml"]))
    assert spec.storage == "/shared/runs"


def test_every_file_names_the_ray_that_the_project_is_tested_with() -> None:
    for path in [*LAUNCHER[:4], CLUSTERS / "Dockerfile"]:
        assert re.search(rf"rayproject/ray:{re.escape(RAY)}-py312", path.read_text()), path.name


def test_the_rayjobs_sweep_knows_the_nodes_that_its_trials_may_take() -> None:
    path = CLUSTERS / "kuberay" / "rayjob.yaml"
    (config,) = [d for d in documents(path) if d["kind"] == "ConfigMap"]
    nodes, known = yaml.safe_load(config["data"]["sweep.yaml"])["cluster"]["nodes"], read_nodes(path)
    assert nodes
    for name, kind in nodes.items():
        assert kind["max"] == known[name].max
        assert all(known[name].resources[what] == much for what, much in kind["resources"].items())


def test_what_is_to_be_typed_is_accepted() -> None:
    for path in (CLUSTERS / "README.md", CLUSTERS / "local" / "up.py"):
        commands = [line for line in path.read_text(encoding="utf-8").splitlines() if "submit search_spaces/" in line]
        assert commands
        assert all("--storage /" in line for line in commands)
