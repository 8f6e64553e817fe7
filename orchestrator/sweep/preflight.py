"""`check --cluster`: what would go wrong on a cluster, before anything is paid for. One line each, with a fix.

Some of it is seen from here (the upload, the token), the rest from inside the cluster: there it runs as a job, which
asks every living node. Nodes that an autoscaler adds later are told apart by their limits only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, WorkError, listed
from orchestrator.models.check import check_model
from orchestrator.spec import SweepSpec
from orchestrator.sweep.capacity import check_gpus, check_shape, concurrency, nodes_now, shape_of
from orchestrator.sweep.nodes import storage_findings
from orchestrator.sweep.submit import CODE, Submission

MARK = "preflight: "
PROBE_S = 120.0  # a node that does not answer in this time is told
LEAST_TEMPORARY_GB = 2.0  # for Ray's logs, spilled objects and a copy of the code


@dataclass(frozen=True)
class Line:
    """One thing that was checked.

    Attributes:
        name: of it, a word or two.
        good: whether a sweep can go on with it.
        told: what was found.
        fix: what to do, where it is not good.
    """

    name: str
    good: bool
    told: str
    fix: str = ""


def tried(name: str, check: Callable[[], str], fix: str) -> Line:
    """The line of a check that returns what it found, or raises what is wrong."""
    try:
        return Line(name, True, check())
    except (UserError, WorkError) as error:
        return Line(name, False, str(error), fix)


def code_hash() -> str:
    """Of the Python files of this package and its methods: the same on two nodes if they run the same code."""
    digest = hashlib.sha256()
    for package in ("orchestrator", "methods"):
        for path in sorted((CODE / package).rglob("*.py")):
            digest.update(path.relative_to(CODE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    import ray
    import torch

    return {
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "code": code_hash(),
    }


def probe(spec: dict[str, Any]) -> dict[str, Any]:
    """What one node answers of itself; runs on it."""
    sweep = SweepSpec.model_validate(spec)
    answer: dict[str, Any] = {"versions": versions(), "problems": []}
    answer["temporary_gb"] = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if Path(sweep.storage).is_dir():
        answer["free_gb"] = shutil.disk_usage(sweep.storage).free / 1e9
    for entry in sweep.teachers:
        try:
            answer["problems"] += check_model(entry, "teacher")
        except UserError as error:
            answer["problems"].append(str(error))
    kind, _, path = sweep.task.data.partition(":")
    if path and "://" not in path and not Path(path).exists():
        answer["problems"].append(f"task.data: there is no {kind} {path!r}.")
    return answer


def ask_nodes(spec: SweepSpec) -> dict[str, dict[str, Any]]:
    """The answers of all living nodes by type, host and id; `failed` says why one has none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(probe)
    raw = spec.model_dump(mode="json")
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            group = node["Labels"].get("ray.io/node-group", "node")
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{group} {node['NodeManagerHostname']} ({node['NodeID'][-8:]})"
            asked[name] = task.options(scheduling_strategy=pinned).remote(raw)
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PROBE_S)
    answers: dict[str, dict[str, Any]] = {}
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer) if answer in done else {"failed": f"no answer in {PROBE_S:g} s"}
        except ray.exceptions.RayError as error:
            answers[name] = {"failed": str(error).strip().splitlines()[-1]}
    return answers


def inside(spec: SweepSpec) -> list[Line]:
    """What is seen from inside the cluster; Ray is connected."""
    made = not Path(spec.storage).exists()
    storage = tried("storage", lambda: _storage(spec), "mount the same folder at the same path on every node.")
    answers = ask_nodes(spec)
    if made and Path(spec.storage).is_dir() and not any(Path(spec.storage).iterdir()):
        Path(spec.storage).rmdir()
    silent = {name: answer["failed"] for name, answer in answers.items() if "failed" in answer}
    there = {name: answer for name, answer in answers.items() if name not in silent}
    told = f"{len(there)} of {len(answers)} living nodes answer"
    lines = [
        Line(
            "nodes",
            not silent,
            told + (f"; {_each(silent)}" if silent else ""),
            "look at that node's log in the dashboard; its environment must hold what this one's holds."
            if silent
            else "",
        ),
        tried("resources", lambda: _resources(spec), "change the sweep's train section, or the cluster's limits."),
        storage,
        *_versions(there),
        _disk(spec, there),
    ]
    lacking = {name: answer["problems"][0] for name, answer in there.items() if answer["problems"]}
    lines.append(
        Line(
            "teachers, data",
            not lacking,
            _each(lacking) if lacking else f"there, on all {len(there)}",
            "put data and weights below the shared folder, and HF_HOME too for those of the hub." if lacking else "",
        )
    )
    return lines


def _each(found: dict[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in found.items())


def _resources(spec: SweepSpec) -> str:
    from orchestrator.sweep.run import device_of

    now = nodes_now()
    device = device_of(spec)
    check_gpus(spec, device)
    try:
        check_shape(spec, device, now)
    except UserError:
        if spec.cluster.nodes:
            raise
        raise UserError(
            "none of the nodes of now holds a trial, and whether the cluster may grow is not known: name the file that "
            "it was made from in cluster.file."
        ) from None
    shape, workers = shape_of(spec, device)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in shape.items())
    times = f"{workers} x " if workers > 1 else ""
    limits = "by cluster's limits" if spec.cluster.nodes else "with the nodes of now (no cluster.file tells its limits)"
    return f"a trial takes {times}{wanted}; {concurrency(spec, device, now)} at a time {limits}"


def _storage(spec: SweepSpec) -> str:
    try:
        findings = storage_findings(spec)
    except OSError as error:
        raise UserError(f"{spec.storage} cannot be written on the head ({error.strerror}).") from None
    if findings:
        bad = {finding.node: finding.reason for finding in findings}
        raise UserError(f"{spec.storage} does not serve every node: {_each(bad)}.")
    store = f", and the store {spec.store.remote} too" if spec.store.remote else ""
    return f"{spec.storage} is read and written by every living node{store}"


def _versions(there: dict[str, dict[str, Any]]) -> list[Line]:
    lines = []
    for what in ("python", "ray", "torch", "code"):
        found: dict[str, list[str]] = {}
        for name, answer in there.items():
            found.setdefault(answer["versions"][what], []).append(name)
        if len(found) <= 1:
            lines.append(Line(what, True, f"{next(iter(found), '-')} on all"))
        else:
            told = "; ".join(f"{version}: {listed(names)}" for version, names in found.items())
            lines.append(Line(what, False, told, "use one image on all nodes (clusters/Dockerfile)."))
    return lines


def _disk(spec: SweepSpec, there: dict[str, dict[str, Any]]) -> Line:
    need = spec.store.min_free_gb + 1
    full = {n: f"{a['free_gb']:.1f} GB free below storage" for n, a in there.items() if a.get("free_gb", need) < need}
    for name, answer in there.items():
        if answer["temporary_gb"] < LEAST_TEMPORARY_GB:
            full[name] = f"{answer['temporary_gb']:.1f} GB free for temporary files"
    if full:
        return Line("disk", False, _each(full), "make room: `orchestrator store gc`, or a bigger disk.")
    least = min((a["free_gb"] for a in there.values() if "free_gb" in a), default=0.0)
    return Line("disk", True, f"{least:.1f} GB free below storage")


def from_inside(spec: SweepSpec) -> list[Line]:
    """The lines of the cluster that RAY_ADDRESS names; this process joins it."""
    from orchestrator.sweep.cluster import start_ray

    start_ray(spec.train.threads)
    return inside(spec)


def from_outside(spec: SweepSpec, path: Path, options: list[str], address: str | None, limit_mb: float) -> list[Line]:
    """The lines seen from here, and those of a job that looks from inside.

    Args:
        spec: the sweep, with the options applied.
        path: its file, in the folder that would be uploaded: this one.
        options: of `orchestrator check`, beside the file.
        address: of the dashboard.
        limit_mb: of the upload.
    """
    from orchestrator.sweep import submit as jobs

    lines = [Line("schema", True, f"{path} is good")]
    made: dict[str, Any] = {}

    def pack() -> str:
        sent = jobs.prepare(spec, path, options, Path("."), [], limit_mb)
        made["sent"] = sent
        return f"{sum(upload.size for upload in sent.uploads) / 1e6:.1f} MB, {limit_mb:g} allowed"

    def connect() -> str:
        made["client"] = jobs.client_of(address)
        return f"{jobs.address_of(address)} takes jobs"

    lines.append(tried("upload, paths", pack, "submit from your code's folder; absolute paths that all nodes have."))
    lines.append(tried("dashboard", connect, "start the head with its dashboard on, and forward its port."))
    if "client" in made:
        lines.append(_token(jobs.address_of(address)))
    if len(made) == 2:
        try:
            lines += _by_job(made["client"], made["sent"], path, options)
        except WorkError as error:
            lines.append(Line("inside", False, str(error), "the nodes must have this package and its requirements."))
    return lines


def _token(address: str) -> Line:
    """Whether a stranger is refused."""
    import requests

    answer = requests.get(f"{address}/api/version", timeout=10)
    if answer.status_code in (401, 403):
        return Line("token", True, "asked for, and ours is taken")
    return Line(
        "token",
        False,
        "the cluster takes jobs from anybody who reaches it",
        "start every node with RAY_AUTH_MODE=token and one token (clusters/README.md).",
    )


def _by_job(client: Any, sent: Submission, path: Path, options: list[str]) -> list[Line]:
    from orchestrator.sweep import submit as jobs

    entrypoint = sent.entrypoint.replace("orchestrator sweep", "orchestrator check", 1) + " --cluster"
    job = f"check-{uuid.uuid4().hex[:12]}"
    client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=sent.runtime_env())
    log: list[str] = []
    jobs.watch(client, job, log.append)
    told = [line for line in "".join(log).splitlines() if line.startswith(MARK)]
    if not told:
        last = "".join(log).strip().splitlines()[-1:] or ["its log is empty"]
        raise WorkError(f"The job {job!r}, which looks from inside, failed: {last[0]}")
    return [Line(**line) for line in json.loads(told[-1].removeprefix(MARK))]


def in_a_job() -> bool:
    """Whether this process is the driver of a job, and so inside the cluster."""
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def marked(lines: list[Line]) -> str:
    """The lines as one line of a job's log."""
    return MARK + json.dumps([asdict(line) for line in lines])
