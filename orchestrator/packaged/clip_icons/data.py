"""Named icons from the fonts of the PyPI package qtawesome, and the files that distillation and its test read.

One designer, Phosphor, is held out: nothing here that is for training holds a drawing of it. Half of its names
serve as val, half as test, the same halves in the retrieval set and in the labelled task.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFont

HERE = Path(__file__).parent
ICONS = HERE.parent / "icons"
CORPUS, SENTENCES = ICONS / "images", ICONS / "sentences"
RETRIEVAL, LABELLED = HERE / "retrieval.parquet", ICONS / "images.parquet"
PACKAGED_SENTENCES = 12_000  # of all that `sentences` gives: each costs a hash of 64 digits in a corpus

SIDE = 64  # pixels
GLYPH = 56  # pixels: the longer side of every drawing
DRAWN = 160  # pixels: fonts are drawn larger, then shrunk, so that every designer gets the same smoothing
FONTS = {  # of the training designers; brands' fonts stay out
    "materialdesignicons6-webfont-6.9.96": "mdi",
    "remixicon-2.5.0": "remix",
    "fontawesome6-solid-webfont-6.7.2": "fa6-solid",
    "fontawesome6-regular-webfont-6.7.2": "fa6-regular",
    "fontawesome5-solid-webfont-5.15.4": "fa5-solid",
    "fontawesome5-regular-webfont-5.15.4": "fa5-regular",
    "codicon-0.0.36": "codicon",
}
HELD_OUT = "phosphor-1.3.0"
WEIGHTS = ("thin", "light", "regular", "bold", "fill")
STYLE_WORDS = {"outline", "variant", "fill", "line", "alt"}

# Class: beginnings of Phosphor's names, beginnings of the other designers' captions.
CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "airplane": (("airplane",), ("airplane", "plane")),
    "battery": (("battery",), ("battery",)),
    "bell": (("bell",), ("bell",)),
    "book": (("book",), ("book",)),
    "bookmark": (("bookmark", "bookmarks"), ("bookmark",)),
    "bug": (("bug",), ("bug",)),
    "calendar": (("calendar",), ("calendar",)),
    "camera": (("camera",), ("camera",)),
    "car": (("car",), ("car",)),
    "chart": (("chart",), ("chart", "bar chart", "pie chart", "line chart")),
    "chat bubble": (("chat", "chats"), ("chat", "message", "comment")),
    "clipboard": (("clipboard",), ("clipboard",)),
    "clock": (("clock",), ("clock",)),
    "cloud": (("cloud",), ("cloud",)),
    "crown": (("crown",), ("crown", "vip crown", "chess queen")),
    "currency": (("currency",), ("currency", "money", "dollar sign", "euro sign")),
    "die": (("dice",), ("dice",)),
    "envelope": (("envelope",), ("email", "mail", "envelope")),
    "eye": (("eye",), ("eye",)),
    "file": (("file",), ("file",)),
    "fire": (("fire",), ("fire",)),
    "fish": (("fish",), ("fish",)),
    "flag": (("flag",), ("flag",)),
    "flower": (("flower",), ("flower", "plant")),
    "folder": (("folder",), ("folder",)),
    "funnel": (("funnel",), ("filter",)),
    "gear": (("gear",), ("cog", "gear", "settings")),
    "globe": (("globe",), ("earth", "globe")),
    "hand": (("hand",), ("hand",)),
    "handbag": (("handbag",), ("bag", "shopping bag", "purse")),
    "heart": (("heart",), ("heart",)),
    "hourglass": (("hourglass",), ("hourglass", "timer sand")),
    "house": (("house",), ("home", "house")),
    "key": (("key",), ("key",)),
    "light bulb": (("lightbulb",), ("lightbulb",)),
    "lightning": (("lightning",), ("lightning", "flash", "bolt")),
    "link": (("link",), ("link",)),
    "magnet": (("magnet",), ("magnet",)),
    "magnifying glass": (("magnifying-glass",), ("magnify", "magnifying glass", "search", "zoom")),
    "map pin": (("map-pin",), ("map marker", "map pin", "location")),
    "megaphone": (("megaphone",), ("bullhorn", "megaphone")),
    "microphone": (("microphone",), ("microphone", "mic")),
    "monitor": (("monitor", "television", "desktop"), ("monitor", "television", "tv", "desktop", "computer")),
    "moon": (("moon",), ("moon", "weather night")),
    "mouse": (("mouse",), ("mouse", "computer mouse")),
    "music note": (("music-note", "music-notes"), ("music",)),
    "newspaper": (("newspaper",), ("newspaper",)),
    "paint brush": (("paint-brush",), ("brush", "paint brush", "paintbrush", "format paint")),
    "paper clip": (("paperclip",), ("paperclip", "attachment")),
    "paper plane": (("paper-plane",), ("send", "paper plane")),
    "padlock": (("lock",), ("lock",)),
    "pencil": (("pencil", "pen"), ("pencil", "pen")),
    "phone": (("phone",), ("phone",)),
    "push pin": (("push-pin",), ("pin", "pushpin", "thumbtack")),
    "rainbow": (("rainbow",), ("rainbow", "looks")),
    "rocket": (("rocket",), ("rocket",)),
    "shield": (("shield",), ("shield",)),
    "shopping cart": (("shopping-cart",), ("cart", "shopping cart")),
    "smiley": (("smiley",), ("emoticon", "face", "emotion")),
    "speaker": (("speaker",), ("volume", "speaker")),
    "star": (("star",), ("star",)),
    "suitcase": (("suitcase", "briefcase"), ("briefcase", "suitcase", "bag suitcase")),
    "sun": (("sun",), ("sun", "weather sunny", "white balance sunny")),
    "tag": (("tag",), ("tag", "price tag")),
    "thermometer": (("thermometer",), ("thermometer", "temp")),
    "thumb": (("thumbs",), ("thumb", "thumbs")),
    "train": (("train",), ("train",)),
    "trash can": (("trash",), ("trash", "delete")),
    "tree": (("tree", "tree-evergreen"), ("tree", "pine tree")),
    "umbrella": (("umbrella",), ("umbrella",)),
    "user": (("user", "users"), ("account", "user")),
    "warning sign": (("warning",), ("alert", "error warning", "warning", "triangle exclamation")),
    "wifi": (("wifi",), ("wifi",)),
}
NOT_OF_CLASS = {"tree-structure"}
MAX_NAMES = 8  # of one class in val and test together
MAX_TRAIN = 24  # labelled images of one class
TEMPLATES = (
    "{}",
    "{} icon",
    "a {} icon",
    "an icon of a {}",
    "a {} symbol",
    "the symbol for {}",
    "a pictogram of a {}",
    "a drawing of a {}",
    "a picture of a {}",
    "a black and white {}",
)
EVERY_NTH_GLOSS = 3


@dataclass(frozen=True)
class Icon:
    """One glyph.

    Attributes:
        font: file name without its ending.
        designer: short name of the font's family and style.
        code: code point.
        names: its names in the font, style words included.
    """

    font: str
    designer: str
    code: int
    names: tuple[str, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """Its names in words, style words left out."""
        return tuple(dict.fromkeys(caption(name) for name in self.names))


def caption(name: str) -> str:
    """`alarm-light-outline` -> `alarm light`; `key-2-line` -> `key`."""
    words = name.split("-")
    if words[-1] in ("fill", "line"):  # Remix numbers its alternatives: arrow-left-2-line
        words = [word for word in words[:-1] if not re.fullmatch(r"[2-9]", word)] or words[:-1]
    kept = [word for word in words if word not in STYLE_WORDS]
    return " ".join(kept or words)


def fonts_folder() -> Path:
    """Where qtawesome keeps its fonts; the package is not imported, since that would need Qt."""
    from importlib.util import find_spec

    spec = find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The icons come with qtawesome: pip install --no-deps qtawesome==1.4.2")
    return Path(spec.submodule_search_locations[0]) / "fonts"


def charmap(fonts: Path, font: str) -> dict[str, int]:
    """Code point of each name."""
    family, _, version = font.rpartition("-")
    path = fonts / f"{family}-charmap-{version}.json"
    return {name: int(code, 16) for name, code in json.loads(path.read_text()).items()}


def training_icons(fonts: Path) -> list[Icon]:
    """Every glyph of the training designers."""
    icons = []
    for font, designer in FONTS.items():
        names = defaultdict(list)
        for name, code in charmap(fonts, font).items():
            names[code].append(name)
        icons += [Icon(font, designer, code, tuple(of_code)) for code, of_code in sorted(names.items())]
    return icons


def held_out_icons(fonts: Path) -> dict[str, list[Icon]]:
    """Phosphor by name: one icon for each of `WEIGHTS`. Companies' logos are left out."""
    codes = charmap(fonts, HELD_OUT)
    found: dict[str, list[Icon]] = {}
    for name in codes:
        if name.endswith(("-thin", "-light", "-bold", "-fill")) or name.endswith("-logo") or "-logo-" in name:
            continue
        of_name = [name if weight == "regular" else f"{name}-{weight}" for weight in WEIGHTS]
        found[name] = [
            Icon(HELD_OUT, f"phosphor-{weight}", codes[full], (name,))
            for weight, full in zip(WEIGHTS, of_name, strict=True)
        ]
    return found


def draw(fonts: Path, icons: Sequence[Icon]) -> np.ndarray:
    """(n, 64, 64) bytes: ink 255 on 0 in 16 levels, the drawing's longer side 56 px, centred."""
    faces: dict[str, Any] = {}
    pictures = np.zeros((len(icons), SIDE, SIDE), np.uint8)
    for row, icon in enumerate(icons):
        if icon.font not in faces:
            faces[icon.font] = ImageFont.truetype(str(fonts / f"{icon.font}.ttf"), DRAWN)
        mask = faces[icon.font].getmask(chr(icon.code), mode="L")
        if not all(mask.size):
            continue
        ink = Image.frombytes("L", mask.size, bytes(mask))
        ink = ink.crop(ink.getbbox())
        scale = GLYPH / max(ink.size)
        width, height = (max(1, round(length * scale)) for length in ink.size)
        small = np.asarray(ink.resize((width, height), Image.Resampling.BOX))
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        pictures[row, top : top + height, left : left + width] = (small.astype(np.uint16) + 8) // 17 * 17
    return pictures


def training_pictures(fonts: Path) -> tuple[list[Icon], np.ndarray]:
    """The training designers' icons and drawings (n, 64, 64), without blank ones and held-out ones."""
    held_out = [icon for of_name in held_out_icons(fonts).values() for icon in of_name]
    hidden = {picture.tobytes() for picture in draw(fonts, held_out)}  # plain squares and dots are everybody's
    icons = training_icons(fonts)
    pictures = draw(fonts, icons)
    kept = [i for i, picture in enumerate(pictures) if picture.any() and picture.tobytes() not in hidden]
    return [icons[i] for i in kept], pictures[kept]


def encoded(picture: np.ndarray) -> bytes:
    """Lossless WebP of (64, 64) bytes of ink, black on white."""
    buffer = io.BytesIO()
    Image.fromarray(255 - picture).save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _begins(text: str, starts: Iterable[str], gap: str) -> bool:
    return any(text == start or text.startswith(start + gap) for start in starts)


def name_splits(names: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """`val` or `test` for each held-out name, and the names of each class: half of each class is val."""
    ordered = sorted(names, key=_order)
    splits = {name: ("test", "val")[i % 2] for i, name in enumerate(ordered)}
    classes: dict[str, list[str]] = {}
    for label, (starts, _) in CLASSES.items():
        classes[label] = [n for n in ordered if n not in NOT_OF_CLASS and _begins(n, starts, "-")][:MAX_NAMES]
        splits.update({name: ("test", "val")[i % 2] for i, name in enumerate(classes[label])})
    return splits, classes


def class_of(icon: Icon) -> str | None:
    """The class of a training designer's icon, where its first caption begins with one's words."""
    text = icon.captions[0]
    found = [label for label, (_, starts) in CLASSES.items() if _begins(text, starts, " ")]
    return found[0] if len(found) == 1 else None


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
    for icon in sorted(training_pictures(fonts)[0], key=lambda icon: _order(f"{icon.designer}/{icon.names[0]}")):
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
        rows.append((encoded(picture), _order(source)[:16], icon.captions[0], source))
    columns = list(zip(*rows, strict=True))
    names = ("id", "caption", "source")
    return pa.table(
        {
            "image": pa.array(columns[0], pa.binary()),
            **{name: list(values) for name, values in zip(names, columns[1:], strict=True)},
        }
    )


def words() -> list[str]:
    """Whole English words of three letters and more, most frequent first: the entries of open_clip's vocabulary."""
    from open_clip.tokenizer import SimpleTokenizer

    entries = SimpleTokenizer().encoder
    return [entry[:-4] for entry in entries if re.fullmatch(r"[a-z]{3,}</w>", entry)]


def lemmas_and_glosses() -> tuple[list[str], list[str]]:
    """Nouns of WordNet with their definitions, as timm carries them for ImageNet-22k."""
    import timm.data

    folder = Path(timm.data.__file__).parent / "_info"
    columns = []
    for name in ("lemma", "definition"):
        lines = (folder / f"imagenet_synset_to_{name}.txt").read_text().splitlines()
        columns.append(dict(line.split("\t", 1) for line in lines))
    lemmas, glosses = columns
    names = dict.fromkeys(part.strip().lower() for text in lemmas.values() for part in text.split(","))
    return list(names), [glosses[key] for key in sorted(glosses)]


def sentences(icons: Sequence[Icon]) -> list[str]:
    """Texts for distillation: the icons' captions in templates, WordNet's nouns and a third of their definitions.

    No text is tied to an image, and none is a held-out designer's caption unless another designer uses it too.
    """
    captions = sorted({text for icon in icons for text in icon.captions}, key=_order)
    templated = [TEMPLATES[i % len(TEMPLATES)].format(text) for i, text in enumerate(captions)]
    lemmas, glosses = lemmas_and_glosses()
    texts = dict.fromkeys(text.strip() for text in [*captions, *templated, *lemmas, *glosses[::EVERY_NTH_GLOSS]])
    return [text for text in texts if text]


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

    lines = sorted(sorted(sentences(training_icons(fonts)), key=_order)[:PACKAGED_SENTENCES])
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
