"""Real servers on loopback for the tests: each is started in a temporary folder and ended by its own process id."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PASSWORD = "s3cret/p@ss w%rd"  # needs quoting in an address
DEBIAN = Path("/usr/lib/postgresql")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Any, process: subprocess.Popen[Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, f"{what} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{what} did not answer in {seconds} s"
        time.sleep(0.05)


def postgres_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, or None where a developer has none."""
    found = shutil.which("initdb")
    places = [Path(os.path.realpath(found)).parent] if found else []
    return next(
        (
            p
            for p in [*places, *sorted(DEBIAN.glob("*/bin"))]
            if (p / "initdb").is_file() and (p / "postgres").is_file()
        ),
        None,
    )


class Postgres:
    """A PostgreSQL of its own on a random port of loopback; the user `tester` needs a password. Never runs as root."""

    def __init__(self) -> None:
        binaries = postgres_binaries()
        assert binaries is not None
        self.binaries, self.port = binaries, free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self.who: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(u for u in (_user("postgres"), _user("nobody")) if u is not None)
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self.who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)  # of the temporary folder only its owner sees anything
        words = ["-D", str(self.folder / "data"), "-U", "tester", "-A", "scram-sha-256", f"--pwfile={secret}", "-N"]
        self._run("initdb", *words, "-E", "UTF8", "--locale=C")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(
            [str(self.binaries / program), *words], check=True, capture_output=True, cwd=self.folder, **self.who
        )

    def start(self) -> None:
        words = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)]
        words += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binaries / "postgres"), *words], stdout=log, stderr=log, cwd=self.folder, **self.who
            )
        wait_until(self.ready, self.process, "postgres")

    def ready(self) -> bool:
        words = ["-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run([str(self.binaries / "pg_isready"), *words], cwd=self.folder).returncode == 0

    def stop(self) -> None:
        """At once, as a crash: clients see their connection break."""
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGQUIT)
            self.process.wait(60)
            self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        import urllib.parse

        return f"postgresql://tester:{urllib.parse.quote(password, safe='')}@127.0.0.1:{self.port}/{database}"


def _user(name: str) -> Any:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None
