"""TDMR's stage B, tuned teachers and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tdmr_cases import PAIRS, batch_of, config, learner_of
from tiny import (
    CLASSES,
    SIDE,
    fitted,
    given_for,
    make_case,
    make_images,
    run_chain,
    teacher_outputs,
    tensor_hash,
)

from methods.contract import (
    TEACHER,
    Batch,
    trainable_parameters,
)
from methods.heads import POOLED
from methods.outputs import read_outputs
from methods.proxy import Proxy, load_proxy
from methods.tdmr import (
    SCORES,
    TDMR,
    active_depths,
    depth_weights,
    depths_of,
    feature_distance,
    snapshot_at,
    teacher_share,
)
from methods.transport import transport_cost


def test_schedules():
    assert [active_depths(u, 4, 0.8, "depth") for u in (0, 0.19, 0.2, 0.4, 0.6, 0.8, 1)] == [1, 1, 2, 3, 4, 4, 4]
    assert [active_depths(u, 4, 1.0, "depth+weight") for u in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 3, 4, 4]
    assert all(active_depths(0, 3, 0.8, mode) == 3 for mode in ("none", "weight", "snapshot"))
    assert [teacher_share(u, 0.2, "weight") for u in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])
    assert [teacher_share(u, 0.2, "depth+weight") for u in (0, 1)] == pytest.approx([1, 0.2])
    assert all(teacher_share(u, 0.2, mode) == 0.2 for u in (0, 1) for mode in ("none", "depth", "snapshot"))
    assert [snapshot_at(u, 4, 0.8) for u in (0, 0.19, 0.2, 0.4, 0.6, 1)] == [0, 0, 1, 2, 3, 3]
    assert snapshot_at(0.9, 1, 0.8) == 0
    assert depth_weights(4, "uniform") == [0.25] * 4
    assert depth_weights(4, "rising") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert depth_weights(3, "last") == [0, 0, 1]
    assert depths_of(4, 12) == [2, 5, 8, 11]
    assert depths_of(4, 5) == [1, 2, 3, 4]
    assert depths_of(8, 3) == [0, 1, 2]


@pytest.mark.parametrize("mode", ["none", "depth", "weight", "snapshot", "depth+weight"])
def test_the_loss_is_the_specified_sum(mode):
    case = make_case("vit", "vit")
    learner, _, _ = learner_of(
        case, mode=mode, lambda_end=0.3, beta=2.0, gamma=0.5, depths=3, stage_weights="rising", switch=0.8
    )
    batch, progress = batch_of(case), 0.5
    parts = learner(batch, progress)
    share = teacher_share(progress, 0.3, mode)
    assert share == pytest.approx(0.65 if "weight" in mode else 0.3)
    active = 2 if "depth" in mode else 3
    z, scores = learner.targets(batch, progress)
    own = read_outputs(learner.student, batch.images, [*learner.maps, SCORES])
    expected = torch.zeros(())
    for k in range(active):
        pooled = own[learner.maps[k].key].mean((2, 3))
        distance = 1 - F.cosine_similarity(learner.adapters[k](pooled), z)
        expected = expected + (k + 1) / 6 * distance.mean()
    kd = 16 * F.kl_div(F.log_softmax(own["logits"] / 4, 1), F.softmax(scores / 4, 1), reduction="batchmean")
    ce = F.cross_entropy(own["logits"][:10], batch.labels[:10])
    total = (1 - share) * ce + share * (2.0 * expected + 0.5 * kd)
    torch.testing.assert_close(parts["loss"], total, rtol=1e-5, atol=1e-5)
    assert set(parts) == {"loss", "ce", "kd", "feature", *(f"depth_{k + 1}" for k in range(active))}


def test_mode_snapshot_changes_the_proxy_as_training_goes_on():
    case = make_case()
    learner, _, _ = learner_of(case, mode="snapshot", snapshots=2)
    plain, _, _ = learner_of(case, mode="none", snapshots=2)
    batch = batch_of(case)
    early, late = learner.targets(batch, 0.0)[0], learner.targets(batch, 0.5)[0]
    assert not torch.equal(early, late)
    assert torch.equal(late, plain.targets(batch, 0.0)[0])
    assert len(learner.proxies) == 2
    assert len(plain.proxies) == 1


@pytest.mark.parametrize("knobs", [{}, {"distance": "similarity", "transport": 0.5}])
def test_labels_matter_to_cross_entropy_only(knobs):
    case = make_case()
    learner, _, _ = learner_of(case, **knobs)
    batch = batch_of(case, labelled=16)
    flipped = Batch(batch.images, batch.labels.flip(0), batch.outputs)
    one, other = (learner.eval()(b, 0.5) for b in (batch, flipped))
    assert torch.equal(one["kd"], other["kd"])
    assert torch.equal(one["feature"], other["feature"])
    assert not torch.equal(one["ce"], other["ce"])
    none = learner(Batch(batch.images, torch.full_like(batch.labels, -1), batch.outputs), 0.5)
    assert none["ce"].item() == 0.0
    assert none["feature"].item() > 0


def test_depths_without_weight_are_not_trained():
    case = make_case()
    learner, _, _ = learner_of(case, stage_weights="last", mode="none")
    trained = [trainable_parameters(adapter) > 0 for adapter in learner.adapters]
    assert trained == [False, False, False, True]


def test_transport_is_added_to_each_depth():
    case = make_case()
    plain, _, _ = learner_of(case, mode="none")
    moved, _, _ = learner_of(case, mode="none", transport=2.0)
    batch = batch_of(case)
    one, other = plain.eval()(batch, 0.0), moved.eval()(batch, 0.0)
    z, _ = plain.targets(batch, 0.0)
    maps = read_outputs(plain.student, batch.images, plain.maps)
    own = plain.adapters[3](maps[plain.maps[3].key].flatten(1))
    torch.testing.assert_close(other["depth_4"], one["depth_4"] + 2 * transport_cost(own, z), rtol=1e-4, atol=1e-5)


def test_distances_of_hand_computed_rows():
    own, target = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    assert feature_distance(own, target, "cosine").item() == pytest.approx(0.5)
    assert feature_distance(own, target, "mse").item() == pytest.approx(1.0)
    assert feature_distance(own, target, "similarity").item() == 0.0  # one other row: no choice
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    moved = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    # softmax over the two others of cos / 0.1, a row each: theirs (0, -10), (0, 0), (-10, 0); ours (10, -10), ...
    theirs = torch.tensor([[0.0, -10.0], [0.0, 0.0], [-10.0, 0.0]]).softmax(1)
    ours = torch.tensor([[10.0, -10.0], [10.0, -10.0], [-10.0, -10.0]]).softmax(1)
    expected = (theirs * (theirs / ours).log()).sum(1).mean()
    assert feature_distance(moved, rows, "similarity").item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_means_replace_the_vectors():
    case = make_case()
    learner, _, tensors = learner_of(case, prototypes=True)
    batch = batch_of(case, n=16, labelled=10)
    z, scores = learner.targets(batch, 0.0)
    images, labels = make_images()
    proxy = load_proxy({"dim": 16, "projector": "mlp", "normalise": False}, tensors, -1)
    known = proxy(teacher_outputs(case.teacher, images[:20], (POOLED,))["pooled"])
    means = torch.stack([known[labels[:20] == c].mean(0) for c in range(CLASSES)])
    torch.testing.assert_close(z[:10], means[batch.labels[:10]], rtol=0, atol=1e-5)
    torch.testing.assert_close(z[10:], scores[10:].softmax(1) @ means, rtol=0, atol=1e-5)


def test_class_means_of_several_labels():
    proxy = Proxy(4, 3, CLASSES, "linear", False)
    proxy.prototypes.copy_(torch.randn(CLASSES, 3))
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [-1.0] * 5])
    scores = torch.zeros(3, CLASSES)
    z = proxy.prototype(scores, labels, "multilabel")
    torch.testing.assert_close(z[0], (proxy.prototypes[0] + proxy.prototypes[2]) / 2)
    torch.testing.assert_close(z[1], proxy.prototypes.mean(0))
    torch.testing.assert_close(z[2], proxy.prototypes.mean(0))


def test_it_trains_on_several_labels():
    case = make_case()
    setting = replace(case.setting, task=replace(case.setting.task, kind="multilabel"))
    case = replace(case, setting=setting)
    images, single = make_images()
    labels = F.one_hot(single, CLASSES).float()
    proxy, stage = TDMR.stages(config(), setting)
    results = {"proxy": fitted(proxy, case, images, labels, {})}
    learner = stage.learner(stage.params, given_for(stage, case, labels[:20], results)).train()
    known = torch.where(torch.arange(32)[:, None] < 20, labels, -1.0)
    batch = Batch(images, known, teacher_outputs(case.teacher, images, (POOLED,)))
    parts = learner(batch, 0.9)
    with torch.no_grad():
        scores = read_outputs(copy.deepcopy(case.student).train(), images, [SCORES])["logits"]
    expected = F.binary_cross_entropy_with_logits(scores[:20], labels[:20])
    torch.testing.assert_close(parts["ce"], expected, rtol=1e-4, atol=1e-5)
    parts["loss"].backward()


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_of_kinds_learns(teacher, student):
    case = make_case(teacher, student)
    knobs = config(mode="none", lr=3e-3, lambda_end=0.5)
    chain = run_chain(TDMR, knobs, case, *make_images(), steps=25)
    first, last = chain.parts[0], chain.parts[-1]
    assert last["feature"] < 0.8 * first["feature"]
    assert last["loss"] < first["loss"]
    assert chain.deployed.network(make_images(2)[0]).shape == (2, CLASSES)


def test_half_precision_features_are_accepted():
    case = make_case()
    learner, _, _ = learner_of(case)
    batch = batch_of(case)
    half = Batch(batch.images, batch.labels, {k: v.half() for k, v in batch.outputs.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = learner.targets(half, 0.0)
        assert z.dtype == torch.float32
        assert learner(half, 0.0)["loss"].isfinite()


# Tuned teachers


@pytest.mark.parametrize("tuning", ["lora", "full_tuning"])
@pytest.mark.parametrize("teacher", ["vit", "cnn"])
def test_a_tuned_teachers_features_are_reprogrammed(tuning, teacher):
    case = make_case(teacher, "cnn")
    knobs = config(teacher_tuning=tuning)
    assert TDMR.invalid(knobs, case.setting) is None
    *_, tune, proxy, distil = TDMR.stages(knobs, case.setting)
    assert (proxy.of, distil.feed.of) == (tune.name, tune.name)
    before = tensor_hash(case.teacher)
    images, labels = make_images()
    chain = run_chain(TDMR, knobs, case, images, labels, steps=6)
    assert tensor_hash(case.teacher) == before
    tuned = teacher_outputs(chain.networks[tune.name], images[:20], (POOLED,))["pooled"]
    plain = teacher_outputs(case.teacher, images[:20], (POOLED,))["pooled"]
    assert not torch.allclose(tuned, plain, atol=1e-4)
    mean = chain.results["proxy"]["0.standardise.mean"]
    torch.testing.assert_close(mean, tuned.mean(0), rtol=0, atol=1e-5)
    assert chain.deployed.base == "student"


# Settings that it cannot serve


def test_it_says_by_name_what_it_cannot_serve():
    case = make_case()
    flat = replace(case.setting, student=replace(case.setting.student, channels=(), name="tiny/flat"))
    assert "tiny/flat" in TDMR.refuses(flat)
    dense = replace(case.setting, task=replace(case.setting.task, kind="segmentation"))
    assert "segmentation" in TDMR.refuses(dense)
    for student in ("cnn", "vit"):
        for teacher in ("cnn", "vit"):
            assert TDMR.refuses(make_case(teacher, student).setting) is None


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"teacher_tuning": "lora"}, "teacher_tuning"),
        ({"mode": "snapshot"}, "snapshot"),
        ({"prototypes": True}, "prototypes"),
        ({"input_prompt": SIDE // 2}, "leaves nothing"),
    ],
)
def test_an_input_prompt_excludes_what_needs_stored_features(knobs, words):
    case = make_case()
    reason = TDMR.invalid(config(**{"input_prompt": 4, **knobs}), case.setting)
    assert words in reason
    assert "input_prompt" in reason
    assert TDMR.invalid(config(input_prompt=SIDE // 2, prompt_kind="additive"), case.setting) is None


def test_stage_a_reads_the_plain_teacher_unless_it_is_tuned():
    proxy, distil = TDMR.stages(config(), make_case().setting)
    assert (proxy.of, distil.feed.of) == (TEACHER, TEACHER)
    assert distil.inputs == (proxy.name,)
