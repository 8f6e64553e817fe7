"""Real servers on loopback for the tests: each is started in a temporary folder and ended by its own process id."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PASSWORD = "s3cret/p@ss w%rd"  # needs quoting in an address
DEBIAN = Path("/usr/lib/postgresql")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something on loopback takes connections there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


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


class S3:
    """An S3-protocol server of its own (moto) on loopback, with one bucket, behind a proxy that can be told to fail.

    Attributes:
        address: of a prefix in the bucket.
        failures: how many of the next requests are answered with 503, or broken off.
        seen: requests that reached the proxy, as `GET /bucket/key`.
    """

    def __init__(self) -> None:
        self.port, self.failures, self.mode = free_port(), 0, "503"
        self.seen: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.start()
        server = self
        self.proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
        self.proxy.daemon_threads = True
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        self.endpoint = f"127.0.0.1:{self.proxy.server_address[1]}"
        self.make_bucket()

    def make_bucket(self) -> None:
        from pyarrow import fs

        here = fs.S3FileSystem(
            access_key="test",
            secret_key="test",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self.port}",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        here.create_dir("bucket")

    def address(self, prefix: str) -> str:
        return f"s3://bucket/{prefix}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def start(self) -> None:
        words = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, *words], **quiet)
        wait_until(lambda: answers(self.port), self.process, "moto")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(60)
            self.process = None

    def remove(self) -> None:
        self.stop()
        self.proxy.shutdown()
        self.proxy.server_close()


class GCS:
    """A server of Google's storage protocol on loopback (gcp-storage-emulator), with one bucket, in memory."""

    def __init__(self) -> None:
        self.port = free_port()
        words = ["-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--in-memory", "--quiet", "--default-bucket", "bucket"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, *words], **quiet)
        wait_until(lambda: answers(self.port), self.process, "gcp-storage-emulator")

    def address(self, prefix: str) -> str:
        return f"gs://anonymous@bucket/{prefix}?scheme=http&endpoint_override=127.0.0.1:{self.port}"

    def remove(self) -> None:
        self.process.kill()
        self.process.wait(60)


def _handler(server: S3) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            """Nothing on the test's screen."""

        def _pass_on(self) -> None:
            body = self._body()
            server.seen.append(f"{self.command} {self.path.partition('?')[0]}")
            if server.failures > 0:
                server.failures -= 1
                if server.mode == "503":
                    self._answer(503, [], b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
                else:
                    self.close_connection = True
                return
            del self.headers["Expect"]
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            try:
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                content = answer.read()
                dropped = ("transfer-encoding", "connection", "content-length")
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
                length = answer.getheader("Content-Length")
                self._answer(answer.status, headers, content, length if self.command == "HEAD" else None)
            except OSError:
                self.close_connection = True
            finally:
                connection.close()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            del self.headers["Transfer-Encoding"]
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                """Trailers."""
            self.headers["Content-Length"] = str(len(body))
            return body

        def _answer(self, status: int, headers: Any, content: bytes, length: str | None = None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

    return Handler
