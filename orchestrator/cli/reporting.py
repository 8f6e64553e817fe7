"""Commands that show a sweep to people."""

from __future__ import annotations

import contextlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.face import JsonFlag, SweepDir, app, out


class ReportFormat(StrEnum):
    """What `report` writes."""

    html = "html"
    md = "md"
    csv = "csv"
    parquet = "parquet"


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="SWEEP...", help="A sweep's folder; several make one report of them all.")
    ],
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
    """Write a page (or text, or table) about sweeps, at any time: which student to take, why, and what it cost."""
    from orchestrator.sweep.compare import write_several
    from orchestrator.sweep.report import write_report

    form = fmt.value if fmt else None
    several = len(folders) > 1
    answer = (
        write_several(folders, out_file, form) if several else write_report(folders[0], out_file, form, not no_images)
    )
    if as_json:
        print(json.dumps(answer))
        return
    for line in answer["sentences"]:
        out.print(line, markup=False, soft_wrap=True)
    out.print(
        f"\n{answer['out']}: {answer['trials']} trials, {answer['bytes'] / 1e6:.2f} MB.", markup=False, soft_wrap=True
    )


class Tool(StrEnum):
    """What `dashboard` starts."""

    tensorboard = "tensorboard"
    optuna = "optuna"


@app.command()
def dashboard(
    folder: SweepDir,
    only: Annotated[Tool | None, typer.Option(help="Start this one alone.")] = None,
    tensorboard_port: Annotated[int | None, typer.Option(min=1, max=65535, help="6006 if not given and free.")] = None,
    optuna_port: Annotated[int | None, typer.Option(min=1, max=65535, help="8080 if not given and free.")] = None,
) -> None:
    """Start TensorBoard and optuna-dashboard over a sweep, on this machine alone, until Ctrl-C; also while it runs."""
    from orchestrator.sweep.dashboards import TOOLS, keep, ray_dashboard, serving

    tools = [only.value] if only else list(TOOLS)
    ports = {"tensorboard": tensorboard_port, "optuna": optuna_port}
    with contextlib.suppress(KeyboardInterrupt), serving(folder, tools, ports) as servers:
        for server in servers:
            out.print(f"{server.name:<17} {server.url}", markup=False)
        ray = ray_dashboard(folder)
        out.print(f"{'Ray dashboard':<17} {ray or 'none: the sweep does not run now'}", markup=False)
        out.print("Ctrl-C ends them.", markup=False)
        keep(folder, servers)
