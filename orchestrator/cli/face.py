"""What all commands share: the application, its consoles, and the flags that mean the same everywhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.errors import UserError, listed, nearest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Turns a vision foundation model into the best small student for your own data.",
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)

MaxParams = Annotated[int | None, typer.Option(help="At most this many parameters.")]
MaxLatency = Annotated[float | None, typer.Option(help="At most this median latency.")]
Limits = Annotated[
    list[str] | None,
    typer.Option(metavar="METRIC=VALUE", help="At most (val_metric: at least) that; in place of the sweep's own."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
SetFlag = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the file.")
]
StoreDir = Annotated[
    str,
    typer.Argument(metavar="WHERE", help="A sweep's folder, a storage folder, a store, or its s3:// or gs:// address."),
]
SweepDir = Annotated[Path, typer.Argument(help="A sweep's folder: <storage>/<name>.")]


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """Rows under their columns, as text."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table, markup=False)


def read_limits(given: list[str] | None, **named: float | None) -> dict[str, float]:
    """Limits by metric, from `METRIC=VALUE` and from options of their own."""
    from orchestrator.spec import METRICS, is_metric

    limits = {metric: float(value) for metric, value in named.items() if value is not None}
    for text in given or []:
        metric, _, value = text.partition("=")
        if not is_metric(metric):
            raise UserError(
                f"--limit: unknown metric {metric!r}; allowed: {listed(METRICS)}.{nearest(metric, METRICS)}"
            )
        try:
            limits[metric] = float(value)
        except ValueError:
            raise UserError(f"--limit {text!r} is not of the form METRIC=NUMBER, as in {metric}=5.") from None
    return limits
