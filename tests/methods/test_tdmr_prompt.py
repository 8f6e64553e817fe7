"""TDMR with an input prompt."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from tdmr_cases import PAIRS, config
from tiny import (
    CLASSES,
    SIDE,
    build_optimizer,
    draw,
    given_for,
    make_case,
    make_images,
    run_chain,
    tensor_hash,
)

from methods.contract import (
    Batch,
    TrainStage,
)
from methods.heads import POOLED
from methods.outputs import read_outputs
from methods.reprogram import Prompt
from methods.tdmr import (
    TDMR,
)


@pytest.mark.parametrize("kind", ["padding", "additive"])
def test_a_prompt_is_a_frame(kind):
    prompt = Prompt(SIDE, 4, kind)
    images, _ = make_images(2)
    if kind == "additive":
        assert torch.equal(prompt(images), images)  # it starts as nothing
    else:
        inner = F.interpolate(images, size=SIDE - 8, mode="bilinear", antialias=True)
        assert torch.equal(prompt(images)[..., 4:-4, 4:-4], inner)
        assert torch.count_nonzero(prompt(images)[..., :4, :]) == 0
    with torch.no_grad():
        prompt.delta.fill_(1.0)
    moved = prompt(images) - Prompt(SIDE, 4, kind)(images)
    assert torch.count_nonzero(moved[..., 4:-4, 4:-4]) == 0
    torch.testing.assert_close(moved[..., :4, :], torch.ones(2, 3, 4, SIDE))
    assert Prompt(SIDE, SIDE, "additive").frame.min() == 1  # all of the image


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("kind", ["padding", "additive"])
def test_an_input_prompt_is_learned_through_the_frozen_teacher(teacher, student, kind):
    case = make_case(teacher, student)
    knobs = config(input_prompt=4, prompt_kind=kind)
    stage_a, stage_b = TDMR.stages(knobs, case.setting)
    assert (stage_a.trains, stage_a.publishes, stage_a.live_teacher) == ("teacher", "tensors", True)
    assert stage_a.feed.images == "labelled"
    assert stage_b.live_teacher
    assert stage_b.feed.teacher_images
    assert stage_b.feed.outputs == ()
    before = tensor_hash(case.teacher)
    images, labels = make_images()
    chain = run_chain(TDMR, knobs, case, images, labels, steps=6)
    assert tensor_hash(case.teacher) == before
    learner, delta = chain.learner, chain.results["prompt"]["delta"]
    assert tensor_hash(learner.live.teacher) == before
    assert torch.equal(learner.live.prompt.delta, delta)
    assert delta[:, :4].abs().max() > 0
    assert torch.count_nonzero(delta[:, 4:-4, 4:-4]) == 0
    learner.train()
    batch = Batch(images, labels, {}, teacher_images=images)
    z, _ = learner.targets(batch, 0.0)
    with torch.no_grad():
        pooled = read_outputs(case.teacher, learner.live.prompt(images), [POOLED])["pooled"]
        torch.testing.assert_close(z, learner.proxies[0](pooled), rtol=0, atol=1e-5)
    assert not z.requires_grad
    assert chain.deployed.network.state_dict().keys() == case.student.state_dict().keys()


def test_an_input_prompt_lowers_the_proxys_loss():
    case = make_case("cnn", "vit")
    images, labels = make_images()
    stage, _ = TDMR.stages(config(input_prompt=8, prompt_kind="additive", proxy_lr=1e-2), case.setting)
    learner = stage.learner(stage.params, given_for(stage, case, labels[:20], {}))
    assert learner.lr_scale("student.prompt.delta") == 10
    assert not learner.decays("student.prompt.delta", learner.student.prompt.delta)
    trained = {n for n, p in learner.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in learner.named_parameters() if ".teacher." not in n}
    optimizer = build_optimizer(learner.train(), stage.recipe)
    losses = []
    for _ in range(8):
        parts = learner(draw(stage, case, images, labels, 16), 0.0)
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert learner.eval().student(images).shape == (32, CLASSES)
    with pytest.raises(TypeError, match="deploys nothing"):
        learner.deployed()


def test_prompt_stages_keep_the_contract():
    case = make_case("vit", "cnn")
    for knobs in (config(input_prompt=4), config(input_prompt=4, mode="depth+weight", alpha=0.5)):
        stages = TDMR.stages(knobs, case.setting)
        assert all(isinstance(s, TrainStage) for s in stages)
        for stage in stages:
            assert json.loads(json.dumps(stage.params)) == dict(stage.params)
        one, other = (run_chain(TDMR, knobs, case, *make_images(), steps=4).losses for _ in range(2))
        assert one == other
