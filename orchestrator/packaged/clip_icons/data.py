"""The files that distillation and its test read, written from the icons' fonts.

Nothing here that is for training holds a drawing by the held-out designer. Half of its names serve as val, half as
test, the same halves in the retrieval set and in the labelled task.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.packaged.clip_icons.classes import CLASSES, class_of, hash_order, name_splits
from orchestrator.packaged.clip_icons.drawings import (
    WEIGHTS,
    Icon,
    draw,
    encoded,
    fonts_folder,
    held_out_icons,
    training_icons,
    training_pictures,
)
from orchestrator.packaged.clip_icons.sentences import sentences

HERE = Path(__file__).parent
ICONS = HERE.parent / "icons"
CORPUS, SENTENCES = ICONS / "images", ICONS / "sentences"
RETRIEVAL, LABELLED = HERE / "retrieval.parquet", ICONS / "images.parquet"
PACKAGED_SENTENCES = 12_000  # of all that `sentences` gives: each costs a hash of 64 digits in a corpus
MAX_TRAIN = 24  # labelled images of one class


def retrieval_table(fonts: Path) -> pa.Table:
    """Columns image, caption, split: the regular weight of every held-out name."""
    icons = held_out_icons(fonts)
    splits, _ = name_splits(icons)
    names = sorted(icons)
    pictures = draw(fonts, [icons[name][WEIGHTS.index("regular")] for name in names])
    return pa.table(
        {
            "image": pa.array([encoded(picture) for picture in pictures], pa.binary()),
            "caption": [name.replace("-", " ") for name in names],  # its `line` is no style: chart line
            "split": [splits[name] for name in names],
        }
    )


def labelled_table(fonts: Path) -> pa.Table:
    """Columns image, label, stem, split, source. Train: other designers; val and test: Phosphor in five weights."""
    icons = held_out_icons(fonts)
    splits, classes = name_splits(icons)
    rows = [
        (icon, label, name, splits[name], f"{icon.designer}/{name}")
        for label, names in classes.items()
        for name in names
        for icon in icons[name]
    ]
    of_class: dict[str, list[Icon]] = defaultdict(list)
    for icon in sorted(training_pictures(fonts)[0], key=lambda icon: hash_order(f"{icon.designer}/{icon.names[0]}")):
        label = class_of(icon)
        if label and not icon.designer.startswith("fa5"):  # nearly the drawings of its sixth edition
            of_class[label].append(icon)
    rows += [
        (icon, label, f"{label} {icon.captions[0]}", "train", f"{icon.designer}/{icon.names[0]}")
        for label in CLASSES
        for icon in of_class[label][:MAX_TRAIN]
    ]
    pictures = draw(fonts, [row[0] for row in rows])
    return pa.table(
        {
            "image": pa.array([encoded(picture) for picture in pictures], pa.binary()),
            "label": [row[1] for row in rows],
            "stem": [row[2] for row in rows],
            "split": [row[3] for row in rows],
            "source": [row[4] for row in rows],
        }
    )


def corpus_table(fonts: Path) -> pa.Table:
    """Columns image, id, caption, source: the training designers' icons, equal drawings once."""
    rows, seen = [], set()
    for icon, picture in zip(*training_pictures(fonts), strict=True):
        key = picture.tobytes()
        if key in seen:
            continue
        seen.add(key)
        source = f"{icon.designer}/{icon.names[0]}"
        rows.append((encoded(picture), hash_order(source)[:16], icon.captions[0], source))
    columns = list(zip(*rows, strict=True))
    names = ("id", "caption", "source")
    return pa.table(
        {
            "image": pa.array(columns[0], pa.binary()),
            **{name: list(values) for name, values in zip(names, columns[1:], strict=True)},
        }
    )


def write_table(table: pa.Table, path: Path) -> None:
    """Parquet; WebP does not shrink further, the texts do."""
    texts = [name for name in table.column_names if name != "image"]
    pq.write_table(table, path, compression={"image": "NONE", **dict.fromkeys(texts, "ZSTD")})


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_corpora(fonts: Path, images: Path, texts: Path) -> None:
    """The training icons with captions, and texts tied to no image, as corpora."""
    from orchestrator.data.corpus import build_corpus

    lines = sorted(sorted(sentences(training_icons(fonts)), key=hash_order)[:PACKAGED_SENTENCES])
    with tempfile.TemporaryDirectory() as folder:
        write_table(corpus_table(fonts), Path(folder) / "corpus.parquet")
        (Path(folder) / "sentences.txt").write_text("\n".join(lines), encoding="utf-8")
        for kind, source, target in (
            ("images", "parquet:corpus.parquet", images),
            ("sentences", "text:sentences.txt", texts),
        ):
            shutil.rmtree(target, ignore_errors=True)
            with _inside(folder):  # so that the manifest names no folder of this machine
                facts = build_corpus(source, target.absolute(), kind)  # type: ignore[arg-type]
            print(f"{target.name}: {facts['rows']} rows, {facts['bytes']} bytes")


def main() -> None:
    """Write the files; without a folder, the packaged ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder; default: the package itself")
    args = parser.parse_args()
    fonts = fonts_folder()
    paths = (CORPUS, SENTENCES, RETRIEVAL, LABELLED)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        names = ("images", "sentences", RETRIEVAL.name, "labelled.parquet")
        paths = tuple(args.out.absolute() / name for name in names)  # type: ignore[assignment]
    corpus, texts, retrieval, labelled = paths
    for path, table in ((retrieval, retrieval_table(fonts)), (labelled, labelled_table(fonts))):
        write_table(table, path)
        print(f"{path.name}: {table.num_rows} rows, {path.stat().st_size} bytes")
    write_corpora(fonts, corpus, texts)


if __name__ == "__main__":
    main()
