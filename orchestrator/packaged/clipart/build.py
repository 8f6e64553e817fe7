"""Build ``images.parquet``, the default clip-art task, from Debian's ``openclipart-png`` package.

Run it where that package is installed (``apt-get install openclipart-png``)::

    python orchestrator/packaged/clipart/build.py --source /usr/share/openclipart/png

The result depends on the source files and on the versions of Pillow (its WebP encoder) and pyarrow only:
nothing is drawn at random, so a second run writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TOPICS = (
    "animals",
    "computer",
    "food",
    "geography",
    "office",
    "people",
    "plants",
    "tools",
    "transportation",
)
# Hundreds of desktop icons and web buttons, near-copies of each other, and pictograms for signs in public
# buildings: drawings of one style, whose topic a person could not name.
SKIPPED_FOLDERS = ("computer/icons", "computer/buttons", "transportation/aiga-symbols")
MAX_FILE_BYTES = 400_000  # some larger files unpack to more than 100 million pixels
MAX_PIXELS = 16_000_000
SIDE = 96  # pixels, square
QUALITY = 80  # WebP, lossy
CAP = 360  # images a topic
MIN_INK = 0.01  # share of pixels that differ from white
MAX_GROUP_HELD_OUT = 6  # larger groups of near-duplicates stay in train, where they skew no accuracy
NEAR_BITS = 3  # of 256: difference hashes this close are one drawing
VARIANT_BITS, VARIANT_LEVELS = (
    16,
    15.0,
)  # both: another state of a drawing; levels are mean differences of 255
SHARE_TEST, SHARE_VAL = 0.18, 0.155


class Item(NamedTuple):
    """One accepted picture; ``signature`` is a 256-bit difference hash, ``pixels`` a content hash."""

    source: str
    label: str
    stem: str
    webp: bytes
    pixels: str
    signature: np.ndarray


def stem_of(path: str | Path) -> str:
    """The file name without extension, digits and the mark ``bw``: foo_01.png, foo_bw2.png -> foo."""
    words = re.split(r"[_\W]+", re.sub(r"\d+", "", Path(path).stem.lower()))
    return "_".join(word for word in words if word and word != "bw") or Path(path).stem.lower()


def load_square(path: Path, side: int = SIDE) -> Image.Image | None:
    """The drawing on white, trimmed, centred on a ``side`` x ``side`` RGB square; None if unusable."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return None
            rgba = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError):
        return None
    flat = Image.new("RGBA", rgba.size, "white")
    flat.alpha_composite(rgba)
    rgb = flat.convert("RGB")
    ink = Image.fromarray((np.asarray(rgb.convert("L")) < 248).astype(np.uint8) * 255)
    box = ink.getbbox()
    if box is None:
        return None
    rgb = rgb.crop(box)
    scale = 0.94 * side / max(rgb.size)
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    square = Image.new("RGB", (side, side), "white")
    square.paste(rgb.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2))
    grey = np.asarray(square.convert("L"))
    if (grey < 240).mean() < MIN_INK or grey.std() < 4:
        return None
    return square


def difference_hash(image: Image.Image) -> np.ndarray:
    """256 bools: whether each of 16 x 16 cells is darker than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    return (grey[:, 1:] - grey[:, :-1] > 2).ravel()


def read_items(root: Path) -> list[Item]:
    """All usable pictures of the topics, in the order of their paths, without exact copies."""
    items: list[Item] = []
    labels_of: dict[str, set[str]] = defaultdict(set)
    for topic in TOPICS:
        for path in sorted((root / topic).rglob("*.png")):
            source = path.relative_to(root).as_posix()
            if source.startswith(tuple(folder + "/" for folder in SKIPPED_FOLDERS)):
                continue
            square = load_square(path)
            if square is None:
                continue
            buffer = io.BytesIO()
            square.save(buffer, "WEBP", quality=QUALITY, method=6)
            pixels = hashlib.sha256(np.asarray(square).tobytes()).hexdigest()
            items.append(Item(source, topic, stem_of(path), buffer.getvalue(), pixels, difference_hash(square)))
            labels_of[pixels].add(topic)
    kept, seen = [], set()
    for item in items:
        # A drawing filed under two topics has no right answer: none of its copies stays.
        if len(labels_of[item.pixels]) == 1 and item.pixels not in seen:
            seen.add(item.pixels)
            kept.append(item)
    return kept


def group_near_duplicates(items: list[Item]) -> list[int]:
    """A group number for each item: pictures with one stem or nearly one difference hash share it."""
    parent = list(range(len(items)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of: dict[str, int] = {}
    for i, item in enumerate(items):
        parent[find(i)] = find(first_of.setdefault(item.stem, i))
    bits = np.stack([item.signature for item in items]).astype(np.int32)
    distance = bits.sum(1)[:, None] + bits.sum(1)[None] - 2 * bits @ bits.T
    for i, j in zip(*np.nonzero(np.triu(distance <= NEAR_BITS, 1)), strict=True):
        parent[find(int(i))] = find(int(j))
    return [find(i) for i in range(len(items))]


def assign_splits(items: list[Item], groups: list[int]) -> list[str]:
    """``train``, ``val`` or ``test`` for each item: whole groups, in an order that a hash fixes."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    order = sorted(members.values(), key=lambda ids: hashlib.sha256(items[ids[0]].stem.encode()).hexdigest())
    totals = Counter(item.label for item in items)
    quota = {
        (split, label): share * n
        for split, share in (("test", SHARE_TEST), ("val", SHARE_VAL))
        for label, n in totals.items()
    }
    splits = ["train"] * len(items)
    for ids in order:
        if len(ids) > MAX_GROUP_HELD_OUT:
            continue
        counts = Counter(items[i].label for i in ids)
        for split in ("test", "val"):
            if all(quota[split, label] >= n for label, n in counts.items()):
                for i in ids:
                    splits[i] = split
                for label, n in counts.items():
                    quota[split, label] -= n
                break
    return splits


def is_variant(image: Image.Image, hashes: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether a picture is a variant of one of n, given as ``hashes_and_pixels`` returns them."""
    close = np.flatnonzero((hashes != difference_hash(image)).sum(1) <= VARIANT_BITS)
    own = np.asarray(image, dtype=np.int16)
    return any(float(np.abs(pixels[i] - own).mean()) < VARIANT_LEVELS for i in close)


def hashes_and_pixels(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """What ``is_variant`` compares with: (n, 256) bool and (n, 96, 96, 3) int16."""
    hashes = np.stack([difference_hash(image) for image in images])
    return hashes, np.stack([np.asarray(image, dtype=np.int16) for image in images])


def without_variants(items: list[Item], splits: list[str]) -> list[int]:
    """Indices that stay once train has no variant of a val or test drawing, nor val of a test drawing."""
    images = [Image.open(io.BytesIO(item.webp)).convert("RGB") for item in items]
    kept = [i for i, split in enumerate(splits) if split == "test"]
    for split in ("val", "train"):
        against = [i for i in kept if splits[i] != split]
        hashes, pixels = hashes_and_pixels([images[i] for i in against])
        kept += [i for i, own in enumerate(splits) if own == split and not is_variant(images[i], hashes, pixels)]
    return sorted(kept)


def cap_topics(items: list[Item]) -> list[Item]:
    """At most ``CAP`` pictures a topic, the first in an order of stems fixed by a hash."""
    kept: list[Item] = []
    for topic in TOPICS:
        of_topic = [item for item in items if item.label == topic]
        of_topic.sort(key=lambda item: (hashlib.sha256(("cap" + item.stem).encode()).hexdigest(), item.source))
        kept += of_topic[:CAP]
    return sorted(kept, key=lambda item: item.source)


def build(root: Path) -> pa.Table:
    """The table with columns image, label, stem, split and source; rows in the order of ``source``."""
    items = cap_topics(read_items(root))
    splits = assign_splits(items, group_near_duplicates(items))
    # Stems and hashes miss recoloured or slightly redrawn copies under another name: those leave.
    kept = without_variants(items, splits)
    items, splits = [items[i] for i in kept], [splits[i] for i in kept]
    columns: dict[str, Any] = {
        "image": pa.array([item.webp for item in items], pa.binary()),
        "label": [item.label for item in items],
        "stem": [item.stem for item in items],
        "split": splits,
        "source": [item.source for item in items],
    }
    return pa.table(columns)


def main() -> None:
    """Write the table and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("images.parquet"))
    args = parser.parse_args()
    if not args.source.is_dir():
        parser.error(f"{args.source} is no folder: install Debian's openclipart-png or pass --source")
    table = build(args.source)
    # WebP does not shrink further: compressing the column would cost time and gain nothing.
    pq.write_table(table, args.out, compression={"image": "NONE", "source": "ZSTD", "stem": "ZSTD"})
    counts = Counter(zip(table["split"].to_pylist(), table["label"].to_pylist(), strict=True))
    for split in ("train", "val", "test"):
        of_split = {label: counts[split, label] for label in TOPICS}
        print(f"{split}: {sum(of_split.values())} {of_split}")
    print(f"{args.out.name}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
