"""The decisive tests of WeCoLoRA, WC-1 to WC-10."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CLASSES, given_for, hybrid_vit, make_case, make_images, run_chain, teacher_outputs, tensor_hash, vit
from torch import nn

from methods.contract import Batch, Given, trainable_parameters
from methods.wecolora import AdaptedLinear, WeCoLoRA, WeCoLoRAConfig, WeCoLoRALearner, kept_blocks, target_blocks


def learner_of(teacher: nn.Module, **knobs) -> tuple[WeCoLoRALearner, tuple]:
    case = make_case()
    config = WeCoLoRAConfig(**knobs)
    setting = copy.copy(case.setting)
    object.__setattr__(
        setting, "teacher", type(setting.teacher)(**{**vars(setting.teacher), "blocks": len(teacher.blocks)})
    )
    (stage,) = WeCoLoRA.stages(config, setting)
    torch.manual_seed(0)
    given = Given(values={"teacher": copy.deepcopy(teacher)}, num_classes=CLASSES)
    learner = WeCoLoRALearner(stage.params, given)
    learner.train()
    return learner, stage.feed.outputs


def loss_of(teacher: nn.Module, images: torch.Tensor, **knobs) -> torch.Tensor:
    learner, outputs = learner_of(teacher, **knobs)
    return learner(Batch(images, None, teacher_outputs(teacher, images, outputs)), 0.0)["loss"]


def perturb(learner: nn.Module, std: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))


@pytest.mark.parametrize("build", [vit, hybrid_vit])
def test_wc_1_factor_1_is_the_teacher(build):
    teacher, (images, _) = build(), make_images(4)
    learner, _ = learner_of(teacher, factor=1)
    assert torch.equal(learner.student(images), teacher(images))
    assert loss_of(teacher, images, factor=1).item() == 0.0


@pytest.mark.parametrize("offset", ["first", "last"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_wc_2_at_the_start_it_is_the_truncated_teacher(factor, offset):
    teacher, (images, _) = vit(depth=6), make_images(4)
    learner, _ = learner_of(teacher, factor=factor, offset=offset)
    plain = copy.deepcopy(teacher)
    plain.blocks = nn.Sequential(*[teacher.blocks[i] for i in kept_blocks(6, factor, offset)])
    assert torch.equal(learner.student(images), plain(images))
    assert len(learner.student.feature_info) == len(learner.student.blocks)


@pytest.mark.parametrize(("depth", "factor", "rank", "dim"), [(12, 2, 8, 48), (12, 3, 16, 64), (6, 3, 4, 32)])
def test_wc_3_trainable_parameters_are_18_m_rank_d(depth, factor, rank, dim):
    learner, _ = learner_of(vit(depth=depth, dim=dim), factor=factor, rank=rank)
    assert trainable_parameters(learner) == 18 * (depth // factor) * rank * dim


def test_wc_3_at_paper_scale_it_is_10_616_832():
    base = vit(depth=1, dim=768)
    learner, _ = learner_of(base, factor=1, rank=128)
    assert 6 * trainable_parameters(learner) == 10_616_832


@pytest.mark.parametrize(("targets", "maps"), [("qv", 4), ("qkv", 6), ("attn", 8), ("all", 18)])
def test_wc_3_smaller_targets_have_fewer(targets, maps):
    learner, _ = learner_of(vit(), factor=2, rank=4, targets=targets)
    assert trainable_parameters(learner) == maps * 3 * 4 * 48


def test_wc_4_first_backward_moves_b_only():
    teacher, (images, _) = vit(), make_images(4)
    learner, outputs = learner_of(teacher, factor=2)
    learner(Batch(images, None, teacher_outputs(teacher, images, outputs)), 0.0)["loss"].backward()
    for name, parameter in learner.named_parameters():
        if name.endswith(".A"):
            assert parameter.grad.abs().max().item() == 0.0
        elif name.endswith(".B"):
            assert parameter.grad.abs().max().item() > 0.0
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("teacher_kind", ["vit", "hybrid"])
def test_wc_5_training_moves_no_copied_tensor(teacher_kind):
    case = make_case(teacher_kind)
    before = tensor_hash(case.teacher)
    chain = run_chain(WeCoLoRA, WeCoLoRAConfig(factor=2, rank=4), case, *make_images(), steps=4)
    assert tensor_hash(case.teacher) == before
    theirs = case.teacher.state_dict()
    compared = 0
    for name, tensor in chain.learner.student.state_dict().items():
        if name.endswith((".A", ".B")):
            continue
        name = name.replace(".base.", ".")
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            name = f"blocks.{2 * int(index)}.{rest}"
        assert torch.equal(tensor, theirs[name])
        compared += 1
    assert compared == len(theirs) - 3 * 12
    assert any(p.abs().max() > 0 for n, p in chain.learner.named_parameters() if n.endswith(".B"))


@pytest.mark.parametrize("targets", ["qv", "qkv", "attn", "all"])
def test_wc_6_merged_is_unmerged(targets):
    learner, _ = learner_of(vit(), factor=2, rank=8, targets=targets)
    learner.eval()
    perturb(learner)
    images, _ = make_images(8)
    deployed = learner.deployed()
    assert not any(isinstance(m, AdaptedLinear) for m in deployed.network.modules())
    assert any(isinstance(m, AdaptedLinear) for m in learner.student.modules())
    assert deployed.changes == {"depth": 3}
    logits = learner.student(images)
    assert 0.1 < logits.abs().mean() < 10
    torch.testing.assert_close(deployed.network(images), logits, rtol=0, atol=2e-6)


def test_wc_6_in_float64_merging_is_exact_to_1e_12():
    learner, _ = learner_of(vit().double(), factor=2, rank=8)
    learner.double().eval()
    perturb(learner)
    images = make_images(8)[0].double()
    torch.testing.assert_close(learner.deployed().network(images), learner.student(images), rtol=0, atol=1e-12)


def test_wc_7_the_offset_decides_the_blocks():
    assert kept_blocks(12, 3, "first") == [0, 3, 6, 9]
    assert kept_blocks(12, 3, "last") == [2, 5, 8, 11]
    teacher, (images, _) = vit(depth=12), make_images(4)
    first, _ = learner_of(teacher, factor=3, offset="first")
    last, _ = learner_of(teacher, factor=3, offset="last")
    assert not torch.allclose(first.student(images), last.student(images))


def test_wc_7_a_factor_that_does_not_divide_keeps_ceil_or_floor():
    assert kept_blocks(12, 5, "first") == [0, 5, 10]
    assert kept_blocks(12, 5, "last") == [4, 9]


@pytest.mark.parametrize("offset", ["first", "last"])
def test_blocks_are_compared_with_the_end_of_their_group(offset):
    assert target_blocks(12, 2, offset) == [1, 3, 5, 7, 9, 11]
    assert target_blocks(12, 3, offset) == [2, 5, 8, 11]
    assert target_blocks(12, 5, "first") == [4, 9, 11]


def test_multi_block_adds_the_earlier_groups():
    teacher, (images, _) = vit(), make_images(4)
    learner, outputs = learner_of(teacher, factor=2, multi_block=0.5)
    assert [o.layer for o in outputs] == [-1, 1, 3]
    parts = learner(Batch(images, None, teacher_outputs(teacher, images, outputs)), 0.0)
    torch.testing.assert_close(parts["loss"], parts["last_block"] + 0.5 * parts["earlier_blocks"])
    assert parts["earlier_blocks"] > 0
    assert loss_of(teacher, images, factor=1, multi_block=1.0).item() == 0.0


def test_wc_8_l1_falls_five_times_on_four_images():
    case = make_case(unlabelled=4, labelled=0)
    config = WeCoLoRAConfig(factor=2, rank=32, lr=1e-2, warmup=0.1)
    chain = run_chain(WeCoLoRA, config, case, *make_images(4), steps=30, batch=4)
    assert chain.losses[0] > 0.1
    assert chain.losses[0] / chain.losses[-1] >= 5


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
def test_wc_9_pre_and_post_norm_differ_and_vanish_at_factor_1(loss):
    teacher, (images, _) = vit(), make_images(4)
    pre, post = (loss_of(teacher, images, factor=2, target=t, loss=loss).item() for t in ("prenorm", "postnorm"))
    assert pre > 0
    assert post > 0
    assert pre != post
    for target in ("prenorm", "postnorm"):
        assert loss_of(teacher, images, factor=1, target=target, loss=loss).item() == 0.0


def test_cosine_vanishes_at_factor_1():
    teacher, (images, _) = vit(), make_images(4)
    assert abs(loss_of(teacher, images, factor=1, loss="cosine").item()) < 1e-6
    assert loss_of(teacher, images, factor=2, loss="cosine").item() > 1e-2


def test_wc_10_labels_change_nothing():
    images, labels = make_images()
    config = WeCoLoRAConfig(factor=2, rank=4)
    one = run_chain(WeCoLoRA, config, make_case(), images, labels, steps=3)
    other = run_chain(WeCoLoRA, config, make_case(), images, labels.flip(0), steps=3)
    assert one.losses == other.losses
    assert tensor_hash(one.deployed.network) == tensor_hash(other.deployed.network)


def test_a_factor_above_the_depth_is_invalid():
    case = make_case()
    assert WeCoLoRA.invalid(WeCoLoRAConfig(factor=6), case.setting) is None
    assert "larger than the 6 blocks" in WeCoLoRA.invalid(WeCoLoRAConfig(factor=7), case.setting)


def test_only_transformers_are_served():
    assert "vit teacher" in WeCoLoRA.refuses(make_case("cnn").setting)


def test_a_block_without_the_named_maps_is_refused():
    case = make_case()
    case.teacher.blocks[0].mlp.fc1 = nn.Identity()
    (stage,) = WeCoLoRA.stages(WeCoLoRAConfig(), case.setting)
    with pytest.raises(ValueError, match=r"mlp\.fc1"):
        WeCoLoRALearner(stage.params, given_for(stage, case, torch.zeros(0), {}))
