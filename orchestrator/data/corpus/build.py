"""Building a corpus folder: clean, leave out duplicates, write shards; a build that died goes on where it was."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from orchestrator.data.corpus.clean import LONGEST, ImageRules
from orchestrator.data.corpus.corpus import MANIFEST, VERSION
from orchestrator.data.corpus.items import AGAIN, Cleaned, Place, chained, cleaned, in_order, items_after
from orchestrator.data.corpus.seen import Seen
from orchestrator.data.corpus.settings import ROW_GROUP, ROWS_PER_SHARD, Settings, check_settings
from orchestrator.data.corpus.shards import ShardWriter
from orchestrator.data.corpus.sources import CorpusSource, Kind, open_corpus_source
from orchestrator.errors import UserError, WorkError, disk_full, listed
from orchestrator.store import key_of

PROGRESS = "progress.json"
LEAST = 200  # items before the share of bad ones says anything


@dataclass
class Counts:
    """What became of the items that were read, by reason.

    Attributes:
        seen: all; each was kept, a duplicate, or skipped.
        converted: of the images that were kept or duplicates; one may count under several reasons.
        captions: of the images kept.
    """

    seen: int = 0
    kept: int = 0
    duplicates: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Counts:
        read: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in facts.items()}
        return cls(**read)

    def facts(self) -> dict[str, Any]:
        """Plain JSON, reasons in alphabetical order."""
        return {k: dict(sorted(v.items())) if isinstance(v, Counter) else v for k, v in vars(self).items()}


def build_corpus(
    source: str,
    out: Path,
    kind: Kind,
    *,
    rows_per_shard: int | None = None,
    row_group: int | None = None,
    rules: ImageRules | None = None,
    longest: int = LONGEST,
    max_bad: float = 0.05,
    workers: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes the corpus folder `out`. The same files and settings give the same bytes, whatever the workers.

    It is written as `<out>.building` and renamed when it is whole. What a killed or interrupted build left there is
    used by the next one: finished shards stay if settings and source are the same, else it begins anew.

    Args:
        source: see `open_corpus_source`.
        out: a folder that does not exist.
        kind: `images` or `sentences`.
        rows_per_shard, row_group: 4096 and 256 for images, 100 000 and 10 000 for sentences.
        rules: for images.
        longest: characters of a sentence or caption.
        max_bad: share of skipped items, 0 to 1, beyond which the build stops; looked at from 200 items on, and at the
            end.
        workers: threads that read and decode images; as many as there are CPUs if None.
        tell: hears a sentence for each shard.

    Returns:
        The manifest.

    Raises:
        UserError: if the source or a setting is wrong, `out` exists, or another process is building it.
        WorkError: if too many items are bad (nothing is left then), or the source cannot be read further (what was
            finished stays).
    """
    rules = rules or ImageRules()
    rows = ROWS_PER_SHARD[kind] if rows_per_shard is None else rows_per_shard
    settings = Settings(source, kind, rows, min(row_group or ROW_GROUP[kind], rows), rules, longest)
    check_settings(settings, max_bad, out)
    opened = open_corpus_source(source, kind)
    try:
        next(opened.pieces())  # so that a wrong source leaves no folder behind
    except StopIteration:
        raise UserError(f"SOURCE: there is nothing in {source!r}.") from None
    except OSError as error:
        raise UserError(f"SOURCE: {source!r} cannot be read: {error}.") from None
    folder = out.with_name(out.name + ".building")
    if folder.exists() and not (folder / "lock").exists() and any(folder.iterdir()):
        raise UserError(
            f"OUT: {str(folder)!r}, which the build needs, exists and is no unfinished build; move it away."
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            try:
                manifest = _Build(settings, opened, folder, max_bad, workers or os.cpu_count() or 1, tell).run()
            except (UserError, _TooBadError):
                shutil.rmtree(folder)
                raise
            (folder / "lock").unlink()
            folder.rename(out)
    except Timeout:
        raise UserError(f"OUT: another process is building {str(out)!r} now.") from None
    except OSError as error:
        if disk_full(error):
            raise
        raise WorkError(f"The build of {str(out)!r} broke off: {error}. {AGAIN}") from None
    return manifest


class _TooBadError(WorkError):
    """More items are bad than allowed."""


class _Build:
    def __init__(
        self,
        settings: Settings,
        source: CorpusSource,
        folder: Path,
        max_bad: float,
        workers: int,
        tell: Callable[[str], None],
    ) -> None:
        self.settings, self.source, self.folder = settings, source, folder
        self.max_bad, self.workers, self.tell = max_bad, workers, tell
        # Encoders of other versions may give other bytes, and one corpus is of one version.
        versions = {"format": VERSION, "pillow": PIL.__version__, "pyarrow": pa.__version__}
        self.key = key_of({**settings.facts(), **versions})
        self.counts = Counts()
        self.seen = Seen()
        self.shards: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        settings, counts = self.settings, self.counts
        place = self._resume()
        counts = self.counts
        began, before = time.perf_counter(), counts.seen
        writer = ShardWriter(self.folder, settings, len(self.shards))
        clean = functools.partial(cleaned, settings=settings)
        # Sentences are cleaned by Python alone, which threads do not speed up.
        items = in_order(clean, items_after(self.source, place), self.workers if settings.kind == "images" else 1)
        with contextlib.closing(items), contextlib.closing(writer):
            for place, item in items:
                if not self._admit(item):
                    continue
                shard = writer.add(item.row)
                if shard is not None:
                    self._finish_shard(shard, place)
                    speed = (counts.seen - before) / (time.perf_counter() - began)
                    self.tell(
                        f"{shard['file']}: {counts.kept} of {counts.seen} {settings.kind} kept, "
                        f"{sum(s['bytes'] for s in self.shards) / 1e6:.1f} MB, {speed:.0f} a second."
                    )
            last = writer.finish()
        if last is not None:
            self.shards.append(last)
        self._check_bad(at_end=True)
        if not counts.kept:
            reasons = listed(f"{n} {why}" for why, n in sorted(counts.skipped.items()))
            raise _TooBadError(
                f"None of the {counts.seen} {settings.kind} of {settings.source!r} is usable: {reasons}."
            )
        manifest = {
            "format": "corpus",
            "version": VERSION,
            "kind": settings.kind,
            "rows": counts.kept,
            "bytes": sum(s["bytes"] for s in self.shards),
            "row_group": settings.row_group,
            "counts": counts.facts(),
            "settings": settings.facts(),
            "shards": self.shards,
        }
        _write_json(self.folder / MANIFEST, manifest)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return manifest

    def _admit(self, item: Cleaned) -> bool:
        """Counts an item; whether it is to be stored."""
        counts = self.counts
        counts.seen += 1
        if item.row is None:
            counts.skipped[item.reasons[0]] += 1
            self._check_bad()
            return False
        counts.converted.update(item.reasons)
        if not self.seen.add(item.digest):
            counts.duplicates += 1
            return False
        counts.kept += 1
        if item.caption:
            counts.captions[item.caption] += 1
        return True

    def _check_bad(self, at_end: bool = False) -> None:
        counts = self.counts
        bad = sum(counts.skipped.values())
        if bad > self.max_bad * counts.seen and (at_end or counts.seen >= LEAST):
            reasons = listed(f"{n} {why}" for why, n in counts.skipped.most_common())
            raise _TooBadError(
                f"{bad} of {counts.seen} {self.settings.kind} of {self.settings.source!r} are left out ({reasons}), "
                f"more than the share --max-bad {self.max_bad:g} allows; nothing was kept."
            )

    def _finish_shard(self, shard: dict[str, Any], place: Place) -> None:
        self.shards.append(shard)
        facts = {"key": self.key, "place": place, "counts": self.counts.facts(), "shards": self.shards}
        _write_json(self.folder / PROGRESS, facts)

    def _resume(self) -> Place | None:
        """Takes over the finished shards of an earlier build, or clears what cannot be used."""
        try:
            facts = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            facts = None
        if facts is not None and facts["key"] == self.key and self._same_files(Place(*facts["place"]), facts["shards"]):
            self.shards = facts["shards"]
            self.counts = Counts.of(facts["counts"])
            for shard in self.shards:
                for identity in pq.read_table(self.folder / shard["file"], columns=["id"])["id"].to_pylist():
                    self.seen.add(bytes.fromhex(identity))
            self.tell(f"Going on after {len(self.shards)} finished shards of an earlier build.")
            kept = {s["file"] for s in self.shards}
        else:
            if facts is not None:
                self.tell("An earlier build had other settings or another state of the source: beginning anew.")
            kept = set()
        for path in self.folder.iterdir():
            if path.name not in kept | {"lock"} and not (kept and path.name == PROGRESS):
                path.unlink()
        return Place(*facts["place"]) if kept else None

    def _same_files(self, place: Place, shards: list[dict[str, Any]]) -> bool:
        """Whether the source up to `place`, and the shards made of it, are what they were."""
        paths = [(self.folder / s["file"], s["bytes"]) for s in shards]
        if not all(path.is_file() and path.stat().st_size == size for path, size in paths):
            return False
        stamps = ""
        for number, piece in enumerate(self.source.pieces()):
            stamps = chained(stamps, piece.stamp)
            if number == place.piece:
                return stamps == place.stamps
        return False


def _write_json(path: Path, facts: Any) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
