"""A sweep in the tools that people know: TensorBoard, optuna-dashboard and Ray's dashboard, on the loopback only."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import UserError, WorkError, listed
from orchestrator.select.results import read_trials
from orchestrator.sweep.event_files import write_event_files
from orchestrator.sweep.folder import RAY_DASHBOARD
from orchestrator.sweep.ledger import FINAL, Ledger, open_sweep
from orchestrator.sweep.ports import answers, free_port
from orchestrator.sweep.study_storage import StudyPlace

HOST = "127.0.0.1"
TOOLS = {"tensorboard": ("TensorBoard", 6006), "optuna": ("optuna-dashboard", 8080)}
NEEDS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "optuna": ("optuna_dashboard", "transfer-orchestrator[dashboard]"),
}
START_S = 120.0
REFRESH_S = 5.0  # between two looks for trials that ended


@dataclass
class Server:
    """A tool that runs.

    Attributes:
        name: for people.
        url: where it answers.
        process: ours.
        log: what it prints.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@contextlib.contextmanager
def serving(folder: Path, tools: Sequence[str], ports: dict[str, int | None]) -> Iterator[list[Server]]:
    """Starts tools and ends them; SIGTERM is then like Ctrl-C.

    Args:
        folder: the sweep's.
        tools: of `TOOLS`.
        ports: by tool; None: the usual one, or any that is free.

    Raises:
        UserError: if there is no sweep, nothing to show, a tool is not installed, or a port is taken.
        WorkError: if a tool does not start.
    """
    frame = read_trials(folder)
    spec = open_sweep(folder)
    if frame.empty and not any((folder / "trials").glob("t*.json")):
        raise UserError(f"The sweep {str(folder)!r} has no trials yet: there is nothing to show.")
    for tool in tools:
        module, package = NEEDS[tool]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{TOOLS[tool][0]} is not installed: pip install '{package}', or leave it out with --only.")
    if "optuna" in tools:
        StudyPlace(spec, folder).look()
    write_event_files(folder)
    commands = {
        "tensorboard": ["tensorboard.main", "--logdir", str(folder / "tensorboard"), "--host", HOST, "--port"],
        "optuna": ["orchestrator.sweep.study_dashboard", str(folder)],
    }
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_end, servers)
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _stop))
        for tool in tools:
            name, usual = TOOLS[tool]
            port = _port(tool, ports.get(tool), usual)
            log = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [sys.executable, "-m", *commands[tool], str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end them
            )
            servers.append(Server(name, f"http://{HOST}:{port}", process, log))
        for server in servers:
            _wait(server)
        yield servers


def _port(tool: str, asked: int | None, usual: int) -> int:
    if asked is not None:
        if answers(HOST, asked):
            raise UserError(f"--{tool}-port: {asked} is taken on {HOST}; give another one, or none.")
        return asked
    if not answers(HOST, usual):
        return usual
    return free_port(HOST)


def _wait(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    deadline = time.monotonic() + START_S
    while not answers(HOST, port):
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise WorkError(f"{server.name} did not start: {_last_line(server)}")
        time.sleep(0.1)


def _last_line(server: Server) -> str:
    server.log.seek(0)
    lines = server.log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _end(servers: list[Server]) -> None:
    for server in servers:
        server.process.terminate()
    for server in servers:
        try:
            server.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def ray_dashboard(folder: Path) -> str | None:
    """The address of the dashboard of the cluster that the sweep runs on; None: it does not run."""
    try:
        address = (folder / RAY_DASHBOARD).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    host, _, port = address.rpartition(":")
    return f"http://{address}" if port.isdigit() and answers(host, int(port)) else None


def keep(folder: Path, servers: list[Server]) -> None:
    """Shows trials as they end, until it is interrupted.

    Raises:
        WorkError: if a tool ends by itself.
    """
    ledger, shown, looked = Ledger(folder), -1, time.monotonic()
    while True:
        gone = [server for server in servers if server.process.poll() is not None]
        if gone:
            raise WorkError(f"{listed(s.name for s in gone)} ended by itself: {_last_line(gone[0])}")
        if time.monotonic() - looked >= REFRESH_S:
            done = sum(row["status"] in FINAL for row in ledger.rows())
            if shown not in (-1, done):
                write_event_files(folder)
            shown, looked = done, time.monotonic()
        time.sleep(0.2)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt
