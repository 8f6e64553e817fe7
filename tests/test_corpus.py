"""Corpora: what is kept of raw images and sentences, that a build loses and repeats nothing, and how it is read."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms
from typer.testing import CliRunner

from methods.outputs import Output
from orchestrator.cli import app
from orchestrator.data.corpus import (
    CorpusShard,
    ImageRules,
    build_corpus,
    open_corpus,
    shard_of,
    verify_corpus,
)
from orchestrator.data.corpus import sources as corpus_sources
from orchestrator.data.corpus.clean import CleanImage, clean_image, clean_sentence
from orchestrator.data.corpus.seen import Seen
from orchestrator.data.corpus.sources import Piece, Raw, open_corpus_source
from orchestrator.data.images import CorruptError, decode
from orchestrator.data.outputs import Bill, ensure_outputs, open_outputs
from orchestrator.data.views import Policy
from orchestrator.errors import UserError, WorkError
from orchestrator.models.load import load_network
from orchestrator.spec import Model
from orchestrator.store import Store
from orchestrator.sweep.stock import verify

ROOT = Path(__file__).parent.parent
RULES = ImageRules()
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
SENTENCES = [f"a photo of {n} things" for n in range(40)]


def pixels(seed: int, height: int = 20, width: int = 28, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def smooth(channels: int = 3) -> np.ndarray:
    """A picture that a lossy code keeps well: slopes in another direction for each channel."""
    down, right = np.mgrid[0:1:20j, 0:1:28j]
    slopes = [down, right, (down + right) / 2, 0.3 + 0.4 * right]
    return (255 * np.stack(slopes[:channels], -1)).astype(np.uint8)


def file_of(image: Image.Image, fmt: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def plain(seed: int, fmt: str = "png") -> bytes:
    return file_of(Image.fromarray(pixels(seed)), fmt)


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + plain(0)[33:]


def frames(fmt: str) -> bytes:
    first, *others = (Image.fromarray(smooth()[:, :, list(order)]) for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)))
    return file_of(first, fmt, save_all=True, append_images=others, **({"lossless": True} if fmt == "webp" else {}))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(Image.fromarray(smooth()), "jpeg", exif=exif)


def wide_colours() -> bytes:
    """A PNG with three channels of 16 bits, which PIL cannot write: every value is 0x8000."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    rows = (b"\x00" + b"\x80\x00" * 60) * 20
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BAD = {
    "empty file": b"",
    "cannot be decoded": plain(1, "jpeg")[:400],
    "more than 64 megapixels": bomb(9000),
    "smaller than 16 pixels": file_of(Image.fromarray(pixels(2, 15, 400))),
    "values that are not finite": file_of(Image.fromarray(np.full((20, 28), np.nan, np.float32)), "tiff"),
}
ODD = {
    "CMYK colours": file_of(Image.fromarray(smooth(4), "CMYK"), "jpeg", quality=95),
    "16-bit values": file_of(Image.fromarray(np.arange(560, dtype=np.uint16).reshape(20, 28) * 117)),
    "floating-point values": file_of(Image.fromarray(smooth()[..., 0].astype(np.float32) / 1000 - 0.1), "tiff"),
    "palette": file_of(Image.fromarray(smooth()).quantize(64)),
    "transparency": file_of(Image.fromarray(smooth(4))),
    "other colours": file_of(ImageCms.profileToProfile(Image.fromarray(smooth()), SRGB, LAB, outputMode="LAB"), "tiff"),
    "more than one frame": frames("webp"),
    "EXIF rotation": turned(),
}


@pytest.mark.parametrize(("reason", "data"), [*BAD.items(), ("cannot be decoded", b"not an image")])
def test_an_image_that_cannot_be_used_is_left_out_for_a_reason(reason: str, data: bytes) -> None:
    with pytest.raises(CorruptError, match=f"^{reason}$"):
        clean_image(data, RULES)
    if reason == "more than 64 megapixels":  # and where PIL itself refuses the header
        with pytest.raises(CorruptError, match=f"^{reason}$"):
            clean_image(bomb(60_000), RULES)


@pytest.mark.parametrize(("reason", "data"), ODD.items())
def test_an_image_of_an_odd_kind_becomes_plain_rgb_with_the_pixels_that_decode_gives(reason: str, data: bytes) -> None:
    clean = clean_image(data, RULES)
    assert reason in clean.converted
    again = clean_image(clean.data, RULES)
    assert again == CleanImage(clean.data, clean.height, clean.width, ())
    before, after = decode(data).float(), decode(clean.data).float()
    assert before.shape == after.shape == (3, clean.height, clean.width)
    assert (before - after).abs().mean() < 6


def test_the_upright_side_the_white_ground_and_the_first_frame_are_what_is_kept() -> None:
    assert clean_image(ODD["EXIF rotation"], RULES)[1:3] == (28, 20)
    clear = clean_image(file_of(Image.new("RGBA", (20, 20), (0, 0, 0, 0))), RULES)
    assert decode(clear.data).unique().tolist() == [255]
    flat = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for fmt in ("gif", "webp"):
        moving = clean_image(file_of(flat[0], fmt, save_all=True, append_images=flat[1:]), RULES)
        assert "more than one frame" in moving.converted
        red, _, blue = decode(moving.data).float().mean((1, 2)).tolist()
        assert (red > 240, blue < 15) == (True, True)
    grey = decode(clean_image(wide_colours(), RULES).data)
    assert clean_image(wide_colours(), RULES).converted == ("16-bit values",)
    assert (grey.float() - 128).abs().max() <= 1


@pytest.mark.parametrize("fmt", ["jpeg", "png", "webp", "bmp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_image_keeps_its_own_bytes(fmt: str, mode: str) -> None:
    data = file_of(Image.fromarray(pixels(7)).convert(mode), fmt)
    assert clean_image(data, RULES) == CleanImage(data, 20, 28, ())


def test_only_images_above_the_limit_are_scaled_and_their_shorter_side_meets_it() -> None:
    data = file_of(Image.fromarray(pixels(8, 60, 90)))
    assert clean_image(data, ImageRules(max_side=60)).data == data
    scaled = clean_image(data, ImageRules(max_side=40))
    assert (scaled.height, scaled.width, scaled.converted) == (40, 60, ("scaled down",))
    assert decode(scaled.data).shape == (3, 40, 60)
    long = clean_image(file_of(Image.new("CMYK", (17_000, 20)), "jpeg"), RULES)  # longer than WebP allows
    assert decode(long.data).shape == (3, 20, 17_000)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"  a\tphoto \r\n of \xc2\xa0 it ", "a photo of it"),
        ("cafe\u0301".encode(), "caf\u00e9"),
        (b"x" * 512, "x" * 512),
    ],
)
def test_sentences_are_normalised(data: bytes, text: str) -> None:
    assert clean_sentence(data) == text


@pytest.mark.parametrize(
    ("data", "reason"), [(b" \t\r", "empty"), (b"\xff\xfe", "not UTF-8"), (b"x" * 513, "longer than 512 characters")]
)
def test_a_sentence_that_cannot_be_used_is_left_out_for_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptError, match=f"^{reason}$"):
        clean_sentence(data)


def test_the_set_of_contents_is_exact_on_many_and_small() -> None:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(200_000)]
    seen = Seen()
    assert all(seen.add(d) for d in digests)
    assert not any(seen.add(d) for d in digests)
    assert len(seen) == 200_000
    assert sum(sys.getsizeof(b) for b in seen._buckets) / 200_000 < 12  # bytes; a set of Python's takes 100


# Sources


def raw_images() -> dict[str, bytes]:
    """By file name: good, doubled, broken and odd ones, in the order of their names."""
    files = {f"{i:03}.png": plain(i) for i in range(30)}
    files |= {"030.png": plain(4), "031.jpg": BAD["cannot be decoded"], "032.png": ODD["transparency"]}
    return files


CAPTIONS = {name: f"picture {name[:3]}" for name in list(raw_images())[::2]}


def folder_source(root: Path) -> str:
    for number, (name, data) in enumerate(raw_images().items()):
        (root / f"{number // 10}" / "deep").mkdir(parents=True, exist_ok=True)
        (root / f"{number // 10}" / "deep" / name).write_bytes(data)
    (root / "readme.txt").write_text("no image")
    return f"folder:{root}"


def parquet_source(root: Path, hugging_face: bool = False) -> str:
    root.mkdir()
    files = list(raw_images().items())
    for part in range(2):
        rows = files[part * 20 : part * 20 + 20]
        images: Any = [{"bytes": d, "path": n} for n, d in rows] if hugging_face else [d for _, d in rows]
        table = pa.table({"image": images, "caption": pa.array([CAPTIONS.get(n) for n, _ in rows], pa.string())})
        pq.write_table(table, root / f"{part}.parquet", row_group_size=7)
    return f"parquet:{root}"


def tar_source(root: Path, as_json: bool = False, mode: str = "w") -> str:
    root.mkdir()
    files = list(raw_images().items())
    for part in range(2):
        with tarfile.open(root / f"{part}.tar{'.gz' if ':' in mode else ''}", mode) as archive:
            for name, data in files[part * 20 : part * 20 + 20]:
                members = {name: data}
                if name in CAPTIONS:
                    text = json.dumps({"caption": CAPTIONS[name]}) if as_json else CAPTIONS[name]
                    members[f"{name[:3]}.{'json' if as_json else 'txt'}"] = text.encode()
                add(archive, members)
    return f"webdataset:{root}"


def add(archive: tarfile.TarFile, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def content(folder: Path | str) -> dict[str, Any]:
    """The manifest without the source's address; its hashes stand for the shards."""
    manifest = dict(open_corpus(str(folder)).manifest)
    manifest["settings"] = {k: v for k, v in manifest["settings"].items() if k != "source"}
    return manifest


def build_images(source: str, out: Path, **options: Any) -> dict[str, Any]:
    return build_corpus(source, out, "images", **{"rows_per_shard": 12, "row_group": 5, "workers": 2, **options})


def test_every_image_source_gives_the_same_corpus(tmp_path: Path) -> None:
    sources = {
        "parquet": parquet_source(tmp_path / "p"),
        "struct": parquet_source(tmp_path / "s", hugging_face=True),
        "tar": tar_source(tmp_path / "t"),
        "json": tar_source(tmp_path / "j", as_json=True),
        "gz": tar_source(tmp_path / "z", mode="w:gz"),
        "glob": f"webdataset:{tmp_path / 't'}/*.tar",
        "uri": f"webdataset:{(tmp_path / 't').as_uri()}",
    }
    for name, source in sources.items():
        build_images(source, tmp_path / f"of_{name}")
    wanted = content(tmp_path / "of_parquet")
    assert all(content(tmp_path / f"of_{name}") == wanted for name in sources)
    assert wanted["counts"] == {
        "seen": 33,
        "kept": 31,
        "duplicates": 1,
        "skipped": {"cannot be decoded": 1},
        "converted": {"transparency": 1},
        "captions": {"kept": 16},  # of 17, one belongs to the duplicate
    }
    assert [s["rows"] for s in wanted["shards"]] == [12, 12, 7]

    build_images(folder_source(tmp_path / "f"), tmp_path / "of_folder")
    bare = content(tmp_path / "of_folder")
    assert bare["counts"] == {**wanted["counts"], "captions": {}}
    assert images_of(tmp_path / "of_folder") == images_of(tmp_path / "of_parquet")


def images_of(folder: Path) -> list[tuple[Any, ...]]:
    tables = [s.read(g, ("id", "image")) for s in open_corpus(str(folder)).shards for g in range(len(s.row_groups))]
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


def test_a_row_is_named_by_the_bytes_it_stores_and_knows_their_size(tmp_path: Path) -> None:
    build_images(tar_source(tmp_path / "t"), tmp_path / "c")
    raw, rows = raw_images(), 0
    for shard in open_corpus(str(tmp_path / "c")).shards:
        assert sum(shard.row_groups) == shard.rows
        for group, count in enumerate(shard.row_groups):
            table = shard.read(group, ("caption", "id", "image", "width", "height"))
            assert (table.num_rows, table.column_names[0]) == (count, "caption")
            for row in table.to_pylist():
                rows += 1
                assert row["id"] == hashlib.sha256(row["image"]).hexdigest()
                assert (row["height"], row["width"]) == tuple(decode(row["image"]).shape[1:])
                assert row["caption"] is None or raw[f"{row['caption'][-3:]}.png"] == row["image"] or "032" in str(row)
    assert rows == 31


def test_a_tar_that_ends_too_early_gives_what_is_whole_and_is_named(tmp_path: Path) -> None:
    tar_source(tmp_path / "t")
    whole = (tmp_path / "t" / "1.tar").read_bytes()
    (tmp_path / "t" / "1.tar").write_bytes(whole[: 5 * len(whole) // 13])
    manifest = build_images(f"webdataset:{tmp_path / 't'}", tmp_path / "c", max_bad=0.1)
    assert manifest["counts"]["skipped"] == {"rest of 1.tar, which is broken": 1}
    assert 20 < manifest["rows"] < 31


def test_a_sample_without_an_image_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, {"a.jpg": plain(0, "jpeg"), "a.seg.png": plain(1), "b.txt": b"words alone"})
    counts = build_images(f"webdataset:{tmp_path / 'a.tar'}", tmp_path / "c", max_bad=0.5)["counts"]
    assert (counts["kept"], counts["skipped"]) == (1, {"sample without an image": 1})


def stream(path: Path, texts: list[str], column: str, batch: int = 9) -> None:
    table = pa.table({"number": list(range(len(texts))), column: texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def sentence_sources(root: Path, texts: list[str]) -> dict[str, str]:
    for name in ("text", "packed", "parquet", "datasets"):
        (root / name).mkdir()
    half = len(texts) // 2
    for number, part in enumerate((texts[:half], texts[half:])):
        lines = "\n".join(part).encode()
        (root / "text" / f"{number}.txt").write_bytes(lines)
        (root / "packed" / f"{number}.txt.gz").write_bytes(
            gzip.compress(b"\xef\xbb\xbf" * (1 - number) + lines + b"\n")
        )
        column: Any = pa.array(part)
        table = pa.table({"id": list(range(len(part))), "text": column if number else column.dictionary_encode()})
        pq.write_table(table, root / "parquet" / f"{number}.parquet", row_group_size=8)
        stream(root / "datasets" / f"data-0000{number}-of-00002.arrow", part, "sentence")
    names = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (root / "datasets" / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))
    known = {name: f"{name}:{root / name}" for name in ("text", "parquet", "datasets")}
    return {**known, "packed": f"text:{root / 'packed'}", "uri": f"text:{(root / 'text').as_uri()}"}


def test_every_sentence_source_gives_the_same_corpus(tmp_path: Path) -> None:
    texts = [*SENTENCES, SENTENCES[3].replace(" ", "  "), "x" * 600, "", "ende\u0301", "last"]
    sources = sentence_sources(tmp_path, texts)
    for name, source in sources.items():
        build_corpus(source, tmp_path / f"of_{name}", "sentences", rows_per_shard=15, row_group=4, max_bad=0.5)
    wanted = content(tmp_path / "of_text")
    assert all(content(tmp_path / f"of_{name}") == wanted for name in sources)
    assert wanted["counts"] == {
        "seen": 45,
        "kept": 42,
        "duplicates": 1,
        "skipped": {"empty": 1, "longer than 512 characters": 1},
        "converted": {},
        "captions": {},
    }
    corpus = open_corpus(str(tmp_path / "of_text"), "sentences")
    tables = [s.read(g, ("id", "text")) for s in corpus.shards for g in range(len(s.row_groups))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["text"] for row in rows] == [*SENTENCES, "end\u00e9", "last"]
    assert all(row["id"] == hashlib.sha256(row["text"].encode()).hexdigest() for row in rows)


def test_one_string_that_is_not_utf8_spoils_no_other(tmp_path: Path) -> None:
    lines = [b"good", b"bad \xff", b"better"]
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    pq.write_table(pa.table({"text": pa.array(lines, pa.binary()).view(pa.string())}), tmp_path / "a.parquet")
    for name, source in {"t": "text:a.txt", "p": "parquet:a.parquet"}.items():
        where = source.replace("a.", f"{tmp_path}/a.")
        counts = build_corpus(where, tmp_path / name, "sentences", max_bad=0.5)["counts"]
        assert (counts["kept"], counts["skipped"]) == (2, {"not UTF-8": 1})


def test_lines_are_whole_across_reads_and_an_endless_one_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_sources, "CHUNK", 64)
    texts = [*SENTENCES, "y" * 1000, "the end"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    build_corpus(f"text:{tmp_path / 'a.txt'}", tmp_path / "c", "sentences")
    (shard,) = open_corpus(str(tmp_path / "c")).shards
    assert shard.read(0, ("text",))["text"].to_pylist() == [*SENTENCES, "the end"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(SENTENCES).encode())[:-20])
    counts = build_corpus(f"text:{tmp_path / 'b.txt.gz'}", tmp_path / "d", "sentences", max_bad=0.5)["counts"]
    assert counts["skipped"] == {"rest of b.txt.gz, which is broken": 1}


# Building


def test_the_bytes_of_a_corpus_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    source = tar_source(tmp_path / "t")
    for workers in (1, 2, 7):
        build_images(source, tmp_path / str(workers), workers=workers, rules=ImageRules(max_side=18))
    files = [{p.name: p.read_bytes() for p in (tmp_path / w).iterdir()} for w in ("1", "2", "7")]
    assert files[0] == files[1] == files[2]
    assert sorted(files[0]) == ["corpus.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_too_many_bad_images_stop_the_build_and_leave_nothing(tmp_path: Path) -> None:
    root = tmp_path / "f"
    root.mkdir()
    for i in range(300):
        (root / f"{i:03}.png").write_bytes(b"broken" if i % 10 == 0 else b"" if i % 10 == 1 else plain(i))
    with pytest.raises(WorkError, match=r"41 of 201 images .*21 cannot be decoded and 20 empty file.*--max-bad 0.1"):
        build_images(f"folder:{root}", tmp_path / "c", max_bad=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]
    assert build_images(f"folder:{root}", tmp_path / "c", max_bad=0.25)["rows"] == 240


def test_the_share_of_bad_items_counts_at_the_end_of_a_small_source_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nbetter")
    with pytest.raises(WorkError, match=r"1 of 3 sentences .*1 empty"):
        build_corpus(f"text:{tmp_path / 'a.txt'}", tmp_path / "c", "sentences", max_bad=0.3)
    (tmp_path / "b.txt").write_bytes(b"\n \n")
    with pytest.raises(WorkError, match="None of the 2 sentences"):
        build_corpus(f"text:{tmp_path / 'b.txt'}", tmp_path / "c", "sentences", max_bad=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.data.corpus import build_corpus
told = []
def tell(line):
    told.append(line)
    if len(told) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
build_corpus(sys.argv[1], Path(sys.argv[2]), "images", rows_per_shard=12, row_group=5, workers=2, tell=tell)
"""


@pytest.mark.parametrize("make", [tar_source, parquet_source, folder_source])
def test_a_killed_build_goes_on_and_gives_what_an_undisturbed_one_gives(tmp_path: Path, make: Any) -> None:
    source = make(tmp_path / "raw")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, source, str(tmp_path / "c")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "c").exists()
    left = tmp_path / "c.building"
    before = {p.name: p.stat().st_mtime_ns for p in left.glob("part-*")}
    assert sorted(before)[:2] == ["part-00000.parquet", "part-00001.parquet"]
    (left / "part-00002.parquet").write_bytes(b"half a shard")

    lines: list[str] = []
    build_images(source, tmp_path / "c", tell=lines.append)
    assert lines[0] == "Going on after 2 finished shards of an earlier build."
    assert all((tmp_path / "c" / n).stat().st_mtime_ns == before[n] for n in sorted(before)[:2])
    build_images(source, tmp_path / "undisturbed")
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("c", "undisturbed"))
    assert ours == theirs
    assert not left.exists()


def test_an_error_of_the_disk_costs_no_image_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_source(tmp_path / "raw")
    read = corpus_sources._read_file

    def failing(system: Any, path: str, size: int) -> bytes:
        if path.endswith("020.png"):
            raise OSError(5, "Input/output error", path)
        return read(system, path, size)

    monkeypatch.setattr(corpus_sources, "_read_file", failing)
    with pytest.raises(WorkError, match=r"Input/output error.*020.png.*goes on after the shards"):
        build_images(source, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    monkeypatch.undo()
    lines: list[str] = []
    build_images(source, tmp_path / "c", tell=lines.append)
    build_images(source, tmp_path / "undisturbed")
    assert lines[0].startswith("Going on after 1 finished")
    assert content(tmp_path / "c") == content(tmp_path / "undisturbed")

    pages = tmp_path / "torn.parquet"
    pq.write_table(pa.table({"text": SENTENCES}), pages, compression="none", use_dictionary=False)
    pages.write_bytes(pages.read_bytes()[:4] + b"\xff" * 40 + pages.read_bytes()[44:])
    with pytest.raises(WorkError, match=r"torn.parquet, row group 0 cannot be read"):
        build_corpus(f"parquet:{pages}", tmp_path / "d", "sentences")


def test_a_build_begins_anew_if_its_settings_or_its_source_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_source(tmp_path / "raw")

    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    def stop(**options: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            build_images(source, tmp_path / "c", tell=interrupted, **options)

    def lines_of(**options: Any) -> str:
        lines: list[str] = []
        build_images(source, tmp_path / "c", tell=lines.append, **options)
        return lines[0]

    stop(rules=ImageRules(max_side=18))
    stop()  # says that it begins anew, and is interrupted while it says so
    assert (tmp_path / "c.building").exists()
    stop()
    (tmp_path / "raw" / "0" / "deep" / "000a.png").write_bytes(plain(99))
    assert "beginning anew" in lines_of()
    assert open_corpus(str(tmp_path / "c")).rows == 32


class Endless(corpus_sources.CorpusSource):
    """Noise images that are made as they are asked for, and a count of those that nobody has dropped yet."""

    kinds = ("images",)

    def pieces(self) -> Iterator[Piece]:
        yield Piece("all", "", None)

    def read(self, piece: Piece) -> Iterator[Raw]:
        for seed in range(600):
            yield Raw(functools.partial(noise, seed))


def noise(seed: int) -> bytes:
    return file_of(Image.fromarray(pixels(seed, 64, 64)), compress_level=0)


def test_a_build_holds_a_few_images_and_not_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpus_sources.SOURCES, "endless", Endless)
    build_images("endless:x", tmp_path / "first", rows_per_shard=300, row_group=20)  # imports what it needs
    before = pa.default_memory_pool().bytes_allocated()  # what other tests hold
    tracemalloc.start()
    manifest = build_images("endless:x", tmp_path / "c", rows_per_shard=300, row_group=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert manifest["bytes"] > 7_000_000
    assert peak < 3_500_000  # some 40 images of 12 kB, the megabyte that is being hashed, the set of contents
    assert pa.default_memory_pool().bytes_allocated() - before < 1_000_000


# Reading


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    build_images(tar_source(root / "t"), root / "c")
    return root / "c"


def test_a_corpus_knows_its_size_and_its_name_follows_its_contents(corpus: Path, tmp_path: Path) -> None:
    opened = open_corpus(str(corpus), "images")
    assert (opened.kind, opened.rows, len(opened.shards)) == ("images", 31, 3)
    assert opened.shards[0].row_groups == (5, 5, 2)
    assert opened.shards[0].hash == hashlib.sha256((corpus / "part-00000.parquet").read_bytes()).hexdigest()
    assert open_corpus(corpus.as_uri()).identity == opened.identity
    build_images(f"webdataset:{corpus.parent / 't' / '0.tar'}", tmp_path / "less")
    assert open_corpus(str(tmp_path / "less")).identity != opened.identity
    opened.shards[0].read(0, ("id",))
    there = pickle.loads(pickle.dumps(opened.shards[0]))
    assert there.read(2, ("id",)) == opened.shards[0].read(2, ("id",))


def copy(corpus: Path, to: Path) -> Path:
    to.mkdir()
    for path in corpus.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edit(folder: Path, **values: Any) -> None:
    path = folder / "corpus.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_that_is_no_whole_corpus_is_refused_with_a_sentence(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'c'"):
        open_corpus(str(corpus.parent / "cc"))
    with pytest.raises(UserError, match=r"holds images; sentences are needed"):
        open_corpus(str(corpus), "sentences")
    for number, (values, message) in enumerate(
        [
            ({"version": 2}, "version 2.*reads version 1"),
            ({"kind": "songs"}, "'songs'; allowed are images and sentences"),
            ({"format": "x"}, "cannot be understood"),
            ({"shards": [{"file": "part-00000.parquet"}]}, "cannot be understood: KeyError"),
        ]
    ):
        changed = copy(corpus, tmp_path / str(number))
        edit(changed, **values)
        with pytest.raises(UserError, match=message):
            open_corpus(str(changed))
    damaged = copy(corpus, tmp_path / "damaged")
    first, second = damaged / "part-00000.parquet", damaged / "part-00001.parquet"
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    assert open_corpus(str(damaged)).rows == 31
    assert verify_corpus(str(damaged))["damaged"] == ["part-00001.parquet has other contents than were written"]
    second.write_bytes(b"short")
    with pytest.raises(UserError, match=r"part-00001.parquet has 5 bytes instead of"):
        open_corpus(str(damaged))
    first.unlink()
    with pytest.raises(UserError, match=r"part-00000.parquet is missing \(1 more"):
        open_corpus(str(damaged))
    assert len(verify_corpus(str(damaged))["damaged"]) == 2
    assert verify_corpus(str(corpus)) == {"shards": 3, "rows": 31, "damaged": []}


def test_a_shard_is_a_set_of_images_in_any_order(corpus: Path) -> None:
    shard = CorpusShard(open_corpus(str(corpus)).shards[0])
    assert len(shard.split) == 12
    rows = [11, 0, 6, 5, 11, 1]
    chosen = shard.split.take(rows)
    for row in range(len(rows)):
        image = shard.image(chosen, row)
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, *chosen.sizes[row]))
        assert torch.equal(image, decode(plain(rows[row])))
    again = shard_of(shard.identity())
    assert again is not None
    assert again.split == shard.split
    assert shard_of({**shard.identity(), "hash": "another"}) is None


def test_teacher_outputs_of_a_shard_are_those_of_its_images_and_are_kept(corpus: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    teacher = load_network(Model(model="timm/test_vit", pretrained=False, image_size=32), "teacher")
    pooled = Output("pooled")
    shard = CorpusShard(open_corpus(str(corpus)).shards[1])
    views = [0, 1]
    bill, later = Bill(), Bill()
    made = ensure_outputs(store, shard, shard.split, teacher, Policy(0.5, 0.2), views, [pooled], bill=bill)
    assert (bill.forwards_paid, bill.forwards_shared) == (24, 0)
    assert [(len(t), *t.shape) for t in open_outputs(made[pooled.key])] == [(12, 64), (12, 64)]
    again = CorpusShard(open_corpus(str(corpus)).shards[1])
    kept = ensure_outputs(store, again, again.split, teacher, Policy(0.5, 0.2), views, [pooled], bill=later)
    assert (later.forwards_paid, later.forwards_shared) == (0, 24)
    assert kept == made
    answer = verify(tmp_path / "store")  # renders the shard's images anew and asks the live teacher
    assert (answer["compared"], answer["damaged"]) == (2, [])


# The command line


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "photos").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "mine.building").mkdir()
    (tmp_path / "mine.building" / "letter").write_text("dear")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    (tmp_path / "set" / "train").mkdir()
    (tmp_path / "fake.tar").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("words")
    before = sorted(tmp_path.rglob("*"))
    wrong: list[tuple[str, str, str, dict[str, Any], str]] = [
        (
            "folders:x",
            "c",
            "images",
            {},
            "allowed are folder:PATH, parquet:PATH and webdataset:PATH. Did you mean 'folder'",
        ),
        ("text:x", "c", "images", {}, "no source of images"),
        (f"folder:{tmp_path}/photo", "c", "images", {}, "There is no file or folder .*Did you mean 'photos'"),
        (f"folder:{tmp_path}/photos", "c", "images", {}, "There is no .*jpg"),
        (f"parquet:{tmp_path}", "c", "images", {}, r"no column 'image' of bytes; it has body \(string\) and n"),
        (f"parquet:{tmp_path}", "c", "sentences", {}, "its columns of strings are body"),
        (f"parquet:{tmp_path}/fake.tar", "c", "sentences", {}, "not a readable Parquet file"),
        (f"datasets:{tmp_path}/set", "c", "sentences", {}, "splits of a set; name one of them: train"),
        ("text:nowhere://x", "c", "sentences", {}, "Allowed are local paths and s3://"),
        (f"text:{tmp_path}/a.txt", "old", "sentences", {}, "exists already"),
        (f"text:{tmp_path}/a.txt", "mine", "sentences", {}, "is no unfinished build"),
        (f"text:{tmp_path}/a.txt", "c", "sentences", {"max_bad": 2.0}, "--max-bad: 2.0 is no share"),
        (f"text:{tmp_path}/a.txt", "c", "sentences", {"rows_per_shard": 0}, "--rows-per-shard: 0 is less than 1"),
        (f"folder:{tmp_path}", "c", "images", {"rules": ImageRules(20, 10)}, "--max-side: 10 is less than --min-side"),
    ]
    for source, out, kind, options, message in wrong:
        with pytest.raises(UserError, match=message):
            build_corpus(source, tmp_path / out, kind, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no local folder"):
        build_corpus(f"text:{tmp_path}/a.txt", Path("s3://bucket/c"), "sentences")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_commands_build_show_and_verify(tmp_path: Path) -> None:
    source, out = tar_source(tmp_path / "t"), str(tmp_path / "c")
    run = CliRunner().invoke
    built = run(app, ["corpus", "build", source, out, "--kind", "images", "--rows-per-shard", "20", "--workers", "2"])
    assert built.exit_code == 0, built.output
    for words in ("images read", "33", "left out: cannot be decoded", "converted: transparency", "Next: "):
        assert words in built.output
    shown = run(app, ["corpus", "show", out, "--json"])
    assert json.loads(shown.output)["rows"] == 31
    verified = run(app, ["corpus", "verify", out])
    assert (verified.exit_code, verified.output) == (0, "2 shards, 0 damaged.\n")
    Path(out, "part-00001.parquet").write_bytes(b"")
    damaged = run(app, ["corpus", "verify", out])
    assert isinstance(damaged.exception, WorkError)
    again = run(app, ["corpus", "build", source, out, "--kind", "images"])
    assert isinstance(again.exception, UserError)


def test_the_packaged_clip_art_is_a_source() -> None:
    source = open_corpus_source("packaged/clipart", "images")
    assert len(list(source.pieces())) == 1
