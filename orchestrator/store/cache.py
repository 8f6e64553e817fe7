"""Where a node keeps its copies of what lies on object storage, and how much of it."""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from pathlib import Path

from orchestrator.errors import UserError

VARIABLE = "ORCHESTRATOR_CACHE"
LIMIT = "ORCHESTRATOR_CACHE_GB"


def cache_of(address: str) -> Path:
    """The folder of this node in which entries of a remote store are kept.

    Raises:
        UserError: if it belongs to another user, who could put anything into it.
    """
    given = os.environ.get(VARIABLE)
    base = Path(given) if given else Path(tempfile.gettempdir()) / f"transfer-orchestrator-{getpass.getuser()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not given and base.stat().st_uid != os.getuid():
        raise UserError(f"The cache folder {str(base)!r} belongs to another user: set {VARIABLE} to one of yours.")
    return base / hashlib.sha256(address.partition("?")[0].encode()).hexdigest()[:16]


def limit_of_cache() -> float | None:
    """Bytes that a node's cache may take; None for no limit.

    Raises:
        UserError: if the variable is not a number above 0.
    """
    given = os.environ.get(LIMIT)
    if given is None:
        return None
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"{LIMIT} is {given!r}; it takes GB, a number above 0, as in {LIMIT}=200.")
    return limit * 1e9
