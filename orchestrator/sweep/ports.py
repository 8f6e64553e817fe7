"""Ports of this machine."""

from __future__ import annotations

import socket


def free_port(host: str = "") -> int:
    """A port that nobody listens on just now; of all addresses of this machine, or of one."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
