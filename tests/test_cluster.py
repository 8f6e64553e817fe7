"""A Ray of this machine's own: where it may keep its files."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import pytest
import ray
from ray.dashboard.subprocesses.module import SubprocessModule
from ray.dashboard.utils import get_all_modules

from orchestrator.errors import UserError
from orchestrator.sweep.cluster import (
    LONGEST_SOCKET,
    SOCKET_PATH_BYTES,
    check_ray_folder,
    start_ray,
    start_ray_beside,
    stop_ray_beside,
)


def test_no_socket_of_ray_has_a_longer_name_than_the_check_reckons_with() -> None:
    names = ["plasma_store", "raylet", *(f"dash_{module.__name__}" for module in get_all_modules(SubprocessModule))]
    assert max(map(len, names)) == len(LONGEST_SOCKET)


def test_a_folder_whose_sockets_would_be_too_long_is_refused_and_one_byte_less_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = f"/ray/session_2026-11-29_01-11-35_028970_{os.getpid()}/sockets/{LONGEST_SOCKET}"
    room = SOCKET_PATH_BYTES - len(session)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * room)
    with pytest.raises(UserError) as refused:
        start_ray(1)
    assert str(refused.value) == (
        f"RAY_TMPDIR: Ray keeps its sockets below '/{'x' * room}', whose path may have {room} bytes and has "
        f"{room + 1}; set RAY_TMPDIR to a shorter one, such as /tmp."
    )
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * (room - 1))
    check_ray_folder()


def test_ray_s_own_variable_goes_before_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "x" * 200)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_ray_folder()


def test_on_a_cluster_that_is_named_work_is_done_and_no_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert start_ray_beside(1, lambda: 7) == 7
    assert not ray.is_initialized()


def test_a_folder_that_is_refused_waits_for_the_work_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 100)
    with pytest.raises(UserError, match="RAY_TMPDIR"):
        start_ray_beside(1, lambda: (time.sleep(0.1), done.append(1)))
    assert done == [1]


def test_what_ray_s_processes_inherit_is_not_left_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "1")

    def init(**options: Any) -> None:
        seen.update(os.environ)
        raise RuntimeError("no Ray today")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError):
        start_ray(1)
    assert seen["RAY_GCS_SERVER_PORT"].isdigit()
    assert seen["RAY_prestart_worker_first_driver"] == "1"
    left = dict(os.environ)
    assert left["RAY_prestart_worker_first_driver"] == "1"
    assert "RAY_GCS_SERVER_PORT" not in left


def test_work_beside_ray_s_end_is_done_even_if_it_fails_and_garbage_is_looked_for_again() -> None:
    looked: list[bool] = []
    stop_ray_beside(lambda: looked.append(gc.isenabled()))

    def fail() -> None:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        stop_ray_beside(fail)
    assert (looked, gc.isenabled()) == ([False], True)
