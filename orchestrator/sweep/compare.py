"""Comparing sweeps from their folders, and writing it down."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, disk_full, listed, nearest
from orchestrator.select.comparison import Comparison, compare, read_members
from orchestrator.select.comparison_text import comparison_markdown, plain
from orchestrator.sweep.ledger import at_once
from orchestrator.sweep.report import check_place, up_to_date

FORMATS = {"md": ".md", "csv": ".csv", "parquet": ".parquet"}
WRITERS: dict[str, Callable[[Comparison, Path], Any]] = {
    "md": lambda found, path: path.write_text(comparison_markdown(found, made_now()), encoding="utf-8"),
    "csv": lambda found, path: found.sweeps.to_csv(path, index=False),
    "parquet": lambda found, path: found.sweeps.to_parquet(path, index=False),
}


def made_now() -> str:
    """When a page is made, as a person reads it."""
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def compare_sweeps(folders: Sequence[Path]) -> Comparison:
    """Sweeps side by side, from their recorded results alone, at any time.

    Raises:
        UserError: if a folder is no sweep, or they do not compare.
    """
    for folder in folders:
        up_to_date(folder)
    return compare(read_members(folders))


def write_comparison(found: Comparison, out: Path, fmt: str | None) -> str:
    """Writes a comparison: Markdown, or the rows of sweeps and methods as a table; returns the format.

    Raises:
        UserError: if the file cannot be written, or its name says no format.
    """
    fmt = fmt or next((name for name, suffix in FORMATS.items() if out.suffix.lower() == suffix), None)
    if fmt is None:
        raise UserError(
            f"--out: {out.name!r} ends in {out.suffix!r}, which is none of {listed(FORMATS.values())}; give --format "
            f"as well, or make a page with `orchestrator report`.{nearest(out.suffix, FORMATS.values())}"
        )
    check_place(out)
    try:
        at_once(out, lambda temporary: WRITERS[fmt](found, temporary))
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"--out: {str(out)!r} cannot be written ({error.strerror}).") from error
    return fmt


def facts(found: Comparison) -> dict[str, Any]:
    """Plain JSON of a comparison."""
    keys = {key: dict(zip((m.name for m in found.members), values, strict=True)) for key, values in found.keys.items()}
    return {
        "sweeps": {m.name: str(m.folder) for m in found.members},
        "groups": found.groups,
        "keys": keys,
        "rows": plain(found.sweeps),
        "table": plain(found.table),
        "sentences": found.sentences,
    }
