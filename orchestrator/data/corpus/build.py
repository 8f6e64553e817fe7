"""Building a corpus folder: clean, leave out duplicates, write shards; a build that died goes on where it was."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from orchestrator.data.corpus.clean import LONGEST, ImageRules, clean_image, clean_sentence
from orchestrator.data.corpus.corpus import MANIFEST, VERSION, file_hash
from orchestrator.data.corpus.seen import Seen
from orchestrator.data.corpus.sources import CorpusSource, Kind, Raw, open_corpus_source
from orchestrator.data.images import CorruptError
from orchestrator.errors import UserError, WorkError, disk_full, listed
from orchestrator.store import key_of

PROGRESS = "progress.json"
AGAIN = "The same command goes on after the shards that are finished."
LEAST = 200  # items before the share of bad ones says anything
AHEAD = 4  # items a worker that are read before their turn
CHUNK_ROWS = 4  # images of one Arrow array: its offsets end at 2 GB
ROWS_PER_SHARD: dict[Kind, int] = {"images": 4096, "sentences": 100_000}
ROW_GROUP: dict[Kind, int] = {"images": 256, "sentences": 10_000}
SCHEMAS: dict[Kind, pa.Schema] = {
    "images": pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("caption", pa.string()),
        ]
    ),
    "sentences": pa.schema(
        [pa.field("id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=False)]
    ),
}


@dataclass(frozen=True)
class Settings:
    """What a corpus is made from and how; together with the source's files it decides every byte.

    Attributes:
        source: its address.
        kind: `images` or `sentences`.
        rows_per_shard, row_group: rows of a file, and of what is read of it at a time.
        rules: for images.
        longest: characters of a sentence or caption.
    """

    source: str
    kind: Kind
    rows_per_shard: int
    row_group: int
    rules: ImageRules
    longest: int

    def facts(self) -> dict[str, Any]:
        """Plain JSON."""
        facts = asdict(self)
        rules = facts.pop("rules")
        return {**facts, **(rules if self.kind == "images" else {})}


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


class Place(NamedTuple):
    """How far a source was read.

    Attributes:
        piece: its number.
        items: how many of its items.
        stamps: hash of the stamps of all pieces up to it.
    """

    piece: int
    items: int
    stamps: str


class Cleaned(NamedTuple):
    """An item after cleaning.

    Attributes:
        row: what is stored; None if it is skipped.
        digest: of its content.
        reasons: why it was converted; why it is skipped.
        caption: what became of the caption; empty if there was none.
    """

    row: dict[str, Any] | None
    digest: bytes
    reasons: tuple[str, ...]
    caption: str = ""


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
    _check(settings, max_bad, out)
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


def _check(settings: Settings, max_bad: float, out: Path) -> None:
    rules = settings.rules
    least = {
        "--rows-per-shard": settings.rows_per_shard,
        "--min-side": rules.min_side,
        "--max-side": rules.max_side or 1,
        "--longest": settings.longest,
    }
    for name, value in least.items():
        if value < 1:
            raise UserError(f"{name}: {value} is less than 1.")
    if rules.max_side is not None and rules.max_side < rules.min_side:
        raise UserError(f"--max-side: {rules.max_side} is less than --min-side, which is {rules.min_side}.")
    if not 1 <= rules.quality <= 100:
        raise UserError(f"--quality: {rules.quality} is not between 1 and 100.")
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad: {max_bad} is no share between 0 and 1.")
    if ":/" in str(out):
        raise UserError(f"OUT: {str(out)!r} is no local folder; build here, then copy the folder as it is.")
    if out.exists():
        raise UserError(f"OUT: {str(out)!r} exists already; name a folder that does not.")


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
        writer = _Writer(self.folder, settings, len(self.shards))
        clean = functools.partial(_clean, settings=settings)
        # Sentences are cleaned by Python alone, which threads do not speed up.
        items = _ordered(clean, _items(self.source, place), self.workers if settings.kind == "images" else 1)
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
            stamps = _chained(stamps, piece.stamp)
            if number == place.piece:
                return stamps == place.stamps
        return False


def _chained(before: str, stamp: str) -> str:
    return hashlib.sha256(f"{before} {stamp}".encode()).hexdigest()


def _items(source: CorpusSource, after: Place | None) -> Iterator[tuple[Place, Raw]]:
    """Every item after a place, with the place that is reached by it."""
    stamps = ""
    for number, piece in enumerate(source.pieces()):
        stamps = _chained(stamps, piece.stamp)
        skip = 0
        if after is not None and number <= after.piece:
            if number < after.piece:
                continue
            skip = after.items
        try:
            for count, raw in enumerate(islice(source.read(piece), skip, None), skip + 1):
                yield Place(number, count, stamps), raw
        except (OSError, pa.ArrowException) as error:
            raise WorkError(f"{piece.name} cannot be read: {error}. {AGAIN}") from None


def _ordered(
    function: Callable[[Raw], Cleaned], items: Iterator[tuple[Place, Raw]], workers: int
) -> Generator[tuple[Place, Cleaned], None, None]:
    """Maps on threads, in order; at most `AHEAD` items a worker are in memory."""
    if workers == 1:
        for place, raw in items:
            yield place, function(raw)
        return
    pool = ThreadPoolExecutor(workers)  # decoders, encoders and hashing release the interpreter lock
    waiting: deque[tuple[Place, Future[Cleaned]]] = deque()
    try:
        for place, raw in items:
            waiting.append((place, pool.submit(function, raw)))
            if len(waiting) > AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _clean(raw: Raw, settings: Settings) -> Cleaned:
    try:
        data = raw.load()
        if settings.kind == "sentences":
            text = clean_sentence(data, settings.longest)
            digest = hashlib.sha256(text.encode())
            return Cleaned({"id": digest.hexdigest(), "text": text}, digest.digest(), ())
        image = clean_image(data, settings.rules)
    except CorruptError as reason:
        return Cleaned(None, b"", (str(reason),))
    caption, told = None, ""
    if raw.caption is not None:
        try:
            caption, told = clean_sentence(raw.caption, settings.longest), "kept"
        except CorruptError as reason:
            told = str(reason)
    digest = hashlib.sha256(image.data)
    row = {"id": digest.hexdigest(), "image": image.data, "height": image.height, "width": image.width}
    return Cleaned({**row, "caption": caption}, digest.digest(), image.converted, told)


class _Writer:
    """Writes rows into shards; holds one row group."""

    def __init__(self, folder: Path, settings: Settings, first: int) -> None:
        self._folder, self._settings, self._number = folder, settings, first
        self._schema = SCHEMAS[settings.kind]
        self._waiting: list[dict[str, Any]] = []
        self._written = 0
        self._file: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any] | None) -> dict[str, Any] | None:
        """Facts of a shard, when this row makes it full."""
        assert row is not None
        self._waiting.append(row)
        if self._written + len(self._waiting) == self._settings.rows_per_shard:
            return self.finish()
        if len(self._waiting) == self._settings.row_group:
            self._flush()
        return None

    def finish(self) -> dict[str, Any] | None:
        """Facts of the shard that ends here; None if it has no row."""
        if self._waiting:
            self._flush()
        if self._file is None:
            return None
        self.close()
        path = self._path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        facts = {"file": path.name, "rows": self._written, "bytes": path.stat().st_size}
        facts["sha256"] = file_hash(str(self._folder), path.name)
        self._number, self._written = self._number + 1, 0
        return facts

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return self._folder / f"part-{self._number:05}.parquet"

    def _flush(self) -> None:
        if self._file is None:
            texts = [name for name in ("caption", "text") if name in self._schema.names]
            numbers = [name for name in ("height", "width") if name in self._schema.names]
            self._file = pq.ParquetWriter(
                self._path,
                self._schema,
                compression={n: "zstd" if n in texts else "none" for n in self._schema.names},
                use_dictionary=False,
                write_statistics=numbers,  # those of other columns would put whole images into the footer
            )
        columns = [
            pa.chunked_array(
                [
                    pa.array([row[f.name] for row in self._waiting[i : i + CHUNK_ROWS]], f.type)
                    for i in range(0, len(self._waiting), CHUNK_ROWS)
                ]
            )
            if f.name == "image"
            else pa.array([row[f.name] for row in self._waiting], f.type)
            for f in self._schema
        ]
        self._file.write_table(pa.table(columns, schema=self._schema), row_group_size=self._settings.row_group)
        self._written += len(self._waiting)
        self._waiting = []


def _write_json(path: Path, facts: Any) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
