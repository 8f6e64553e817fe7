"""The Ray cluster that a sweep runs on: joined where there is one, else started on this machine."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import ray

from orchestrator.errors import UserError
from orchestrator.process import beginning
from orchestrator.sweep.ports import free_port

# A socket's path has an end: 108 bytes with the closing zero on Linux, 104 on macOS. Ray's longest name is this one.
LONGEST_SOCKET = "dash_TaskEventsHead"
SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107

T = TypeVar("T")
_dashboards: dict[str, str] = {}  # of the clusters that this process has joined, by the address of their control store


def start_ray(threads: int) -> str | None:
    """Joins the cluster that RAY_ADDRESS names (a submitted job has it), or starts one on this machine.

    Returns:
        Where its dashboard is, `host:port`; None: not known.
    """
    if ray.is_initialized():
        return _dashboards.get(ray.get_runtime_context().gcs_address)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # rows and event files are our own
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")  # all trials so far, again and again, for nobody to read
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    variables = {
        "OMP_NUM_THREADS": str(threads),
        # A stopped trial leaves its function by itself, a worker group in seconds; then its process takes the next.
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "120",
        # A rank that waits for one that has failed cannot say goodbye; it is killed after this, not half a minute.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    }
    environment: dict[str, Any] = {"env_vars": variables}
    if address == "local":
        check_ray_folder()
        # The dashboard must be on: without it, worker groups whose trial has died are never freed. Nor are they with
        # two clusters on a machine, if Ray is left to guess in which of them it is; so the port is chosen here.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        # Ray would begin one process for each core before there is work, none of them with the variables of trials.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        port = str(free_port())
        os.environ["RAY_GCS_SERVER_PORT"] = port
        variables["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        environment["worker_process_setup_hook"] = beginning()
    elif ":" in address and "://" not in address:
        variables["RAY_ADDRESS"] = address
    try:
        context = ray.init(address=address, runtime_env=environment, **options)
    finally:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)
    url = getattr(context, "dashboard_url", None) or None
    if url is not None:
        _dashboards[ray.get_runtime_context().gcs_address] = url
    return url


def start_ray_beside(threads: int, work: Callable[[], T]) -> T:
    """Starts Ray, if it is to run on this machine, while another thread does `work`; each takes seconds.

    Returns:
        What `work` returns.

    Raises:
        UserError: as `start_ray`, and what `work` raises, once Ray is up.
    """
    if os.environ.get("RAY_ADDRESS"):
        return work()
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work)
        start_ray(threads)
        return doing.result()


def stop_ray_beside(work: Callable[[], None]) -> None:
    """Leaves the cluster, and stops it where it was started here, while another thread does `work`.

    Raises:
        what `work` raises, once Ray is down.
    """
    looks = gc.isenabled()
    gc.disable()  # what is found meanwhile may be Ray's, which ends a process that asks it for something then
    try:
        with ThreadPoolExecutor(1) as pool:
            doing = pool.submit(work)
            ray.shutdown()
        doing.result()
    finally:
        if looks:
            gc.enable()


def check_ray_folder() -> None:
    """Refuses a folder for Ray's files whose sockets would have longer paths than the system allows.

    Ray itself would start, and then say that a part of its dashboard has failed.

    Raises:
        UserError: with how long the folder may be.
    """
    named = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    if not named or (named[0] == "TMPDIR" and sys.platform == "darwin"):
        return
    folder = os.environ[named[0]]
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    rest = len(os.fsencode(os.path.join("/ray", session, "sockets", LONGEST_SOCKET)))
    if len(os.fsencode(folder)) + rest > SOCKET_PATH_BYTES:
        raise UserError(
            f"{named[0]}: Ray keeps its sockets below {folder!r}, whose path may have {SOCKET_PATH_BYTES - rest} bytes "
            f"and has {len(os.fsencode(folder))}; set RAY_TMPDIR to a shorter one, such as /tmp."
        )
