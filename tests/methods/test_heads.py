from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tiny import cnn, make_images, vit
from torch import Tensor

from methods.heads import L2_GRID, fit_linear_head, fit_linear_head_cv, load_head, stratified_folds
from methods.outputs import Output, read_outputs


def rows(n: int, d: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes, with features of very different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator)
    features = centres[labels] + 2 * torch.randn(n, d, generator=generator)
    return features * torch.logspace(-1, 1, d) + torch.linspace(-5, 5, d), labels


def standard(features: Tensor) -> Tensor:
    features = features.double()
    return (features - features.mean(0)) / features.std(0, correction=0)


def objective(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, l2: float) -> float:
    """Of a folded head: what `fit_linear_head` minimises."""
    on_standard = weight.double() * features.double().std(0, correction=0)
    logits = features.double() @ weight.double().T + bias.double()
    return (F.cross_entropy(logits, labels) + 0.5 * l2 * on_standard.square().sum()).item()


@pytest.mark.parametrize(("n", "d"), [(60, 12), (20, 50)])
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_it_is_scikit_learns_optimum(n, d, l2):
    features, labels = rows(n, d)
    weight, bias = fit_linear_head(features, labels, 4, l2)
    reference = LogisticRegression(C=1 / (n * l2), tol=1e-10, max_iter=10_000).fit(standard(features), labels)
    probabilities = torch.softmax(features.double() @ weight.double().T + bias.double(), dim=1)
    expected = torch.from_numpy(reference.predict_proba(standard(features)))
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-3)
    unfolded = weight.double() * features.double().std(0, correction=0)
    torch.testing.assert_close(unfolded, torch.from_numpy(reference.coef_), rtol=0, atol=1e-3)


def test_the_folded_head_is_the_unfolded_one():
    features, labels = rows(60, 12)
    weight, bias = fit_linear_head(features, labels, 4, 1e-2)
    std, mean = features.double().std(0, correction=0), features.double().mean(0)
    on_standard = standard(features) @ (weight.double() * std).T + (bias.double() + weight.double() @ mean)
    torch.testing.assert_close(features @ weight.T + bias, on_standard.float(), rtol=0, atol=1e-4)
    assert weight.dtype == bias.dtype == torch.float32
    assert weight.shape == (4, 12)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_fewer_rows_than_features_is_solved_exactly(l2):
    features, labels = rows(20, 50)
    weight, _ = fit_linear_head(features, labels, 4, l2)
    x = standard(features)
    free = torch.zeros(4, 51, dtype=torch.float64, requires_grad=True)
    direct = torch.optim.LBFGS(
        [free], max_iter=2000, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        direct.zero_grad()
        loss = 1e6 * (F.cross_entropy(x @ free[:, :-1].T + free[:, -1], labels) + l2 / 2 * free[:, :-1].square().sum())
        loss.backward()
        return loss

    direct.step(closure)
    expected = free.detach()[:, :-1] / features.double().std(0, correction=0)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-6)


def test_no_small_step_improves_it():
    features, labels = rows(60, 12)
    weight, bias = fit_linear_head(features, labels, 4, 1e-2)
    best = objective(weight, bias, features, labels, 1e-2)
    for _ in range(20):
        moved = objective(weight + 1e-2 * torch.randn_like(weight), bias, features, labels, 1e-2)
        assert moved > best


def test_it_is_deterministic():
    features, labels = rows(40, 60)
    for fit in (fit_linear_head, fit_linear_head_cv):
        for one, other in zip(fit(features, labels, 4), fit(features, labels, 4), strict=True):
            assert torch.equal(one, other)


def test_dead_and_constant_features_stay_finite():
    features, labels = rows(40, 12)
    features[:, 0] = 3.0
    features[:, 1] *= 1e-12
    weight, bias = fit_linear_head_cv(features, labels, 4)
    assert weight.isfinite().all()
    logits = (features + 1.0) @ weight.T + bias
    assert logits.isfinite().all()
    assert logits.abs().max() < 1e4


def test_a_class_without_rows_is_never_predicted():
    features, labels = rows(40, 12, classes=3)
    weight, bias = fit_linear_head_cv(features, labels, 5)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    assert (features @ weight.T + bias).argmax(1).max() < 3


def test_one_row_a_class_works():
    features, labels = rows(4, 12)
    weight, bias = fit_linear_head_cv(features, labels, 4)
    assert torch.equal((features @ weight.T + bias).argmax(1), labels)


@pytest.mark.parametrize("several", [False, True])
def test_where_no_row_can_be_held_out_the_penalty_is_the_fixed_one(several):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20)
    features = torch.randn(20, 64, generator=generator) + 3 * F.one_hot(labels, 64)
    given = F.one_hot(labels).float() if several else labels
    found, fixed = fit_linear_head_cv(features, given, 20), fit_linear_head(features, given, 20)
    for one, other in zip(found, fixed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    logits = features @ found[0].T + found[1]
    chance = logits.sigmoid().diagonal() if several else logits.softmax(1).amax(1)
    assert chance.mean() > 0.5


def test_a_single_fold_chooses_no_penalty():
    features, labels = rows(40, 12)
    found = fit_linear_head_cv(features, labels, 4, groups=torch.zeros(40, dtype=torch.int64))
    assert all(torch.equal(*pair) for pair in zip(found, fit_linear_head(features, labels, 4), strict=True))


def test_classes_of_one_row_have_no_say_in_the_penalty():
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(3).repeat(4), torch.arange(3, 15)])
    lookalikes = torch.arange(24) % 3  # each single row looks like one of the three classes: a sure head is wrong on it
    features = torch.randn(24, 40, generator=generator) + 4 * F.one_hot(lookalikes, 40)
    weight, _ = fit_linear_head_cv(features, labels, 15)
    assert torch.equal(weight, fit_linear_head(features, labels, 15, 1e-3)[0])  # with their say 1 would be best


def test_a_class_of_one_image_has_no_say_where_images_are_held_out():
    generator = torch.Generator().manual_seed(3)
    images, lookalikes = torch.arange(60) // 10, torch.arange(60) % 2
    labels = torch.where(images == 5, 2, lookalikes)
    features = torch.randn(60, 40, generator=generator) + 8 * F.one_hot(lookalikes, 40)
    weight, _ = fit_linear_head_cv(features, labels, 3, folds=6, groups=images)
    assert torch.equal(weight, fit_linear_head(features, labels, 3, 1e-2)[0])  # with its say 0.1 would be best


def test_wrong_input_is_refused():
    features, labels = rows(12, 6)
    with pytest.raises(ValueError, match="l2"):
        fit_linear_head(features, labels, 4, 0.0)
    with pytest.raises(ValueError, match="labelled rows only"):
        fit_linear_head(features, labels - 1, 4)
    with pytest.raises(ValueError, match=r"not \[n, D\]"):
        fit_linear_head(features[:5], labels, 4)


def test_cross_validation_shrinks_more_on_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 40, generator=generator)
    signal = noise + 8 * F.one_hot(labels, 40).float()
    on_noise, _ = fit_linear_head_cv(noise, labels, 3)
    strongest, _ = fit_linear_head(noise, labels, 3, max(L2_GRID))
    assert torch.equal(on_noise, strongest)
    on_signal, _ = fit_linear_head_cv(signal, labels, 3)
    assert not torch.equal(on_signal, fit_linear_head(signal, labels, 3, max(L2_GRID))[0])


def test_folds_deal_every_class_evenly():
    labels = torch.cat([torch.zeros(10), torch.ones(7), torch.full((1,), 2)]).long()
    folds = stratified_folds(labels, 3)
    for c, most in ((0, 4), (1, 3), (2, 1)):
        counts = torch.bincount(folds[labels == c], minlength=3)
        assert counts.max() <= most
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("n", "d"), [(180, 1280), (2000, 320)])
def test_it_is_fast(n, d):
    features, labels = rows(n, d, classes=10)
    fit_linear_head(features[:50, :20], labels[:50], 10)
    start = time.process_time()
    fit_linear_head_cv(features, labels, 10)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("build", [vit, cnn, lambda: cnn("test_resnet"), lambda: cnn("test_convnext")])
def test_a_loaded_head_gives_the_fitted_logits(build):
    network, (images, labels) = build(), make_images()
    pooled = read_outputs(network, images, [Output("pooled")])["pooled"].detach()
    weight, bias = fit_linear_head(pooled, labels, 5, 1e-1)
    load_head(network, weight, bias)
    torch.testing.assert_close(network(images), pooled @ weight.T + bias)
