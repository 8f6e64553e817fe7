"""Commands that choose a student, and take it away."""

from __future__ import annotations

import contextlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.face import (
    JsonFlag,
    Limits,
    MaxLatency,
    MaxParams,
    SweepDir,
    app,
    err,
    out,
    print_table,
    read_limits,
)
from orchestrator.process import settle


class Format(StrEnum):
    """What `export` writes."""

    safetensors = "safetensors"
    onnx = "onnx"
    pt2 = "pt2"


@app.command()
def best(
    folder: SweepDir,
    metric: Annotated[
        str | None, typer.Option(help="What to choose by; the sweep's first objective if not given.")
    ] = None,
    max_params: MaxParams = None,
    max_latency_ms: MaxLatency = None,
    limit: Limits = None,
    promote: Annotated[
        int | None, typer.Option(min=1, max=100, help="Run this many of the best once more, in a sweep of their own.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, max=20, help="With --promote: runs of each.")] = 3,
    as_json: JsonFlag = False,
) -> None:
    """The recommended student under limits, and its score on the test images."""
    from orchestrator.sweep.choice import recommend

    limits = read_limits(limit, params_total=max_params, latency_ms=max_latency_ms)
    if promote is not None:
        _promote(folder, promote, seeds, metric, limits, as_json)
        return
    answer = recommend(folder, metric, limits)
    if as_json:
        print(json.dumps(answer))
        return
    for line in answer["sentences"]:
        out.print(line, markup=False, soft_wrap=True)


def _promote(folder: Path, count: int, seeds: int, metric: str | None, limits: dict[str, float], as_json: bool) -> None:
    from orchestrator.api import Sweep
    from orchestrator.sweep.promote import rank_sentences

    sweep = Sweep(folder)
    tell = None if as_json else (lambda line: out.print(line, markup=False))
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        promoted = sweep.promote(count, seeds, tell, metric=metric, limits=limits)
    changes = sweep.ranks(promoted)
    sentences = [*rank_sentences(changes), f"Next: python -m orchestrator best {promoted.folder}"]
    if as_json:
        print(json.dumps({"folder": str(promoted.folder), "ranks": changes, "sentences": sentences}))
        return
    rows = [
        [f["rank"] or "", f["rank_before"], f["trial_id"], f["method"], _mean(f), f"{f['val_before']:.4f}", f["status"]]
        for f in changes
    ]
    print_table(["rank", "before", "trial", "method", f"val, {seeds} seeds", "val before", "status"], rows)
    for line in sentences:
        out.print(line, markup=False, soft_wrap=True)


def _mean(fact: dict[str, Any]) -> str:
    return f"{fact['val_metric']:.4f} ± {fact['val_sd']:.4f}" if fact["rank"] is not None else ""


@app.command()
def export(
    folder: SweepDir,
    out_dir: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    trial: Annotated[str | None, typer.Option(help="Which trial; the best one if not given.")] = None,
    fmt: Annotated[
        Format,
        typer.Option(
            "--format", help="safetensors: plain timm or open_clip; onnx; pt2: a program that torch alone runs."
        ),
    ] = Format.safetensors,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="onnx: whole images go in, uint8 [B, H, W, 3].")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: 8-bit integers, if val loses no more than noise by it.")
    ] = False,
    max_loss: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --int8: the loss of the val metric that is accepted.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the exported network, for its card, as in cc-by-4.0; unknown if not given.")
    ] = None,
    data_licence: Annotated[str | None, typer.Option(help="Of the data, for the card.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a student so that it loads without this package, with a model card."""
    from orchestrator.sweep.export import export_trial

    options: dict[str, Any] = {"with_preprocessing": with_preprocessing, "int8": int8, "max_loss": max_loss}
    options |= {"licence": licence, "data_licence": data_licence}
    report = export_trial(folder, out_dir, trial, fmt.value, **options)
    if as_json:
        print(json.dumps(report))
        return
    for line in report["sentences"]:
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def suite(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A student's folder, SWEEP_DIR[:TRIAL] (the best one if none is named), or a model's name.",
        ),
    ],
    tasks: Annotated[
        Path, typer.Argument(metavar="SUITE", help="A YAML file, or a folder with one sub-folder a task.")
    ],
    store: Annotated[
        Path | None, typer.Option(help="Where features are kept; the sweep's store if not given, else runs/store.")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write it there: .md or .json.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a network on many tasks: zero-shot, probes, shifts, retrieval. Reads their test images, on purpose."""
    from orchestrator.evaluate.suite import check_out, markdown, read_suite, run_suite, write_result
    from orchestrator.select.subject import find_subject
    from orchestrator.store import store_at

    if out_file is not None:
        check_out(out_file)
    settle()
    read = read_suite(tasks)
    subject, place = find_subject(model, store)
    result = run_suite(subject, read, store_at(place), lambda line: err.print(line, markup=False))
    if out_file is not None:
        write_result(result, out_file)
    print(json.dumps(result) if as_json else markdown(result), end="\n" if as_json else "")
