"""What a cluster can give to trials: with the nodes that it has, and with those that its autoscaler may add.

Ray does not tell the limits of its autoscaler, so the file that the cluster was made from does (`cluster.file`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import UserError, listed, nearest
from orchestrator.spec import Cluster, NodeType, SweepSpec

DRIVER = "driver"  # the resource of nodes that are not taken away, for processes that wait for a worker group
EPSILON = 1e-6
GIB = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def shape_of(spec: SweepSpec, device: str) -> tuple[dict[str, float], int]:
    """What one process of a trial reserves, and how many there are."""
    train = spec.train
    shape = {"CPU": float(train.threads)}
    if device == "cuda":
        shape["GPU"] = train.gpus_per_worker
    return shape, train.workers


def room(shape: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many processes of a shape a node holds."""
    return min(int(resources.get(name, 0) / amount + EPSILON) for name, amount in shape.items() if amount > 0)


def nodes_now() -> list[dict[str, float]]:
    """The resources of each living node of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def nodes_at_most(spec: SweepSpec) -> list[dict[str, float]]:
    """The resources of each node that the autoscaler may have at a time; none where no limits are known."""
    return [kind.resources for kind in spec.cluster.nodes.values() for _ in range(kind.max)]


def trials_at_a_time(spec: SweepSpec, device: str, nodes: Iterable[Mapping[str, float]]) -> int:
    """Trials that nodes hold together; the workers of one may lie on several."""
    shape, workers = shape_of(spec, device)
    return sum(room(shape, node) for node in nodes) // workers


def actors_of(spec: SweepSpec) -> list[tuple[str, dict[str, float], int, int]]:
    """Pools of actors that reserve GPUs of their own: section, what each actor reserves, the fewest and the most."""
    found = []
    if spec.generate.gpus and spec.upstream.given:
        found.append(("generate", spec.generate.cpus, spec.generate.gpus, 1, spec.generate.actors))
    corpus = spec.corpus
    if corpus.gpus and (corpus.images is not None or corpus.sentences is not None):
        found.append(("corpus", corpus.cpus, corpus.gpus, corpus.min_actors, corpus.actors))
    return [(name, {"CPU": cpus, "GPU": gpus}, least, most) for name, cpus, gpus, least, most in found]


def placed(
    shape: Mapping[str, float], count: int, nodes: Iterable[Mapping[str, float]]
) -> tuple[int, list[dict[str, float]]]:
    """How many of `count` processes of a shape nodes hold, and what is left of the nodes.

    Each goes to the node with the fewest free GPUs among those that hold it, which leaves whole ones to trials.
    """
    left = [dict(node) for node in nodes]
    for number in range(count):
        holding = [node for node in left if room(shape, node)]
        if not holding:
            return number, left
        node = min(holding, key=lambda one: one.get("GPU", 0))
        for name, amount in shape.items():
            node[name] = node.get(name, 0) - amount
    return count, left


def trials_beside_actors(spec: SweepSpec, device: str, nodes: Iterable[Mapping[str, float]]) -> int:
    """Trials that nodes hold together beside all actors; the workers of a trial give way to its own actors."""
    left = [dict(node) for node in nodes]
    if spec.train.workers == 1:
        for _, shape, _, most in actors_of(spec):
            left = placed(shape, most, left)[1]
    return trials_at_a_time(spec, device, left)


def check_actors(spec: SweepSpec, device: str, clusters: Iterable[list[dict[str, float]]]) -> None:
    """For clusters whose nodes are known: one must hold the fewest actors that reserve GPUs, and a trial that waits.

    Raises:
        UserError: if none does, so that a trial would wait for its actors for ever.
    """
    clusters = list(clusters)
    for name, shape, least, _ in actors_of(spec):

        def holds(nodes: list[dict[str, float]], shape: dict[str, float] = shape, least: int = least) -> bool:
            found, left = placed(shape, least, nodes)
            return found == least and (spec.train.workers > 1 or trials_at_a_time(spec, device, left) > 0)

        if any(holds(nodes) for nodes in clusters):
            continue
        gpus = max((sum(node.get("GPU", 0) for node in nodes) for nodes in clusters), default=0)
        times = f"{least} x " if least > 1 else ""
        own = (
            f" beside the {spec.train.gpus_per_worker:g} of a trial"
            if device == "cuda" and spec.train.workers == 1
            else ""
        )
        raise UserError(
            f"{name}.gpus: {times}{shape['GPU']:g} GPUs for actors{own} are never free: the cluster has {gpus:g} GPUs; "
            f"use {name}.gpus: 0 (a trial that has a GPU then works on it, without actors), or fewer."
        )


def check_gpus(spec: SweepSpec, device: str) -> None:
    """For the device that trials will run on, which `train.device: auto` leaves to the cluster.

    Raises:
        UserError: if no GPU can be reserved as the sweep file wants it.
    """
    if device == "cuda" and (reason := spec.train.never_on_gpus()):
        raise UserError(f"train: {reason}.")


def concurrency(spec: SweepSpec, device: str, now: list[dict[str, float]]) -> int:
    """Trials at a time: as asked, or as many as the cluster holds once it has grown, beside actors; at least one."""
    fit = max(trials_beside_actors(spec, device, nodes) for nodes in (now, nodes_at_most(spec)))
    return max(1, min(spec.search.concurrency or fit, max(fit, 1)))


def has(name: str, spec: SweepSpec, now: list[dict[str, float]]) -> bool:
    """Whether the cluster has a resource, or can have it."""
    return any(node.get(name, 0) > 0 for node in [*now, *nodes_at_most(spec)])


def check_shape(spec: SweepSpec, device: str, now: list[dict[str, float]]) -> None:
    """For a cluster whose limits are known.

    Raises:
        UserError: if no node of it holds a process of a trial, or all together hold fewer than a trial has; or if there
            is no room for its actors.
    """
    (shape, _), workers = shape_of(spec, device), spec.train.fewest
    clusters = (now, nodes_at_most(spec))
    nodes = [*now, *nodes_at_most(spec)]
    if max(sum(room(shape, node) for node in kind) for kind in clusters) >= workers:
        return check_actors(spec, device, clusters)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in shape.items())
    biggest = [f"{max((node.get(name, 0) for node in nodes), default=0):g} {name}" for name in shape]
    times = f", {workers} times," if workers > 1 else ""
    raise UserError(
        f"train: a trial needs nodes with {wanted}{times} and the cluster never has them (most on a node: "
        f"{', '.join(biggest)}): change train.threads, train.gpus_per_worker or train.workers, or the cluster's limits."
    )


def known_cluster(cluster: Cluster) -> Cluster:
    """The same with the node types of its file, which may not be there when a sweep is continued.

    Raises:
        UserError: if the file cannot be read, or a price is for a node type that it does not have.
    """
    nodes = read_nodes(cluster.file) if cluster.file is not None else cluster.nodes
    if cluster.prices and not nodes:
        raise UserError(
            f"cluster.file: {cluster.file!r} has no node types that prices could be for (a file for machines that are "
            "there has none): give cluster.nodes instead."
        )
    for name in cluster.prices:
        if name not in nodes:
            raise UserError(
                f"cluster.prices: there is no node type {name!r}; there are {listed(nodes)}.{nearest(name, nodes)}"
            )
    return Cluster(nodes=nodes, prices=cluster.prices)


def read_nodes(path: str | Path) -> dict[str, NodeType]:
    """The node types of a file for Ray's cluster launcher or for KubeRay.

    Raises:
        UserError: if the file cannot be read or is neither.
    """
    path = Path(path)
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(d, dict)]
    except OSError as error:
        raise UserError(f"cluster.file: {str(path)!r} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cluster.file: {str(path)!r} is not valid YAML: {str(error).splitlines()[0]}.") from None
    for document in documents:
        if document.get("kind") in ("RayCluster", "RayJob"):
            spec = document["spec"]
            return _kuberay(spec.get("rayClusterSpec", spec))
        if "provider" in document:
            return _launcher(document)
    raise UserError(f"cluster.file: {str(path)!r} is no file of Ray's cluster launcher and no RayCluster or RayJob.")


def _launcher(document: dict[str, Any]) -> dict[str, NodeType]:
    limit = int(document.get("max_workers", 2))
    types = document.get("available_node_types") or {}
    found = {}
    for name, kind in types.items():
        head = name == document.get("head_node_type")
        resources = {k: float(v) for k, v in kind.get("resources", {}).items()}
        found[name] = NodeType(max=1 if head else min(limit, kind.get("max_workers", limit)), resources=resources)
    return found


def _kuberay(spec: dict[str, Any]) -> dict[str, NodeType]:
    groups = [("head", 1, spec["headGroupSpec"])]
    groups += [(g["groupName"], g.get("maxReplicas", 1), g) for g in spec.get("workerGroupSpecs", [])]
    return {name: NodeType(max=count, resources=_pod(group)) for name, count, group in groups}


def _pod(group: dict[str, Any]) -> dict[str, float]:
    """What Ray will see of a pod: its limits, unless the start parameters or the group say otherwise."""
    container = group["template"]["spec"]["containers"][0].get("resources", {})
    limits = {**container.get("requests", {}), **container.get("limits", {})}
    params = group.get("rayStartParams", {})
    found = {"CPU": quantity(params.get("num-cpus", limits.get("cpu", 0)))}
    gpus = params.get("num-gpus", limits.get("nvidia.com/gpu", 0))
    if quantity(gpus):
        found["GPU"] = quantity(gpus)
    if "memory" in limits:
        found["memory"] = quantity(limits["memory"])
    if "resources" in params:
        custom = json.loads(params["resources"])
        # The parameter goes through a shell, so it is often quoted twice.
        found |= {k: float(v) for k, v in (json.loads(custom) if isinstance(custom, str) else custom).items()}
    return found | {k: quantity(v) for k, v in group.get("resources", {}).items()}


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number: `500m` is 0.5, `2Gi` is 2147483648."""
    matched = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|Ki)?", str(text))
    if matched is None:
        raise UserError(f"cluster.file: {text!r} is no quantity of Kubernetes.")
    number, unit = matched.groups()
    return float(number) / 1000 if unit == "m" else float(number) * GIB[unit or ""]
