"""Commands that check, run and continue a sweep."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.clusters import check_cluster
from orchestrator.cli.face import JsonFlag, SetFlag, SweepDir, app, err, out, print_table
from orchestrator.errors import UserError, WorkError
from orchestrator.process import settle


@app.command()
def check(
    spec: Annotated[Path | None, typer.Argument(help="A sweep file.")] = None,
    overrides: SetFlag = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key of the sweep file instead.")] = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at the cluster instead, before it is paid for.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="With --cluster: its dashboard, as in `submit`.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Validate everything that can be validated; start nothing."""
    from orchestrator.spec import documented_keys

    if keys:
        rows = documented_keys()
        if as_json:
            print(json.dumps([{"key": k, "default": d, "description": t} for k, d, t in rows]))
        else:
            print_table(["key", "default", "what it is"], [list(row) for row in rows])
        return
    if spec is None:
        raise UserError("Which sweep file? `orchestrator check SPEC`, or `orchestrator check --keys` for its keys.")
    if cluster:
        check_cluster(spec, overrides or [], address, as_json)
        return
    from orchestrator.sweep.folder import check_places

    read = read_sweep_file(spec, None, None, None, overrides)
    check_places(read)
    if read.search.on_server:  # else neither Optuna nor SQLAlchemy need be imported
        from orchestrator.sweep.study_storage import check_study

        check_study(read)
    from orchestrator.imports import without_compiler

    with without_compiler():
        from orchestrator.sweep.costs import costs_of, sentences_of
        from orchestrator.sweep.run import prepare

        prepared = prepare(read, dry=True)
        task = prepared.task
        reckoned = costs_of(read, task, prepared.cells, prepared.spaces)
    facts = {
        "name": read.name,
        "classes": len(task.classes),
        "labelled": len(task.labelled),
        "unlabelled": task.info.unlabelled,
        "val": len(task.val),
        "test": len(task.test),
        "skipped": task.skipped,
        "combinations": len(prepared.cells),
        "dropped": prepared.dropped,
        "unchecked": prepared.unchecked,
        "costs": reckoned[2].facts() if reckoned is not None else None,
    }
    if as_json:
        print(json.dumps(facts))
        return
    out.print(f"{spec}: good.", markup=False)
    _tell(prepared)
    for line in sentences_of(read, reckoned[0], reckoned[2]) if reckoned is not None else []:
        out.print(line, markup=False)


def _tell(prepared: Any) -> None:
    task, spec = prepared.task, prepared.spec
    times = f" x {spec.search.repeats} repeats" if spec.search.repeats > 1 else ""
    out.print(
        f"{len(task.classes)} classes; train {len(task.labelled)} labelled + {task.info.unlabelled} unlabelled, "
        f"val {len(task.val)}, test {len(task.test)} images. "
        f"{len(prepared.cells)} combinations of method, teacher and student; {prepared.trials} trials{times} of "
        f"{spec.train.total_steps(len(task.train))} steps x {spec.train.batch} images."
    )
    if task.skipped:
        out.print("Skipped images: " + ", ".join(f"{n} {why}" for why, n in sorted(task.skipped.items())), markup=False)
    for sentence in prepared.dropped:
        out.print(f"Left out: {sentence}.", markup=False)
    for sentence in prepared.unchecked:
        out.print(f"Not checked: {sentence}", markup=False)


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="A sweep file.")],
    storage: Annotated[Path | None, typer.Option(help="Folder for sweeps and the store.")] = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name.")] = None,
    trials: Annotated[int | None, typer.Option(help="Trials in all.")] = None,
    overrides: SetFlag = None,
    continued: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep of that name, if there is one.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a sweep to its end and show the leaderboard."""
    from orchestrator.sweep.folder import check_new, check_places, check_same, create, discard
    from orchestrator.sweep.ledger import open_sweep
    from orchestrator.sweep.study_storage import check_study

    read = read_sweep_file(spec, storage, name, trials, overrides)
    check_places(read)
    begun = Path(read.storage) / read.name
    if continued and (begun / "sweep.yaml").is_file():
        known = open_sweep(begun)
        flags = [text.partition("=")[0] for text in overrides or []] + ["search.trials"] * (trials is not None)
        told = check_same(read, known, flags)
        if told:
            err.print(told, markup=False)
        _run(_prepared(known, as_json, begun), begun, as_json)
        return
    check_new(read)
    check_study(read)
    prepared = _prepared(read, as_json)
    folder = create(read)
    try:
        _run(prepared, folder, as_json)
    except UserError:
        discard(folder)
        raise


@app.command()
def resume(folder: SweepDir, as_json: JsonFlag = False) -> None:
    """Continue a sweep whose driver died: no finished trial is repeated."""
    from orchestrator.sweep.ledger import open_sweep

    _run(_prepared(open_sweep(folder), as_json, folder), folder, as_json)


def _prepared(spec: Any, as_json: bool, folder: Path | None = None) -> Any:
    """The checked sweep, with Ray up where it runs on this machine."""
    from orchestrator.sweep.cluster import start_ray_beside

    def work() -> Any:
        from orchestrator.sweep.run import load_teachers, prepare  # and with it torch

        prepared = prepare(spec, folder)
        load_teachers(spec, fetch=False)  # a download would keep whoever interrupts it waiting
        return prepared

    with _ray_s_words(as_json):
        return start_ray_beside(spec.train.threads, work)


def _ray_s_words(as_json: bool) -> contextlib.redirect_stdout[Any]:
    """Ray prints what happens to its processes; with --json nothing but JSON may be on stdout."""
    return contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)


def read_sweep_file(
    spec: Path, storage: Path | None, name: str | None, trials: int | None, overrides: list[str] | None
) -> Any:
    from orchestrator.spec import read_spec
    from orchestrator.sweep.folder import resolved

    extra = list(overrides or [])
    if storage is not None:
        extra.append(f"storage={json.dumps(str(storage))}")
    if name is not None:
        extra.append(f"name={json.dumps(name)}")
    if trials is not None:
        extra.append(f"search.trials={trials}")
    return resolved(read_spec(spec, extra))


def _run(prepared: Any, folder: Path, as_json: bool) -> None:
    from orchestrator.select.leaderboard import print_leaderboard
    from orchestrator.select.results import check_ended, read_trials
    from orchestrator.sweep.cluster import stop_ray_beside
    from orchestrator.sweep.event_files import write_event_files
    from orchestrator.sweep.run import run

    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # A job's folder is a copy that Ray makes anew for each node; where nodes share a machine, under the job's feet.
        folder = folder.absolute()
        os.chdir(folder)
    if not as_json:
        _tell(prepared)
    lines: Callable[[str], None] | None = None if as_json else (lambda line: out.print(line, markup=False))
    from orchestrator.sweep.live import LiveScreen, TrialLines

    settle()
    with _ray_s_words(as_json), contextlib.ExitStack() as stack:
        if out.is_terminal and not as_json:
            shown = LiveScreen(folder, prepared.spec, out, prepared.trials)
            stack.callback(shown.close)
            whole = run(prepared, folder, shown)
        else:
            whole = run(prepared, folder, TrialLines(folder, prepared.spec, lines, prepared.trials))
        stop_ray_beside(lambda: write_event_files(folder))
    frame = read_trials(folder)
    if as_json:
        print(frame.to_json(orient="records"))
    else:
        print_leaderboard(out, frame, prepared.spec.objectives, kind=prepared.spec.task.kind)
        if whole:
            out.print(f"\nNext: python -m orchestrator best {folder}", markup=False, soft_wrap=True)
    check_ended(folder, frame, whole)
    if not (frame["status"] == "complete").any():
        raise WorkError(f"No trial of {folder} is complete; its leaderboard says why.")
