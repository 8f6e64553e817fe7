"""The decisive tests of the tuners by peft other than LoRA (see test_lora.py), PEFT-1 to PEFT-5."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import cnn, hybrid_vit, make_images, vit
from tuned import learner_of, perturb, train, with_head

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
