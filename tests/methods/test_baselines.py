"""Fine-tuning and the linear probe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import CLASSES, make_case, make_images, run_chain, tensor_hash

from methods.contract import Batch, Given, trainable_parameters
from methods.finetune import FineTune, FineTuneConfig, FineTuneLearner
from methods.linear_probe import LinearProbe, LinearProbeConfig


def test_fine_tuning_moves_every_tensor():
    case = make_case()
    chain = run_chain(FineTune, FineTuneConfig(lr=1e-2), case, *make_images(), steps=3)
    assert trainable_parameters(chain.learner) == sum(p.numel() for p in case.student.parameters())
    before = dict(case.student.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in chain.deployed.network.named_parameters())


def test_fine_tuning_learns():
    images, labels = make_images()
    chain = run_chain(FineTune, FineTuneConfig(lr=3e-3), make_case(), images, labels, steps=40)
    assert chain.losses[-1] < 0.3 * chain.losses[0]
    chain.deployed.network.eval()
    assert (chain.deployed.network(images[:20]).argmax(1) == labels[:20]).float().mean() > 0.9


def test_fine_tuning_smooths_labels():
    case, (images, labels) = make_case(), make_images(8)
    learner = FineTuneLearner(
        {"label_smoothing": 0.1}, Given(values={"student": case.student}, num_classes=CLASSES)
    ).eval()
    loss = learner(Batch(images, labels), 0.0)["loss"]
    logits = case.student(images)
    soft = 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES
    torch.testing.assert_close(loss, -(soft * F.log_softmax(logits, dim=1)).sum(1).mean())


def test_fine_tuning_never_sees_an_unlabelled_image():
    chain = run_chain(FineTune, FineTuneConfig(), make_case(), *make_images(), steps=3)
    assert all((b.labels >= 0).all() for b in chain.batches)


def test_the_linear_probe_has_nothing_to_run():
    case = make_case()
    before = tensor_hash(case.student)
    assert LinearProbe.stages(LinearProbeConfig(), case.setting) == []
    chain = run_chain(LinearProbe, LinearProbeConfig(), case, *make_images())
    assert chain.deployed is None
    assert tensor_hash(case.student) == before
    assert not LinearProbe.trains_head
    assert not LinearProbe.uses_teacher
