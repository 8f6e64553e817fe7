"""The decisive tests of adapters by peft, PEFT-1 to PEFT-5."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny import CLASSES, cnn, given_for, hybrid_vit, make_case, make_images, run_chain, tensor_hash, vit
from torch import nn

from methods.by_peft import target_modules
from methods.contract import Batch, Given, trainable_parameters
from methods.heads import TEACHER_HEAD, load_head
from methods.lora import LoRA, LoRAConfig, LoRALearner

VARIANTS = ["lora", "rslora", "dora"]
BUILDERS = [vit, hybrid_vit, cnn, lambda: cnn("test_resnet"), lambda: cnn("test_convnext")]


def head_for(network: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = network.num_features
    return {
        "weight": torch.randn(CLASSES, width, generator=generator) * width**-0.5,
        "bias": torch.randn(CLASSES, generator=generator),
    }


def learner_of(network: nn.Module, **knobs) -> LoRALearner:
    params = LoRAConfig(**knobs).model_dump(
        include={"variant", "rank", "alpha_ratio", "targets", "dropout", "head_init"}, mode="json"
    )
    results = {TEACHER_HEAD: head_for(network)} if params["head_init"] == "probe" else {}
    torch.manual_seed(0)
    given = Given(values={"teacher": copy.deepcopy(network)}, num_classes=CLASSES, results=results)
    return LoRALearner(params, given).train()


def with_head(network: nn.Module) -> nn.Module:
    head = head_for(network)
    return load_head(copy.deepcopy(network), head["weight"], head["bias"]).eval()


def perturb(learner: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def wrapped(learner: LoRALearner) -> list[str]:
    return [name for name, module in learner.student.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", BUILDERS)
def test_peft_1_at_the_start_it_is_the_teacher(build, variant):
    network, (images, _) = build(), make_images(4)
    learner = learner_of(network, variant=variant).eval()
    torch.testing.assert_close(learner.student(images), with_head(network)(images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", BUILDERS)
def test_peft_2_merged_has_the_base_keys_and_shapes(build, variant):
    network, (images, _) = build(), make_images(4)
    learner = learner_of(network, variant=variant)
    perturb(learner)
    learner.eval()
    logits = learner.student(images)
    deployed = learner.deployed()
    shapes = {name: tensor.shape for name, tensor in deployed.network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in with_head(network).state_dict().items()}
    torch.testing.assert_close(deployed.network(images), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.student(images), logits, rtol=0, atol=0)


def test_peft_3_saved_and_loaded_it_gives_the_same_logits(tmp_path):
    network, (images, _) = vit(), make_images(4)
    learner = learner_of(network).eval()
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    learner.student.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(with_head(network), tmp_path).eval()
    torch.testing.assert_close(loaded(images), learner.student(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("targets", "per_block"), [("qkv", 1), ("attn", 2), ("mlp", 2), ("all", 4)])
@pytest.mark.parametrize("build", [vit, hybrid_vit])
def test_peft_4_wrapped_modules(build, targets, per_block):
    learner = learner_of(build(depth=6), targets=targets)
    names = wrapped(learner)
    assert len(names) == per_block * 6
    assert not any("patch_embed" in name or "head" in name for name in names)


@pytest.mark.parametrize("teacher", ["vit", "hybrid", "cnn"])
def test_peft_5_training_moves_no_base_tensor(teacher):
    case = make_case(teacher)
    before = tensor_hash(case.teacher)
    chain = run_chain(LoRA, LoRAConfig(lr=1e-2), case, *make_images(), steps=6)
    assert tensor_hash(case.teacher) == before
    theirs = {n: t for n, t in case.teacher.state_dict().items() if not n.startswith(("head.", "classifier."))}
    mine = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in chain.learner.student.state_dict().items()
        if "lora_" not in name
    }
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    merged = chain.deployed.network.state_dict()
    assert any(not torch.equal(merged[name], tensor) for name, tensor in theirs.items())


def test_vt_2_trainable_parameters_follow_the_fused_qkv():
    learner = learner_of(vit(depth=6), rank=8)
    head = CLASSES * 48 + CLASSES
    per_block = 8 * ((48 + 144) + (48 + 48) + (48 + 192) + (192 + 48))
    assert trainable_parameters(learner) - head == 6 * per_block


def test_names_that_end_like_a_target_are_not_matched():
    learner = learner_of(cnn("test_resnet"))
    names = {name.removeprefix("base_model.model.") for name in wrapped(learner)}
    network = cnn("test_resnet")
    assert names == set(target_modules(network, "all"))
    first = next(name for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    assert first not in names
    assert "fc" not in names


def test_grouped_convolutions_are_left_alone():
    network = cnn()
    assert any(m.groups > 1 for m in network.modules() if isinstance(m, nn.Conv2d))
    modules = dict(network.named_modules())
    pointwise = target_modules(network, "mlp")
    every = target_modules(network, "all")
    assert all(modules[name].groups == 1 for name in every)
    assert all(modules[name].kernel_size == (1, 1) for name in pointwise)
    assert set(pointwise) < set(every)


@pytest.mark.parametrize("head_init", ["probe", "zero"])
def test_the_head_trains_from_where_it_was_put(head_init):
    case = make_case()
    stages = LoRA.stages(LoRAConfig(head_init=head_init), case.setting)
    assert len(stages) == (2 if head_init == "probe" else 1)
    learner = learner_of(case.teacher, head_init=head_init)
    head = learner.student.get_base_model().head
    expected = head_for(case.teacher)["weight"] if head_init == "probe" else torch.zeros(CLASSES, 48)
    assert torch.equal(head.weight, expected)
    assert head.weight.requires_grad
    images, labels = make_images(8)
    learner(Batch(images, labels), 0.0)["loss"].backward()
    assert head.weight.grad.abs().max() > 0


def test_a_teacher_without_a_head_gets_one():
    learner = learner_of(vit(num_classes=0))
    assert learner.student(make_images(2)[0]).shape == (2, CLASSES)


def test_dropout_is_ours_alone():
    network = hybrid_vit(proj_drop_rate=0.5)
    learner = learner_of(network, dropout=0.1).train()
    training = {name for name, m in learner.student.named_modules() if m.training}
    assert training
    assert all("lora_dropout" in name for name in training)
    assert not any(m.training for m in learner.eval().student.modules())


def test_the_scale_is_alpha_over_rank_or_its_root():
    for variant, scale in (("lora", 2.0), ("rslora", 2.0 * 16 / 4)):
        learner = learner_of(vit(), variant=variant, rank=16, alpha_ratio=2.0)
        layer = next(m for m in learner.student.modules() if isinstance(m, LoraLayer))
        assert layer.scaling["default"] == pytest.approx(scale)


def test_targets_that_a_network_lacks_are_invalid():
    on_cnn = make_case("cnn").setting
    assert "of kind cnn" in LoRA.invalid(LoRAConfig(targets="qkv"), on_cnn)
    assert LoRA.invalid(LoRAConfig(targets="mlp"), on_cnn) is None
    assert LoRA.invalid(LoRAConfig(targets="qkv"), make_case("vit").setting) is None
    with pytest.raises(ValueError, match="no module"):
        target_modules(cnn(), "attn")


def test_importing_methods_does_not_import_peft():
    code = "import sys, methods; methods.discover(); print({'peft', 'transformers', 'ray'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_stage_reads_only_the_teacher():
    case = make_case()
    (stage,) = LoRA.stages(LoRAConfig(head_init="zero"), case.setting)
    given = given_for(stage, case, torch.zeros(0), {})
    assert LoRALearner(stage.params, given).student is not None
