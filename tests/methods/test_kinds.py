"""Every kind of task that a method names, it serves; run on whatever `discover()` finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CLASSES, SIDE, labels_of, make_case, make_images, run_chain

from methods import discover
from methods.contract import IGNORE, FitStage, Method, TrainStage
from methods.dense import linear_decoder
from methods.heads import fit_dense_head
from methods.outputs import Output, read_outputs
from methods.parts.dense import Segmenter, segmenter

DENSE = Output("dense")
UPSTREAM = ("vq", "diffusion")
SERVED = [(m, kind) for m in discover().values() for kind in m.tasks if kind != "classification"]
PIXELS = [m for m, kind in SERVED if kind == "segmentation"]


def case_of(method: type[Method], kind: str):
    teacher = next(one for one in ("vit", "cnn", "clip") if one in method.teacher_kinds)
    case = make_case(teacher, "cnn", upstream=UPSTREAM, task_kind=kind)
    if method.refuses(case.setting) is None:
        return case
    return make_case(teacher, teacher, upstream=UPSTREAM, task_kind=kind)


@pytest.mark.parametrize(("method", "kind"), SERVED, ids=[f"{m.name}-{kind}" for m, kind in SERVED])
def test_it_trains_and_deploys_for_every_kind_it_names(method, kind):
    case = case_of(method, kind)
    assert method.refuses(case.setting) is None
    images, classes = make_images()
    chain = run_chain(method, method.Config(), case, images, labels_of(kind, classes), steps=2)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in chain.losses)
    if chain.deployed is None or not method.trains_head:
        return
    network = chain.deployed.network
    shape = (4, CLASSES, SIDE, SIDE) if kind == "segmentation" else (4, CLASSES)
    assert network(images[:4]).shape == shape
    assert network.num_classes == CLASSES
    fresh = case.build[chain.deployed.base](num_classes=CLASSES, **chain.deployed.changes)
    if chain.deployed.structure is not None:
        fresh = chain.deployed.structure.apply(fresh)
    fresh.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(fresh.eval()(images), network(images), rtol=0, atol=0)


@pytest.mark.parametrize("method", discover().values(), ids=discover())
def test_it_refuses_the_kinds_it_does_not_name(method):
    for kind in ("classification", "multilabel", "segmentation"):
        case = case_of(method, "classification")
        setting = replace(case.setting, task=replace(case.setting.task, kind=kind))
        reason = method.refuses(setting)
        assert (reason is None) == (kind in method.tasks), (kind, reason)
        assert reason is None or kind in reason


@pytest.mark.parametrize("method", PIXELS, ids=[m.name for m in PIXELS])
def test_what_it_learns_of_unlabelled_images_does_not_depend_on_their_masks(method):
    """The mask of an image without a label may hold anything: it is 255 everywhere for the learner."""
    case = case_of(method, "segmentation")
    images, classes = make_images()
    masks = labels_of("segmentation", classes)
    other = masks.clone()
    other[case.setting.task.labelled :] = (other[case.setting.task.labelled :] + 1) % CLASSES
    one, same = (run_chain(method, method.Config(), case, images, m, steps=2) for m in (masks, other))
    assert one.losses == same.losses
    for batch in one.batches:
        if batch.labels is not None and len(images) > case.setting.task.labelled:
            unlabelled = (batch.labels == IGNORE).flatten(1).all(1)
            drawn = any(isinstance(s, TrainStage) and s.feed.images == "all" for s in stages_of(method, case))
            assert bool(unlabelled.any()) == drawn


def stages_of(method: type[Method], case):
    return method.stages(method.Config(), case.setting)


def test_a_head_of_pixels_reads_the_teachers_map_and_labels_alone():
    kd = discover()["kd"]
    case = case_of(kd, "segmentation")
    (head, distil) = stages_of(kd, case)
    assert isinstance(head, FitStage)
    assert head.outputs == distil.feed.outputs == (DENSE,)


def test_outputs_of_a_network_of_pixels_are_its_backbones_and_its_logits_its_own():
    case = make_case("vit", "cnn")
    images, _ = make_images(3)
    backbone = case.student
    plain = read_outputs(backbone, images, [Output("pooled"), Output("map", layer=2, grid=2)])
    network = segmenter(backbone, CLASSES, "conv").eval()
    read = read_outputs(network, images, [Output("pooled"), Output("map", layer=2, grid=2), Output("logits"), DENSE])
    for key, value in plain.items():
        torch.testing.assert_close(read[key], value, rtol=0, atol=0)
    torch.testing.assert_close(read["logits"], network(images), rtol=0, atol=0)


def test_a_probe_on_tokens_that_tell_the_classes_apart_finds_every_one():
    """The token of each 8-pixel patch names its class; between two patches the logits pass from one to the other."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.eye(3)
    raster = torch.randint(0, 3, (12, 4, 4), generator=generator)
    maps = colours[raster].permute(0, 3, 1, 2) + 0.01 * torch.randn(12, 3, 4, 4, generator=generator)
    masks = raster.repeat_interleave(8, 1).repeat_interleave(8, 2)
    decoder = linear_decoder(*fit_dense_head(maps, masks, 3))
    assert torch.equal(decoder(maps, (32, 32)).argmax(1), raster)
    whole = Segmenter(make_case().student, decoder).decode(maps, (32, 32)).argmax(1)
    middle = slice(3, None, 8)
    assert torch.equal(whole[:, middle, middle], raster)
