"""Clusters started for a test, and ended by process id: the autoscaling one of clusters/local, and a single node."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
import yaml
from servers import free_port

ROOT = Path(__file__).parent.parent
LIMIT_S = 300


@dataclass
class LocalCluster:
    """What clusters/local/up.py told.

    Attributes:
        environment: with the token, for commands that talk to it.
        url: of its dashboard.
        gcs: its address for `ray.init`.
        process: up.py.
    """

    environment: dict[str, str]
    url: str
    gcs: str
    process: subprocess.Popen[str]

    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    def run(self, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """One command of ours, with its output."""
        command = [sys.executable, "-m", "orchestrator", *words]
        environment = self.environment | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S)

    def nodes(self) -> dict[str, list[str]]:
        """Ids of living nodes by node type, as the dashboard tells."""
        header = {"Authorization": f"Bearer {self.token()}"}
        answer = requests.get(f"{self.url}/api/v0/nodes?limit=1000", headers=header, timeout=10).json()
        found: dict[str, list[str]] = {}
        for node in answer["data"]["result"]["result"]:
            if node["state"] == "ALIVE":
                found.setdefault(node["labels"].get("ray.io/node-group", "?"), []).append(node["node_id"])
        return found


@contextmanager
def head(cpus: int) -> Iterator[str]:
    """The address of a node that asks for no token: whoever joins it needs RAY_AUTH_MODE=disabled.

    It is a process of its own, since Ray decides once in a process whether it has tokens.
    """
    port, ray = free_port(), str(Path(sys.executable).parent / "ray")
    words = ["start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}"]
    words += [f"--dashboard-port={free_port()}", "--dashboard-agent-listen-port=0"]  # beside other clusters
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen([ray, *words], env=environment, stdout=subprocess.DEVNULL)
    address = f"127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + LIMIT_S
        check = [ray, "health-check", f"--address={address}"]
        while subprocess.run(check, env=environment, capture_output=True).returncode:
            assert process.poll() is None
            assert time.monotonic() < deadline, "the head does not come up"
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@contextmanager
def local_cluster(folder: Path, idle_s: float = 4.0, workers: int = 2) -> Iterator[LocalCluster]:
    """Starts it, and ends it whatever happens."""
    config = yaml.safe_load((ROOT / "clusters" / "local" / "cluster.yaml").read_text())
    config["idle_timeout_minutes"] = idle_s / 60
    config["available_node_types"]["cpu-trials"]["max_workers"] = workers
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    log = (folder / "up.log").open("w+")
    command = [sys.executable, str(ROOT / "clusters/local/up.py"), "--config", str(path), "--dashboard-port", str(port)]
    process = subprocess.Popen(command, env=clean, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + LIMIT_S
        while True:
            told = (folder / "up.log").read_text()
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            try:
                if requests.get(f"{url}/api/version", timeout=2).status_code == 401:
                    break  # it answers, and wants the token
            except requests.RequestException:
                pass
            time.sleep(0.2)
        environment = clean | dict(re.findall(r"(RAY_\w+)=(\S+)", told))
        gcs = re.findall(r"--address (\S+)", told)[0]
        cluster = LocalCluster(environment, url, gcs, process)
        while not cluster.nodes():
            assert time.monotonic() < deadline, "the head does not come up"
            time.sleep(0.2)
        yield cluster
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        log.close()
