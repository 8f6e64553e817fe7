"""`corpus`: unlabelled images and sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.face import JsonFlag, app, out, print_table
from orchestrator.errors import WorkError

corpus_app = typer.Typer(no_args_is_help=True, help="Make a corpus of unlabelled images or sentences, or look at one.")
app.add_typer(corpus_app, name="corpus")


class CorpusKind(StrEnum):
    """What a corpus holds."""

    images = "images"
    sentences = "sentences"


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
    print_table(["what", "count"], rows)
    out.print(
        f"{address}: {manifest['rows']} {kind} in {len(manifest['shards'])} shards, {manifest['bytes'] / 1e6:.1f} MB.",
        markup=False,
        soft_wrap=True,
    )
