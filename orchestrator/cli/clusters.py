"""Commands that run a sweep on a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.face import JsonFlag, SetFlag, SweepDir, app, err, out, print_table
from orchestrator.errors import UserError

MAX_UPLOAD_MB = 100.0
AddressFlag = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, as http://127.0.0.1:8265; else RAY_API_SERVER_ADDRESS, else this machine's."
    ),
]


@app.command()
def submit(
    spec: Annotated[Path | None, typer.Argument(help="A sweep file.")] = None,
    address: AddressFlag = None,
    storage: Annotated[str | None, typer.Option(help="Folder for sweeps and the store, the same on all nodes.")] = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name; also the job's.")] = None,
    overrides: SetFlag = None,
    continued: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep of that name, if there is one.")
    ] = False,
    working_dir: Annotated[Path, typer.Option(help="The folder to upload, without what .rayignore lists.")] = Path("."),
    pip: Annotated[
        list[str] | None, typer.Option(help="A requirement, or a .txt of them, that nodes install for this job.")
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(help="Refuse a bigger upload.")] = MAX_UPLOAD_MB,
    detach: Annotated[bool, typer.Option("--detach", help="Send it and return.")] = False,
    attach: Annotated[str | None, typer.Option(help="Instead: watch the sweep of this name.")] = None,
    stop: Annotated[str | None, typer.Option(help="Instead: stop the sweep of this name.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a sweep on a cluster as a job: send it, watch it, stop it, find it again."""
    from orchestrator.sweep import submit as jobs

    asked = [flag for flag, value in (("SPEC", spec), ("--attach", attach), ("--stop", stop)) if value is not None]
    if len(asked) != 1:
        found = f"{' and '.join(asked)} are given" if asked else "none is given"
        raise UserError(f"submit takes one of SPEC, --attach NAME and --stop NAME; {found}.")
    if spec is not None:
        submission = _submission(spec, storage, name, overrides, continued, working_dir, pip or [], max_upload_mb)
        client = jobs.client_of(address)
        job = jobs.submit(client, submission)
        sweep = submission.name
        sent = sum(upload.size for upload in submission.uploads) / 1e6
        err.print(
            f"Job {job} is sent ({sent:.1f} MB to upload). Watch it: orchestrator submit --attach {job}", markup=False
        )
    else:
        client = jobs.client_of(address)
        found = jobs.job_named(client, str(attach or stop))
        job, sweep = found.submission_id, found.metadata[jobs.SWEEP]
    if stop is not None:
        _tell(as_json, job, sweep, jobs.stop(client, job))
        return
    if detach:
        _tell(as_json, job, sweep, jobs.status_of(client, job))
        return
    status = _watch(client, job, sys.stderr if as_json else sys.stdout)
    _tell(as_json, job, sweep, status)
    if status in jobs.ENDED:
        jobs.verdict(client, job, status, sweep)


def _submission(
    spec: Path,
    storage: str | None,
    name: str | None,
    overrides: list[str] | None,
    continued: bool,
    working_dir: Path,
    pip: list[str],
    max_upload_mb: float,
) -> Any:
    from orchestrator.spec import read_spec
    from orchestrator.sweep.capacity import known_cluster
    from orchestrator.sweep.submit import prepare

    extra = list(overrides or [])
    if storage is not None:
        extra.append(f"storage={json.dumps(storage)}")
    if name is not None:
        extra.append(f"name={json.dumps(name)}")
    read = read_spec(spec, extra)
    if read.cluster.file is not None:  # it need not be among what is uploaded
        extra.append(f"cluster={known_cluster(read.cluster).model_dump_json()}")
    options = [word for override in extra for word in ("--set", override)]
    return prepare(read, spec, options, working_dir, pip, max_upload_mb, continued)


def _watch(client: Any, job: str, stream: Any) -> str:
    """Streams the log; Ctrl-C asks what is meant by it."""
    from orchestrator.sweep.submit import status_of, stop, watch

    def tell(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        return watch(client, job, tell)
    except KeyboardInterrupt:
        if sys.stdin.isatty():
            try:
                if typer.confirm(f"\nStop the job {job} (else it runs on)?", default=False, err=True):
                    return stop(client, job)
            except (typer.Abort, KeyboardInterrupt):
                pass  # a second Ctrl-C only leaves
        err.print(f"The job runs on. Watch it: orchestrator submit --attach {job}; stop it: --stop {job}", markup=False)
        return status_of(client, job, patience_s=0)  # who wants to leave does not wait


def _tell(as_json: bool, job: str, sweep: str, status: str) -> None:
    if as_json:
        print(json.dumps({"job": job, "sweep": sweep, "status": status}))
    else:
        out.print(f"Job {job} of sweep {sweep}: {status}", markup=False)


def check_cluster(spec: Path, overrides: list[str], address: str | None, as_json: bool) -> None:
    """`check --cluster`: exit code 2 if anything is wrong."""
    from dataclasses import asdict

    from orchestrator.spec import read_spec
    from orchestrator.sweep import preflight
    from orchestrator.sweep.folder import resolved

    read = read_spec(spec, overrides)
    if preflight.in_a_job():
        print(preflight.marked(preflight.from_inside(resolved(read))))
        return
    options = [word for override in overrides for word in ("--set", override)]
    lines = preflight.from_outside(read, spec, options, address, MAX_UPLOAD_MB)
    if as_json:
        print(json.dumps([asdict(line) for line in lines]))
    else:
        print_table(["", "what", "found"], [["ok" if x.good else "NO", x.name, x.told] for x in lines])
        for line in lines:
            if not line.good:
                out.print(f"Fix {line.name}: {line.fix}", markup=False)
    if not all(line.good for line in lines):
        raise typer.Exit(2)


@app.command()
def cost(folder: SweepDir, as_json: JsonFlag = False) -> None:
    """What a sweep's trials have held of the cluster: seconds, device-seconds, and money where prices are given."""
    from orchestrator.sweep.held import bill

    facts = bill(folder)
    if as_json:
        print(json.dumps(facts))
        return
    device, total = facts["device"], facts["total"]
    print_table(
        ["trial", "method", "status", "held s", f"{device}-s held", f"{device}-s own", "node type", "money"],
        [
            [r["trial"], r["method"], r["status"], *_amounts(r), r["node_type"] or "-", f"{r['money']:.4g}"]
            for r in facts["trials"]
        ],
    )
    spent, failed = total["device_seconds"] / 3600, facts["failed"]["device_seconds"]
    limits = {"device_hours": facts["device_hours"], "budget": facts["budget"]}
    told = ", ".join(f"search.{name} {limit:g}" for name, limit in limits.items() if limit is not None)
    beyond = total["device_seconds"] - total["own_device_seconds"]
    out.print(
        f"In all {spent:.2f} {device}-hours held{f' ({told})' if told else ''}, {total['money']:.4g} by the prices "
        f"given; of it {failed:.0f} {device}-s by failed trials, {beyond:.0f} in no trial's own: starts of processes, "
        "processes that died, trials that still run. The head and idle nodes are not in it.",
        markup=False,
    )


def _amounts(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]:.1f}" for name in ("seconds", "device_seconds", "own_device_seconds")]
