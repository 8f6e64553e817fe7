"""A Ray of this machine's own: where it may keep its files."""

from __future__ import annotations

import os
import time

import pytest
import ray
from ray.dashboard.subprocesses.module import SubprocessModule
from ray.dashboard.utils import get_all_modules

from orchestrator.errors import UserError
from orchestrator.sweep.cluster import LONGEST_SOCKET, SOCKET_PATH_BYTES, check_ray_folder, start_ray, start_ray_beside


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
