"""A stage's key: the hash of exactly what it reads."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def key_of(reads: Any) -> str:
    """Twenty hex digits of the SHA-256 of `reads` (JSON values only) in canonical form.

    Raises:
        TypeError: if something in it is not plain JSON, so that no object's address can slip into a key.
    """
    text = json.dumps(reads, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
