"""An autoscaling cluster on this machine, until Ctrl-C: `python clusters/local/up.py`, then `orchestrator submit`.

It starts Ray's head with cluster.yaml beside this file, tells how to talk to it, and ends by process id what it
started and nothing else (`ray stop` would end every Ray of the machine).
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

import psutil
import yaml

HERE = Path(__file__).resolve().parent
GRACE_S = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(config: Path, work: Path, port: int) -> tuple[Path, str]:
    """The autoscaler's file with this head's address in it, and the id that the head must have."""
    from ray.util import get_node_ip_address

    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    written["provider"]["gcs_address"] = f"{get_node_ip_address()}:{port}"
    path = work / "cluster.yaml"
    path.write_text(yaml.safe_dump(written), encoding="utf-8")
    return path, written["provider"]["head_node_id"]


def session(leader: int) -> list[psutil.Process]:
    """The living processes of the session that `leader` opened."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def end(leader: int) -> None:
    """Ends the session's processes: asks them, waits, and kills what is left."""
    for verb in ("terminate", "kill"):
        alive = session(leader)
        for process in alive:
            try:
                getattr(process, verb)()
            except psutil.NoSuchProcess:
                continue
        deadline = time.monotonic() + GRACE_S
        while session(leader) and time.monotonic() < deadline:
            time.sleep(0.1)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--config", type=Path, default=HERE / "cluster.yaml", help="The autoscaler's file.")
    options.add_argument("--dashboard-port", type=int, default=8265, help="Where jobs are taken; on loopback only.")
    given = options.parse_args()
    # Ray's sockets lie below its folder, and their paths may have 107 characters only.
    work = Path(tempfile.mkdtemp(prefix="cl-", dir="/tmp"))
    token = work / "token"
    token.touch(mode=0o600)
    token.write_text(os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32), encoding="utf-8")
    port = free_port()
    config, head_id = prepare(given.config, work, port)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A job says `python`: it must be this one, in an environment that was not activated too.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    command = ["ray", "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={given.dashboard_port}", f"--temp-dir={work / 'ray'}"]
    command += [f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
    command += ["--labels=ray.io/node-group=ray.head.default", f"--autoscaling-config={config}"]
    command[0] = str(Path(sys.executable).with_name("ray"))
    log = work / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=work
        )
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    print("Starting. Ctrl-C ends the cluster and removes its files. In another terminal:")
    print(f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}")
    print(f"  export RAY_API_SERVER_ADDRESS=http://127.0.0.1:{given.dashboard_port}")
    print(f"  ray status --address {yaml.safe_load(config.read_text())['provider']['gcs_address']}")
    print("  python -m orchestrator submit search_spaces/quickstart.yaml --storage /ABSOLUTE/FOLDER", flush=True)
    while head.poll() is None and not asked.wait(0.5):
        pass
    failed = head.poll() is not None
    end(head.pid)
    head.wait()
    if failed:
        print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    shutil.rmtree(work, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
