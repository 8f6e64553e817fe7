"""Whether every node of the cluster sees what a sweep's trials read and write."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.spec import SweepSpec
from orchestrator.store import check_remote

WAIT_S = 60.0  # for a node's answer
GONE_S = 15.0  # for the cluster to notice that a node died


@dataclass(frozen=True)
class NodeFinding:
    """What is wrong with one node.

    Attributes:
        node: its address.
        reason: why it cannot serve the sweep.
    """

    node: str
    reason: str


def storage_findings(spec: SweepSpec, wait_s: float = WAIT_S) -> list[NodeFinding]:
    """Nodes that cannot read what the driver writes below `storage`, write what it reads, or reach the store.

    The driver writes a file of random content; a task on each node reads it and writes one of its own beside it, which
    the driver reads. Ray must be running. Nothing is left behind.

    Raises:
        OSError: if the driver itself cannot write there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = Path(spec.storage)
    folder.mkdir(parents=True, exist_ok=True)
    nonce = uuid.uuid4().hex
    probe = folder / f".probe-{nonce}"
    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0, max_retries=0)(_answer)
    try:
        probe.write_text(nonce, encoding="utf-8")
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            reference = task.options(scheduling_strategy=there).remote(str(probe), node["NodeID"], spec.store.remote)
            asked[reference] = node
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=wait_s)
        findings = []
        for reference, node in asked.items():
            if reference not in done:
                ray.cancel(reference, force=True)
                reason = f"it did not answer in {wait_s:g} s"
            else:
                try:
                    reason = ray.get(reference) or _written(probe, node["NodeID"])
                except ray.exceptions.RayError as error:
                    reason = "" if _gone(node["NodeID"]) else f"its task failed ({type(error).__name__})"
            if reason:
                findings.append(NodeFinding(node["NodeManagerAddress"], reason))
        return findings
    finally:
        for file in folder.glob(f"{probe.name}*"):
            file.unlink(missing_ok=True)


def _gone(node: str) -> bool:
    """Whether a node has died, which is no fault of the storage; the cluster takes seconds to notice."""
    import ray

    deadline = time.monotonic() + GONE_S
    while any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def check_nodes(spec: SweepSpec) -> None:
    """Refuses a storage path or store that some node of the cluster cannot use.

    Raises:
        UserError: naming the first such node.
    """
    import ray

    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    findings = storage_findings(spec)
    if findings:
        more = f" ({len(findings) - 1} more after this one)" if len(findings) > 1 else ""
        raise UserError(
            f"storage: {spec.storage!r} does not serve the node {findings[0].node}{more}: {findings[0].reason}; give a "
            "path that every node mounts, and a store that each of them can reach."
        )


def _answer(probe: str, node: str, remote: str | None) -> str:
    """Runs on a node: why it cannot serve the sweep, or nothing."""
    file = Path(probe)
    try:
        if file.read_text(encoding="utf-8") != file.name.rpartition("-")[2]:
            return f"what it reads in {str(file.parent)!r} is not what the driver wrote"
        temporary = file.with_name(f"{file.name}-{node}.part")
        temporary.write_text(node, encoding="utf-8")
        os.replace(temporary, file.with_name(f"{file.name}-{node}"))
    except OSError as error:
        return f"it cannot read or write there what the driver wrote ({error.strerror})"
    if remote is not None:
        try:
            check_remote(remote)
        except UserError as error:
            return str(error).rstrip(".")
    return ""


def _written(probe: Path, node: str) -> str:
    try:
        if probe.with_name(f"{probe.name}-{node}").read_text(encoding="utf-8") == node:
            return ""
    except OSError:
        pass
    return "the driver does not see what it writes there"
