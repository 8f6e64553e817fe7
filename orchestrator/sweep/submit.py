"""A sweep as a job of a cluster's job server (`ray job submit`): sent, watched, stopped, found again by name.

Nothing of the token is in the job's metadata or environment: the nodes of a cluster have it already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import UserError, WorkError, first_lines, listed, nearest
from orchestrator.spec import NAME, SweepSpec
from orchestrator.sweep.folder import resolved
from orchestrator.sweep.upload import Upload, check_size, measure

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SWEEP = "sweep"  # the key of a job's metadata that holds the sweep's name
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_S = 60.0
LOST_S = 60.0  # for which a job server that does not answer is asked again
RETRY_S = 1.0  # between two tries
CODE = Path(__file__).parents[2]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Submission:
    """What is sent.

    Attributes:
        name: the sweep's.
        entrypoint: the job's command line.
        working_dir: is uploaded and is the job's folder.
        modules: packages that are uploaded beside it, because the folder does not hold them.
        pip: requirements that each node installs before the job starts.
        uploads: what is sent, measured.
    """

    name: str
    entrypoint: str
    working_dir: Path
    modules: tuple[Path, ...] = ()
    pip: tuple[str, ...] = ()
    uploads: tuple[Upload, ...] = field(default=(), compare=False)

    def runtime_env(self) -> dict[str, Any]:
        env: dict[str, Any] = {"working_dir": str(self.working_dir)}
        if self.modules:
            env["py_modules"] = [str(module) for module in self.modules]
        if self.pip:
            env["pip"] = list(self.pip)
        return env


def address_of(given: str | None) -> str:
    """Where the job server is: as given, as RAY_API_SERVER_ADDRESS says, or this machine's.

    Raises:
        UserError: if it is no HTTP address.
    """
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        if "://" in address:
            raise UserError(f"--address: {address!r} is no dashboard's address, which begins with http:// or https://.")
        address = f"http://{address}"
    return address.rstrip("/")


def token() -> str | None:
    """The cluster's token, from where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        UserError: if RAY_AUTH_TOKEN_PATH names no readable file.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        if named:
            raise UserError(f"RAY_AUTH_TOKEN_PATH: there is no file {named!r}.") from None
        return None
    except OSError as error:
        raise UserError(f"The token file {str(path)!r} cannot be read: {error.strerror}.") from None


def client_of(address: str | None) -> Any:
    """A client of the cluster's job server.

    Raises:
        UserError: if nothing answers there, or the token is missing or refused.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # It tells of each ignore file, three times, and of each connection that ends.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    where = address_of(address)
    secret = token()
    headers = {"Authorization": f"Bearer {secret}"} if secret else None
    with _alone():
        try:
            return JobSubmissionClient(where, headers=headers)
        except AuthenticationError:
            problem = "refuses the token that was sent" if secret else "wants a token and none was found"
            raise UserError(
                f"The cluster at {where} {problem}: set RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's token."
            ) from None
        except (ConnectionError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise UserError(
                f"No job server answers at {where} ({reason}): is the cluster up, and its dashboard's port forwarded?"
            ) from None


@contextmanager
def _alone() -> Iterator[None]:
    """Ray's client lets these variables override the address that it is given."""
    hidden = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def check_addresses(spec: SweepSpec) -> None:
    """Refuses relative paths: a job's folder is a copy, on each node another one, and goes when the job is done.

    Raises:
        UserError: naming the first key with a relative path.
    """
    for key, was, now in _differences(spec.model_dump(mode="json"), resolved(spec).model_dump(mode="json")):
        if was != now and not key.startswith("cluster."):
            raise UserError(
                f"{key}: {was!r} is relative, and a job's folder is gone when the job is; give a path that every node "
                "of the cluster has."
            )


def _differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict):
        for name in was:
            yield from _differences(was[name], now[name], f"{key}.{name}" if key else name)
    elif isinstance(was, list):
        for i, item in enumerate(was):
            yield from _differences(item, now[i], f"{key}[{i}]")
    else:
        yield key, was, now


def prepare(
    spec: SweepSpec,
    path: Path,
    options: list[str],
    working_dir: Path,
    pip: list[str],
    limit_mb: float,
    continued: bool = False,
) -> Submission:
    """Checks and measures what would be sent.

    Args:
        spec: the sweep, with the options applied.
        path: its file, inside `working_dir`.
        options: of `orchestrator sweep`, beside the file.
        working_dir: the folder to upload.
        pip: requirements, or one path of a file of them.
        limit_mb: of each upload.
        continued: an existing sweep of that name is continued.

    Raises:
        UserError: if a path is relative, the file is not in the folder, or the upload is too big.
    """
    check_addresses(spec)
    folder = working_dir.resolve()
    try:
        inside = path.resolve().relative_to(folder)
    except ValueError:
        raise UserError(
            f"The sweep file {str(path)!r} is not in {str(working_dir)!r}, the folder that is uploaded (--working-dir)."
        ) from None
    modules = () if (folder / "orchestrator" / "__main__.py").is_file() else (CODE / "orchestrator", CODE / "methods")
    uploads = [measure(part) for part in (folder, *modules)]
    for upload in uploads:
        check_size(upload, limit_mb)
    words = ["python", "-m", "orchestrator", "sweep", inside.as_posix(), *options]
    if continued:
        words.append("--resume")
    return Submission(spec.name, shlex.join(words), folder, modules, tuple(_requirements(pip)), tuple(uploads))


def _requirements(pip: list[str]) -> list[str]:
    found: list[str] = []
    for entry in pip:
        path = Path(entry)
        if path.suffix != ".txt":
            found.append(entry)
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"--pip: {entry!r} cannot be read: {error.strerror}.") from None
        found += [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def jobs_of(client: Any, name: str | None = None) -> list[Any]:
    """The sweeps among the cluster's jobs (of one name), the newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id and SWEEP in (job.metadata or {})]
    found = [job for job in jobs if name in (None, job.metadata[SWEEP], job.submission_id)]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def job_named(client: Any, name: str) -> Any:
    """The newest job of a sweep, by the sweep's name or the job's.

    Raises:
        UserError: if there is none.
    """
    found = jobs_of(client, name)
    if found:
        return found[0]
    known = sorted({job.metadata[SWEEP] for job in jobs_of(client)})
    raise UserError(
        f"There is no job of a sweep {name!r} on the cluster; there are {listed(known)}.{nearest(name, known)}"
    )


def submit(client: Any, submission: Submission) -> str:
    """Sends a sweep.

    Returns:
        The job's name: the sweep's, with a number behind it if an earlier job had it.

    Raises:
        UserError: if the name cannot name a job, or a job of this sweep is running.
    """
    if not NAME.fullmatch(submission.name):
        raise UserError(
            f"--name: {submission.name!r} cannot name a job; allowed: letters, digits, '.', '_', '-', at most 64."
        )
    earlier = jobs_of(client, submission.name)
    running = [job for job in earlier if job.status not in ENDED]
    if running:
        raise UserError(
            f"The sweep {submission.name!r} is running as job {running[0].submission_id!r}: watch it with "
            f"`orchestrator submit --attach {submission.name}`, or give this one another --name."
        )
    taken = {job.submission_id for job in client.list_jobs()}
    job = next(n for n in (submission.name, *(f"{submission.name}-{i}" for i in range(2, 10_000))) if n not in taken)
    with _alone():
        return client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=job,
            runtime_env=submission.runtime_env(),
            metadata={SWEEP: submission.name},
        )


def watch(client: Any, job: str, tell: Callable[[str], None]) -> str:
    """Streams a job's log until the job ends; a lost connection is made again.

    Returns:
        How it ended: SUCCEEDED, FAILED or STOPPED.

    Raises:
        WorkError: if the connection stays lost.
    """
    from aiohttp import ClientError

    shown = 0

    async def follow() -> None:
        nonlocal shown
        seen = 0
        # A new connection begins at the log's beginning: what was shown is not shown again.
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            if fresh:
                shown = seen
                tell(fresh)

    while True:
        try:
            asyncio.run(follow())
        except (RuntimeError, OSError, ClientError):
            time.sleep(RETRY_S)
        status = status_of(client, job)
        if status in ENDED:
            rest = _answer(lambda: client.get_job_logs(job), job)[shown:]
            if rest:
                tell(rest)
            return status
        time.sleep(0.5)


def status_of(client: Any, job: str, patience_s: float = LOST_S) -> str:
    """What the job does, or how it ended.

    Raises:
        WorkError: if the job server gives no answer for `patience_s`.
    """
    return str(_answer(lambda: client.get_job_status(job), job, patience_s).value)


def _answer(ask: Callable[[], Answer], job: str, patience_s: float = LOST_S) -> Answer:
    """What the job server answers, which is asked again while the connection to it is lost.

    Raises:
        WorkError: if it stays lost for `patience_s`; the job knows nothing of that.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except (RuntimeError, OSError) as error:
            if time.monotonic() >= deadline:
                raise WorkError(
                    f"The job server gives no answer about the job {job!r}, which may run on; watch it with "
                    f"`orchestrator submit --attach {job}` once it does ({first_lines(error).rstrip('.')})."
                ) from None
        time.sleep(RETRY_S)


def stop(client: Any, job: str) -> str:
    """Asks a job to stop and waits until it has.

    Returns:
        How it ended.

    Raises:
        WorkError: if it runs on, or the connection is lost and stays so.
    """
    _answer(lambda: client.stop_job(job), job)
    deadline = time.monotonic() + STOP_S
    while (status := status_of(client, job)) not in ENDED:
        if time.monotonic() > deadline:
            raise WorkError(f"The job {job!r} was asked to stop {STOP_S:g} s ago and is {status}.")
        time.sleep(0.2)
    return status


def verdict(client: Any, job: str, status: str, name: str) -> None:
    """Turns a job's end into this command's.

    Raises:
        UserError: if the sweep was refused on the cluster (exit code 2 there).
        WorkError: if it failed or was stopped, or the connection is lost and stays so.
    """
    if status == "SUCCEEDED":
        return
    if status == "STOPPED":
        raise WorkError(f"The job {job!r} was stopped; what is finished is kept: `orchestrator submit SPEC --resume`.")
    info = _answer(lambda: client.get_job_info(job), job)
    if info.driver_exit_code == 2:
        raise UserError(f"The sweep {name!r} was refused on the cluster; the last line of its log says why.")
    lines = (info.message or "").strip().splitlines()
    raise WorkError(f"The job {job!r} failed{': ' + lines[-1] if lines else '; its log says why'}")
