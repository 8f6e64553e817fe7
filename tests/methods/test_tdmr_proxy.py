"""TDMR's stage A: the fit of the proxy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tdmr_cases import config
from tiny import (
    CLASSES,
    make_case,
)

from methods.contract import (
    FitStage,
    Given,
)
from methods.proxy import cka, fit_proxy, load_proxy, proxy_loss
from methods.tdmr import (
    TDMR,
)


def features_of(n=100, classes=CLASSES, seed=0, width=24):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator), labels


def proxy_params(**changes):
    base = {
        "dim": 8,
        "projector": "mlp",
        "normalise": False,
        "alpha": 0.0,
        "lr": 1e-2,
        "weight_decay": 1e-4,
        "epochs": 20,
        "snapshots": 3,
    }
    return {**base, **changes}


def fit(features, labels, kind="classification", **changes):
    given = Given(
        values={"labels": labels}, outputs={"pooled": features}, num_classes=int(CLASSES), kind=kind, results={}
    )
    params = proxy_params(**changes)
    return fit_proxy(params, given), params


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_proxy_learns_the_task(projector, normalise):
    features, labels = features_of()
    fresh, truth = features_of(200)
    fresh = fresh + 0.1
    tensors, params = fit(features, labels, projector=projector, normalise=normalise, epochs=60)
    proxy = load_proxy(params, tensors, -1)
    z = proxy(fresh)
    assert (proxy.head(z).argmax(1) == truth).float().mean() > 0.9
    assert torch.allclose(z.norm(dim=1), torch.ones(200)) == normalise


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_scale_of_the_features_does_not_matter(scale):
    features, labels = features_of()
    one, _ = fit(features, labels, alpha=0.5)
    other, _ = fit(scale * features, labels, alpha=0.5)
    for name in ("0.head.weight", "2.projector.3.weight"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)


def test_a_feature_that_was_dead_in_the_labelled_images_does_not_take_over():
    features, labels = features_of()
    features[:, :3] = 0.0
    tensors, params = fit(features, labels)
    proxy = load_proxy(params, tensors, -1)
    alive = features.clone()
    alive[:, :3] = 1.0
    assert proxy.standardise(alive)[:, :3].abs().max() < 12


def test_the_epoch_is_the_best_on_held_out_images():
    features, labels = features_of(60)
    tensors, _ = fit(features + 2 * torch.randn(features.shape), labels, epochs=60, lr=3e-2)
    curve, chosen = tensors["held_out"], int(tensors["epochs"][-1])
    assert curve.shape == (60, 3)
    assert curve[chosen - 1, 0] == curve[:, 0].max()
    ties = curve[curve[:, 0] == curve[:, 0].max()]
    assert curve[chosen - 1, 1] == ties[:, 1].min()
    assert chosen < 60  # noisy features are learned by heart after a while
    assert ((curve[:, 2] > 0) & (curve[:, 2] <= 1)).all()


def test_one_image_a_class_leaves_none_to_hold_out():
    features, labels = features_of(CLASSES)
    tensors, _ = fit(features, labels, epochs=7)
    assert tensors["epochs"].tolist() == [3, 5, 7]
    assert tensors["held_out"].shape == (0, 3)


def test_more_images_than_a_batch_are_all_used():
    features, labels = features_of(257, width=6)
    one, _ = fit(features, labels, epochs=1, snapshots=1)
    mean = one["0.standardise.mean"]
    torch.testing.assert_close(mean, features.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(one["0.standardise.variance"], features.var(0), rtol=1e-4, atol=1e-5)


def test_snapshots_go_from_easy_to_hard():
    features, labels = features_of()
    tensors, params = fit(features, labels, epochs=30, snapshots=3)
    losses = [
        proxy_loss(load_proxy(params, tensors, i), features, labels, "classification", 0.0)["ce"].item()
        for i in range(3)
    ]
    assert losses[0] > losses[1] > losses[2]
    alone, _ = fit(features, labels, epochs=30, snapshots=1)
    assert torch.equal(alone["0.projector.0.weight"], tensors["2.projector.0.weight"])  # the last is the proxy


def test_alpha_keeps_the_teachers_geometry():
    features, labels = features_of()
    shapes = []
    for alpha in (0.0, 10.0):
        tensors, params = fit(features, labels, alpha=alpha, epochs=30, snapshots=1)
        z = load_proxy(params, tensors, -1)(features)
        shapes.append(cka(z, features).item())
    assert shapes[1] > shapes[0] + 0.03
    parts = proxy_loss(load_proxy(params, tensors, -1), features, labels, "classification", 0.5)
    torch.testing.assert_close(parts["loss"], parts["ce"] + 0.5 * parts["shape"])


def test_the_fit_leaves_the_global_random_state():
    features, labels = features_of()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one, _ = fit(features, labels)
    assert torch.equal(torch.randn(3), expected)
    other, _ = fit(features, labels)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_multi_label_proxies_are_fitted_on_binary_cross_entropy():
    features, single = features_of()
    labels = F.one_hot(single, CLASSES).float()
    labels[::3, 0] = 1.0
    labels[7] = 0.0
    tensors, params = fit(features, labels, kind="multilabel", epochs=60)
    proxy = load_proxy(params, tensors, -1)
    scores = proxy.head(proxy(features))
    assert ((scores > 0) == (labels > 0)).float().mean() > 0.9
    z = proxy(features)
    torch.testing.assert_close(proxy.prototypes[1], z[labels[:, 1] > 0].mean(0), rtol=0, atol=1e-5)


def test_the_proxy_is_shared_by_trials_that_differ_in_the_distillation_only():
    case = make_case()
    stage_a, stage_b = TDMR.stages(config(), case.setting)
    for knobs in ({"lr": 0.1}, {"mode": "snapshot"}, {"beta": 3.0}, {"depths": 2}, {"prototypes": True}):
        other_a, other_b = TDMR.stages(config(**knobs), case.setting)
        assert other_a == stage_a
        assert other_b != stage_b
    assert isinstance(stage_a, FitStage)
    assert stage_a.images == "labelled"
