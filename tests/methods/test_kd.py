from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from learners import learner_of as built_learner
from tiny import CLASSES, draw, fitted, given_for, make_case, make_images, run_chain, teacher_outputs

from methods.contract import Batch, Feed, supervised_loss
from methods.finetune import FineTune, FineTuneConfig, FineTuneLearner
from methods.fitnet import FitNet, FitNetConfig, FitNetLearner, layer_at
from methods.heads import POOLED, TEACHER_HEAD
from methods.kd import KD, KDConfig, KDLearner, distillation_loss
from methods.lora import LoRA
from methods.outputs import Output, read_outputs
from methods.tdmr import TDMR
from orchestrator.train.feed import Feeder


def learner_of(case, method=KD, config=None, **knobs):
    images, labels = make_images()
    config = config or method.Config(**knobs)
    head, stage = method.stages(config, case.setting)
    n = case.setting.task.labelled
    results = {head.name: fitted(head, case, images, labels, {})}
    torch.manual_seed(0)
    learner = stage.learner(stage.params, given_for(stage, case, labels[:n], results))
    return learner.train(), stage, results


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ota_6_a_hand_computed_case(temperature):
    teacher, student = (
        torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]),
        torch.tensor([[0.5, 0.5, -2.0], [1.0, 0.0, 3.0]]),
    )

    def softmax(row):
        exps = [math.exp(v / temperature) for v in row]
        return [e / sum(exps) for e in exps]

    expected = 0.0
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(softmax(t), softmax(s), strict=True))
    expected *= temperature**2 / 2
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_ota_7_gradient_norm_hardly_depends_on_temperature():
    torch.manual_seed(0)
    teacher, start = torch.randn(256, 10), torch.randn(256, 10)
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        student = start.clone().requires_grad_(True)
        distillation_loss(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    middle = sum(norms) / len(norms)
    assert all(abs(n - middle) <= 0.25 * middle for n in norms)


@pytest.mark.parametrize("labelled", [16, 10])
def test_vt_10_weight_0_is_cross_entropy_bit_for_bit(labelled):
    case = make_case("vit", "cnn")
    kd, _, _ = learner_of(case, weight=0.0)
    images, labels = make_images(16)
    labels = torch.where(torch.arange(16) < labelled, labels, -1)
    batch = Batch(images, labels, teacher_outputs(case.teacher, images, (POOLED,)))
    plain = copy.deepcopy(case.student).train()
    expected = supervised_loss(plain(images), labels, "classification")
    expected.backward()
    loss = kd(batch, 0.0)["loss"]
    loss.backward()
    assert torch.equal(loss, expected)
    for one, other in zip(kd.student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_vt_10_weight_0_trains_as_fine_tuning_does():
    case = make_case("vit", "cnn")
    kd, stage, _ = learner_of(case, weight=0.0)
    (plain_stage,) = FineTune.stages(FineTuneConfig(), case.setting)
    plain = FineTuneLearner(plain_stage.params, given_for(plain_stage, case, torch.zeros(0), {})).train()
    images, labels = make_images(16)
    batch = Batch(images, labels, teacher_outputs(case.teacher, images, stage.feed.outputs))
    for learner in (kd, plain):
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            learner(batch, 0.0)["loss"].backward()
            optimizer.step()
    for one, other in zip(kd.student.state_dict().values(), plain.student.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_vt_10_a_student_equal_to_the_teacher_has_no_kd_term():
    case = make_case("vit", "vit")
    object.__setattr__(case, "student", copy.deepcopy(case.teacher))
    learner, stage, results = learner_of(case, weight=1.0)
    with torch.no_grad():
        learner.student.head.weight.copy_(results[TEACHER_HEAD]["weight"])
        learner.student.head.bias.copy_(results[TEACHER_HEAD]["bias"])
    images, labels = make_images(16)
    batch = Batch(images, labels, teacher_outputs(case.teacher, images, stage.feed.outputs))
    parts = learner(batch, 0.0)
    assert abs(parts["kd"].item()) < 1e-6
    parts["loss"].backward()
    assert max(p.grad.abs().max().item() for p in learner.student.parameters()) < 1e-5
    logits = torch.randn(8, 3)
    assert distillation_loss(logits, logits, 4.0).item() == 0.0


def test_the_loss_is_the_weighted_sum():
    case = make_case()
    learner, stage, _ = learner_of(case, weight=0.3, temperature=2.0)
    images, labels = make_images()
    parts = learner(draw(stage, case, images, labels, 16), 0.0)
    torch.testing.assert_close(parts["loss"], 0.7 * parts["ce"] + 0.3 * parts["kd"])


def test_unlabelled_rows_teach_through_the_teacher_only():
    case = make_case("vit", "vit")
    learner, _, _ = learner_of(case, weight=0.5)
    images, labels = make_images(16)
    outputs = teacher_outputs(case.teacher, images, (POOLED,))
    none = torch.full_like(labels, -1)
    parts = learner(Batch(images, none, outputs), 0.0)
    assert parts["ce"].item() == 0.0
    assert parts["kd"].item() > 0.0
    parts["loss"].backward()


def test_ota_5_permuting_labels_leaves_the_kd_term():
    case = make_case("vit", "vit")
    learner, _, _ = learner_of(case)
    images, labels = make_images(16)
    outputs = teacher_outputs(case.teacher, images, (POOLED,))
    one, other = (learner(Batch(images, y, outputs), 0.0) for y in (labels, labels.flip(0)))
    assert torch.equal(one["kd"], other["kd"])
    assert not torch.equal(one["ce"], other["ce"])


def test_half_precision_features_are_accepted():
    case = make_case()
    learner, _, _ = learner_of(case)
    images, labels = make_images(8)
    outputs = {k: v.half() for k, v in teacher_outputs(case.teacher, images, (POOLED,)).items()}
    assert learner(Batch(images, labels, outputs), 0.0)["loss"].isfinite()


def test_the_teacher_head_is_one_stage_for_every_knob_and_method():
    case = make_case()
    heads = [KD.stages(KDConfig(temperature=t), case.setting)[0] for t in (1.0, 8.0)]
    heads.append(FitNet.stages(FitNetConfig(grid=2), case.setting)[0])
    assert heads[0] == heads[1] == heads[2]


def test_kd_learns():
    images, labels = make_images()
    chain = run_chain(KD, KDConfig(lr=3e-3), make_case(), images, labels, steps=40)
    assert sum(chain.losses[-5:]) < 0.5 * sum(chain.losses[:5])


@pytest.mark.parametrize(
    ("fraction", "count", "layer"), [(0.5, 12, 5), (1.0, 12, 11), (0.01, 12, 0), (0.5, 5, 2), (0.25, 4, 0), (1.0, 1, 0)]
)
def test_fitnet_layer_at(fraction, count, layer):
    assert layer_at(fraction, count) == layer


@pytest.mark.parametrize(("teacher", "student"), [("vit", "cnn"), ("cnn", "vit"), ("hybrid", "cnn")])
def test_fitnet_hint_vanishes_where_the_maps_agree(teacher, student):
    case = make_case(teacher, student)
    learner, stage, _ = learner_of(case, FitNet, grid=2)
    images, labels = make_images(8)
    batch = draw(stage, case, images, labels, 8)
    assert learner(batch, 0.0)["hint"].item() > 0.0
    learner.eval()
    with torch.no_grad():
        own = learner.regressor(read_outputs(learner.student, batch.images, [learner.mine])[learner.mine.key])
    batch.outputs[learner.theirs.key] = own
    assert learner(batch, 0.0)["hint"].item() == 0.0


def test_fitnet_hint_of_an_equal_network_with_an_identity_regressor_is_0():
    case = make_case("vit", "vit")
    object.__setattr__(case, "student", copy.deepcopy(case.teacher))
    learner, stage, _ = learner_of(case, FitNet)
    with torch.no_grad():
        torch.nn.init.dirac_(learner.regressor.weight)
        learner.regressor.bias.zero_()
    images, labels = make_images(8)
    assert learner(draw(stage, case, images, labels, 8), 0.0)["hint"].item() < 1e-10


def test_fitnet_hint_is_half_the_mean_square():
    guess, target = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
    assert FitNetLearner.hint_loss(guess, target).item() == 2.0


def test_fitnet_hints_first_then_distils():
    case = make_case("vit", "vit")
    learner, stage, _ = learner_of(case, FitNet, hint_share=0.5, hint_layer=0.5)
    images, labels = make_images(8)
    batch = draw(stage, case, images, labels, 8)
    parts = learner(batch, 0.49)
    assert set(parts) == {"loss", "hint"}
    parts["loss"].backward()
    moved = {name for name, p in learner.named_parameters() if p.grad is not None}
    assert "regressor.weight" in moved
    assert "student.blocks.2.mlp.fc2.weight" in moved  # of 6 blocks, the third is the guided one
    assert not any(name.startswith(("student.blocks.3.", "student.head.")) for name in moved)
    learner.zero_grad()
    parts = learner(batch, 0.5)
    assert set(parts) == {"loss", "ce", "kd"}
    parts["loss"].backward()
    assert learner.student.head.weight.grad is not None
    assert learner.regressor.weight.grad is None


def test_fitnet_without_hints_is_kd():
    case = make_case()
    images, labels = make_images()
    fitnet, stage, _ = learner_of(case, FitNet, hint_share=0.0)
    kd, _, _ = learner_of(case, KD)
    batch = draw(stage, case, images, labels, 16)
    assert torch.equal(fitnet(batch, 0.0)["loss"], kd(batch, 0.0)["loss"])


def test_fitnet_deploys_no_regressor():
    case = make_case()
    chain = run_chain(FitNet, FitNetConfig(), case, *make_images(), steps=4)
    names = {n for n, _ in chain.deployed.network.named_parameters()}
    assert names == {n for n, _ in case.student.named_parameters()}
    assert not any("regressor" in n for n in names)
    assert any("regressor" in n for n, _ in chain.learner.named_parameters())
    assert "hint" in chain.parts[0]
    assert "kd" in chain.parts[-1]


def test_fitnet_reads_the_map_at_the_same_share_of_both_networks():
    case = make_case("vit", "cnn")
    _, stage = FitNet.stages(FitNetConfig(hint_layer=0.5, grid=2), case.setting)
    assert stage.feed.outputs == (POOLED, Output("map", layer=2, grid=2))
    assert stage.params["student_layer"] == 2
    assert stage.params["teacher_channels"] == 48
    assert stage.reads == ("student",)


def test_fitnet_refuses_networks_without_maps():
    case = make_case()
    bare = type(case.setting.teacher)(**{**vars(case.setting.teacher), "channels": ()})
    setting = type(case.setting)(task=case.setting.task, teacher=bare, student=case.setting.student)
    assert "gives none" in FitNet.refuses(setting)
    assert FitNet.refuses(case.setting) is None


def test_cross_entropy_of_no_labels_is_0():
    logits = torch.randn(4, CLASSES, requires_grad=True)
    loss = supervised_loss(logits, torch.full((4,), -1), "classification")
    loss.backward()
    assert loss.item() == 0.0
    mixed = supervised_loss(logits, torch.tensor([1, -1, 2, -1]), "classification")
    torch.testing.assert_close(mixed, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 2])))


@pytest.mark.parametrize("method", [KD, TDMR], ids=lambda m: m.name)
def test_the_share_with_labels_is_rounded_as_the_knob_says(method):
    said = method.Config.model_fields["labelled_fraction"].description
    assert "8 images of a batch of 64" in said
    assert "at least one and at most all but one" in said

    def share(batch: int, fraction: float) -> int:
        feed = Feed("all", labels=True, labelled_fraction=fraction)
        return Feeder(feed, 100, None, None, labelled=range(50), batch=batch, views=1, seed=0).pools[0][1]

    assert [share(64, f) for f in (0.0, 0.05, 0.1, 0.25, 1.0)] == [8, 8, 8, 16, 56]
    assert [share(12, f) for f in (0.0, 0.25, 1.0)] == [2, 4, 10]  # portions of gcd(6, 8) = 2


def test_a_transformers_class_token_and_positions_are_not_decayed():
    learner, _, _ = learner_of(make_case("vit", "vit"))
    tensors = {n: p for n, p in learner.named_parameters() if p.ndim >= 2}
    assert {n for n, p in tensors.items() if not learner.decays(n, p)} == {"student.cls_token", "student.pos_embed"}


def test_of_a_convolutional_student_every_tensor_but_vectors_is_decayed():
    learner, _, _ = learner_of(make_case("vit", "cnn"))
    assert all(learner.decays(n, p) == (p.ndim >= 2) for n, p in learner.named_parameters())


def test_the_magnitudes_of_dora_are_not_decayed():
    learner, _ = built_learner(make_case("cnn", "cnn"), LoRA, variant="dora")
    magnitudes = {n: p for n, p in learner.named_parameters() if "magnitude" in n}
    assert {p.ndim for p in magnitudes.values()} == {4}
    assert not any(learner.decays(n, p) for n, p in magnitudes.items())
    assert all(learner.decays(n, p) for n, p in learner.named_parameters() if "lora_A" in n)


def test_kd_learner_has_no_teacher_inside():
    learner, _, _ = learner_of(make_case())
    assert isinstance(learner, KDLearner)
    assert set(dict(learner.named_children())) == {"student", "soft_teacher"}
    assert not list(learner.soft_teacher.parameters())
    assert not any("head_" in name for name in learner.state_dict())
