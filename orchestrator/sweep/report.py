"""A report of a sweep that has ended, runs, or never will: what is recorded, put together and written at once."""

from __future__ import annotations

import datetime
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from methods.knobs import Choice
from orchestrator.errors import UserError, disk_full, listed, nearest
from orchestrator.evaluate.details import FILE
from orchestrator.files import at_once, read_facts
from orchestrator.select.report import Gathered, Importance, Study, gather, html, markdown, table
from orchestrator.select.report.gather import knobs_of
from orchestrator.select.report.page import export_command, shown
from orchestrator.select.results import margin_note, numbers, read_trials, top
from orchestrator.select.uncertainty import lead_of, lead_sentence
from orchestrator.spec import METRIC_NAMES, SweepSpec, near_limits
from orchestrator.sweep.choice import against_baseline, latencies_of, spread
from orchestrator.sweep.ledger import open_sweep
from orchestrator.sweep.space import method_space
from orchestrator.sweep.study_importance import importances

FORMATS = {"html": ".html", "md": ".md", "csv": ".csv", "parquet": ".parquet"}
ENOUGH = 10  # complete trials from which importances are worth a look
WRITERS: dict[str, Callable[[Gathered, Path], Any]] = {
    "html": lambda found, path: path.write_text(html(found), encoding="utf-8"),
    "md": lambda found, path: path.write_text(markdown(found), encoding="utf-8"),
    "csv": lambda found, path: table(found).to_csv(path, index=False),
    "parquet": lambda found, path: table(found).to_parquet(path, index=False),
}


def write_report(folder: Path, out: Path | None, fmt: str | None, images: bool = True) -> dict[str, Any]:
    """Writes a report of the sweep in `folder`; reads its recorded results alone.

    Args:
        out: the file, replaced whole; None: `report` in the sweep's folder.
        fmt: one of `FORMATS`; None: what the name of `out` says, else html.
        images: whether worst errors are shown as pictures of the user's data.

    Raises:
        UserError: if there is no sweep, or the file cannot be written.
    """
    fmt = fmt or format_of(out)
    path = out or folder / f"report{FORMATS[fmt]}"
    check_place(path)
    found = gathered(folder, images)
    write_file(path, lambda temporary: WRITERS[fmt](found, temporary))
    return {
        "out": str(path),
        "format": fmt,
        "bytes": path.stat().st_size,
        "trials": len(found.board),
        "recommended": found.study.recommended,
        "sentences": list(found.study.sentences),
    }


def gathered(folder: Path, images: bool = True) -> Gathered:
    """Everything that a report of the sweep in `folder` shows, as it is recorded now.

    Raises:
        UserError: if there is no sweep.
    """
    frame = read_trials(folder)
    spec = open_sweep(folder)
    return gather(folder, spec, frame, _study(folder, spec, frame), made_now(), images)


def made_now() -> str:
    """When a report is made, as a person reads it."""
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes `--out` whole.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        at_once(path, write)
    except OSError as error:
        if disk_full(error):
            raise
        raise UserError(f"--out: {str(path)!r} cannot be written ({error.strerror}).") from error


def format_of(out: Path | None) -> str:
    """The format that a file's name says; html for none."""
    if out is None or not out.suffix:
        return "html"
    for fmt, suffix in FORMATS.items():
        if out.suffix.lower() in (suffix, f".{fmt}"):
            return fmt
    raise UserError(
        f"--out: {out.name!r} ends in {out.suffix!r}, which is none of {listed(FORMATS.values())}; give --format as "
        f"well.{nearest(out.suffix, FORMATS.values())}"
    )


def check_place(path: Path) -> None:
    """Refuses a folder as a file, and a file in a folder that is not there."""
    if path.is_dir():
        raise UserError(f"--out: {str(path)!r} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out: the folder {str(path.absolute().parent)!r} does not exist.")


def _study(folder: Path, spec: SweepSpec, frame: pd.DataFrame) -> Study:
    recommended, sentences = _recommendation(folder, spec, frame)
    try:
        seconds = float(json.loads((folder / "clock.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        seconds = math.nan
    text = (folder / "sweep.yaml").read_text(encoding="utf-8")
    commands = _commands(folder, spec, frame, recommended)
    return Study(recommended, sentences, _importances(spec, frame), seconds, commands, text)


def _recommendation(folder: Path, spec: SweepSpec, frame: pd.DataFrame) -> tuple[str | None, list[str]]:
    """By the sweep's first objective, as `best` chooses; the test images are not read, only what is known of them."""
    first = spec.objectives[0]
    kept = spec.limits.given
    try:
        best = top(frame, first.metric, first.direction, kept)
    except UserError as error:
        return None, [str(error)]
    row = best.iloc[0]
    trial, kind = str(row["trial_id"]), spec.task.kind
    networks = " → ".join(n for n in (row["teacher"], row["student"]) if isinstance(n, str))
    objective = "" if first.metric == "val_metric" else f", the best {first.metric}"
    sentences = [
        f"Take {trial}: {row['method']} ({networks}){objective}, {METRIC_NAMES[kind]} on val {row['val_metric']:.4f}"
        f"{spread(row)}.",
        f"{shown(row['params_total'], 'params_total')} parameters, {shown(row['flops'], 'flops')} MFLOPs an image, "
        f"{latencies_of(row, spec)}.",
        *near_limits(kept, row),
    ]
    tested = read_facts(folder / "test.json").get(trial)
    if tested:
        sentences.append(
            f"On {tested['images']} test images: {tested['value']:.4f} (standard error {tested['standard_error']:.4f})."
        )
    else:
        sentences.append("The test images were not read for it: `best` reads them once.")
    images = int(read_facts(folder / str(row["student_path"]) / FILE).get("images", 0))
    if kept:
        sentences.append(f"It keeps the sweep's limits: {listed(f'{m} {v:g}' for m, v in kept.items())}.")
    if images:
        lead = first.metric == "val_metric" and len(best) > 1
        if lead:
            second = best.iloc[1]
            sentences.append(lead_sentence(row, second, lead_of(folder, row, second, images, kind)))
        if not lead or best.iloc[1]["method"] == row["method"]:  # the best of another method is then a further one
            note = margin_note(frame, row, first.metric, images, kept, kind)
            sentences += [note] if note else []
        sentences += against_baseline(frame, row, images, kind, kept)
    return trial, sentences


def _commands(folder: Path, spec: SweepSpec, frame: pd.DataFrame, recommended: str | None) -> list[tuple[str, str]]:
    place, run = shlex.quote(str(folder)), "python -m orchestrator"
    again = shlex.quote(str(folder / "sweep.yaml"))
    commands = [
        (
            "The same sweep again; what the store still holds is not computed anew:",
            f"{run} sweep {again} --name {spec.name}-again",
        )
    ]
    if len(frame) < spec.search.trials or (frame["status"] == "running").any():
        commands.append(("To its end, if it does not run any more:", f"{run} resume {place}"))
    if recommended is not None:
        commands.append(
            ("The recommended student with its score on the test images, which are read once:", f"{run} best {place}")
        )
        commands.append(
            ("The student, loadable without this package:", f"{export_command(folder)} --trial {recommended}")
        )
    return commands


def _importances(spec: SweepSpec, frame: pd.DataFrame) -> list[Importance]:
    done = frame[(frame["status"] == "complete").to_numpy() & ~pd.isna(numbers(frame, "val_metric"))]
    rows = done.to_dict("records")
    if not rows:
        return []
    of_all = [{k: row[k] or "-" for k in ("method", "teacher", "student")} for row in rows]
    space: dict[str, Any] = {k: Choice(values=tuple({c[k] for c in of_all})) for k in ("method", "teacher", "student")}
    found = [_importance("all methods", of_all, [r["val_metric"] for r in rows], space)]
    for method in sorted(done["method"].unique()):
        mine = [r for r in rows if r["method"] == method]
        try:
            space = method_space(spec, method)
        except (UserError, KeyError):
            continue  # the method is not installed here, or is another one by now
        if any(not isinstance(domain, str | int | float | bool) for domain in space.values()):
            found.append(_importance(method, [knobs_of(r) for r in mine], [r["val_metric"] for r in mine], space))
    return found


def _importance(among: str, choices: list[dict[str, Any]], values: list[float], space: dict[str, Any]) -> Importance:
    if len(values) < ENOUGH:
        return Importance(among, len(values), reason=f"not reckoned, which takes {ENOUGH} complete trials.")
    shares = importances(choices, values, space)
    return Importance(among, len(values), shares, "" if shares else "no choice took two values.")
