"""`store`: the shared store, and what primes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.face import JsonFlag, StoreDir, app, out, print_table
from orchestrator.errors import WorkError
from orchestrator.process import settle

store_app = typer.Typer(
    no_args_is_help=True, help="Look at, verify or shrink the shared store, or prime it with an upstream package."
)
app.add_typer(store_app, name="store")


@store_app.command("ls")
def store_ls(where: StoreDir, as_json: JsonFlag = False) -> None:
    """What lies in the store, by stage."""
    from orchestrator.sweep.stock import inventory

    rows = inventory(where)
    if as_json:
        print(json.dumps(rows))
        return
    print_table(
        ["stage", "entries", "MB", "seconds"],
        [[r["stage"], r["entries"], f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}"] for r in rows],
    )


@store_app.command("verify")
def store_verify(
    where: StoreDir,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take damaged entries away; they are computed anew.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the store against its files and the live teacher."""
    from orchestrator.sweep.stock import verify

    answer = verify(where, remove)
    if as_json:
        print(json.dumps(answer))
    else:
        for line in answer["sentences"]:
            out.print(line, markup=False, soft_wrap=True)
    if answer["damaged"] and not remove:
        raise WorkError(
            f"{len(answer['damaged'])} entries of the store are damaged; `store verify --remove` takes them away."
        )


@store_app.command("gc")
def store_gc(
    where: StoreDir,
    max_gb: Annotated[float | None, typer.Option(help="Shrink to this; default: the sweep's store.max_gb.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Free disk: leftovers of dead processes, and what was not used for longest."""
    from orchestrator.sweep.stock import collect

    answer = collect(where, max_gb)
    print(json.dumps(answer)) if as_json else out.print(answer["sentence"], markup=False)


@store_app.command("prime")
def store_prime(
    where: StoreDir,
    data: Annotated[
        str, typer.Option(help="Upstream images, without labels: folder:PATH, parquet:PATH or packaged/clipart.")
    ],
    kind: Annotated[str, typer.Option(help="vq (codes and their prior) or diffusion.")],
    out_dir: Annotated[Path, typer.Option("--out", help="The folder to write; it will hold no image.")],
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 64,
    steps: Annotated[int, typer.Option(help="Training steps; a VQ's prior takes as many again.")] = 10_000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Shape or training; a wrong key lists all.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """For a provider: train the upstream package that OTA's users need instead of upstream images."""
    from orchestrator.sweep.prime import prime

    settle()
    tell: Callable[[str], None] = (lambda line: None) if as_json else (lambda line: out.print(line, markup=False))
    facts = prime(where, data, kind, size, steps, out_dir, overrides or [], tell)
    if as_json:
        print(json.dumps(facts))
        return
    measured = [name for name in facts if name not in ("out", "kind", "sentence", "images_hash")]
    print_table(["fact", "value"], [[name, facts[name]] for name in measured])
    out.print(facts["sentence"], markup=False, soft_wrap=True)
