"""Commands that show a sweep to people."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.face import JsonFlag, SweepDir, app, out


class ReportFormat(str, Enum):
    """What `report` writes."""

    html = "html"
    md = "md"
    csv = "csv"
    parquet = "parquet"


@app.command()
def report(
    folder: SweepDir,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The file; report.html in the sweep's folder if not given."),
    ] = None,
    fmt: Annotated[
        ReportFormat | None, typer.Option("--format", help="If not given: what FILE ends in, else html.")
    ] = None,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Leave out the pictures of your data beside the worst errors.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a page (or text, or table) about a sweep, at any time: which student to take, why, and what it cost."""
    from orchestrator.sweep.report import write_report

    answer = write_report(folder, out_file, fmt.value if fmt else None, not no_images)
    if as_json:
        print(json.dumps(answer))
        return
    for line in answer["sentences"]:
        out.print(line, markup=False, soft_wrap=True)
    out.print(
        f"\n{answer['out']}: {answer['trials']} trials, {answer['bytes'] / 1e6:.2f} MB.", markup=False, soft_wrap=True
    )
