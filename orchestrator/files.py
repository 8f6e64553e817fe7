"""Files that are whole or not there, whatever happens to whoever writes them; and small ones that may be lacking."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file whole: a reader sees the old one or the new one, and a failed write leaves nothing behind."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def once(path: Path, write: Callable[[Path], Any]) -> None:
    """Makes a file whole unless there is one: of several processes, the first one's stays."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            if not path.exists():  # a file system without hard links
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_facts(path: Path) -> dict[str, Any]:
    """What a JSON file says by key; nothing where it cannot be read, or has no keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
