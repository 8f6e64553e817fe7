"""The command line: commands, no logic. Exit code 0 done, 1 the work failed, 2 the user's input is wrong."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.errors import UserError, WorkError, disk_full

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Turns a vision foundation model into the best small student for your own data.",
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(
    no_args_is_help=True, help="Look at, verify or shrink the shared store, or prime it with an upstream package."
)
app.add_typer(store_app, name="store")
corpus_app = typer.Typer(no_args_is_help=True, help="Make a corpus of unlabelled images or sentences, or look at one.")
app.add_typer(corpus_app, name="corpus")
out = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
SetFlag = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the file.")
]
StoreDir = Annotated[Path, typer.Argument(help="A sweep's folder, a storage folder, or a store.")]
SweepDir = Annotated[Path, typer.Argument(help="A sweep's folder: <storage>/<name>.")]


class CorpusKind(str, Enum):
    """What a corpus holds."""

    images = "images"
    sentences = "sentences"


class Format(str, Enum):
    """What `export` writes."""

    safetensors = "safetensors"
    onnx = "onnx"


def main() -> None:
    """Runs the command line; every failure is one sentence on stderr and an exit code."""
    # Ray tells of its usage and warns of settings that this program chose on purpose.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Torch warns of a CUDA toolkit without a GPU; on a CPU machine that is no news.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        app(standalone_mode=True)
    except UserError as error:
        err.print(f"Error: {error}", markup=False)
        sys.exit(2)
    except WorkError as error:
        err.print(f"Failed: {error}", markup=False)
        sys.exit(1)
    except OSError as error:
        if not disk_full(error):
            raise
        err.print(f"Failed: the disk is full ({error}).", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("Stopped. Continue with `orchestrator resume SWEEP_DIR`.")
        sys.exit(1)


def _read(spec: Path, storage: Path | None, name: str | None, trials: int | None, overrides: list[str] | None) -> Any:
    from orchestrator.spec import read_spec
    from orchestrator.sweep.run import resolved

    extra = list(overrides or [])
    if storage is not None:
        extra.append(f"storage={json.dumps(str(storage))}")
    if name is not None:
        extra.append(f"name={json.dumps(name)}")
    if trials is not None:
        extra.append(f"search.trials={trials}")
    return resolved(read_spec(spec, extra))


@app.command()
def check(
    spec: Annotated[Path | None, typer.Argument(help="A sweep file.")] = None,
    overrides: SetFlag = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key of the sweep file instead.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Validate everything that can be validated; start nothing."""
    from orchestrator.spec import documented_keys

    if keys:
        rows = documented_keys()
        if as_json:
            print(json.dumps([{"key": k, "default": d, "description": t} for k, d, t in rows]))
        else:
            _table(["key", "default", "what it is"], [list(row) for row in rows])
        return
    if spec is None:
        raise UserError("Which sweep file? `orchestrator check SPEC`, or `orchestrator check --keys` for its keys.")
    from orchestrator.sweep.costs import costs_of, sentences_of
    from orchestrator.sweep.run import check_storage, prepare

    read = _read(spec, None, None, None, overrides)
    check_storage(read)
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
        f"{len(prepared.cells)} combinations of method, teacher and student; {spec.search.trials} trials{times} of "
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
    as_json: JsonFlag = False,
) -> None:
    """Run a sweep to its end and show the leaderboard."""
    from orchestrator.sweep.run import check_storage, create, discard, prepare

    read = _read(spec, storage, name, trials, overrides)
    check_storage(read)
    prepared = prepare(read)
    folder = create(read)
    try:
        _run(prepared, folder, as_json)
    except UserError:
        discard(folder)
        raise


@app.command()
def resume(folder: SweepDir, as_json: JsonFlag = False) -> None:
    """Continue a sweep whose driver died: no finished trial is repeated."""
    from orchestrator.sweep.run import open_sweep, prepare

    _run(prepare(open_sweep(folder)), folder, as_json)


def _run(prepared: Any, folder: Path, as_json: bool) -> None:
    from orchestrator.select.leaderboard import print_leaderboard
    from orchestrator.select.results import read_trials
    from orchestrator.sweep.board import finish
    from orchestrator.sweep.run import run

    if not as_json:
        _tell(prepared)
    lines: Callable[[str], None] | None = None if as_json else (lambda line: out.print(line, markup=False))
    from orchestrator.sweep.live import TrialLines

    # Ray prints what happens to its processes; with --json nothing but JSON may be on stdout.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        run(prepared, folder, TrialLines(folder, prepared.spec, lines))
        finish(folder)
    frame = read_trials(folder)
    if as_json:
        print(frame.to_json(orient="records"))
    else:
        print_leaderboard(out, frame, prepared.spec.objectives, kind=prepared.spec.task.kind)
        out.print(f"\nNext: python -m orchestrator best {folder}", markup=False, soft_wrap=True)
    if not (frame["status"] == "complete").any():
        raise WorkError(f"No trial of {folder} is complete; its leaderboard says why.")


@app.command()
def best(
    folder: SweepDir,
    metric: Annotated[
        str | None, typer.Option(help="What to choose by; the sweep's first objective if not given.")
    ] = None,
    max_params: Annotated[int | None, typer.Option(help="At most this many parameters.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="At most this median latency.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """The recommended student under limits, and its score on the test images."""
    from orchestrator.sweep.board import recommend

    answer = recommend(folder, metric, max_params, max_latency_ms)
    if as_json:
        print(json.dumps(answer))
        return
    for line in answer["sentences"]:
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def export(
    folder: SweepDir,
    out_dir: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    trial: Annotated[str | None, typer.Option(help="Which trial; the best one if not given.")] = None,
    fmt: Annotated[
        Format, typer.Option("--format", help="safetensors loads in plain timm; onnx is checked.")
    ] = Format.safetensors,
    as_json: JsonFlag = False,
) -> None:
    """Write a student so that it loads without this package."""
    from orchestrator.sweep.board import export_trial

    report = export_trial(folder, out_dir, trial, fmt.value)
    if as_json:
        print(json.dumps(report))
        return
    for line in report["sentences"]:
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its knobs.")] = None, as_json: JsonFlag = False
) -> None:
    """What each method needs and can search."""
    from orchestrator.sweep.catalogue import method_facts

    facts = method_facts(name)
    if as_json:
        print(json.dumps(facts if name is None else facts[0]))
        return
    if name is None:
        _table(
            ["method", "family", "needs", "deploys", "reference"],
            [[f["name"], f["family"], f["needs"], f["deploys"], f["paper"]] for f in facts],
        )
        return
    fact = facts[0]
    out.print(
        f"{fact['name']} ({fact['family']}): {fact['summary']}\n{fact['paper']}\nNeeds {fact['needs']}. "
        f"Serves {', '.join(fact['tasks'])}.",
        markup=False,
    )
    _table(
        ["knob", "default", "searched by default", "allowed", "what it is"],
        [[k["knob"], str(k["default"]), k["search"], k["allowed"], k["description"]] for k in fact["knobs"]],
    )


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
    from orchestrator.store import Store

    if out_file is not None:
        check_out(out_file)
    read = read_suite(tasks)
    subject, place = find_subject(model, store)
    result = run_suite(subject, read, Store(place), lambda line: err.print(line, markup=False))
    if out_file is not None:
        write_result(result, out_file)
    print(json.dumps(result) if as_json else markdown(result), end="\n" if as_json else "")


@store_app.command("ls")
def store_ls(where: StoreDir, as_json: JsonFlag = False) -> None:
    """What lies in the store, by stage."""
    from orchestrator.sweep.stock import inventory

    rows = inventory(where)
    if as_json:
        print(json.dumps(rows))
        return
    _table(
        ["stage", "entries", "MB", "seconds"],
        [[r["stage"], r["entries"], f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}"] for r in rows],
    )


@store_app.command("verify")
def store_verify(where: StoreDir, as_json: JsonFlag = False) -> None:
    """Check the store against its files and the live teacher."""
    from orchestrator.sweep.stock import verify

    answer = verify(where)
    if as_json:
        print(json.dumps(answer))
    else:
        for line in answer["sentences"]:
            out.print(line, markup=False, soft_wrap=True)
    if answer["damaged"]:
        raise WorkError(
            f"{len(answer['damaged'])} entries of the store are damaged; `store gc --max-gb 0` removes all."
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

    tell: Callable[[str], None] = (lambda line: None) if as_json else (lambda line: out.print(line, markup=False))
    facts = prime(where, data, kind, size, steps, out_dir, overrides or [], tell)
    if as_json:
        print(json.dumps(facts))
        return
    measured = [name for name in facts if name not in ("out", "kind", "sentence", "images_hash")]
    _table(["fact", "value"], [[name, facts[name]] for name in measured])
    out.print(facts["sentence"], markup=False, soft_wrap=True)


@corpus_app.command("build")
def corpus_build(
    source: Annotated[
        str,
        typer.Argument(
            help="folder:, parquet: or webdataset:PATH of images; text:, parquet: or datasets:PATH of text."
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    kind: Annotated[CorpusKind, typer.Option(help="What to make of it.")],
    rows_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Rows of a file; 4096 images or 100000 sentences if not given.")
    ] = None,
    min_side: Annotated[int, typer.Option(min=1, help="Leave out images with a shorter side, in pixels.")] = 16,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Scale down images so that the shorter side is at most this.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of the WebP files of converted images.")] = 90,
    longest: Annotated[int, typer.Option(min=1, help="Leave out sentences of more characters.")] = 512,
    max_bad: Annotated[float, typer.Option(min=0, max=1, help="Stop if a larger share must be left out.")] = 0.05,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; one for each CPU if not given.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Clean, de-duplicate and pack images or sentences; after a kill the same command goes on."""
    from orchestrator.data.corpus import ImageRules, build_corpus

    tell: Callable[[str], None] = (lambda line: None) if as_json else (lambda line: out.print(line, markup=False))
    try:
        manifest = build_corpus(
            source,
            out_dir,
            kind.value,
            rows_per_shard=rows_per_shard,
            rules=ImageRules(min_side, max_side, quality),
            longest=longest,
            max_bad=max_bad,
            workers=workers,
            tell=tell,
        )
    except KeyboardInterrupt:
        raise WorkError("Stopped. The same command goes on after the shards that are finished.") from None
    if as_json:
        print(json.dumps(manifest))
        return
    _show_corpus(str(out_dir), manifest)
    out.print(f"\nNext: python -m orchestrator corpus verify {out_dir}", markup=False, soft_wrap=True)


@corpus_app.command("show")
def corpus_show(
    corpus: Annotated[str, typer.Argument(help="A corpus folder, or the URI of one.")], as_json: JsonFlag = False
) -> None:
    """What a corpus holds, and what was left out of it."""
    from orchestrator.data.corpus import open_corpus

    manifest = open_corpus(corpus).manifest
    print(json.dumps(manifest)) if as_json else _show_corpus(corpus, manifest)


@corpus_app.command("verify")
def corpus_verify(
    corpus: Annotated[str, typer.Argument(help="A corpus folder, or the URI of one.")], as_json: JsonFlag = False
) -> None:
    """Read every shard and compare it with the hash that it was written with."""
    from orchestrator.data.corpus import verify_corpus

    answer = verify_corpus(corpus)
    if as_json:
        print(json.dumps(answer))
    else:
        for line in [*answer["damaged"], f"{answer['shards']} shards, {len(answer['damaged'])} damaged."]:
            out.print(line, markup=False, soft_wrap=True)
    if answer["damaged"]:
        raise WorkError(f"{len(answer['damaged'])} shards of {corpus} are damaged.")


def _show_corpus(address: str, manifest: dict[str, Any]) -> None:
    counts, kind = manifest["counts"], manifest["kind"]
    rows = [[f"{kind} read", counts["seen"]], ["kept", counts["kept"]], ["duplicates", counts["duplicates"]]]
    for what, title in (("skipped", "left out"), ("converted", "converted"), ("captions", "caption")):
        rows += [[f"{title}: {reason}", count] for reason, count in counts[what].items()]
    _table(["what", "count"], rows)
    out.print(
        f"{address}: {manifest['rows']} {kind} in {len(manifest['shards'])} shards, {manifest['bytes'] / 1e6:.1f} MB.",
        markup=False,
        soft_wrap=True,
    )


def _table(columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table, markup=False)
