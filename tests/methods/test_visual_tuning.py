"""The decisive tests of the methods that tune a teacher, VT-1 to VT-6."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from tiny import CLASSES, SIDE, cnn, hybrid_vit, make_images, vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tuned import CNNS, VITS, learner_of, perturb, planned, rebuilt, refusal, setting_for, train, with_head

from methods import discover
from methods.adapter import AdapterLearner
from methods.contract import Given, trainable_parameters
from methods.parts.prompts import Prompted, add_prompts
from methods.ssf import ScaledShifted, points
from methods.teacher_probe import TeacherProbe
from methods.tuning import TunedTeacher, _rehearsed, tunings
from methods.vpt import VPT, VPTConfig

IDENTITIES = [
    ("full_tuning", {}),
    ("partial_tuning", {}),
    ("bitfit", {}),
    ("ln_tuning", {}),
    ("adapter", {"variant": "pfeiffer"}),
    ("adapter", {"variant": "houlsby"}),
    ("adaptformer", {}),
    ("ssf", {"noise": 0.0}),
    ("lora", {}),
    ("ia3", {"scales": "outputs"}),
    ("ia3", {"scales": "paper"}),
    ("vera", {"rank": 4}),
    ("oft", {"variant": "oft"}),
    ("oft", {"variant": "boft"}),
]
OTHERS = [("ssf", {}), ("vpt", {"depth": "deep", "prompts": 4}), ("vpt", {"depth": "shallow", "prompts": 4})]
ON_CNN = [("full_tuning", {}), ("partial_tuning", {}), ("bitfit", {}), ("ln_tuning", {}), ("ssf", {}), ("ia3", {})]


def name_of(case: object) -> str:
    if isinstance(case, dict):
        return "-".join(str(v) for v in case.values()) or "default"
    return str(case)


def logits_of(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(make_images(4)[0])


# VT-1


@pytest.mark.parametrize("teacher", VITS)
@pytest.mark.parametrize(("method", "knobs"), IDENTITIES, ids=name_of)
def test_vt_1_at_the_start_it_is_the_teacher(method, knobs, teacher):
    network = VITS[teacher]()
    learner = learner_of(method, network, **knobs).eval()
    torch.testing.assert_close(logits_of(learner.student), logits_of(with_head(network)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("teacher", ["plain", "hybrid", "pre_norm"])
@pytest.mark.parametrize(("method", "knobs"), OTHERS, ids=name_of)
def test_vt_1_ssf_and_prompts_are_not_the_teacher_at_the_start(method, knobs, teacher):
    network = VITS[teacher]()
    learner = learner_of(method, network, **knobs).eval()
    assert (logits_of(learner.student) - logits_of(with_head(network))).abs().max() > 1e-4


@pytest.mark.parametrize("teacher", CNNS)
@pytest.mark.parametrize(("method", "knobs"), [*ON_CNN[:4], ("ssf", {"noise": 0.0}), ("ia3", {})], ids=name_of)
def test_vt_1_at_the_start_it_is_the_convolutional_teacher(method, knobs, teacher):
    network = CNNS[teacher]()
    learner = learner_of(method, network, "cnn", **knobs).eval()
    torch.testing.assert_close(logits_of(learner.student), logits_of(with_head(network)), rtol=0, atol=2e-6)


# VT-2

D, L, P, B = 48, 6, 5, 8
TINY = [
    ("full_tuning", {}, None),
    ("partial_tuning", {"last": 1}, 12 * D * D + 13 * D),
    ("partial_tuning", {"last": 2}, 2 * (12 * D * D + 13 * D)),
    ("vpt", {"depth": "shallow", "prompts": P}, P * D),
    ("vpt", {"depth": "deep", "prompts": P}, L * P * D),
    ("adapter", {"variant": "pfeiffer", "bottleneck": D // 8}, L * (2 * D * (D // 8) + D // 8 + D)),
    ("adapter", {"variant": "houlsby", "bottleneck": D // 8}, 2 * L * (2 * D * (D // 8) + D // 8 + D)),
    ("adaptformer", {"bottleneck": B}, L * (2 * D * B + B + D)),
    ("bitfit", {}, L * 11 * D + 2 * D),
    ("ln_tuning", {}, L * 4 * D + 2 * D),
    ("ssf", {}, 2 * (L * 11 * D + 2 * D)),
    ("lora", {"rank": B, "targets": "qkv"}, L * B * (D + 3 * D)),
    ("ia3", {"scales": "outputs"}, L * 9 * D),
    ("ia3", {"scales": "paper"}, L * 7 * D),
    ("vera", {"rank": B}, L * (9 * D + 4 * B)),
    ("oft", {"variant": "oft", "block": B}, L * 7 * D * (B - 1) // 2),
    ("oft", {"variant": "boft", "block": B}, L * (7 * D * B + 9 * D)),
]


@pytest.mark.parametrize(("method", "knobs", "expected"), TINY, ids=name_of)
def test_vt_2_trained_parameters_follow_the_closed_form(method, knobs, expected):
    network = vit(depth=L, dim=D)
    below = sum(p.numel() for p in network.parameters()) - (CLASSES * D + CLASSES)
    learner = learner_of(method, network, **knobs)
    assert trainable_parameters(learner) - (CLASSES * D + CLASSES) == (below if expected is None else expected)


BASE = [
    ("full_tuning", {}, 85_798_656),
    ("partial_tuning", {"last": 1}, 7_087_872),
    ("vpt", {"depth": "shallow", "prompts": 50}, 38_400),
    ("vpt", {"depth": "deep", "prompts": 10}, 92_160),
    ("vpt", {"depth": "deep", "prompts": 50}, 460_800),
    ("adaptformer", {"bottleneck": 64}, 1_189_632),
    ("adaptformer", {"bottleneck": 8}, 156_768),
    ("bitfit", {}, 102_912),
    ("ln_tuning", {}, 38_400),
    ("ssf", {}, 205_824),
    # The survey counts independent pairs on q and v. peft's one A for all of qkv comes to 8 · (768 + 2304) a block,
    # which happens to be the same number.
    ("lora", {"rank": 8, "targets": "qkv"}, 294_912),
]


@pytest.mark.parametrize(("method", "knobs", "expected"), BASE, ids=name_of)
def test_vt_2_trained_parameters_of_vit_b_16(method, knobs, expected):
    with torch.device("meta"):
        network = VisionTransformer(num_classes=0)  # timm's defaults are ViT-B/16
    chosen = discover()[method]
    assert issubclass(chosen, TunedTeacher)
    params = chosen.params(chosen.Config(head_init="zero", **knobs), setting_for(network))
    learner = chosen.learner(params, Given(values={"teacher": network}, num_classes=CLASSES))
    assert trainable_parameters(learner) - (CLASSES * 768 + CLASSES) == expected


# VT-3

TRAINED = [
    ("full_tuning", {}, r".*(weight|bias|cls_token|pos_embed)(?<!running_mean)"),
    ("partial_tuning", {"last": 2}, r"blocks\.[45]\..*"),
    ("vpt", {"depth": "deep", "prompts": 3}, r"blocks\.\d\.prompts"),
    ("vpt", {"depth": "shallow", "prompts": 3}, r"blocks\.0\.prompts"),
    ("adapter", {"variant": "houlsby"}, r"blocks\.\d\.ls[12]\.adapter\.(down|up)\.(weight|bias)"),
    ("adaptformer", {}, r"blocks\.\d\.mlp\.adapter\.(down|up)\.(weight|bias)"),
    ("bitfit", {}, r".*\.bias"),
    ("ln_tuning", {}, r"(blocks\.\d\.norm[12]|norm|.*\.bn\d)\.(weight|bias)"),
    ("ssf", {}, r".*\.(scale|shift)"),
    ("lora", {}, r".*\.lora_[AB]\.default\.weight"),
    ("ia3", {}, r".*\.ia3_l\.default"),
    ("vera", {"rank": 4}, r".*\.vera_lambda_[bd]\.default"),
    ("oft", {"variant": "oft"}, r".*\.oft_R\.default\.weight"),
    ("oft", {"variant": "boft"}, r".*\.boft_[Rs]\.default"),
]


@pytest.mark.parametrize("build", [vit, hybrid_vit])
@pytest.mark.parametrize(("method", "knobs", "trained"), TRAINED, ids=name_of)
def test_vt_3_only_what_the_method_names_moves(method, knobs, trained, build):
    learner = learner_of(method, build(depth=6), **knobs)
    before = {name: tensor.clone() for name, tensor in learner.student.state_dict().items()}
    train(learner)
    after = learner.student.state_dict()
    names = {name.removeprefix("base_model.model."): name for name in after}
    moved = {short for short, name in names.items() if not torch.equal(before[name], after[name])}
    head = {"head.weight", "head.bias"}
    # timm builds these stages behind the map that the stem gives, and never runs them.
    names = {
        short: name for short, name in names.items() if not re.match(r"patch_embed\.backbone\.blocks\.[34]", short)
    }
    assert moved == head | {short for short in names if re.fullmatch(trained, short)}


@pytest.mark.parametrize("teacher", CNNS)
@pytest.mark.parametrize(("method", "knobs"), ON_CNN, ids=name_of)
def test_vt_3_training_leaves_batch_statistics_alone(method, knobs, teacher):
    learner = learner_of(method, CNNS[teacher](), "cnn", **knobs)
    before = {name: buffer.clone() for name, buffer in learner.student.named_buffers()}
    frozen = {name: p.clone() for name, p in learner.student.named_parameters() if not p.requires_grad}
    train(learner)
    assert all(torch.equal(buffer, before[name]) for name, buffer in learner.student.named_buffers())
    now = dict(learner.student.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())


def test_vt_3_partial_tuning_of_a_cnn_trains_its_last_stages():
    for last, stages in ((1, ["layer4"]), (2, ["layer3", "layer4"])):
        learner = learner_of("partial_tuning", cnn("test_resnet"), "cnn", last=last)
        names = {name.split(".")[0] for name, p in learner.student.named_parameters() if p.requires_grad}
        assert names == {*stages, "fc"}
    learner = learner_of("partial_tuning", cnn(), "cnn", last=1)
    names = {name for name, p in learner.student.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in learner.student.named_parameters() if re.match(r"blocks\.4|conv_head|bn2|class", n)}


# VT-4


@pytest.mark.parametrize("teacher", VITS)
@pytest.mark.parametrize(("method", "knobs"), [*IDENTITIES, *OTHERS], ids=name_of)
def test_vt_4_what_is_deployed_equals_what_was_trained(method, knobs, teacher):
    """On every common kind of vision transformer, and as an export builds it anew."""
    build = VITS[teacher]
    learner = perturb(learner_of(method, build(), **knobs))
    trained = logits_of(learner.student)
    deployed = learner.deployed()
    torch.testing.assert_close(logits_of(deployed.network), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(rebuilt(deployed, build)), logits_of(deployed.network), rtol=0, atol=0)
    torch.testing.assert_close(logits_of(learner.student), trained, rtol=0, atol=0)


@pytest.mark.parametrize("teacher", CNNS)
@pytest.mark.parametrize(("method", "knobs"), ON_CNN, ids=name_of)
def test_vt_4_what_is_deployed_equals_what_was_trained_of_a_cnn(method, knobs, teacher):
    build = CNNS[teacher]
    learner = perturb(learner_of(method, build(), "cnn", **knobs))
    trained = logits_of(learner.student)
    deployed = learner.deployed()
    assert (deployed.changes, deployed.structure) == ({}, None)
    torch.testing.assert_close(logits_of(rebuilt(deployed, build)), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ssf", "ia3", "vera", "oft", "bitfit", "ln_tuning", "partial_tuning"])
def test_vt_4_merging_restores_the_teachers_modules(method):
    network = hybrid_vit()
    deployed = perturb(learner_of(method, network)).deployed()
    kinds = [(name, type(module)) for name, module in deployed.network.named_modules()]
    assert kinds == [(name, type(module)) for name, module in with_head(network).named_modules()]
    assert (deployed.changes, deployed.structure) == ({}, None)


def test_vt_4_ssf_is_a_scale_and_a_shift_of_what_each_module_gives():
    network = vit(depth=1)
    learner = learner_of("ssf", network).eval()
    inserted = {n: m for n, m in learner.student.named_modules() if isinstance(m, ScaledShifted)}
    block = [f"blocks.0.{n}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    assert list(inserted) == ["patch_embed.proj", *block, "norm"]
    for name, module in inserted.items():
        seen = {}
        module.register_forward_hook(lambda m, args, out, seen=seen: seen.update(x=args[0], y=out))
        logits_of(learner.student)
        expected = network.get_submodule(name)(seen["x"])
        tail = (-1, 1, 1) if expected.ndim == 4 else (-1,)
        expected = expected * module.scale.view(tail) + module.shift.view(tail)
        torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-6)


def test_vt_4_ssf_starts_as_the_authors_do():
    learner = learner_of("ssf", vit(dim=192))
    scales = torch.cat([m.scale for m in learner.student.modules() if isinstance(m, ScaledShifted)])
    shifts = torch.cat([m.shift for m in learner.student.modules() if isinstance(m, ScaledShifted)])
    assert (scales.mean().item(), scales.std().item()) == pytest.approx((1.0, 0.02), abs=1e-3)
    assert (shifts.mean().item(), shifts.std().item()) == pytest.approx((0.0, 0.02), abs=1e-3)


def test_vt_4_ssf_acts_before_the_activation_inside_a_norm():
    network = cnn("test_efficientnet")
    learner = perturb(learner_of("ssf", network, "cnn"), std=0.5)
    name = next(n for n, m in network.named_modules() if type(m).__name__ == "BatchNormAct2d")
    module = learner.student.get_submodule(name)
    seen = {}
    module.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    logits_of(learner.student)
    bn = network.get_submodule(name)
    plain = nn.functional.batch_norm(seen["x"], bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    expected = bn.act(plain * module.scale.view(-1, 1, 1) + module.shift.view(-1, 1, 1))
    torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


def test_vt_4_ssf_has_no_shift_where_there_is_no_bias_to_hold_it():
    learner = learner_of("ssf", VITS["no_qkv_bias"]())
    inserted = {n: m for n, m in learner.student.named_modules() if isinstance(m, ScaledShifted)}
    without = {name for name, module in inserted.items() if module.shift is None}
    assert without == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}


# VT-5, VT-6: prompts


@pytest.mark.parametrize("teacher", VITS)
@pytest.mark.parametrize("deep", [True, False])
def test_vt_5_no_prompts_are_no_change(teacher, deep):
    network = VITS[teacher]()
    same = add_prompts(copy.deepcopy(network), prompts=0, deep=deep)
    assert torch.equal(logits_of(same), logits_of(network))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("teacher", ["plain", "hybrid", "registers"])
def test_vt_5_every_block_sees_class_prompts_and_patches(teacher, depth):
    network = VITS[teacher]()
    tokens = 1 + network.num_reg_tokens + network.patch_embed.num_patches
    learner = learner_of("vpt", network, depth=depth, prompts=7).eval()
    student = learner.student
    inner = [block.block if isinstance(block, Prompted) else block for block in student.blocks]
    seen: list[Tensor] = []
    for block in inner:
        block.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    final: list[Tensor] = []
    student.norm.register_forward_pre_hook(lambda m, args: final.append(args[0]))
    first: list[Tensor] = []
    network.blocks[0].register_forward_pre_hook(lambda m, args: first.append(args[0]))
    logits_of(student)
    logits_of(network)
    assert [x.shape[1] for x in seen] == [tokens + 7] * len(inner)
    assert final[0].shape[1] == tokens
    at = network.num_prefix_tokens
    assert torch.equal(seen[0][:, :at], first[0][:, :at])  # the class token, still in front
    assert torch.equal(seen[0][:, at + 7 :], first[0][:, at:])  # patches keep their positional embeddings
    prompts = student.blocks[0].prompts
    assert torch.equal(seen[0][:, at : at + 7], prompts.expand(4, -1, -1))
    if depth == "deep":
        assert torch.equal(seen[1][:, at : at + 7], student.blocks[1].prompts.expand(4, -1, -1))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_vt_6_only_deep_prompts_are_discarded_after_their_block(depth, at):
    student = learner_of("vpt", vit(depth=3), depth=depth, prompts=4).eval().student
    before = logits_of(student)
    block = student.blocks[at]
    inner = block.block if isinstance(block, Prompted) else block

    def spoil(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1], torch.randn_like(out[:, 1:5]), out[:, 5:]], dim=1)

    inner.register_forward_hook(spoil)
    unchanged = torch.equal(logits_of(student), before)
    assert unchanged == (depth == "deep" or at == 2)  # after the last block shallow ones are discarded as well


@pytest.mark.parametrize("teacher", VITS)
def test_vt_5_shallow_prompts_become_register_tokens(teacher):
    build = VITS[teacher]
    learner = perturb(learner_of("vpt", build(), depth="shallow", prompts=4))
    prompts = learner.student.blocks[0].prompts
    deployed = learner.deployed()
    if teacher == "pre_norm":  # the norm would act on register tokens
        assert deployed.structure is not None
        assert deployed.changes == {}
        return
    had = 3 if teacher == "registers" else 0
    assert deployed.structure is None
    assert deployed.changes == {"reg_tokens": had + 4}
    fresh = rebuilt(deployed, build)
    assert torch.equal(fresh.reg_token[:, had:], prompts)
    assert (fresh.num_prefix_tokens, fresh.num_reg_tokens) == (
        deployed.network.num_prefix_tokens,
        deployed.network.num_reg_tokens,
    )
    if not fresh.no_embed_class:
        at = int(fresh.has_class_token)
        assert not fresh.pos_embed[:, at : at + 4].any()
    maps = [n.forward_intermediates(make_images(2)[0], indices=1)[1][0] for n in (fresh, deployed.network)]
    assert torch.equal(*maps)


def test_vt_5_prompts_start_uniform_with_the_papers_bound():
    learner = learner_of("vpt", vit(dim=96), prompts=100)
    prompts = torch.cat([block.prompts for block in learner.student.blocks]).flatten()
    bound = (6 / (3 * 8 * 8 + 96)) ** 0.5
    assert prompts.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_prompt_dropout_acts_on_prompts_and_only_while_training():
    learner = learner_of("vpt", hybrid_vit(proj_drop_rate=0.5), dropout=0.5, prompts=3)
    active = {name for name, m in learner.student.named_modules() if m.training}
    assert active == {f"blocks.{i}.drop" for i in range(6)}
    images = make_images(2)[0]
    assert not torch.equal(learner.student(images), learner.student(images))
    assert torch.equal(learner.eval().student(images), learner.student(images))
    assert not any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in learner.deployed().network.blocks[0].children())


def test_what_is_deployed_can_be_counted_as_it_is():
    """torch's counter of operations follows the inputs of modules, and these must not be parameters."""
    for method, knobs in [*OTHERS, ("adapter", {}), ("adaptformer", {})]:
        deployed = learner_of(method, vit(depth=2), **knobs).deployed()
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            rebuilt(deployed, VITS["plain"])(make_images(1)[0])
        assert counter.get_total_flops() > 0


def test_prompts_are_tuned_by_adamw_or_as_their_authors_do():
    setting = setting_for(vit())
    (*_, stage) = VPT.stages(VPTConfig(), setting)
    (*_, other) = VPT.stages(VPTConfig(optimizer="sgd", lr=25.0), setting)
    assert (stage.recipe.optimizer, other.recipe.optimizer) == ("adamw", "sgd")
    assert stage.params == other.params


# Adapters


def test_adapters_see_what_the_papers_say_they_see():
    images = make_images(2)[0]
    for method, knobs in (("adapter", {"variant": "houlsby"}), ("adaptformer", {"scale": 0.2})):
        network = vit(depth=1, init_values=0.3)
        student = perturb(learner_of(method, network, **knobs), std=0.1).student
        x: list[Tensor] = []
        y: list[Tensor] = []
        student.blocks[0].register_forward_hook(lambda m, args, out, x=x, y=y: x.append(args[0]) or y.append(out))
        with torch.no_grad():
            student(images)
            block, own = student.blocks[0], network.blocks[0]
            if method == "adapter":
                h = own.ls1(own.attn(own.norm1(x[0])))
                middle = x[0] + h + block.ls1.adapter(h)
                h = own.ls2(own.mlp(own.norm2(middle)))
                expected = middle + h + block.ls2.adapter(h)
            else:
                middle = x[0] + own.ls1(own.attn(own.norm1(x[0])))
                side = block.mlp.adapter
                beside = 0.2 * side.up(torch.relu(side.down(middle)))
                expected = middle + own.ls2(own.mlp(own.norm2(middle))) + beside
        torch.testing.assert_close(y[0], expected, rtol=1e-5, atol=1e-5)


def test_adapters_refuse_blocks_that_they_would_break():
    network = vit(depth=2, block_fn=ResPostBlock)
    for method in ("adapter", "adaptformer"):
        with pytest.raises(ValueError, match=rf"{method} serves .*VisionTransformer are ResPostBlock"):
            learner_of(method, network)
    with pytest.raises(ValueError, match="vpt serves timm's VisionTransformer, and the teacher is a EfficientNet"):
        learner_of("vpt", cnn(), "cnn")


def test_ssf_refuses_a_transformer_without_its_places():
    network = vit(depth=2)
    network.blocks[1].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"VisionTransformer has no 'blocks.1.mlp.fc1'"):
        points(network)


# Rates and decay


def test_full_tuning_slows_down_away_from_the_head():
    learner = learner_of("full_tuning", vit(depth=3), backbone=0.1, layer_decay=0.5)
    scale = {name.removeprefix("student."): learner.lr_scale(name) for name, _ in learner.named_parameters()}
    assert scale["head.weight"] == 1.0
    assert scale["norm.weight"] == scale["blocks.2.mlp.fc2.weight"] == pytest.approx(0.05)
    assert scale["blocks.0.attn.qkv.weight"] == pytest.approx(0.1 / 8)
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == pytest.approx(0.1 / 16)
    for name in ("test_resnet", "test_efficientnet", "test_convnext"):
        learner = learner_of("full_tuning", cnn(name), "cnn", backbone=0.1, layer_decay=0.5)
        scales = [learner.lr_scale(n) for n, _ in learner.named_parameters()]
        assert scales == sorted(scales), name  # parameters come in the order of the layers
        assert scales[-1] == 1.0
        assert len(set(scales)) > 4


@pytest.mark.parametrize(
    ("method", "knobs", "pattern"),
    [
        ("vpt", {}, r"\.prompts$"),
        ("ssf", {}, r"\.(scale|shift)$"),
        ("bitfit", {}, r"\.bias$"),
        ("ia3", {}, r"\.ia3_l\."),
        ("vera", {"rank": 4}, r"vera_lambda"),
        ("oft", {"variant": "boft"}, r"\.boft_s\."),
        ("full_tuning", {}, r"(pos_embed|cls_token|\.bias)$"),
    ],
    ids=name_of,
)
def test_prompts_scales_and_biases_are_not_decayed(method, knobs, pattern):
    learner = learner_of(method, vit(depth=2), **knobs)
    trained = {n: learner.decays(n, p) for n, p in learner.named_parameters() if p.requires_grad}
    named = [n for n in trained if re.search(pattern, n)]
    assert named
    assert not any(trained[n] for n in named)
    assert trained[next(n for n in trained if n.endswith("head.weight"))]


# Planning


def test_every_tuning_can_be_a_distillations_teacher():
    names = {"full_tuning", "partial_tuning", "vpt", "adapter", "adaptformer", "bitfit", "ln_tuning", "ssf"}
    assert names | {"lora", "ia3", "vera", "oft"} <= set(tunings())
    assert "teacher_probe" not in tunings()
    families = {discover()[name].family for name in tunings()}
    assert families >= {"fine-tuning", "prompt", "adapter", "parameter"}


def test_the_teachers_probe_trains_nothing():
    setting = setting_for(vit())
    assert TeacherProbe.stages(TeacherProbe.Config(), setting) == []
    assert (TeacherProbe.deploys, TeacherProbe.trains_head) == ("teacher", False)


def test_configurations_that_a_teacher_cannot_run_are_invalid():
    methods = discover()
    small, on_cnn = setting_for(vit(depth=2)), setting_for(cnn(), "cnn")
    partial, oft, ia3 = (methods[name] for name in ("partial_tuning", "oft", "ia3"))
    assert "has 2 blocks" in partial.invalid(partial.Config(last=4), small)
    assert "has 5 stages" in partial.invalid(partial.Config(last=6), on_cnn)
    assert "width 48" in oft.invalid(oft.Config(block=32), small)
    assert "of kind cnn" in ia3.invalid(ia3.Config(scales="paper"), on_cnn)
    for name in ("vpt", "adapter", "adaptformer", "vera", "oft"):
        assert "needs a vit teacher" in methods[name].refuses(on_cnn)


def test_a_head_that_is_not_one_linear_layer_is_refused():
    network = vit()
    network.reset_classifier = lambda n: None  # type: ignore[method-assign]
    network.head = nn.Conv2d(SIDE, CLASSES, 1)
    with pytest.raises(ValueError, match="classifier is not one linear layer"):
        AdapterLearner(
            {"head_init": "zero", "variant": "houlsby", "bottleneck": 4},
            Given(values={"teacher": network}, num_classes=CLASSES),
        )


SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
EDGENEXT = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "heads": (2, 2, 2, 2)}
DAVIT = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("beit_base_patch16_224", SMALL), ("davit_tiny", DAVIT), ("edgenext_xx_small", EDGENEXT)],
)
def test_ssf_refuses_networks_that_look_into_what_it_puts_around_their_modules(name, kwargs):
    reason = refusal("ssf", planned(name, **kwargs))
    assert f"ssf cannot serve timm/{name}: " in reason
    assert "put around" in reason


@pytest.mark.parametrize("name", ["test_nfnet", "nf_resnet26"])
def test_ssf_refuses_weights_that_are_standardised_before_use(name):
    reason = refusal("ssf", planned(name))
    assert "is a ScaledStdConv2d" in reason
    assert "could not be merged" in reason


def test_a_scale_that_could_not_be_folded_is_refused_by_the_learner_too():
    with pytest.raises(ValueError, match="is a ScaledStdConv2d"):
        learner_of("ssf", cnn("test_nfnet"), "cnn")


def test_a_network_that_cannot_run_without_values_is_not_refused_for_that():
    setting = planned("test_resnet")
    network = setting.teacher.skeleton
    network.register_forward_pre_hook(lambda *_: torch.zeros(1, device="meta").item())
    other = replace(setting, teacher=replace(setting.teacher, name="timm/reads_a_value"))
    assert refusal("ssf", other) is None


def test_a_skeleton_that_was_built_with_values_is_rehearsed_like_any_other():
    network = vit(depth=2)
    setting = setting_for(network)
    setting = replace(setting, teacher=replace(setting.teacher, name="tiny/with_values", skeleton=network))
    for method in ("ssf", "lora", "net2net", "vpt"):
        assert refusal(method, setting) is None
    assert next(network.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "efficientvit_m0"])
@pytest.mark.parametrize("method", ["full_tuning", "partial_tuning"])
def test_attention_biases_that_a_network_keeps_computed_are_not_trained(method, name):
    assert "attention biases" in refusal(method, planned(name))
    assert refusal("bitfit", planned(name)) is None


def test_full_tuning_refuses_a_decay_by_layers_where_timm_knows_none():
    setting = planned("poolformer_s12")
    assert "does not say how the layers of MetaFormer are grouped" in refusal("full_tuning", setting, layer_decay=0.75)
    assert refusal("full_tuning", setting, layer_decay=1.0) is None
    assert "coarse grouping is not implemented" in refusal("partial_tuning", planned("rdnet_tiny"))


def test_knobs_that_change_no_module_are_not_rehearsed_anew():
    setting = planned("test_vit2", "vit")
    unseen: dict[str, dict[str, object]] = {
        "full_tuning": {"backbone": 0.03, "head_init": "probe"},
        "net2net": {"noise": 0.02, "width": 2.0},
        "vpt": {"prompts": 7, "dropout": 0.1},
        "adapter": {"bottleneck": 5},
        "adaptformer": {"bottleneck": 5, "scale": 0.3},
        "side_tuning": {"width": 8, "depth": 3, "alpha": 0.7, "alpha_rate": 3.0, "side_init": "scratch"},
    }
    for method, knobs in unseen.items():
        refusal(method, setting)
        before = _rehearsed.cache_info().misses
        refusal(method, setting, **{"head_init": "zero", **knobs})
        assert _rehearsed.cache_info().misses == before
