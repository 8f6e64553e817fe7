"""The packaged vision-language teacher and its data: they load, know something, and the card says what was measured."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from orchestrator.data.corpus import open_corpus, verify_corpus
from orchestrator.data.sources import open_source
from orchestrator.packaged import clip
from orchestrator.packaged.clip_icons import data, measure
from orchestrator.packaged.clip_icons.classes import CLASSES
from orchestrator.packaged.clip_icons.drawings import caption

MIB = 2**20
CHANCE = 1 / len(CLASSES)


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that wait for each other are slower on a busy machine
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return clip.clip_icons()


@pytest.fixture(scope="module")
def tokenizer():
    return clip.clip_icons_tokenizer()


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((clip.CLIP_ICONS / "results.json").read_text())


@pytest.fixture(scope="module")
def labelled() -> dict[str, list]:
    return pq.read_table(data.LABELLED).to_pydict()


def test_it_is_a_plain_open_clip_model_of_at_most_eight_mebibytes(model):
    assert type(model) is open_clip.CLIP
    assert (clip.CLIP_ICONS / clip.WEIGHTS).stat().st_size <= 8 * MIB
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert not model.training
    with torch.inference_mode():
        assert model.encode_image(torch.zeros(2, 3, 64, 64)).shape == (2, 256)
        assert model.encode_text(torch.zeros(2, 32, dtype=torch.long)).shape == (2, 256)


def test_open_clips_own_loader_reads_the_folder(model):
    own, transform = open_clip.create_model_from_pretrained(f"local-dir:{clip.CLIP_ICONS}")
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), model.state_dict().values(), strict=True))
    picture = Image.open(io.BytesIO(pq.read_table(data.RETRIEVAL, columns=["image"])["image"][0].as_py()))
    expected = measure.images_of([pq.read_table(data.RETRIEVAL, columns=["image"])["image"][0].as_py()])[0]
    assert torch.allclose(transform(picture.convert("RGB")), expected, atol=1e-6)


def test_its_preprocessing_is_stated(model):
    facts = clip.preprocessing_of(model)
    assert facts == clip.Preprocessing(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "shortest")


def test_missing_weights_are_one_readable_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(clip, "CLIP_ICONS", tmp_path)
    with pytest.raises(RuntimeError, match="missing from this installation: reinstall it"):
        clip.clip_icons()


def test_tokens_round_trip_and_every_text_has_an_end(model, tokenizer):
    texts = ["a magnifying glass icon", "shopping cart", "zygote xylophone 42", "ampersand & co."]
    ids = tokenizer(texts)
    assert ids.shape == (4, 32)
    assert int(ids.max()) == tokenizer.eot_token_id == model.vocab_size - 1
    for row, text in zip(ids.tolist(), texts, strict=True):
        inner = row[1 : row.index(tokenizer.eot_token_id)]
        assert tokenizer.decode(inner).split() == re.findall(r"[a-z]+|\d|[^\sa-z\d]+", text)
    assert len(tokenizer.encode("magnifying glass")) <= 4  # icon names are short in its own merges
    assert tokenizer(["word " * 100])[0, -1] == tokenizer.eot_token_id


def column(corpus: Path, name: str) -> list[Any]:
    """Of every shard of a corpus."""
    return [value for path in sorted(corpus.glob("*.parquet")) for value in pq.read_table(path)[name].to_pylist()]


def test_every_token_of_a_training_text_has_an_embedding_of_its_own(model, tokenizer):
    captions = column(data.CORPUS, "caption")
    used = torch.tensor(sorted({token for text in captions if text for token in tokenizer.encode(text)}))
    rows = model.token_embedding.weight[used]
    assert len(used) > 1500
    assert len(torch.unique(rows, dim=0)) == len(used)


def test_zero_shot_accuracy_on_the_unseen_designer_is_the_stated_one(model, tokenizer, results):
    stated = results["zero-shot"]["test"]
    measured = measure.zero_shot(model, tokenizer, "test")
    assert measured["images"] == stated["images"]
    assert measured["accuracy"] == pytest.approx(stated["accuracy"], abs=0.01)
    assert measured["accuracy"] > 20 * CHANCE


def test_retrieval_on_the_unseen_designer_is_the_stated_one(model, tokenizer, results):
    stated = results["retrieval"]["test"]
    measured = measure.retrieval(model, tokenizer, "test")
    assert measured["names"] == stated["names"]
    for k in (1, 10):
        assert measured[f"R@{k}"] == pytest.approx(stated[f"R@{k}"], abs=0.01)
        assert measured[f"R@{k}"] > 20 * k / stated["names"]


def test_an_untrained_model_is_at_chance(tokenizer):
    torch.manual_seed(0)
    model = clip.clip_icons(pretrained=False)
    found = measure.retrieval(model, tokenizer, "val")
    assert found["R@10"] < 5 * 10 / found["names"]


def test_every_number_of_the_card_is_in_the_results(results):
    card = (clip.CLIP_ICONS / "MODEL_CARD.md").read_text()
    table = card[card.index("## What it can do") : card.index("## How it was trained")]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if re.match(r"\|.*\d", line)
    ]
    stated = {row[0]: row[1:] for row in rows}
    for split in ("val", "test"):
        retrieval, zero_shot = results["retrieval"][split], results["zero-shot"][split]
        topics = results["clipart topics"][split]
        names = f"retrieval among {retrieval['names']} names, {split}"
        assert stated[names][0] == f"R@1 {retrieval['R@1']:.3f}, R@10 {retrieval['R@10']:.3f}"
        classes = f"zero-shot, {zero_shot['classes']} classes, {zero_shot['images']} images, {split}"
        assert stated[classes][0] == f"{zero_shot['accuracy']:.3f}"
        drawings = f"zero-shot, {topics['classes']} topics of clip art, {topics['images']} drawings, {split}"
        assert stated[drawings][0] == f"{topics['accuracy']:.3f}"


def test_synonyms_that_name_no_icon_are_near_the_icons_word(model, tokenizer):
    captions = set(column(data.CORPUS, "caption"))
    pairs = {
        "automobile": "car",
        "residence": "house",
        "aircraft": "airplane",
        "canine": "dog",
        "locomotive": "train",
        "dwelling": "house",
    }
    assert not captions & set(pairs)
    targets = sorted({*pairs.values(), "key", "umbrella", "cloud", "fish", "moon", "scissors", "thermometer", "star"})
    synonyms = measure.text_features(model, tokenizer, list(pairs))
    words = measure.text_features(model, tokenizer, targets)
    nearest = [targets[i] for i in (synonyms @ words.T).argmax(1).tolist()]
    assert sum(found == right for found, right in zip(nearest, pairs.values(), strict=True)) >= 5


def test_no_training_picture_is_one_of_the_unseen_designers(labelled):
    def prints(images: list[bytes]) -> set[str]:
        return {
            hashlib.sha256(np.asarray(Image.open(io.BytesIO(d)).convert("L")).tobytes()).hexdigest() for d in images
        }

    corpus = prints(column(data.CORPUS, "image"))
    hidden = prints(pq.read_table(data.RETRIEVAL, columns=["image"])["image"].to_pylist())
    hidden |= prints([d for d, split in zip(labelled["image"], labelled["split"], strict=True) if split != "train"])
    train = prints([d for d, split in zip(labelled["image"], labelled["split"], strict=True) if split == "train"])
    assert len(hidden) > 1500
    assert not hidden & corpus
    assert not hidden & train


def test_the_labelled_task_has_every_class_in_every_split_and_no_name_in_two(labelled):
    counts = Counter(zip(labelled["split"], labelled["label"], strict=True))
    for label in CLASSES:
        assert counts["train", label] >= 3
        assert counts["val", label] >= 5
        assert counts["test", label] >= 5
    held_out = {(stem, split) for stem, split in zip(labelled["stem"], labelled["split"], strict=True)}
    assert len({stem for stem, _ in held_out}) == len(held_out)
    sources = Counter(
        s.startswith("phosphor")
        for s, split in zip(labelled["source"], labelled["split"], strict=True)
        if split != "train"
    )
    assert set(sources) == {True}
    assert not any(
        s.startswith("phosphor")
        for s, split in zip(labelled["source"], labelled["split"], strict=True)
        if split == "train"
    )
    retrieval = pq.read_table(data.RETRIEVAL, columns=["caption", "split"]).to_pydict()
    split_of = dict(zip(retrieval["caption"], retrieval["split"], strict=True))
    assert all(split_of[stem.replace("-", " ")] == split for stem, split in held_out if split != "train")


def test_a_sweep_can_name_the_labelled_task():
    items = open_source("packaged/icons").items()
    assert Counter(item.split for item in items)["test"] > 700
    assert {item.label for item in items} == set(CLASSES)


def test_the_corpora_for_distillation_are_small_and_whole():
    images, texts = open_corpus("packaged/icons/images", "images"), open_corpus("packaged/icons/sentences", "sentences")
    assert images.rows > 12_000
    assert texts.rows == data.PACKAGED_SENTENCES
    assert [verify_corpus(corpus.address)["damaged"] for corpus in (images, texts)] == [[], []]
    assert sum(shard.bytes for corpus in (images, texts) for shard in corpus.shards) <= 7 * MIB
    assert not any("/" in str(corpus.manifest["settings"]["source"]) for corpus in (images, texts))


def test_names_lose_their_style_words():
    assert caption("alarm-light-outline") == "alarm light"
    assert caption("key-2-line") == "key"
    assert caption("outline") == "outline"
    assert caption("numeric-9-box-multiple-outline") == "numeric 9 box multiple"


@pytest.mark.parametrize("path", [Path("MODEL_CARD.md"), Path("../icons/PROVENANCE.md")])
def test_each_font_has_its_licence(path):
    text = (clip.CLIP_ICONS / path).read_text()
    for word in ("Apache-2.0", "MIT", "CC-BY-4.0", "OFL-1.1", "Phosphor", "Remix Icon", "Codicons", "Font Awesome"):
        assert word in text
