"""WeCoLoRA on timm's other transformers: which ones planning lets through, and that what is trained is deployed."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from tiny import CLASSES
from torch import nn
from tuned import planned, refusal

from methods.contract import Batch, Given
from methods.outputs import read_outputs
from methods.wecolora import AdaptedLinear, WeCoLoRA, WeCoLoRAConfig, WeCoLoRALearner
from orchestrator.models.load import plan_network
from orchestrator.spec import Model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 4, "depth": 4}
# One of each kind of block: fused maps, three maps, biases that are added apart, gated MLPs packed and not.
KINDS = {
    "vit_small_patch16_dinov3": 18,
    "vit_small_patch16_dinov3_qkvb": 18,
    "vit_small_plus_patch16_dinov3": None,
    "eva_giant_patch14_224": None,
    "eva02_tiny_patch14_224": None,
    "eva02_small_patch14_224": None,
    "eva02_base_patch14_224": None,
    "vit_pe_core_tiny_patch16_384": None,
    "beit_base_patch16_224": 18,
    "beitv2_base_patch16_224": 18,
    "deit3_small_patch16_224": 18,
    "vit_base_patch14_reg4_dinov2": 18,
    "vit_giant_patch14_dinov2": None,
}


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=CLASSES, **SMALL)
    with torch.no_grad():  # timm's own start leaves blocks close to the identity
        for block_parameter in network.blocks.parameters():
            if block_parameter.ndim == 2:
                block_parameter.normal_(std=block_parameter.shape[1] ** -0.5)
            else:
                block_parameter.add_(0.2 * torch.randn_like(block_parameter))
    return network.eval()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_uniform_transformer_is_planned_as_one(name):
    info, _ = plan_network(Model(model=f"timm/{name}", pretrained=False), "teacher")
    assert info.kind == "vit"
    assert info.blocks == len(info.skeleton.blocks) == len(info.channels)
    assert len(set(info.channels)) == 1


@pytest.mark.parametrize("name", ["hiera_tiny_224", "swin_tiny_patch4_window7_224", "resnet18", "mvitv2_tiny"])
def test_networks_of_stages_are_not(name):
    info, _ = plan_network(Model(model=f"timm/{name}", pretrained=False), "teacher")
    assert (info.kind, info.blocks) == ("cnn", 0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_the_pairs_of_every_kind_learn_and_are_merged_exactly(name, targets):
    network = network_of(name)
    setting = planned(name, "vit", **SMALL, num_classes=CLASSES)
    config = WeCoLoRAConfig(factor=2, rank=3, targets=targets)
    assert WeCoLoRA.invalid(config, setting) is None
    (stage,) = WeCoLoRA.stages(config, setting)
    torch.manual_seed(0)
    learner = WeCoLoRALearner(stage.params, Given(values={"teacher": copy.deepcopy(network)}, num_classes=CLASSES))
    learner.train()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        outputs = read_outputs(network, images, stage.feed.outputs)
    pairs = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    if targets == "all" and (maps := KINDS[name]) is not None:
        assert sum(p.numel() for p in pairs.values()) == maps * 2 * 3 * 48
    first = learner(Batch(images, None, outputs), 0.0)["loss"]
    assert first > 0.01
    optimizer = torch.optim.Adam(pairs.values(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = learner(Batch(images, None, outputs), 0.0)["loss"]
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in pairs.values())
    assert loss < 0.95 * first
    learner.eval()
    deployed = learner.deployed()
    assert not any(isinstance(m, AdaptedLinear) for m in deployed.network.modules())
    plain = timm.create_model(name, **{**SMALL, "num_classes": CLASSES, **deployed.changes})
    plain.load_state_dict(deployed.network.state_dict(), strict=True)
    tokens = learner.student.forward_features(images)
    assert (tokens - network.forward_features(images)).abs().max() > 0.01
    torch.testing.assert_close(plain.eval().forward_features(images), tokens, rtol=1e-4, atol=2e-5)


def test_rotary_embeddings_that_differ_from_block_to_block_are_refused():
    setting = planned("vit_small_patch16_rope_mixed_224", "vit")
    assert "rotary embeddings of its own" in refusal("wecolora", setting)


def test_a_block_without_the_maps_is_refused_at_planning_and_others_can_be_chosen():
    setting = planned("vit_tiny_patch16_224", "vit", depth=2)
    for block in setting.teacher.skeleton.blocks:
        block.mlp.fc1 = nn.Sequential(block.mlp.fc1)
    assert "'mlp.fc1'" in refusal("wecolora", setting)
    assert refusal("wecolora", setting, targets="attn") is None


def test_a_network_that_leaves_a_map_out_is_refused():
    setting = planned("vit_tiny_patch16_224", "vit", depth=2)
    for block in setting.teacher.skeleton.blocks:
        block.mlp.forward = lambda x: x
    assert "leaves out 'blocks.0.mlp.fc1" in refusal("wecolora", setting)


def test_the_teacher_s_skeleton_is_not_changed_by_the_rehearsal():
    setting = planned("vit_tiny_patch16_224", "vit", depth=2)
    before = {name: id(module) for name, module in setting.teacher.skeleton.named_modules()}
    assert refusal("wecolora", setting) is None
    assert before == {name: id(module) for name, module in setting.teacher.skeleton.named_modules()}
