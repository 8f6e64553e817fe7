"""What every method must do, run on whatever `discover()` finds."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from pydantic import ValidationError
from tiny import (
    CLASSES,
    EMBEDDING,
    Case,
    Chain,
    build_optimizer,
    draw,
    fitted,
    given_for,
    make_case,
    make_images,
    prepare,
    publish,
    run_chain,
    tensor_hash,
)
from torch import nn

from methods import discover
from methods.contract import (
    TEACHER,
    Batch,
    FitStage,
    Given,
    ImageStage,
    Learner,
    Method,
    Stage,
    TrainStage,
    UndeclaredInputError,
)
from methods.knobs import Choice, MethodConfig, Range, default_space
from methods.outputs import Output

METHODS = discover()
UPSTREAM = ("vq", "diffusion")
pytestmark = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def case_for(method: type[Method], kind: str | None = None) -> Case:
    """A teacher of one of its kinds, and a student of another kind unless it needs a relative of the teacher."""
    kind = kind or next(kind for kind in ("vit", "cnn", "clip") if kind in method.teacher_kinds)
    case = make_case(kind, "cnn", upstream=UPSTREAM)
    return case if method.refuses(case.setting) is None else make_case(kind, kind, upstream=UPSTREAM)


def sampled(method: type[Method], case: Case, seed: int) -> MethodConfig:
    """A draw from the default space; those that the method calls invalid in this setting are drawn again."""
    generator = random.Random(seed)
    space = default_space(method.Config)
    for _ in range(100):
        config = method.Config(**{name: value_of(domain, generator) for name, domain in space.items()})
        if method.invalid(config, case.setting) is None:
            return config
    raise AssertionError("100 draws of the default space are invalid")


def value_of(domain: Range | Choice, generator: random.Random) -> Any:
    if isinstance(domain, Choice):
        return generator.choice(domain.values)
    if domain.log:
        value = math.exp(generator.uniform(math.log(domain.low), math.log(domain.high)))
    else:
        value = generator.uniform(domain.low, domain.high)
    return round(value) if domain.int else min(max(value, domain.low), domain.high)


def corners(domain: Range | Choice) -> list[Any]:
    if isinstance(domain, Choice):
        return list(domain.values)
    return [round(v) for v in (domain.low, domain.high)] if domain.int else [domain.low, domain.high]


def other_values(method: type[Method], name: str) -> list[Any]:
    """Values of a knob other than its default: of its range, or near the default where it has none."""
    default = method.Config.model_fields[name].default
    domain = default_space(method.Config).get(name)
    if domain is not None:
        return [v for v in corners(domain) if v != default]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        metadata = method.Config.model_fields[name].metadata
        return [default + next((m.multiple_of for m in metadata if hasattr(m, "multiple_of")), 1)]
    choices = get_args(method.Config.model_fields[name].annotation)
    if choices:
        return [v for v in choices if v != default]
    if isinstance(default, str):
        return ["lora" if default == "none" else "none"]  # the name of a tuned teacher
    return [default / 2 or 0.5]


class Built(NamedTuple):
    stage: TrainStage
    learner: Learner
    chain: Chain


def walk(method: type[Method], config: MethodConfig, case: Case, seed: int = 0) -> Iterator[tuple[Stage, Chain]]:
    """Every stage with what the stages before it left (of those that train: untrained networks)."""
    images, labels = make_images()
    known = case.setting.task.labelled
    chain = Chain(deployed=None)
    for stage in method.stages(config, case.setting):
        torch.manual_seed(seed)
        yield stage, chain
        if isinstance(stage, TrainStage):
            publish(stage, stage.learner(stage.params, given_for(stage, case, labels[:known], chain.results)), chain)
        else:
            prepare(stage, case, images, labels, chain)


def built(method: type[Method], config: MethodConfig, case: Case, seed: int = 0) -> list[Built]:
    """Every training stage with its learner."""
    labels = make_images()[1][: case.setting.task.labelled]
    return [
        Built(stage, stage.learner(stage.params, given_for(stage, case, labels, chain.results)), chain)
        for stage, chain in walk(method, config, case, seed)
        if isinstance(stage, TrainStage)
    ]


def outputs_of(stage: Stage) -> tuple[Output, ...]:
    if isinstance(stage, ImageStage):
        return ()
    return stage.outputs if isinstance(stage, FitStage) else stage.feed.outputs + stage.feed.pool_outputs


def batch_for(one: Built, case: Case, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return draw(one.stage, case, *make_images(), 8, one.chain)


# Configuration


def test_its_attributes_are_from_the_known_sets(method):
    assert method.name.isidentifier()
    assert method.family in ("fine-tuning", "prompt", "adapter", "parameter", "remapping")
    assert method.deploys in ("teacher", "student")
    assert set(method.teacher_kinds) <= {"vit", "cnn", "clip", "other"}
    assert method.paper
    assert method.__doc__
    assert method.deploys == "student" or method.uses_teacher


def test_its_config_is_frozen_and_strict(method):
    config = method.Config()
    with pytest.raises(ValidationError):
        method.Config(not_a_knob=1)
    for name in method.Config.model_fields:
        with pytest.raises(ValidationError):
            setattr(config, name, getattr(config, name))
        with pytest.raises(ValidationError):
            method.Config(**{name: object()})


def test_every_knob_is_described_and_bounded(method):
    properties = method.Config.model_json_schema().get("properties", {})
    for name, field in method.Config.model_fields.items():
        schema = properties[name]
        assert len(field.description or "") > 5, name
        assert "default" in schema, name
        low = {"minimum", "exclusiveMinimum"} & set(schema)
        high = {"maximum", "exclusiveMaximum"} & set(schema)
        finite = {"enum", "const", "pattern"} & set(schema) or schema.get("type") == "boolean"
        assert finite or (low and high), name


def test_its_default_space_is_valid(method):
    for name, domain in default_space(method.Config).items():
        assert name in method.Config.model_fields
        for value in corners(domain):
            method.Config(**{name: value})


def test_sampled_configs_are_valid(method):
    case = case_for(method)
    for seed in range(20):
        sampled(method, case, seed)


def test_its_defaults_suit_its_own_kinds_of_teacher(method):
    for kind in ("vit", "cnn"):
        if kind in method.teacher_kinds:
            case = case_for(method, kind)
            assert method.refuses(case.setting) is None
            assert method.invalid(method.Config(), case.setting) is None


def test_it_refuses_other_kinds_of_teacher(method):
    case = make_case(upstream=UPSTREAM)
    for kind in {"vit", "cnn", "other"} - set(method.teacher_kinds):
        setting = replace(case.setting, teacher=replace(case.setting.teacher, kind=kind))
        assert not method.uses_teacher or kind in method.refuses(setting)


# Stages


def test_stages_are_deterministic(method):
    case = case_for(method)
    for seed in range(3):
        config = sampled(method, case, seed)
        assert method.stages(config, case.setting) == method.stages(config, case.setting)


def test_fits_are_deterministic(method):
    case = case_for(method)
    for stage, chain in walk(method, method.Config(), case):
        if not isinstance(stage, FitStage):
            continue
        one, other = (fitted(stage, case, *make_images(), chain.results, chain, fresh=True) for _ in range(2))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_stages_pickle(method):
    case = case_for(method)
    stages = method.stages(method.Config(), case.setting)
    assert pickle.loads(pickle.dumps(stages)) == stages


def test_stage_params_are_plain_json(method):
    case = case_for(method)
    for stage in method.stages(method.Config(), case.setting):
        assert json.loads(json.dumps(stage.params, allow_nan=False)) == dict(stage.params)


def test_stages_are_well_formed(method):
    case = case_for(method)
    stages = method.stages(method.Config(), case.setting)
    assert len({s.name for s in stages}) == len(stages)
    for i, stage in enumerate(stages):
        assert set(stage.inputs) <= {s.name for s in stages[:i]}
        trained_before = {s.name for s in stages[:i] if isinstance(s, TrainStage) and s.publishes == "network"}
        pools_before = {s.name for s in stages[:i] if isinstance(s, ImageStage)}
        if isinstance(stage, FitStage):
            assert set(stage.reads) <= {"labels"}
            assert "labels" not in stage.reads or stage.images == "labelled"
            assert stage.of in (TEACHER, *trained_before)
            assert not stage.pool or stage.pool in pools_before
        elif isinstance(stage, ImageStage):
            assert set(stage.reads) <= {"vq", "diffusion", "pipeline"}
        else:
            assert stage.feed.of in (TEACHER, *trained_before)
            assert not stage.feed.pool or stage.feed.pool in pools_before
            assert set(stage.reads) <= {"teacher", "student"}
            assert not (stage.feed.images == "labelled" and not stage.feed.labels)
            assert stage.recipe.lr > 0
            assert stage.recipe.budget > 0
        if not method.uses_teacher:
            assert "teacher" not in stage.reads
            assert not outputs_of(stage)
    uses_labels = any("labels" in s.reads or (isinstance(s, TrainStage) and s.feed.labels) for s in stages)
    assert uses_labels == method.needs_labels
    trained = [s for s in stages if isinstance(s, TrainStage)]
    assert not trained or (trained[-1].trains, trained[-1].publishes) == (method.deploys, "network")


def test_every_knob_changes_a_stage(method):
    """With the other knobs at their defaults, or with one of them set to another of its values."""
    case = case_for(method)
    fields = method.Config.model_fields
    others = [{other: value} for other in fields for value in other_values(method, other)]
    for name in fields:
        changes = [{name: value} for value in other_values(method, name)]
        assert any(
            method.stages(method.Config(**base | change), case.setting)
            != method.stages(method.Config(**base), case.setting)
            for base in ({}, *others)
            for change in changes
        ), f"{name} changes nothing"


def test_a_change_of_recipe_leaves_the_fits_before_it(method):
    """Trials that differ only in how they train share every stage that is only fitted."""
    case = case_for(method)
    defaults = [s for s in method.stages(method.Config(), case.setting) if isinstance(s, FitStage)]
    for name in {"lr", "weight_decay", "budget"} & set(method.Config.model_fields):
        stages = method.stages(method.Config(**{name: other_values(method, name)[0]}), case.setting)
        assert [s for s in stages if isinstance(s, FitStage)] == defaults


def test_undeclared_inputs_are_refused(method):
    case = case_for(method)
    for stage in method.stages(method.Config(), case.setting):
        asked = [*stage.reads, *stage.inputs, *(stage.outputs if isinstance(stage, FitStage) else ())]
        if not asked:
            continue
        nothing = Given(values={}, num_classes=CLASSES)
        code = {FitStage: "fit", ImageStage: "maker", TrainStage: "learner"}[type(stage)]
        with pytest.raises(UndeclaredInputError):
            getattr(stage, code)(stage.params, nothing)


# Learning


def test_the_loss_is_a_scalar_with_a_graph_and_parts(method):
    case = case_for(method)
    for seed in range(3):
        config = method.Config() if seed == 0 else sampled(method, case, seed)
        for one in built(method, config, case):
            learner = one.learner
            learner.train()
            batch = batch_for(one, case)
            for progress in (0.0, 0.5, 0.99):
                parts = learner(batch, progress)
                assert parts["loss"].shape == ()
                assert parts["loss"].requires_grad
                assert parts["loss"].isfinite()
                assert len(parts) > 1
                assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in parts.values())


def test_every_trained_tensor_learns_at_some_time(method):
    case = case_for(method)
    for one in built(method, method.Config(), case):
        learner = one.learner
        learner.train()
        batch = batch_for(one, case)
        for progress in (0.0, 0.99):
            learner(batch, progress)["loss"].backward()
        for name, parameter in learner.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_steady_learner_reaches_the_same_parameters_whatever_the_batch_and_the_progress(method):
    case = case_for(method)
    for config in (method.Config(), sampled(method, case, 1)):
        for one in (one for one in built(method, config, case) if one.learner.steady):
            batch = batch_for(one, case)
            bare = replace(batch, labels=torch.full_like(batch.labels, -1)) if batch.labels is not None else batch
            reached = set()
            for given in (batch, bare):
                for progress in (0.0, 0.5, 0.95):
                    one.learner.train().zero_grad(set_to_none=True)
                    one.learner(given, progress)["loss"].backward()
                    reached.add(frozenset(n for n, p in one.learner.named_parameters() if p.grad is not None))
            assert len(reached) == 1


def test_training_leaves_the_teacher_and_the_frozen_alone(method):
    case = case_for(method)
    before = tensor_hash(case.teacher), tensor_hash(case.student)
    for one in built(method, method.Config(), case):
        stage, learner, _ = one
        parameters = {n: p.detach().clone() for n, p in learner.named_parameters() if not p.requires_grad}
        buffers = {id(b): b.clone() for m in learner.frozen() for b in m.buffers()}
        optimizer = build_optimizer(learner, stage.recipe)
        learner.train()
        for step in range(3):
            learner(batch_for(one, case, step), step / 3)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in learner.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(parameter, parameters[name]), name
                assert parameter.grad is None, name
        for module in learner.frozen():
            assert all(torch.equal(b, buffers[id(b)]) for b in module.buffers())
    assert (tensor_hash(case.teacher), tensor_hash(case.student)) == before


def test_frozen_modules_stay_in_evaluation_mode(method):
    for _, learner, _ in built(method, method.Config(), case_for(method)):
        learner.train()
        assert all(not m.training for frozen in learner.frozen() for m in frozen.modules())
        learner.eval()
        assert not any(m.training for m in learner.modules())


def test_a_seed_fixes_the_loss_curve(method):
    case = case_for(method)
    images, labels = make_images()
    curves = [run_chain(method, method.Config(), case, images, labels, steps=4, seed=7).losses for _ in range(2)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    if curves[0]:
        other = run_chain(method, method.Config(), case, images, labels, steps=4, seed=8).losses
        assert other != pytest.approx(curves[0], abs=1e-6)


def test_only_stages_with_labels_see_them(method):
    case = case_for(method)
    for one in built(method, method.Config(), case):
        batch = batch_for(one, case)
        assert (batch.labels is None) == (not one.stage.feed.labels)
        assert one.stage.feed.labels or "labels" not in one.stage.reads


def test_labels_matter_only_where_declared(method):
    case = case_for(method)
    images, labels = make_images()
    one = run_chain(method, method.Config(), case, images, labels, steps=2)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    other = run_chain(method, method.Config(), case, images, shuffled, steps=2)
    if one.losses:
        assert (one.losses != other.losses) == method.needs_labels


def test_a_learner_is_restored_from_its_state(method):
    """What a checkpoint holds, trained tensors and all buffers, is enough to go on."""
    case = case_for(method)
    pairs = zip(built(method, method.Config(), case), built(method, method.Config(), case, seed=1), strict=True)
    for one, (_, fresh, _) in pairs:
        stage, learner, _ = one
        optimizer = build_optimizer(learner, stage.recipe)
        learner.train()
        learner(batch_for(one, case), 0.0)["loss"].backward()
        optimizer.step()
        fixed = {n for n, p in learner.named_parameters() if not p.requires_grad}
        fresh.load_state_dict({n: t for n, t in learner.state_dict().items() if n not in fixed}, strict=False)
        batch = batch_for(one, case)
        losses = [net.eval()(batch, 0.99)["loss"] for net in (learner, fresh)]
        assert torch.equal(losses[0], losses[1])


# Deployment


def test_what_it_deploys_is_a_plain_network(method):
    case = case_for(method)
    for seed in range(3):
        config = method.Config() if seed == 0 else sampled(method, case, seed)
        chain = run_chain(method, config, case, *make_images(), steps=4)
        if chain.deployed is None:
            assert not method.trains_head
            continue
        network = chain.deployed.network
        assert chain.deployed.base == method.deploys
        assert not any(isinstance(m, Learner) for m in network.modules())
        for module in (type(m).__module__ for m in network.modules()):
            assert not module.startswith("peft")
            assert not module.startswith("methods") or module.startswith("methods.parts.")
        assert not any(m.training for m in network.modules())
        if method.deployed_size == "base":
            assert not chain.deployed.changes
            assert chain.deployed.structure is None
        assert "num_classes" not in chain.deployed.changes  # every deployed network has the task's
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        outputs = EMBEDDING if method.zero_shot else CLASSES
        fresh = case.build[chain.deployed.base](num_classes=outputs, **chain.deployed.changes)
        if chain.deployed.structure is not None:
            assert json.loads(json.dumps(chain.deployed.structure.arguments)) == chain.deployed.structure.arguments
            fresh = chain.deployed.structure.apply(fresh)
        fresh.load_state_dict(network.state_dict(), strict=True)
        images, _ = make_images(8)
        torch.testing.assert_close(fresh.eval()(images), network(images), rtol=0, atol=0)


def test_what_it_deploys_equals_what_it_trained(method):
    case = case_for(method)
    images, _ = make_images(8)
    for one in built(method, method.Config(), case):
        stage, learner, _ = one
        optimizer = build_optimizer(learner, stage.recipe)
        learner.train()
        for step in range(3):
            learner(batch_for(one, case, step), 0.9)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        learner.eval()
        with torch.no_grad():
            trained = learner.student(images)
            torch.testing.assert_close(learner.deployed().network(images), trained, rtol=0, atol=1e-5)


def test_a_trained_head_has_the_tasks_classes(method):
    chain = run_chain(method, method.Config(), case_for(method), *make_images(), steps=1)
    if method.trains_head:
        assert chain.deployed.network(make_images(2)[0]).shape == (2, CLASSES)
        assert chain.deployed.network.num_classes == CLASSES


def test_it_works_with_only_the_declared_networks(method):
    case = case_for(method)
    stages = method.stages(method.Config(), case.setting)
    reads = {name for s in stages for name in s.reads}
    bare = replace(case, student=case.student if "student" in reads else nn.Identity())
    setting = replace(
        case.setting,
        teacher=case.setting.teacher if method.uses_teacher else None,
        student=case.setting.student if method.deploys == "student" else None,
    )
    bare = replace(bare, setting=setting)
    if not method.uses_teacher:
        bare = replace(bare, teacher=nn.Identity())
    assert method.refuses(setting) is None
    chain = run_chain(method, method.Config(), bare, *make_images(), steps=2)
    assert (chain.deployed is None) == (not any(isinstance(s, TrainStage) for s in stages))


def test_a_copy_of_a_learner_trains_alike(method):
    """Learners hold no state outside their tensors, so they can be copied to another process."""
    case = case_for(method)
    for one in built(method, method.Config(), case):
        learner = one.learner
        twin = copy.deepcopy(learner)
        batch = batch_for(one, case)
        losses = []
        for which in (learner.train(), twin.train()):
            torch.manual_seed(0)
            losses.append(which(batch, 0.0)["loss"])
        assert torch.equal(losses[0], losses[1])
