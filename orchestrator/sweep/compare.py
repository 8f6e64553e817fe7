"""Comparing sweeps from their folders, and writing it down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError, listed, nearest
from orchestrator.select.comparison import ALL, Comparison, compare
from orchestrator.select.comparison_text import comparison_markdown, plain
from orchestrator.select.members import read_members
from orchestrator.select.report.several import joint_table, several_html
from orchestrator.sweep.report import check_place, format_of, gathered, made_now, write_file

FORMATS = {"md": ".md", "csv": ".csv", "parquet": ".parquet"}
WRITERS: dict[str, Callable[[Comparison, Path], Any]] = {
    "md": lambda found, path: path.write_text(comparison_markdown(found, made_now()), encoding="utf-8"),
    "csv": lambda found, path: found.sweeps.to_csv(path, index=False),
    "parquet": lambda found, path: found.sweeps.to_parquet(path, index=False),
}


def compare_sweeps(folders: Sequence[Path], limits: Mapping[str, float] | None = None) -> Comparison:
    """Sweeps side by side, from their recorded results alone, at any time.

    Args:
        folders: the sweeps'.
        limits: as `compare` takes them.

    Raises:
        UserError: if a folder is no sweep, they do not compare, or no trial keeps the limits.
    """
    return compare(read_members(folders), limits)


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
    write_file(out, lambda temporary: WRITERS[fmt](found, temporary))
    return fmt


SEVERAL = "report_of_several"  # in the first sweep's folder


def write_several(folders: Sequence[Path], out: Path | None, fmt: str | None) -> dict[str, Any]:
    """Writes one report of several sweeps; reads their recorded results alone.

    Args:
        folders: the sweeps'.
        out: the file, replaced whole; None: `report_of_several` in the first one's folder.
        fmt: html, md, or the joint leaderboard as csv or parquet; None: what the name of `out` says, else html.

    Raises:
        UserError: if they do not compare, or the file cannot be written.
    """
    fmt = fmt or format_of(out)
    path = out or folders[0] / f"{SEVERAL}.{fmt}"
    check_place(path)
    found = compare_sweeps(folders)
    if fmt == "md":
        write_comparison(found, path, "md")
    else:
        names, parts = [m.name for m in found.members], [gathered(folder, images=False) for folder in folders]
        writers: dict[str, Callable[[Path], Any]] = {
            "html": lambda to: to.write_text(several_html(found, parts), encoding="utf-8"),
            "csv": lambda to: joint_table(names, parts).to_csv(to, index=False),
            "parquet": lambda to: joint_table(names, parts).to_parquet(to, index=False),
        }
        write_file(path, writers[fmt])
    whole = found.sweeps[found.sweeps["among"] == ALL]
    return {
        "out": str(path),
        "format": fmt,
        "bytes": path.stat().st_size,
        "trials": int(whole["trials"].sum()),
        "recommended": dict(zip(whole["sweep"], whole["trial_id"], strict=True)),
        "sentences": found.sentences,
    }


def facts(found: Comparison) -> dict[str, Any]:
    """Plain JSON of a comparison."""
    keys = {key: dict(zip((m.name for m in found.members), values, strict=True)) for key, values in found.keys.items()}
    return {
        "sweeps": {m.name: str(m.folder) for m in found.members},
        "groups": found.groups,
        "keys": keys,
        "limits": found.limits,
        "rows": plain(found.sweeps),
        "table": plain(found.table),
        "sentences": found.sentences,
    }
