"""The remapping family: relations, attention and side-tuning; decisive tests carry their ids."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from learners import learner_of, twins
from tiny import CLASSES, draw, make_case, make_images, run_chain, teacher_outputs, vit

from methods.attention_transfer import (
    AttentionTransfer,
    AttentionTransferConfig,
    affinity,
    attention,
    attention_loss,
    depths_of,
)
from methods.contract import Batch, supervised_loss
from methods.darts import DARTS
from methods.fna import FNA
from methods.heads import POOLED, TEACHER_HEAD
from methods.kd import KD
from methods.outputs import Output, read_outputs
from methods.parts.side import SideNetwork, SideTuned
from methods.rkd import RKD, relation_losses, relations
from methods.side_tuning import SideTuning, SideTuningConfig
from methods.tuning import LOGITS

# Relational distillation


def test_rkd_distances_by_hand():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])  # 5, 4 and 3 apart: 4 on average
    expected = torch.tensor([[0.0, 1.25, 1.0], [1.25, 0.0, 0.75], [1.0, 0.75, 0.0]])
    torch.testing.assert_close(relations(rows)[0], expected)
    other = torch.tensor([[0.0], [1.0], [2.0]])  # 1, 2 and 1 apart: 4/3 on average
    by_hand = ((0.75 - 1.25) ** 2 + (1.5 - 1.0) ** 2 + (0.75 - 0.75) ** 2) / 2 / 3
    assert relation_losses(other, rows)[0].item() == pytest.approx(by_hand, abs=1e-6)


def test_rkd_angles_by_hand():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    result = relations(rows)[1]
    half = math.sqrt(0.5)
    assert result[0, 1, 2].item() == pytest.approx(0.0, abs=1e-6)
    assert result[1, 0, 2].item() == pytest.approx(half, abs=1e-6)
    assert result[2, 0, 1].item() == pytest.approx(half, abs=1e-6)
    line = torch.tensor([[0.0], [1.0], [2.0]])  # at the ends 1, in the middle -1
    by_hand = ((1 - 0.0) ** 2 / 2 + (abs(-1 - half) - 0.5) + (1 - half) ** 2 / 2) / 3
    assert relation_losses(line, rows)[1].item() == pytest.approx(by_hand, abs=1e-6)


def test_rkd_relations_do_not_see_scale_rotation_or_width():
    torch.manual_seed(0)
    rows = torch.randn(8, 6)
    rotation, _ = torch.linalg.qr(torch.randn(10, 10))
    moved = 3.0 * torch.cat([rows, torch.zeros(8, 4)], 1) @ rotation + 5.0
    assert relation_losses(moved, rows)[0].item() < 1e-10
    assert relation_losses(moved, rows)[1].item() < 1e-10
    assert relation_losses(torch.randn(8, 6), rows)[0].item() > 1e-2
    assert relation_losses(torch.randn(8, 6), rows)[1].item() > 1e-2


def test_rkd_losses_and_gradients_are_those_of_every_pair_and_triple_written_out():
    torch.manual_seed(1)
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4)

    def written_out(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        apart = {(i, j): (rows[i] - rows[j]).norm() for i, j in itertools.permutations(range(5), 2)}
        mean = sum(apart.values()) / len(apart)
        cosines = [
            F.cosine_similarity(rows[i] - rows[j], rows[k] - rows[j], dim=0)
            for j, i, k in itertools.permutations(range(5), 3)
        ]
        return torch.stack([one / mean for one in apart.values()]), torch.stack(cosines)

    pairs = zip(written_out(student), written_out(teacher), strict=True)
    by_hand = [F.smooth_l1_loss(mine, theirs) for mine, theirs in pairs]
    found = relation_losses(student, teacher)
    torch.testing.assert_close(torch.stack(found), torch.stack(by_hand), rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(found, by_hand, strict=True):
        ours, expected = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (mine, theirs))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_rkd_gradients_stay_finite_where_rows_coincide():
    rows = torch.randn(6, 4)
    rows[1] = rows[0]
    rows.requires_grad_(True)
    teacher = torch.randn(6, 4)
    sum(relation_losses(rows, teacher)).backward()
    assert rows.grad.abs().max() < 1e4
    for few in (1, 2):
        rows = torch.randn(few, 4, requires_grad=True)
        relation_losses(rows, torch.randn(few, 4))[1].backward()
        assert torch.equal(rows.grad, torch.zeros(few, 4))


def test_vt_10_rkd_of_the_teacher_itself_is_0_and_without_weights_it_is_kd():
    case = twins()
    learner, stage = learner_of(case, RKD)
    images, labels = make_images(16)
    batch = Batch(images, labels, teacher_outputs(case.teacher, images, stage.feed.outputs))
    parts = learner(batch, 0.0)
    assert parts["distance"].item() < 1e-9
    assert parts["angle"].item() < 1e-9
    plain, kd_stage = learner_of(case, KD)
    off, _ = learner_of(case, RKD, distance=0.0, angle=0.0)
    assert kd_stage.feed == stage.feed
    torch.testing.assert_close(off(batch, 0.0)["loss"], plain(batch, 0.0)["loss"])


def test_rkd_relations_need_no_label_and_store_nothing_but_pooled_features():
    case = make_case()
    learner, stage = learner_of(case, RKD)
    images, labels = make_images(16)
    outputs = teacher_outputs(case.teacher, images, stage.feed.outputs)
    assert set(outputs) == {POOLED.key}
    one, other = (learner(Batch(images, y, outputs), 0.0) for y in (labels, torch.full_like(labels, -1)))
    torch.testing.assert_close(one["distance"], other["distance"])
    torch.testing.assert_close(one["angle"], other["angle"])
    many = replace(case, setting=replace(case.setting, task=replace(case.setting.task, kind="multilabel")))
    assert RKD.refuses(many.setting) is None


def test_vt_10_kd_with_weight_0_is_cross_entropy_and_a_student_like_the_teacher_learns_nothing_from_it():
    case = twins()
    images, labels = make_images(16)
    batch = Batch(images, labels, teacher_outputs(case.teacher, images, (POOLED,)))
    learner, _ = learner_of(case, KD, weight=0.0)
    plain = copy.deepcopy(case.student).train()
    assert torch.equal(learner(batch, 0.0)["loss"], supervised_loss(plain(images), labels, "classification"))
    with torch.no_grad():
        learner.student.head.weight.copy_(learner.soft_teacher.weight)
        learner.student.head.bias.copy_(learner.soft_teacher.bias)
    assert abs(learner(batch, 0.0)["kd"].item()) < 1e-6


# Attention transfer


def test_attention_maps_by_hand():
    maps = torch.tensor([[[[1.0, 2.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]]])  # squares sum to 5, 4, 0, 4
    length = math.sqrt(5**2 + 4**2 + 4**2)
    torch.testing.assert_close(attention(maps), torch.tensor([[5.0, 4.0, 0.0, 4.0]]) / length)
    other = torch.ones(1, 1, 2, 2)  # 1/2 everywhere
    by_hand = sum((a / length - 0.5) ** 2 for a in (5, 4, 0, 4))
    assert attention_loss(maps, other, "attention").item() == pytest.approx(by_hand, abs=1e-6)


def test_affinity_by_hand():
    maps = torch.tensor([[[[1.0, 1.0], [0.0, -2.0]], [[0.0, 1.0], [3.0, 0.0]]]])
    half = math.sqrt(0.5)
    rows = [[1.0, half, 0.0, -1.0], [half, 1.0, half, -half], [0.0, half, 1.0, 0.0], [-1.0, -half, 0.0, 1.0]]
    torch.testing.assert_close(affinity(maps), torch.tensor([rows]))
    ones = torch.ones(1, 5, 2, 2)
    by_hand = sum((v - 1) ** 2 for row in rows for v in row) / 16
    assert attention_loss(maps, ones, "affinity").item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("kind", ["attention", "affinity"])
def test_attention_transfer_ignores_scale_and_the_number_of_channels(kind):
    torch.manual_seed(0)
    maps = torch.randn(4, 6, 3, 3)
    assert attention_loss(7.0 * torch.cat([maps, maps], 1), maps, kind).item() < 1e-10
    assert attention_loss(torch.randn(4, 2, 3, 3), maps, kind).item() > 1e-3


@pytest.mark.parametrize("kind", ["attention", "affinity"])
@pytest.mark.parametrize(("teacher", "student"), [("vit", "cnn"), ("cnn", "vit"), ("hybrid", "cnn")])
def test_attention_transfer_joins_any_two_networks(kind, teacher, student):
    case = make_case(teacher, student)
    learner, stage = learner_of(case, AttentionTransfer, kind=kind, depths=3, grid=2)
    images, labels = make_images()
    parts = learner(draw(stage, case, images, labels, 8), 0.0)
    assert parts[kind].item() > 0.0
    torch.testing.assert_close(parts["loss"], 0.5 * parts["ce"] + 0.5 * parts["kd"] + 10.0 * parts[kind])


def test_attention_transfer_of_the_teacher_itself_is_0():
    case = twins()
    learner, stage = learner_of(case, AttentionTransfer, grid=2)
    images, labels = make_images(8)
    assert learner(draw(stage, case, images, labels, 8), 0.0)["attention"].item() < 1e-10


def test_attention_transfer_reads_the_same_shares_of_both_depths():
    assert depths_of(3, 12) == [3, 7, 11]
    assert depths_of(1, 5) == [4]
    case = make_case("vit", "cnn")
    *_, stage = AttentionTransfer.stages(AttentionTransferConfig(depths=2, grid=4), case.setting)
    assert stage.feed.outputs == (POOLED, Output("map", layer=2, grid=4), Output("map", layer=5, grid=4))


# What the teacher's class scores come from


@pytest.mark.parametrize("method", [RKD, AttentionTransfer, FNA, DARTS], ids=lambda m: m.name)
def test_every_distillation_can_learn_from_a_tuned_teacher(method):
    case = make_case("vit", "vit")
    config = method.Config(teacher_tuning="full_tuning")
    stages = method.stages(config, case.setting)
    assert all(s.feed.of == "tune" and LOGITS in s.feed.outputs for s in stages if s.name in ("search", "distil"))
    chain = run_chain(method, config, case, *make_images(), steps=2)
    assert chain.deployed.base == "student"
    assert "kd" in chain.parts[-1]


# Architecture search


@pytest.mark.parametrize(("place", "full", "empty"), [(0, "weights", "alphas"), (1, "alphas", "weights")])
def test_darts_a_half_without_rows_is_0_and_leaves_batch_statistics_finite(place, full, empty, monkeypatch):
    """As on a rank of a group that has few rows."""
    monkeypatch.setattr("methods.darts.places", lambda count: torch.arange(place, place + count))
    case = make_case()
    learner, stage = learner_of(case, DARTS, stage=-2, cells=1, stages=2, width=8)
    images, labels = make_images(1)
    parts = learner(Batch(images, labels, teacher_outputs(case.teacher, images, stage.feed.outputs)), 0.0)
    assert parts[empty].item() == 0.0
    assert parts["loss"].item() == parts[full].item() > 0.0
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    assert all(b.isfinite().all() for b in learner.student.buffers())


# Side-tuning


def side_tuned(mix):
    torch.manual_seed(0)
    base = vit(seed=1)
    return SideTuned(base, SideNetwork(48, 8, 3), mix).eval(), base


def test_vt_9_alpha_1_is_the_base_and_alpha_0_the_side_network():
    images, _ = make_images(8)
    network, base = side_tuned(100.0)
    assert torch.equal(network.forward_features(images), base.forward_head(base.forward_features(images), True))
    assert torch.equal(network(images), base(images))
    network, _ = side_tuned(-200.0)
    assert torch.equal(network.forward_features(images), network.side(images))
    network, base = side_tuned(0.0)
    halves = 0.5 * base.forward_head(base.forward_features(images), True) + 0.5 * network.side(images)
    torch.testing.assert_close(network.forward_features(images), halves)


def test_side_tuning_moves_only_the_side_alpha_and_the_head():
    case = make_case("cnn")
    before = {n: t.clone() for n, t in case.teacher.state_dict().items()}
    chain = run_chain(SideTuning, SideTuningConfig(lr=1e-2), case, *make_images(), steps=4)
    network = chain.deployed.network
    head = {id(p) for p in network.get_classifier().parameters()}
    for name, tensor in network.base.state_dict(keep_vars=True).items():
        if id(tensor) not in head:
            assert torch.equal(tensor, before[name]), name
    assert network.mix.item() != 0.0
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad} == {"base", "side", "mix"}


def test_side_tuning_starts_from_a_distillation_of_the_teacher():
    case, (images, labels) = make_case(), make_images()
    chain = run_chain(SideTuning, SideTuningConfig(side_budget=4.0, budget=0.1, side_lr=1e-2), case, images, labels, 30)
    imitation = [p["imitation"] for p in chain.parts if "imitation" in p]
    assert sum(imitation[-5:]) < 0.5 * sum(imitation[:5])
    stages = SideTuning.stages(SideTuningConfig(side_init="scratch"), case.setting)
    assert [s.name for s in stages] == [TEACHER_HEAD, "tune"]
    learner, _ = learner_of(case, SideTuning, {"side": chain.results["side"]})
    own = learner.student.side.state_dict()
    assert all(torch.equal(tensor, chain.results["side"][name]) for name, tensor in own.items())


def test_a_side_tuned_teacher_gives_every_output_that_a_teacher_gives():
    network, base = side_tuned(0.0)
    images, _ = make_images(4)
    wanted = [POOLED, LOGITS, Output("map", layer=2, grid=2), Output("tokens", layer=3)]
    own, plain = read_outputs(network, images, wanted), read_outputs(base, images, wanted)
    assert torch.equal(own[LOGITS.key], network(images))
    assert torch.equal(own["map_2_grid2"], plain["map_2_grid2"])
    assert torch.equal(own["tokens_3_prenorm"], plain["tokens_3_prenorm"])
    assert network.num_classes == CLASSES
    network.reset_classifier(3)
    assert (network.num_classes, network(images).shape[1]) == (3, 3)
