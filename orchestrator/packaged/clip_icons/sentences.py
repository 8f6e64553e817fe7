"""Texts that are of no image in particular: captions in templates, WordNet's nouns and definitions, words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from orchestrator.packaged.clip_icons.classes import hash_order
from orchestrator.packaged.clip_icons.drawings import Icon

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
    captions = sorted({text for icon in icons for text in icon.captions}, key=hash_order)
    templated = [TEMPLATES[i % len(TEMPLATES)].format(text) for i, text in enumerate(captions)]
    lemmas, glosses = lemmas_and_glosses()
    texts = dict.fromkeys(text.strip() for text in [*captions, *templated, *lemmas, *glosses[::EVERY_NTH_GLOSS]])
    return [text for text in texts if text]
