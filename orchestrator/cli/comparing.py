"""Comparing sweeps."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.face import JsonFlag, Limits, MaxLatency, MaxParams, app, out, read_limits


class ComparisonFormat(StrEnum):
    """What `compare` writes."""

    md = "md"
    csv = "csv"
    parquet = "parquet"


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="SWEEP SWEEP...", help="Sweeps' folders, two or more.")],
    max_params: MaxParams = None,
    max_latency_ms: MaxLatency = None,
    limit: Limits = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write it there: .md, .csv or .parquet.")
    ] = None,
    fmt: Annotated[ComparisonFormat | None, typer.Option("--format", help="If not given: what FILE ends in.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Sweeps side by side: what differs, each one's best by method and limits, and whether that is noise."""
    from orchestrator.select.comparison_text import print_comparison
    from orchestrator.sweep.compare import compare_sweeps, facts, write_comparison

    found = compare_sweeps(folders, read_limits(limit, params_total=max_params, latency_ms=max_latency_ms))
    if out_file is not None:
        write_comparison(found, out_file, fmt.value if fmt else None)
    if as_json:
        print(json.dumps(facts(found)))
        return
    print_comparison(out, found)
