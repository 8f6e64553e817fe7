"""IRF and OTA: their stages, what they make, and what they learn from it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import (
    CLASSES,
    Chain,
    given_for,
    made,
    make_case,
    make_images,
    prepare,
    publish,
    run_chain,
    teacher_outputs,
    tensor_hash,
    tiny_upstream,
)
from torch import nn

from methods.contract import Batch, FitStage, Given, ImageStage, TrainStage
from methods.finetune import FineTune, FineTuneConfig
from methods.generators.makers import Completion, RePaint, Rerepresentation, SDEdit, kept_rows, top_mask
from methods.heads import POOLED, TEACHER_HEAD, fit_linear_head_cv
from methods.irf import CALIBRATE, DELIVER, IRF, TRANSFER, IRFConfig
from methods.kd import KD, KDConfig
from methods.ota import DISTIL, GENERATE, GENERATORS, OTA, OTAConfig, OTALearner, confidence
from methods.tuning import LOGITS, tunings

COMPLETION = {"keep": 0.5, "sample_temperature": 1.0, "top_k": 1.0}


def case_with(teacher="vit", student="cnn", **kwargs):
    return make_case(teacher, student, upstream=("vq", "diffusion"), **kwargs)


def stage_of(config, case, name, method=OTA):
    (stage,) = [s for s in method.stages(config, case.setting) if s.name == name]
    return stage


def maker_of(maker, **params):
    return maker(params, Given(values={maker.upstream: tiny_upstream(maker.upstream)}, num_classes=CLASSES))


def sources(n=6, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def until(method, config, case, last, labels=None):
    """Every stage up to `last`, training stages untrained; and the stage after it."""
    images, default = make_images()
    chain = Chain(deployed=None)
    for stage in method.stages(config, case.setting):
        if stage.name == last:
            return stage, chain
        torch.manual_seed(0)
        if isinstance(stage, TrainStage):
            publish(stage, stage.learner(stage.params, given_for(stage, case, torch.empty(0), chain.results)), chain)
        else:
            prepare(stage, case, images, default if labels is None else labels, chain)
    raise AssertionError(last)


def learner_of(case, **knobs):
    stage, chain = until(OTA, OTAConfig(**knobs), case, DISTIL)
    torch.manual_seed(0)
    return stage.learner(stage.params, given_for(stage, case, torch.empty(0), chain.results)).train(), stage, chain


def batch_of(case, chain, real=8, generated=8, dtype=torch.float32):
    images, labels = make_images()
    images, teacher = images.to(dtype), copy.deepcopy(chain.networks[CALIBRATE]).to(dtype)
    pool = chain.pools[GENERATE][:generated].to(dtype)
    generated_rows = Batch(pool, None, teacher_outputs(teacher, pool, (LOGITS,)))
    return Batch(images[:real], labels[:real], generated=generated_rows)


# IRF


@pytest.mark.parametrize("teacher", ["vit", "cnn"])
def test_ota_2_delivering_leaves_every_tensor_of_the_teacher_and_calibration_moves_it(teacher):
    case = case_with(teacher)
    before = tensor_hash(case.teacher)
    _, chain = until(IRF, IRFConfig(), case, CALIBRATE)
    assert set(chain.results) == {DELIVER}
    assert tensor_hash(case.teacher) == before
    chain = run_chain(IRF, IRFConfig(lr=1e-2, weight_decay=0.0), case, *make_images(), steps=6)
    after = chain.deployed.network
    old = dict(case.teacher.named_parameters())
    moved = {n: not torch.equal(p, old[n]) for n, p in after.named_parameters() if "head" not in n}
    still = {n for n, m in moved.items() if not m}
    # A constant that is added to all keys changes no attention, so their bias gets no gradient; nothing else is still.
    assert all("classifier" in n or "bias" in n for n in still), still
    assert sum(moved.values()) > 0.9 * len(moved)
    for name, buffer in after.named_buffers():  # batch statistics stay those of pre-training
        assert torch.equal(buffer, dict(case.teacher.named_buffers())[name]), name


def test_the_head_is_fitted_on_re_represented_images_and_calibration_starts_there():
    case = case_with()
    images, labels = make_images()
    stage, chain = until(IRF, IRFConfig(), case, CALIBRATE)
    known = case.setting.task.labelled
    assert chain.pools[TRANSFER].shape == images[:known].shape
    features = {
        name: teacher_outputs(case.teacher, x, (POOLED,))[POOLED.key]
        for name, x in {"x'": chain.pools[TRANSFER], "x": images[:known]}.items()
    }
    weight, _ = fit_linear_head_cv(features["x'"], labels[:known], CLASSES)
    assert torch.equal(chain.results[DELIVER]["weight"], weight)
    assert not torch.allclose(fit_linear_head_cv(features["x"], labels[:known], CLASSES)[0], weight, atol=1e-2)
    learner = stage.learner(stage.params, given_for(stage, case, torch.empty(0), chain.results))
    assert torch.equal(learner.student.get_classifier().weight, weight)
    assert all(p.requires_grad for p in learner.student.parameters())


def test_the_backbone_is_calibrated_more_slowly_than_the_head():
    stage, chain = until(IRF, IRFConfig(backbone=0.03, layer_decay=0.5), case_with(), CALIBRATE)
    learner = stage.learner(stage.params, given_for(stage, case_with(), torch.empty(0), chain.results))
    assert learner.lr_scale("student.head.weight") == 1.0
    assert learner.lr_scale("student.blocks.5.mlp.fc1.weight") == pytest.approx(0.03 * 0.5)
    assert learner.lr_scale("student.blocks.3.mlp.fc1.weight") == pytest.approx(0.03 * 0.5**3)


@pytest.mark.parametrize(
    ("mode", "names"),
    [("irf", [TRANSFER, DELIVER, CALIBRATE]), ("lp_ft", [TEACHER_HEAD, CALIBRATE]), ("ft", [CALIBRATE])],
)
def test_the_modes_are_the_ablations_of_one_calibration(mode, names):
    case = case_with()
    stages = IRF.stages(IRFConfig(mode=mode), case.setting)
    assert [s.name for s in stages] == names
    full = IRF.stages(IRFConfig(), case.setting)[-1]
    assert (stages[-1].recipe, stages[-1].feed, stages[-1].learner) == (full.recipe, full.feed, full.learner)
    start, chain = until(IRF, IRFConfig(mode=mode), case, CALIBRATE)
    learner = start.learner(start.params, given_for(start, case, torch.empty(0), chain.results))
    assert (learner.student.head.weight == 0).all() == (mode == "ft")
    run_chain(IRF, IRFConfig(mode=mode), case, *make_images(), steps=2)


def test_irf_learns():
    images, labels = make_images()
    chain = run_chain(IRF, IRFConfig(lr=3e-3, budget=1.0), case_with(), images, labels, steps=30)
    assert (chain.deployed.network(images[:20]).argmax(1) == labels[:20]).float().mean() > 0.9


def test_an_irf_teacher_teaches_any_distillation():
    assert tunings()["irf"] is IRF
    case = case_with()
    config = KDConfig(teacher_tuning="irf")
    assert KD.invalid(config, case.setting) is None
    chain = run_chain(KD, config, case, *make_images(), steps=2)
    assert set(chain.networks) == {CALIBRATE, "distil"}
    assert "vq" in KD.invalid(config, make_case().setting)


# What is made


def test_ota_3_a_completion_that_keeps_everything_is_the_re_representation():
    x = sources()
    whole = maker_of(Completion, **{**COMPLETION, "keep": 1.0})(x, list(range(6)))
    assert torch.equal(whole, maker_of(Rerepresentation)(x, list(range(6))))


@pytest.mark.parametrize(("keep", "rows"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)])
def test_ota_3_a_completion_keeps_the_first_rows_of_codes(keep, rows):
    maker = maker_of(Completion, **{**COMPLETION, "keep": keep})
    x = sources(16, size=16)
    own, codes = maker.package.indices(x), maker.codes(x, list(range(16)))
    n = rows * maker.package.side
    assert torch.equal(codes[:, :n], own[:, :n])
    assert (codes[:, n:] != own[:, n:]).float().mean() > 0.8  # of 32 codes, a fresh draw is seldom the same


def test_ota_4_greedy_completions_of_two_seeds_are_equal_and_sampled_ones_are_not():
    x = sources()
    greedy = maker_of(Completion, **{**COMPLETION, "top_k": 1e-3})
    assert torch.equal(greedy(x, [0] * 6), greedy(x, [1] * 6))
    sampled = maker_of(Completion, **COMPLETION)
    assert torch.equal(sampled(x, [0] * 6), sampled(x, [0] * 6))
    assert not torch.equal(sampled(x, [0] * 6), sampled(x, [1] * 6))


def test_top_k_is_a_share_of_the_codebook():
    maker = maker_of(Completion, **{**COMPLETION, "top_k": 1 / 8, "keep": 0.0})
    x = sources(1, size=16).expand(200, -1, -1, -1)
    # The first code is drawn from the same distribution each time, of which the four likeliest of 32 codes are left.
    assert len(maker.codes(x, list(range(200)))[:, 0].unique()) == 4


def test_a_random_cut_leaves_something_on_both_sides_and_belongs_to_the_seed():
    rows = kept_rows("random", 4, range(300))
    assert {n: rows.count(n) > 60 for n in set(rows)} == {1: True, 2: True, 3: True}
    assert kept_rows("random", 4, [7, 3]) == [kept_rows("random", 4, [7])[0], kept_rows("random", 4, [3])[0]]
    assert kept_rows(0.5, 5, [1, 2]) == [2, 2]
    mask = top_mask([0, 2, 4], 4)
    assert mask.shape == (3, 1, 4, 4)
    assert mask.sum((1, 2, 3)).tolist() == [0, 8, 16]
    assert mask[1, 0, :2].all()


MAKERS = {
    "completion": (Completion, COMPLETION | {"keep": "random"}, 0.0),
    "rerepresentation": (Rerepresentation, {}, 0.0),
    "sdedit": (SDEdit, {"strength": 0.5, "steps": 4}, 1e-4),
    "repaint": (RePaint, {"keep": "random", "steps": 4, "jump_length": 2, "resamples": 2}, 1e-4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_image_depends_on_its_source_and_seed_and_not_on_its_batch(name):
    maker_class, params, tolerance = MAKERS[name]
    maker = maker_of(maker_class, **params)
    x = sources(5)
    seeds = [3, 1, 4, 1, 5]
    together = maker(x, seeds)
    assert together.shape == x.shape
    assert together.abs().max() <= 1
    alone = torch.cat([maker(x[i : i + 1], [seeds[i]]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
    turned = maker(x.flip(0), seeds[::-1]).flip(0)
    torch.testing.assert_close(together, turned, rtol=0, atol=tolerance)
    assert not torch.allclose(maker(sources(5, seed=1), seeds), together, atol=1e-2)


def test_what_a_mask_keeps_comes_back_exactly():
    maker = maker_of(RePaint, keep=0.5, steps=4, jump_length=2, resamples=1)
    x = sources(3, size=16)
    made_of = maker(x, [0, 1, 2])
    assert torch.equal(made_of[:, :, :8], x[:, :, :8])
    assert not torch.allclose(made_of[:, :, 8:], x[:, :, 8:], atol=0.1)


@pytest.mark.parametrize("upstream", ["labelled", "all"])
def test_ota_8_what_is_made_reads_training_images_and_nothing_else(upstream):
    case = case_with()
    config = OTAConfig(sources=upstream, completions=2)
    images, _ = make_images()
    for stage in OTA.stages(config, case.setting):
        if not isinstance(stage, ImageStage):
            continue
        assert set(stage.reads) == {"vq"}  # neither teacher nor student nor labels
        assert stage.inputs == ()
        pool = made(stage, case, images, {})
        known = case.setting.task.labelled
        changed = images.clone()
        changed[known:] += 1  # images without labels
        same = torch.equal(made(stage, case, changed, {}), pool)
        assert same == (stage.images == "labelled")
        beyond = torch.cat(
            [images, torch.randn(9, *images.shape[1:])]
        )  # what is not a training image is never asked for
        count = stage.count or known
        assert count <= 2 * len(images)
        if stage.images == "labelled":
            assert torch.equal(made(stage, case, beyond, {}), pool)


def test_a_smaller_pool_is_the_beginning_of_a_bigger_one():
    case = case_with()
    images, _ = make_images()
    few, many, absolute = (
        stage_of(OTAConfig(**knobs), case, GENERATE)
        for knobs in ({"completions": 1}, {"completions": 4}, {"generated": 33})
    )
    assert (few.count, many.count, absolute.count) == (20, 80, 33)
    assert replace(few, count=0) == replace(many, count=0) == replace(absolute, count=0)
    pools = [made(s, case, images, {}) for s in (few, many, absolute)]
    assert torch.equal(pools[0], pools[1][:20])
    assert torch.equal(pools[2], pools[1][:33])
    feeds = [stage_of(OTAConfig(completions=m), case, DISTIL).feed for m in (1, 4)]
    assert [f.pool_size for f in feeds] == [20, 80]
    # Four completions of one source differ.
    of_first = pools[1][0::20]
    assert len({tuple(x.flatten().tolist()) for x in of_first}) == 4


def test_all_training_images_can_guide():
    stage = stage_of(OTAConfig(sources="all", completions=3), case_with(), GENERATE)
    assert (stage.images, stage.count) == ("all", 3 * 32)


# Distillation


def test_ota_5_permuting_the_real_labels_leaves_the_term_on_generated_images():
    case = case_with()
    learner, _, chain = learner_of(case, completions=1)
    batch = batch_of(case, chain)
    one = copy.deepcopy(learner)(batch, 0.0)
    other = copy.deepcopy(learner)(replace(batch, labels=batch.labels.flip(0)), 0.0)
    assert torch.equal(one["kd"], other["kd"])
    assert not torch.equal(one["ce"], other["ce"])
    assert batch.generated.labels is None


def test_ota_6_a_student_equal_to_the_teacher_has_no_term_and_no_gradient():
    case = case_with("vit", "vit")
    learner, _, chain = learner_of(case, completions=1)
    learner.student = copy.deepcopy(chain.networks[CALIBRATE]).requires_grad_(True)
    # Networks in double precision, for the two see other batches: how these round in float depends on the processor.
    # The term itself is reckoned in float.
    parts = learner.double().eval()(batch_of(case, chain, dtype=torch.float64), 0.0)
    assert abs(parts["kd"].item()) <= 1e-6
    parts["kd"].backward()
    assert max(p.grad.abs().max().item() for p in learner.student.parameters()) <= 1e-6


class Free(nn.Module):
    """A student whose logits are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return torch.cat([self.logits.new_zeros(len(images) - len(self.logits), self.logits.shape[1]), self.logits])


def free_learner(logits, **params):
    params = {"weight": 1.0, "temperature": 1.0, "min_confidence": 0.0, "tuned": True} | params
    return OTALearner(params, Given(values={"student": Free(logits)}, num_classes=logits.shape[1]))


def free_batch(teacher):
    generated = Batch(torch.zeros(len(teacher), 3, 4, 4), None, {LOGITS.key: teacher})
    return Batch(torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64), generated=generated)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    # KL = p0 · 2/T - p1 · 1/T - ln Σ e^(t/T) + ln Σ e^(s/T), with t = (2, 0, 0), s = (0, 1, 0), p = softmax(t/T).
    # T 1: p0 .786986, p1 .106507, sums 9.389056 and 4.718282: 1.467465 - 0.688101.
    # T 4: p0 .451863, p1 .274069, sums 3.648721 and 3.284025, times 16: 2.518628 - 1.684909.
    [(1.0, 0.779365), (4.0, 16 * 0.0521074)],
)
def test_ota_6_a_hand_computed_case(temperature, expected):
    learner = free_learner(torch.tensor([[0.0, 1.0, 0.0]]), temperature=temperature, weight=2.0)
    parts = learner(free_batch(torch.tensor([[2.0, 0.0, 0.0]])), 0.0)
    assert parts["kd"].item() / temperature**2 == pytest.approx(expected / temperature**2, abs=1e-6)
    assert parts["loss"].item() == pytest.approx(parts["ce"].item() + 2 * parts["kd"].item(), abs=1e-6)


def test_ota_7_gradient_norm_hardly_depends_on_temperature():
    torch.manual_seed(0)
    teacher, start = torch.randn(256, 10), torch.randn(256, 10)
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        learner = free_learner(start.clone(), temperature=temperature)
        learner(free_batch(teacher), 0.0)["kd"].backward()
        norms.append(learner.student.logits.grad.norm().item())
    middle = sum(norms) / len(norms)
    assert all(abs(n - middle) <= 0.25 * middle for n in norms), norms


def test_ota_9_weight_0_is_the_supervised_student_bit_for_bit():
    case = case_with()
    images, labels = make_images()
    config = OTAConfig(weight=0.0, lr=3e-3)
    assert [s.name for s in OTA.stages(config, case.setting)] == [DISTIL]
    assert OTA.invalid(config, make_case().setting) is None  # and needs nothing that it does not use
    ota = run_chain(OTA, config, case, images, labels, steps=5)
    plain = run_chain(FineTune, FineTuneConfig(lr=3e-3), case, images, labels, steps=5)
    assert ota.losses == plain.losses
    assert tensor_hash(ota.deployed.network) == tensor_hash(plain.deployed.network)


def test_ota_9_with_weight_0_the_student_never_sees_a_generated_image():
    case = case_with()
    _, _, chain = learner_of(case, completions=1)
    batch = batch_of(case, chain)
    learner = OTALearner({"weight": 0.0}, Given(values={"student": copy.deepcopy(case.student)}, num_classes=CLASSES))
    sizes = []
    learner.student.register_forward_hook(lambda module, args, result: sizes.append(len(args[0])))
    learner.train()(batch, 0.0)["loss"].backward()
    assert sizes == [8]
    plain = copy.deepcopy(case.student).train()
    F.cross_entropy(plain(batch.images), batch.labels).backward()
    for one, other in zip(learner.student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert tensor_hash(learner.student) == tensor_hash(plain)  # batch statistics too


def test_real_and_generated_rows_go_their_own_ways():
    case = case_with("vit", "vit")  # without batch norm the rows do not mix
    learner, _, chain = learner_of(case, completions=1, weight=0.7, temperature=2.0)
    batch = batch_of(case, chain, real=8, generated=6)
    parts = learner.eval()(batch, 0.0)
    logits = learner.student(batch.images)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(logits, batch.labels), rtol=1e-4, atol=1e-5)
    guess = F.log_softmax(learner.student(batch.generated.images) / 2, dim=1)
    target = F.softmax(batch.generated.outputs[LOGITS.key] / 2, dim=1)
    torch.testing.assert_close(parts["kd"], 4 * F.kl_div(guess, target, reduction="batchmean"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["loss"], parts["ce"] + 0.7 * parts["kd"])


def test_without_a_generator_the_labelled_images_are_distilled_on():
    case = case_with()
    config = OTAConfig(generator="none")
    assert [s.name for s in OTA.stages(config, case.setting)] == [TRANSFER, DELIVER, CALIBRATE, DISTIL]
    chain = run_chain(OTA, config, case, *make_images(), steps=2)
    assert all(b.generated is None and LOGITS.key in b.outputs for b in chain.batches[-2:])
    assert chain.parts[-1]["kd"] > 0


def test_images_on_which_the_teacher_is_unsure_can_be_left_out():
    teacher = torch.tensor([[4.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 3.0, 0.0]])
    logits = torch.randn(3, 3)
    strict = free_learner(logits.clone(), min_confidence=0.8)(free_batch(teacher), 0.0)["kd"]
    sure = free_learner(logits[[0, 2]].clone())(free_batch(teacher[[0, 2]]), 0.0)["kd"]
    torch.testing.assert_close(strict, sure)
    none = free_learner(logits.clone(), min_confidence=0.999)(free_batch(teacher), 0.0)["kd"]
    assert none.item() == 0.0
    none.backward()
    sure_of_two = confidence(torch.tensor([[5.0, -5.0, 0.0]]), "multilabel")
    torch.testing.assert_close(sure_of_two, torch.tensor([(2 / (1 + torch.tensor(-5.0).exp()) + 0.5) / 3]))


def test_generated_images_come_in_the_ratio_that_is_asked_for():
    chain = run_chain(OTA, OTAConfig(ratio=0.5, completions=1), case_with(), *make_images(), steps=2)
    assert len(chain.batches[-1].generated.images) == 8
    assert len(chain.batches[-1].images) == 16


def test_the_teacher_of_the_pool_is_the_calibrated_one():
    stage = stage_of(OTAConfig(), case_with(), DISTIL)
    assert (stage.feed.of, stage.feed.pool_outputs) == (CALIBRATE, (LOGITS,))
    assert stage.feed.outputs == ()  # on the labelled images nobody asks it
    plain = stage_of(OTAConfig(teacher_tuning="none"), case_with(), DISTIL)
    assert (plain.feed.of, plain.feed.pool_outputs) == ("teacher", (POOLED,))
    lora = stage_of(OTAConfig(teacher_tuning="lora"), case_with(), DISTIL)
    assert (lora.feed.of, lora.feed.pool_outputs) == ("tune", (LOGITS,))


def test_ota_learns_with_every_teacher():
    images, labels = make_images()
    for tuning in ("irf", "none"):
        config = OTAConfig(lr=3e-3, completions=2, teacher_tuning=tuning)
        chain = run_chain(OTA, config, case_with(), images, labels, steps=40)
        accuracy = (chain.deployed.network(images[:20]).argmax(1) == labels[:20]).float().mean()
        assert accuracy > 0.9, tuning
        kd = [p["kd"] for p in chain.parts if "kd" in p]
        assert sum(kd[-5:]) < 0.7 * sum(kd[:5]), tuning


# Sharing, and what is refused


def test_trials_that_differ_in_distillation_share_everything_before_it():
    case = case_with()
    one, other = (
        OTA.stages(OTAConfig(temperature=t, weight=w, ratio=r, lr=lr), case.setting)
        for t, w, r, lr in ((1.0, 0.1, 0.25, 1e-4), (8.0, 10.0, 4.0, 1e-2))
    )
    assert one[:-1] == other[:-1]
    assert one[:3] == IRF.stages(IRFConfig(), case.setting)  # and with a trial of IRF alone
    sampled = OTA.stages(OTAConfig(sample_temperature=0.7), case.setting)
    assert sampled[:3] == one[:3]
    assert sampled[3] != one[3]


@pytest.mark.parametrize("name", [*GENERATORS, "none"])
def test_a_generator_without_its_upstream_is_refused_by_name(name):
    config = OTAConfig(generator=name, irf="ft")
    reason = OTA.invalid(config, make_case().setting)
    if name == "none":
        assert reason is None
        return
    upstream = GENERATORS[name].maker.upstream
    assert name in reason
    assert f"add {upstream!r} to its `upstream` section" in reason
    setting = make_case().setting
    there = replace(setting, task=replace(setting.task, upstream=(upstream,)))
    assert OTA.invalid(config, there) is None


def test_irf_without_codes_is_refused():
    assert "upstream.vq" in IRF.refuses(make_case().setting)
    assert "IRF needs the upstream generator 'vq'" in OTA.invalid(OTAConfig(generator="none"), make_case().setting)
    assert OTA.invalid(OTAConfig(generator="none", irf="lp_ft"), make_case().setting) is None


def test_every_generator_reads_its_own_upstream_and_its_own_knobs():
    case = case_with()
    for name, generator in GENERATORS.items():
        stage = stage_of(OTAConfig(generator=name), case, GENERATE)
        assert stage.reads == (generator.maker.upstream,)
        assert stage.maker is generator.maker
        assert set(stage.params) == set(generator.knobs)
        assert set(generator.knobs) <= set(OTAConfig.model_fields)


@pytest.mark.parametrize("name", ["sdedit", "repaint"])
def test_the_small_diffusion_model_generates_in_the_chain(name):
    config = OTAConfig(generator=name, completions=1, steps=5, teacher_tuning="none")
    chain = run_chain(OTA, config, case_with(), *make_images(), steps=2)
    assert chain.pools[GENERATE].shape == (20, 3, 32, 32)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"generator": "img2img", "strength": 0.01}, "strength 0.01 of 25 is none"),
        ({"generator": "repaint", "jump_length": 30}, "jump_length 30 of only 25 steps"),
    ],
)
def test_knobs_that_make_no_sense_together_are_refused(knobs, words):
    assert words in OTA.invalid(OTAConfig(**knobs), case_with().setting)


@pytest.mark.parametrize("keep", [-0.1, 1.1, "half"])
def test_a_keep_that_is_no_share_is_refused(keep):
    with pytest.raises(ValidationError, match="a share from 0 to 1, or random"):
        OTAConfig(keep=keep)


def test_a_stage_that_fits_is_not_touched_by_generation():
    case = case_with()
    fits = [[s for s in OTA.stages(OTAConfig(completions=m), case.setting) if isinstance(s, FitStage)] for m in (1, 8)]
    assert fits[0] == fits[1]
