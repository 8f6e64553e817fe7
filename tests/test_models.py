"""Networks by name: weights in files as people have them, repositories of the hub, and options of packaged ones."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import tokenizers
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import save_file
from small import small_spec
from small_clip import clip_folder
from torch import Tensor, nn

from methods.contract import Deployed
from orchestrator.errors import UserError
from orchestrator.models import clip, hub, load
from orchestrator.models.check import check_model
from orchestrator.models.clip import text_tower
from orchestrator.models.load import build_network, built_of, load_network, load_student, plan_network, save_student
from orchestrator.models.weights import hash_weights, read_weights
from orchestrator.select.export import provenance
from orchestrator.select.export.config import config_of, network_of
from orchestrator.spec import Model
from orchestrator.store import Store
from orchestrator.sweep.run import prepare
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import Cell, TrialConfig
from orchestrator.trial.run import run_trial

VIT = "timm/test_vit"


def weights(seed: int = 0, name: str = "test_vit", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {k: v.clone() for k, v in timm.create_model(name, **options).state_dict().items()}


def local(path: Path, architecture: str = VIT, **options: Any) -> Model:
    return Model(model=f"local:{path}", architecture=architecture, **options)


def same(network: nn.Module, state: dict[str, Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


# Files of weights.


@pytest.mark.parametrize(
    ("name", "architecture", "trained", "asked", "options"),
    [
        ("vit", VIT, 160, 96, {}),
        ("dinov2", "timm/vit_small_patch14_dinov2", 70, 42, {"depth": 1}),
        ("beit", "timm/beit_base_patch16_224", 48, 64, {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_a_file_of_another_size_is_resampled_as_timm_does(tmp_path, name, architecture, trained, asked, options):
    timms = architecture.removeprefix("timm/")
    path = tmp_path / f"{name}.safetensors"
    save_file(weights(0, timms, img_size=trained, **options), path)
    got = load_network(local(path, architecture, image_size=asked, kwargs=options), "teacher")
    by_timm = timm.create_model(
        timms, img_size=asked, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options
    )
    assert same(got.module, by_timm.state_dict())
    assert got.weights_hash == hash_weights(by_timm)
    assert got.module(torch.zeros(1, 3, asked, asked)).shape[0] == 1


def test_a_file_of_its_own_size_is_read_as_it_is_and_a_head_of_other_classes_stays(tmp_path):
    state = weights(num_classes=7)
    save_file(state, tmp_path / "seven.safetensors")
    assert same(load_network(local(tmp_path / "seven.safetensors"), "teacher").module, state)
    save_file(weights(num_classes=7, img_size=64), tmp_path / "small.safetensors")
    got = load_network(local(tmp_path / "small.safetensors"), "teacher").module
    assert torch.equal(got.head.weight, weights(num_classes=7, img_size=64)["head.weight"])


def test_patches_of_another_size_are_another_architecture(tmp_path):
    path = tmp_path / "patches.safetensors"
    save_file(weights(0, "vit_tiny_patch16_224", depth=1), path)
    entry = local(path, "timm/vit_small_patch32_224", kwargs={"depth": 1, "embed_dim": 192, "num_heads": 3})
    with pytest.raises(UserError, match="do not fit timm/vit_small_patch32_224"):
        load_network(entry, "teacher")


@pytest.mark.parametrize("prefixes", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_ddp_and_compile_put_before_names_is_taken_off(tmp_path, prefixes):
    torch.save({prefixes + k: v for k, v in weights().items()}, tmp_path / "wrapped.pth")
    assert same(load_network(local(tmp_path / "wrapped.pth"), "teacher").module, weights())


def test_a_checkpoint_of_timms_train_script_is_read(tmp_path):
    args = argparse.Namespace(model="test_vit", lr=0.1, mean=[0.5], data_dir=None)
    whole = {"epoch": 3, "arch": "test_vit", "state_dict": weights(1), "args": args, "metric": 71.5, "version": 2}
    torch.save(whole, tmp_path / "model_best.pth.tar")
    assert same(load_network(local(tmp_path / "model_best.pth.tar"), "teacher").module, weights(1))


AVERAGED: dict[str, Callable[[], dict[str, Any]]] = {
    "timm": lambda: {"state_dict": weights(1), "state_dict_ema": weights(2)},
    "torchvision": lambda: {
        "model": weights(1),
        "model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in weights(2).items()},
    },
    "of DDP": lambda: {
        "model_ema": {"n_averaged": torch.tensor(3)} | {f"module.module.{k}": v for k, v in weights(2).items()}
    },
}


@pytest.mark.parametrize("script", AVERAGED)
def test_averaged_weights_are_read_where_there_are_some(tmp_path, script):
    torch.save(AVERAGED[script](), tmp_path / "both.pth")
    got = load_network(local(tmp_path / "both.pth"), "teacher")
    assert same(got.module, weights(2))
    assert got.weights_hash == hash_weights(got.module)
    torch.save({"state_dict": weights(1), "state_dict_ema": None}, tmp_path / "plain.pth")
    assert same(load_network(local(tmp_path / "plain.pth"), "teacher").module, weights(1))


@pytest.mark.parametrize(
    "beside",
    [
        {"state_dict_ema": {}},
        {"model_ema": {}},
        {"model_ema": {"updates": 3, "ema": {"a": torch.zeros(1)}}},
        {"state_dict_ema": {"decay": 0.9}},
    ],
)
@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_an_average_that_is_no_state_dict_is_passed_over(tmp_path, beside, wrapper):
    torch.save({wrapper: weights(1), **beside}, tmp_path / "both.pth")
    assert read_weights(tmp_path / "both.pth").keys() == weights(1).keys()


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"student": weights(), "teacher": weights(), "epoch": 3}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"as state_dict_ema, .* and model; it holds student, teacher and epoch"):
        load_network(local(tmp_path / "dino.pth"), "teacher")


# The head that weights come with, which may teach.


@pytest.mark.parametrize(
    ("classes", "options", "known"), [(3, {}, 3), (3, {"num_classes": 3}, 3), (3, {"num_classes": 5}, 0), (0, {}, 0)]
)
def test_the_classes_of_a_files_head_are_its_own(tmp_path, classes, options, known):
    save_file(weights(num_classes=classes), tmp_path / "head.safetensors")
    entry = local(tmp_path / "head.safetensors", kwargs=options)
    assert plan_network(entry, "teacher")[0].classes == known
    assert plan_network(entry, "student")[0].classes == 0


@pytest.mark.parametrize(
    ("entry", "known"),
    [
        ({"model": "timm/test_vit.r160_in1k"}, 1000),
        ({"model": "timm/test_vit.r160_in1k", "kwargs": {"num_classes": 3}}, 0),
        ({"model": "timm/test_vit", "pretrained": False}, 0),
        ({"model": "packaged/efficientnet_lite0"}, 1000),
        ({"model": "packaged/vit_clipart"}, 0),
        ({"model": "packaged/vit_clipart", "kwargs": {"num_classes": 3}}, 0),
        ({"model": "packaged/clip_icons"}, 0),
    ],
)
def test_a_head_that_came_with_no_weights_has_no_classes(entry, known):
    assert plan_network(Model(**entry), "teacher")[0].classes == known


def test_a_teacher_of_the_tasks_own_classes_teaches_by_its_head(tmp_path, colours):
    save_file(weights(num_classes=3, img_size=32), tmp_path / "three.safetensors")
    teacher = {"model": f"local:{tmp_path / 'three.safetensors'}", "architecture": VIT, "image_size": 32}
    kd = {"kd": {"teacher_tuning": "own"}}
    spec = small_spec(colours, tmp_path, teachers=[teacher], methods=kd)
    assert [cell.method for cell in prepare(spec).cells] == ["kd"]
    context = SweepContext(spec, f"{spec.storage}/{spec.name}")
    row = run_trial(context, TrialConfig("t0000", 0, Cell("kd", 0, 0), {"teacher_tuning": "own"}, 0))
    assert row["status"] == "complete", row["reason"]
    stages = {entry.stage for entry in Store(Path(spec.storage) / "store").entries()}
    assert {"distil", "outputs"} <= stages
    assert "teacher_head" not in stages
    with pytest.raises(UserError, match="came with no head, and the task has 3 classes"):
        prepare(small_spec(colours, tmp_path, methods=kd))


# Repositories of the hub. `cache` is the hub's on this machine, and nothing else can be reached.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = (hub._fetched, load._load, load._plan, clip._text_tower)
    for function in kept:
        function.cache_clear()
    yield tmp_path / "hub"
    for function in kept:
        function.cache_clear()


def repository(cache: Path, name: str) -> Path:
    """An empty repository in the cache; returns the folder of its one commit."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    return root / "snapshots" / COMMIT


def timm_repository(cache: Path, name: str = "me/my.vit", *, file: str = "model.safetensors") -> dict[str, Tensor]:
    folder = repository(cache, name)
    state = weights(5, num_classes=4, img_size=64, mlp_ratio=2)
    config = {
        "architecture": "test_vit",
        "num_classes": 4,
        "model_args": {"img_size": 64, "mlp_ratio": 2},
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "fixed_input_size": True,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "num_classes": 4,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    return state


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_timm_repository_in_the_cache_needs_no_connection(cache, monkeypatch, file, revision):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    state = timm_repository(cache, file=file)
    entry = Model(model=f"timm/hf-hub:me/my.vit{revision}")
    assert check_model(entry, "teacher") == []
    info, preprocessing = plan_network(entry, "teacher")
    assert (info.kind, info.blocks, preprocessing.size, preprocessing.mean) == ("vit", 6, 64, (0.1, 0.2, 0.3))
    assert info.classes == 4
    got = load_network(entry, "teacher")
    assert same(got.module, state)
    described = {"architecture": "test_vit", "arguments": {"img_size": 64, "mlp_ratio": 2}}
    assert got.built == built_of(entry) == described


def test_a_repository_as_a_student_needs_no_weights_and_another_size_resamples_them(cache):
    timm_repository(cache)
    for weights_file in cache.rglob("model.safetensors"):
        weights_file.rename(weights_file.with_name("aside"))
    assert check_model(Model(model="timm/hf-hub:me/my.vit"), "student") == []
    assert plan_network(Model(model="timm/hf-hub:me/my.vit"), "student")[0].image_size == 64
    for weights_file in cache.rglob("aside"):
        weights_file.rename(weights_file.with_name("model.safetensors"))
    entry = Model(model="timm/hf-hub:me/my.vit", image_size=96)
    assert load_network(entry, "teacher").module.pos_embed.shape[1] == 36 + 1


@pytest.mark.parametrize("size", [None, 96])
def test_a_student_made_from_a_repository_is_loaded_and_exported_without_the_hub(cache, tmp_path, size):
    timm_repository(cache)
    entry = Model(model="timm/hf-hub:me/my.vit", image_size=size, pretrained=True)
    network = load_network(entry, "student")
    meta = {
        "model": entry.model_dump(mode="json"),
        "role": "student",
        "changes": {},
        "num_classes": 4,
        "classes": list("abcd"),
        "preprocessing": {"size": size or 64, "mean": [0.1] * 3, "std": [0.5] * 3, "interpolation": "bilinear"},
    }
    save_student(tmp_path / "student", Deployed(network.module, "student"), meta)
    shutil.rmtree(cache)
    hub._fetched.cache_clear()
    again, stored = load_student(tmp_path / "student")
    images = torch.randn(2, 3, size or 64, size or 64)
    assert torch.equal(again(images), network.module(images))
    config = config_of(again, stored)
    assert config["architecture"] == "test_vit"
    exported = network_of(config, tmp_path).eval()
    exported.load_state_dict(again.state_dict(), strict=True)
    assert torch.equal(exported(images), again(images))


@pytest.mark.parametrize("size", [None, 96])
def test_a_repository_whose_size_only_its_pretrained_cfg_tells_makes_students_that_load(cache, tmp_path, size):
    folder = repository(cache, "me/plain.vit")
    fixed = {"input_size": [3, 64, 64], "fixed_input_size": True, "classifier": "head"}
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": fixed}))
    save_file(weights(5, img_size=64), folder / "model.safetensors")
    entry = Model(model="timm/hf-hub:me/plain.vit", image_size=size, pretrained=True)
    network = build_network(entry, num_classes=4, weights=True)
    assert network.pos_embed.shape[1] == ((size or 64) // 16) ** 2 + 1
    meta = {"model": entry.model_dump(mode="json"), "role": "student", "changes": {}, "num_classes": 4}
    save_student(tmp_path / "student", Deployed(network, "student"), meta)
    assert same(load_student(tmp_path / "student")[0], dict(network.state_dict()))


def test_the_card_names_the_repository_as_the_base_model():
    assert provenance._hub(Model(model="timm/hf-hub:me/my.vit@v1")) == "me/my.vit"
    assert provenance._hub(Model(model="timm/test_vit.r160_in1k")) == "timm/test_vit.r160_in1k"


def word_tokenizer(folder: Path, *words: str) -> None:
    known = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text("{}")  # transformers asks for it


@pytest.mark.parametrize("own", [True, False])
def test_an_open_clip_repositorys_tokenizer_is_of_the_commit_that_is_read(cache, tmp_path, own):
    source, name = clip_folder(tmp_path / "clip"), "me/clip" if own else "me/words"
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": name, "tokenizer_kwargs": {"clean": "lower"}}
    main = repository(cache, "me/clip")
    pinned = main.with_name("f" * 40)
    pinned.mkdir()
    (main.parents[1] / "refs" / "v1").write_text(pinned.name)
    for folder in (main, pinned):
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    if own:
        word_tokenizer(main, "red", "icon")
        word_tokenizer(pinned, "icon", "red")
    else:
        word_tokenizer(repository(cache, "me/words"), "icon", "red")
    entry = Model(model="open_clip/hf-hub:me/clip@v1", pretrained=False, kwargs={"force_context_length": 5})
    tower = text_tower(entry, weights=False)
    assert tower.tokenize(["Red icon"]).tolist() == [[3, 2, 0, 0, 0]]
    assert tower.embed(["red icon"]).shape == (1, 24)


def test_a_tokenizer_that_cannot_be_had_is_one_sentence(cache, tmp_path):
    source, folder = clip_folder(tmp_path / "clip"), repository(cache, "me/clip")
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "me/words"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="The tokenizer 'me/words' of 'open_clip/hf-hub:me/clip' could not") as caught:
        text_tower(Model(model="open_clip/hf-hub:me/clip", pretrained=False), weights=False)
    assert "\n" not in str(caught.value)


def test_an_open_clip_repository_in_the_cache_needs_no_connection(cache, tmp_path):
    source = clip_folder(tmp_path / "clip")
    folder = repository(cache, "me/clip")
    shutil.copy(source / "open_clip_config.json", folder)
    shutil.copy(source / "open_clip_model.safetensors", folder)
    entry, twin = Model(model="open_clip/hf-hub:me/clip"), Model(model=f"local:{source}")
    assert check_model(entry, "teacher") == []
    assert plan_network(entry, "teacher")[0].embedding == 24
    assert load_network(entry, "teacher").identity == load_network(twin, "teacher").identity
    ours, theirs = (text_tower(one, weights=True) for one in (entry, twin))
    assert ours.weights_hash == theirs.weights_hash


def test_an_open_clip_repository_without_weights_never_gives_random_ones(cache, tmp_path):
    source = clip_folder(tmp_path / "clip")
    shutil.copy(source / "open_clip_config.json", repository(cache, "me/clip"))
    entry = Model(model="open_clip/hf-hub:me/clip")
    assert plan_network(entry, "teacher")[0].embedding == 24
    assert "was not checked" in check_model(entry, "teacher")[0]
    with pytest.raises(UserError, match=r"me/clip@0123.*is not in this machine's cache"):
        load_network(entry, "teacher")


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_without_a_connection_a_repository_that_is_not_in_the_cache_is_one_sentence(cache, library):
    entry = Model(model=f"{library}/hf-hub:me/nothing")
    for ask in (lambda: check_model(entry, "teacher"), lambda: plan_network(entry, "teacher")):
        with pytest.raises(UserError) as caught:
            ask()
        said = str(caught.value)
        assert said.startswith("The hub's repository 'me/nothing' is not in this machine's cache")
        assert "HF_HUB_OFFLINE" in said
        assert "local:PATH" in said
        assert "\n" not in said


def raised(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "what the client says\nat length")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, "is gated: accept its terms on its page at the hub, and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "is not at the hub, or is private: then set HF_TOKEN"),
        (errors.RevisionNotFoundError, "has no revision 'v1'"),
        (errors.RemoteEntryNotFoundError, "has no config.json: it is not for timm"),
        (errors.LocalEntryNotFoundError, "the hub could not be reached: what the client says"),
        (ConnectionError, "could not be fetched: what the client says"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_what_helps(cache, monkeypatch, error, said):
    def refuse(*_: Any, **__: Any) -> str:
        raise raised(error)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError) as caught:
        check_model(Model(model="timm/hf-hub:me/vit@v1"), "teacher")
    assert said in str(caught.value)
    assert "'me/vit" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["me/vit/large", "", "me/vit large", "@main"])
def test_what_is_no_name_of_a_repository_is_refused(cache, name):
    with pytest.raises(UserError, match="allowed: ORG/NAME or ORG/NAME@REVISION"):
        check_model(Model(model=f"timm/hf-hub:{name}"), "teacher")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["ViTModel"]}, "names no `architecture`: it is not for timm"),
        ({"architecture": "test_vitt", "pretrained_cfg": {}}, "is a 'test_vitt', which timm .* Did you mean 'test_vit"),
    ],
)
def test_a_repository_that_timm_cannot_build_says_so(cache, config, said):
    (repository(cache, "me/other") / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        check_model(Model(model="timm/hf-hub:me/other"), "teacher")


# Options of packaged models, and of others.


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("vit_clipart", {"image_size": 128}, "image_size: 128 .*; allowed: 96"),
        ("vit_clipart", {"image_size": 128, "pretrained": False}, "image_size: 128 .*; allowed: 96"),
        ("vit_clipart", {"kwargs": {"depth": 6}}, "depth 6 .* weights are of 12 blocks; set `pretrained: false`"),
        ("vit_clipart", {"kwargs": {"depth": "12"}}, "depth '12' .* weights are of 12 blocks"),
        ("vit_clipart", {"kwargs": {"act_layer": "nope"}}, "with kwargs {'act_layer': 'nope'}: KeyError: 'nope'"),
        ("efficientnet_lite0", {"kwargs": {"act_layer": "nope"}}, "cannot be built .*: KeyError: 'nope'"),
        ("vit_clipart", {"kwargs": {"depht": 6}}, "no option 'depht'; allowed: .*Did you mean 'depth'?"),
        ("vit_clipart", {"kwargs": {"num_heads": 8}, "pretrained": False}, "no option 'num_heads'; allowed: "),
        ("vit_clipart", {"kwargs": {"mlp_ratio": 2}}, "cannot be built with kwargs {'mlp_ratio': 2}: "),
        ("efficientnet_lite0", {"kwargs": {"depth": 6}}, "cannot be built with kwargs {'depth': 6}: "),
        ("efficientnet_lite0", {"kwargs": {"in_chans": 1}}, "cannot be built with kwargs {'in_chans': 1}: "),
        ("efficientnet_lite0", {"kwargs": {"pretrained": False}}, "cannot be built with kwargs"),
        ("clip_icons", {"kwargs": {"depth": 6}}, "open_clip cannot build .* with kwargs {'depth': 6}: "),
    ],
)
def test_options_that_a_packaged_model_does_not_take_are_refused_by_check(role, model, options, said):
    with pytest.raises(UserError, match=said) as caught:
        check_model(Model(model=f"packaged/{model}", **options), role)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("vit_clipart", {"image_size": 96}),
        ("vit_clipart", {"kwargs": {"depth": 2}, "pretrained": False}),
        ("vit_clipart", {"kwargs": {"drop_path_rate": 0.1}}),
        ("efficientnet_lite0", {"image_size": 64}),
        ("clip_icons", {"image_size": 96}),
    ],
)
def test_options_that_it_takes_are_fine(model, options):
    entry = Model(model=f"packaged/{model}", **options)
    assert check_model(entry, "student") == []
    size = plan_network(entry, "student")[1].size
    assert torch.isfinite(load_network(entry, "student").module(torch.zeros(1, 3, size, size))).all()


@pytest.mark.parametrize(
    "options",
    [{"embed_dim": 65}, {"class_token": False, "global_pool": "token"}, {"num_heads": 0}, {"act_layer": "nope"}],
)
def test_options_that_a_constructor_refuses_are_one_sentence(tmp_path, options):
    with pytest.raises(UserError, match="'timm/test_vit' cannot be built with kwargs"):
        plan_network(Model(model=VIT, pretrained=False, kwargs=options), "teacher")
    save_file(weights(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"vit\.safetensors' cannot be built with kwargs"):
        load_network(local(tmp_path / "vit.safetensors", kwargs=options), "teacher")


def test_the_size_of_an_entry_is_stronger_than_its_constructors_argument():
    entry = Model(model=VIT, pretrained=False, image_size=64, kwargs={"img_size": 96})
    assert load_network(entry, "teacher").module.pos_embed.shape[1] == 16 + 1
