"""The decisive tests of the tuners by peft other than LoRA (see test_lora.py), PEFT-1 to PEFT-5."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import Conv2dSame
from tiny import cnn, hybrid_vit, make_images, vit
from tuned import learner_of, perturb, planned, refusal, train, with_head

TUNERS = [
    ("ia3", {"scales": "outputs"}),
    ("ia3", {"scales": "paper"}),
    ("vera", {"rank": 4}),
    ("oft", {"variant": "oft"}),
    ("oft", {"variant": "boft"}),
]
IDS = ["ia3", "ia3_paper", "vera", "oft", "boft"]
tuners = pytest.mark.parametrize(("method", "knobs"), TUNERS, ids=IDS)


@tuners
@pytest.mark.parametrize("build", [vit, hybrid_vit])
def test_peft_1_at_the_start_it_is_the_teacher(method, knobs, build):
    network, (images, _) = build(), make_images(4)
    learner = learner_of(method, network, **knobs).eval()
    torch.testing.assert_close(learner.student(images), with_head(network)(images), rtol=0, atol=2e-6)


@tuners
@pytest.mark.parametrize("build", [vit, hybrid_vit])
def test_peft_2_merged_has_the_base_keys_and_shapes(method, knobs, build):
    network, (images, _) = build(), make_images(4)
    learner = perturb(learner_of(method, network, **knobs), std=0.05)
    logits = learner.student(images)
    assert (logits - with_head(network)(images)).abs().max() > 1e-3
    deployed = learner.deployed()
    shapes = {name: tensor.shape for name, tensor in deployed.network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in with_head(network).state_dict().items()}
    torch.testing.assert_close(deployed.network(images), logits, rtol=1e-5, atol=1e-5)


@tuners
def test_peft_3_saved_and_loaded_it_gives_the_same_logits(method, knobs, tmp_path):
    network, (images, _) = vit(), make_images(4)
    learner = learner_of(method, network, **knobs)
    learner.student.get_base_model().head.requires_grad_(False)  # not peft's to save
    perturb(learner)
    learner.student.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(with_head(network), tmp_path).eval()
    torch.testing.assert_close(loaded(images), learner.student(images), rtol=0, atol=1e-6)


@tuners
def test_peft_4_wrapped_modules(method, knobs):
    learner = learner_of(method, hybrid_vit(depth=6), **knobs)
    names = [name for name, module in learner.student.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(names) == 6 * (2 if knobs.get("scales") == "paper" else 4)
    assert not any("patch_embed" in name or "head" in name for name in names)


@tuners
def test_peft_5_training_moves_no_base_tensor(method, knobs):
    network = hybrid_vit()
    learner = learner_of(method, network, **knobs)
    train(learner)
    own = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in learner.student.state_dict().items()
    }
    for name, tensor in network.state_dict().items():
        assert name.startswith("head.") or torch.equal(own[name], tensor), name


def test_ia3_scales_every_ungrouped_convolution_but_the_stem():
    learner = learner_of("ia3", cnn("test_resnet"), "cnn")
    names = {n for n, m in learner.student.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(names) > 8
    assert not any("conv1.0" in name and "layer" not in name for name in names)
    assert not any(name.endswith("fc") for name in names)


def test_oft_rotates_and_keeps_lengths():
    """Merged weights have the base's row norms: an orthogonal map of the inputs changes no length."""
    network = vit(depth=2)
    for block in (4, 16):
        learner = perturb(learner_of("oft", network, block=block), std=0.2)
        merged = learner.deployed().network
        for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
            one, other = merged.get_submodule(name).weight, network.get_submodule(name).weight
            torch.testing.assert_close(one.norm(dim=1), other.norm(dim=1), rtol=1e-4, atol=1e-5)
            assert (one - other).abs().max() > 0.05


def test_a_block_that_does_not_divide_is_refused_not_replaced():
    with pytest.raises(ValueError, match=r"block is 32 and does not divide the 48 inputs of 'blocks.0.attn.qkv'"):
        learner_of("oft", vit(), block=32)


def test_veras_random_matrices_are_shared_and_frozen():
    learner = learner_of("vera", vit(), rank=4)
    layers = [m for m in learner.student.modules() if isinstance(m, BaseTunerLayer)]
    assert len({id(layer.vera_A) for layer in layers}) == 1
    assert not any("vera_A" in name or "vera_B" in name for name, _ in learner.named_parameters())


# Planning

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
DAVIT = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)}
BY_PEFT = [("lora", {}), ("lora", {"variant": "dora"}), ("ia3", {})]
by_peft = pytest.mark.parametrize(("method", "knobs"), BY_PEFT, ids=["lora", "dora", "ia3"])


@by_peft
@pytest.mark.parametrize("name", ["test_nfnet", "nf_resnet26"])
def test_weights_that_are_standardised_before_use_are_refused_because_nothing_merges_into_them(method, knobs, name):
    reason = refusal(method, planned(name), **knobs)
    assert f"{method} cannot serve timm/{name}: 'st" in reason
    assert "is a ScaledStdConv2d" in reason
    assert "could not be merged" in reason


@by_peft
def test_a_standardised_stem_is_no_hindrance_to_a_transformer_behind_it(method, knobs):
    assert refusal(method, planned("vit_tiny_r_s16_p8_224", "vit", depth=2), **knobs) is None


@by_peft
def test_convolutions_that_only_pad_in_their_own_way_merge_exactly(method, knobs):
    torch.manual_seed(0)
    network, (images, _) = timm.create_model("test_efficientnet", pad_type="same").eval(), make_images(4)
    assert refusal(method, planned("test_efficientnet", pad_type="same"), **knobs) is None
    learner = perturb(learner_of(method, network, "cnn", **knobs), std=0.1)
    adapted = [m.get_base_layer() for m in learner.student.modules() if isinstance(m, BaseTunerLayer)]
    assert any(type(m) is Conv2dSame for m in adapted)
    logits = learner.student(images)
    assert (logits - with_head(network)(images)).abs().max() > 1e-3
    torch.testing.assert_close(learner.deployed().network(images), logits, rtol=1e-4, atol=1e-4)


@by_peft
@pytest.mark.parametrize(
    ("name", "kwargs", "module"),
    [
        ("beit_base_patch16_224", SMALL, "blocks.0.attn.qkv"),
        ("beitv2_base_patch16_224", SMALL, "blocks.0.attn.qkv"),
        ("eva02_tiny_patch14_224", SMALL, "blocks.0.attn.qkv"),
        ("swinv2_tiny_window8_256", SWIN, "layers.0.blocks.0.attn.qkv"),
    ],
)
def test_maps_whose_weight_a_network_reads_without_calling_them_are_refused_by_name(
    method, knobs, name, kwargs, module
):
    reason = refusal(method, planned(name, **kwargs), **knobs)
    assert f"never calls '{module}'" in reason


def test_what_a_network_reads_past_can_be_left_out_by_choosing_other_maps():
    assert refusal("lora", planned("beit_base_patch16_224", **SMALL), targets="mlp") is None


@by_peft
def test_maps_into_which_a_network_looks_are_refused(method, knobs):
    reason = refusal(method, planned("davit_tiny", **DAVIT), **knobs)
    assert "DaVit" in reason
    assert "put around" in reason


@by_peft
@pytest.mark.parametrize("name", ["levit_128s", "resnetv2_18"])
def test_heads_that_are_not_one_linear_layer_are_refused_at_planning(method, knobs, name):
    assert "its classifier is not one linear layer" in refusal(method, planned(name), **knobs)


def test_lora_refuses_dilated_convolutions_and_ia3_scales_them():
    setting = planned("skresnet18")
    assert "cannot be dilated, and 'layer1.0.conv1.paths.1.conv' is" in refusal("lora", setting)
    assert refusal("ia3", setting) is None


def test_ia3_refuses_a_network_without_maps_to_scale():
    assert "no module for the targets 'all'" in refusal("ia3", planned("twins_svt_small"))


def test_oft_refuses_a_block_that_does_not_divide_what_a_map_takes_in():
    setting = planned("vit_tiny_patch16_224", "vit", depth=1, mlp_ratio=1.34)
    assert "does not divide the 257 inputs of 'blocks.0.mlp.fc2'" in refusal("oft", setting)


def test_refusing_at_planning_needs_no_peft():
    code = (
        "import sys; from tuned import planned, refusal; s = planned('test_vit', 'vit');"
        "print([refusal(m, s) for m in ('lora', 'ia3', 'vera', 'oft')], 'peft' in sys.modules)"
    )
    folder = Path(__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[None, None, None, None] False"
