"""Upstream generators: codes and their prior (OTA-1, OTA-3, OTA-4), and a small diffusion model."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from methods.contract import Batch, Given
from methods.generators.diffusion import DiffusionPackage, jump_path
from methods.generators.priming import (
    DiffusionPriming,
    PatchDiscriminator,
    PriorPriming,
    VQPriming,
    adaptive_weight,
    adversarial_losses,
)
from methods.generators.prior import LatentPrior, draw
from methods.generators.vq import VQPackage

SMALL = {
    "size": 16,
    "f": 4,
    "codes": 24,
    "dim": 6,
    "channels": [8, 8, 8],
    "prior_width": 24,
    "prior_layers": 2,
    "prior_heads": 3,
}
UNET = {"size": 16, "channels": [8, 16], "attention": [1]}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def package() -> VQPackage:
    """Fresh weights; the codebook lies where the latents do, and the prior is far from uniform."""
    package = VQPackage.build(SMALL)
    with torch.no_grad():
        package.codebook.normal_(std=0.5)
        package.prior.head.weight.normal_(std=0.3)
    return package


def given(**values: object) -> Given:
    return Given(values=values, num_classes=0)


# --- codes --------------------------------------------------------------------------------------------------


def test_ota_1_quantising_twice_changes_nothing_and_gives_the_codebooks_vectors(package, images) -> None:
    latents = package.vq.encode(images).latents
    indices = package.nearest(latents)
    assert indices.unique().numel() > 3  # else the claim would be empty
    quantised, _, (_, _, again) = package.vq.quantize(latents)
    assert torch.equal(again.view(5, -1), indices)
    assert (package.entries(indices) - quantised).abs().max() <= 1e-6
    assert torch.equal(package.nearest(package.entries(indices)), indices)
    assert torch.equal(package.codebook[indices[2, 5]], package.entries(indices)[2, :, 1, 1])


def test_codes_do_not_depend_on_what_else_is_in_the_batch(package, images) -> None:
    indices = package.indices(images)
    assert indices.shape == (5, 16)
    assert indices.dtype == torch.int64
    assert torch.equal(package.indices(images[[3, 1]]), indices[[3, 1]])
    assert torch.equal(package.decode(indices)[3:4], package.decode(indices[3:4]))
    assert package.indices(images[:0]).shape == (0, 16)
    assert package.decode(indices[:0]).shape == (0, 3, 16, 16)


def test_decoded_images_lie_in_the_unit_range_and_rerepresenting_is_decoding_the_codes(package, images) -> None:
    made = package.rerepresent(images)
    assert made.shape == images.shape
    assert made.abs().max() <= 1
    assert torch.equal(made, package.decode(package.indices(images)))


def test_the_codebook_loss_has_beta_on_the_encoders_term(package, images) -> None:
    for beta in (0.25, 4.0):
        parts = package.vq_loss(images, beta)
        latents, entries = parts["latents"], package.entries(parts["indices"])
        distance = (latents - entries).square().mean()
        torch.testing.assert_close(parts["codebook"], (1 + beta) * distance)
        to_latents, to_codes = torch.autograd.grad(parts["codebook"], [latents, package.codebook], retain_graph=True)
        torch.testing.assert_close(to_latents, beta * 2 * (latents - entries).detach() / latents.numel())
        code = int(parts["indices"][0, 0])
        pulled = package.codebook[code] - latents.permute(0, 2, 3, 1).flatten(0, 2)[parts["indices"].flatten() == code]
        torch.testing.assert_close(to_codes[code], 2 * pulled.sum(0).detach() / latents.numel())


def test_the_reconstructions_gradient_passes_the_quantiser_straight_through(package, images) -> None:
    parts = package.vq_loss(images)
    (to_latents,) = torch.autograd.grad(parts["l1"], parts["latents"], retain_graph=True)
    entries = package.entries(parts["indices"]).detach().requires_grad_()
    made = package.vq.decode(entries, force_not_quantize=True).sample
    (to_entries,) = torch.autograd.grad((made - images).abs().mean(), entries)
    torch.testing.assert_close(to_latents, to_entries)
    assert to_latents.abs().max() > 0


# --- the prior ----------------------------------------------------------------------------------------------


def test_a_cached_forward_equals_the_uncached_one(package, images) -> None:
    symbols = package.prior.shifted(package.indices(images))
    whole, _ = package.prior(symbols)
    cache, parts = None, []
    for length in (3, 1, 1, 7, 4):  # a prefix, single steps, and several at once on a cache
        done = sum(p.shape[1] for p in parts)
        logits, cache = package.prior(symbols[:, done : done + length], cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_the_prior_sees_earlier_codes_only(package, images) -> None:
    symbols = package.prior.shifted(package.indices(images))
    assert (symbols[:, 0] == package.codes).all()
    changed = symbols.clone()
    changed[:, 9] = (changed[:, 9] + 1) % package.codes
    before, after = package.prior(symbols)[0], package.prior(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_cached_completion_draws_what_a_loop_without_cache_draws(package, images) -> None:
    indices = package.indices(images)
    keep, seeds = [0, 4, 7, 12, 15], [3, 4, 5, 6, 7]
    found = package.complete(indices, keep, temperature=0.8, top_k=9, seeds=seeds)
    prior = package.prior.double()
    for row, (kept, seed) in enumerate(zip(keep, seeds, strict=True)):
        uniforms = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        codes = indices[row : row + 1, :kept]
        for i in range(kept, 16):
            start = torch.full((1, 1), package.codes)
            logits, _ = prior(torch.cat([start, codes], dim=1))
            codes = torch.cat([codes, draw(logits[:, -1] / 0.8, 9, uniforms[i : i + 1])[:, None]], dim=1)
        assert torch.equal(codes[0], found[row])


def test_ota_3_keeping_all_codes_is_the_rerepresentation_and_a_kept_prefix_never_changes(package, images) -> None:
    indices = package.indices(images)
    whole = package.complete(indices, [16] * 5, seeds=range(5))
    assert torch.equal(whole, indices)
    assert torch.equal(package.decode(whole), package.rerepresent(images))
    keep = torch.tensor([0, 4, 8, 12, 16])
    made = package.complete(indices, keep, seeds=range(5))
    for row, kept in enumerate(keep.tolist()):
        assert torch.equal(made[row, :kept], indices[row, :kept])
    assert not torch.equal(made[:2], indices[:2])
    scrambled = indices.clone()  # what is not kept is not looked at
    scrambled[1, 4:] = 0
    assert torch.equal(package.complete(scrambled, keep, seeds=range(5))[1], made[1])


def test_ota_4_top_1_ignores_the_seed_and_sampling_follows_it(package, images) -> None:
    indices = package.indices(images)
    keep = [4] * 5
    greedy = [package.complete(indices, keep, top_k=1, seeds=[s] * 5) for s in (0, 1)]
    assert torch.equal(*greedy)
    first, again, other = (package.complete(indices, keep, seeds=[s] * 5) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first[:, 4:] != other[:, 4:]).any(dim=1).all()


def test_ota_4_a_rows_completion_does_not_depend_on_its_batch(package, images) -> None:
    indices = package.indices(images)
    keep, seeds = [0, 4, 8, 0, 12], [9, 8, 7, 6, 5]
    whole = package.complete(indices, keep, seeds=seeds)
    for rows in ([2], [3, 0], [4, 2, 1]):
        part = package.complete(indices[rows], [keep[i] for i in rows], seeds=[seeds[i] for i in rows])
        assert torch.equal(part, whole[rows])


def test_draws_follow_the_models_probabilities() -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(10_000, 3)
    uniforms = torch.arange(10_000) / 10_000
    counts = torch.bincount(draw(logits, 0, uniforms), minlength=3) / 10_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.2, 0.3]), atol=2e-4, rtol=0)
    counts = torch.bincount(draw(logits, 2, uniforms), minlength=3) / 10_000
    torch.testing.assert_close(counts, torch.tensor([5 / 8, 0, 3 / 8]), atol=2e-4, rtol=0)
    assert draw(torch.zeros(1, 4), 0, torch.tensor([1.0])).item() < 4  # rounding to 1 stays within the codes


def test_the_priors_loss_is_log_k_for_a_uniform_prior_and_pkeep_changes_inputs_not_targets(package, images) -> None:
    indices = package.indices(images)
    with torch.no_grad():
        noisy, clean = package.prior_loss(indices, 0.2), package.prior_loss(indices)
        assert abs(float(noisy - clean)) > 1e-4
        logits = package.prior(package.prior.shifted(indices))[0]
        by_hand = -logits.log_softmax(-1).gather(2, indices[..., None]).mean()
        torch.testing.assert_close(clean, by_hand)
        package.prior.head.weight.zero_()
        package.prior.head.bias.zero_()
        for pkeep in (1.0, 0.2):
            assert float(package.prior_loss(indices, pkeep)) == pytest.approx(math.log(24), abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep": [4, 4]}, "keep"),
        ({"keep": [17] * 5}, "0 to 16"),
        ({"seeds": [1]}, "5 seeds"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_k": 25}, "0 to 24"),
    ],
)
def test_wrong_arguments_of_a_completion_are_refused(package, images, wrong, words) -> None:
    arguments = {"keep": [4] * 5, "seeds": range(5), "temperature": 1.0, "top_k": 0} | wrong
    with pytest.raises(ValueError, match=words):
        package.complete(package.indices(images), arguments.pop("keep"), **arguments)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"coeds": 4}, "coeds"),
        ({"f": 4, "channels": [8, 8]}, "needs 3 channels"),
        ({"channels": [8, 8, 9]}, "multiples of groups"),
        ({"size": 18}, "multiple of f"),
        ({"prior_heads": 5}, "prior_heads"),
        ({"codes": 1}, "codes = 1"),
    ],
)
def test_a_wrong_shape_is_refused_in_one_sentence(wrong, words) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        VQPackage.build(SMALL | wrong)
    assert "\n" not in str(caught.value)


def test_the_default_shape_follows_f() -> None:
    assert len(VQPackage.build({"size": 16, "f": 4, "codes": 8}).config.channels) == 3
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\]"):
        VQPackage.build(SMALL).indices(torch.zeros(1, 3, 8, 8))


# --- priming ------------------------------------------------------------------------------------------------


def vq_params(**changes: object) -> dict:
    return {"config": SMALL, "beta": 0.25, "revive_after": 5} | changes


def test_the_first_step_puts_every_unused_code_onto_a_latent_and_later_only_idle_codes_move(images) -> None:
    learner = VQPriming(vq_params(), given()).train()
    book = learner.student.codebook
    before = book.detach().clone()
    latents = learner.student.vq.encode(images).latents.permute(0, 2, 3, 1).flatten(0, 2)
    used = learner.student.nearest(learner.student.vq.encode(images).latents).unique()
    learner.loss(Batch(images), 0.0)
    unused = torch.tensor([i for i in range(24) if i not in used.tolist()])
    assert len(unused) > 0
    exact = torch.cdist(book[unused], latents, compute_mode="donot_use_mm_for_euclid_dist")
    assert exact.min(dim=1).values.max() < 1e-5
    assert torch.equal(book[used], before[used])
    settled = book.detach().clone()
    for _ in range(4):
        learner.loss(Batch(images), 0.0)
        assert torch.equal(book, settled)  # nobody was idle for long enough
    with torch.no_grad():
        book[3] = 100.0
    for _ in range(7):
        learner.loss(Batch(images), 0.0)
    assert book[3].abs().max() < 50


def test_revival_keeps_more_of_the_codebook_in_use(images) -> None:
    used = {}
    for patience in (3, 10**6):
        torch.manual_seed(0)
        learner = VQPriming(vq_params(revive_after=patience), given()).train()
        if patience == 10**6:
            learner.idle.zero_()
        optimizer = torch.optim.AdamW(learner.parameters(), 3e-3, weight_decay=0)
        for step in range(30):
            torch.manual_seed(step)
            optimizer.zero_grad()
            learner.loss(Batch(images), 0.0)["loss"].backward()
            optimizer.step()
        used[patience] = learner.student.indices(images).unique().numel()
    assert used[3] > used[10**6]


def test_training_lowers_the_loss_and_publishes_the_vq_without_the_prior(images) -> None:
    learner = VQPriming(vq_params(), given()).train()
    optimizer = torch.optim.AdamW(learner.parameters(), 3e-3, weight_decay=0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        parts = learner(Batch(images), 0.0)
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["l1"].item())
    assert losses[-1] < 0.8 * losses[0]
    tensors = learner.tensors()
    assert all(name.startswith("vq.") for name in tensors)
    prior = PriorPriming({"config": SMALL, "pkeep": 1.0, "vq": "vq"}, _with_result(tensors)).train()
    assert torch.equal(prior.student.codebook, learner.student.codebook)
    assert not any(p.requires_grad for p in prior.student.vq.parameters())
    codes = prior.student.indices(images)
    optimizer = torch.optim.AdamW([p for p in prior.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = prior(Batch(codes), 0.0)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # five images are learned by heart
    assert torch.equal(prior.student.complete(codes, [8] * 5, top_k=1, seeds=range(5)), codes)


def _with_result(tensors: dict[str, Tensor]) -> Given:
    return Given(values={}, num_classes=0, results={"vq": tensors})


def test_the_adversarial_terms_reach_their_own_side_only(images) -> None:
    critic = PatchDiscriminator(8)
    made = images.flip(0).requires_grad_()
    generator, hinge = adversarial_losses(critic, made, images)
    weights = list(critic.parameters())
    assert all(g is None for g in torch.autograd.grad(generator, weights, retain_graph=True, allow_unused=True))
    assert torch.autograd.grad(hinge, [made], retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(generator, made, retain_graph=True)[0].abs().max() > 0
    real, fake = critic(images), critic(made.detach())
    torch.testing.assert_close(generator, -critic(made).mean())
    torch.testing.assert_close(hinge, ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2)


def test_the_adaptive_weight_balances_the_two_gradients() -> None:
    last = torch.randn(4, 3, requires_grad=True)
    rebuilt, generator = (3 * last).sum(), (last * torch.arange(3.0)).sum()
    expected = 3 * math.sqrt(12) / (math.sqrt(4 * (0 + 1 + 4)) + 1e-4)
    assert float(adaptive_weight(rebuilt, generator, last)) == pytest.approx(expected, rel=1e-5)
    assert float(adaptive_weight(rebuilt, (0 * last).sum(), last)) == 1e4


def test_the_adversarial_term_is_off_before_its_start_and_trains_both_sides_after_it(images) -> None:
    learner = VQPriming(vq_params(gan_weight=0.8, gan_start=0.5), given()).train()
    assert "critic" not in learner.loss(Batch(images), 0.4)
    parts = learner.loss(Batch(images), 0.5)
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learner.critic.parameters() if p.ndim > 1)
    assert {"generator", "critic"} <= set(parts)


class Maps(nn.Module):
    """A frozen network as timm's look: two intermediate maps, batch norm that would drift if it were trained."""

    feature_info = [{"num_chs": 4}, {"num_chs": 6}]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)

    def forward_intermediates(self, x: Tensor, indices: list[int], output_fmt: str) -> tuple[Tensor, list[Tensor]]:
        maps = [self.norm(self.first(x))]
        maps.append(self.second(maps[0]))
        return maps[1], [maps[i] for i in indices]


def test_the_feature_distance_is_added_and_its_network_stays_frozen(images) -> None:
    network = Maps()
    params = vq_params(feature_weight=0.5, feature_mean=[0.5] * 3, feature_std=[0.5] * 3)
    learner = VQPriming(params, given(teacher=network)).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    parts = learner.loss(Batch(images), 0.0)
    torch.testing.assert_close(parts["loss"], parts["l1"] + 0.5 * parts["feature"] + parts["codebook"])
    assert parts["feature"] > 0
    assert learner.features(images, images) == 0
    parts["loss"].backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_generator_is_not_deployed(images) -> None:
    with pytest.raises(TypeError, match="published"):
        VQPriming(vq_params(), given()).deployed()


# --- diffusion ----------------------------------------------------------------------------------------------


@pytest.fixture
def diffusion() -> DiffusionPackage:
    return DiffusionPackage.build(UNET)


def test_strength_0_returns_the_image_and_the_seed_decides_the_rest(diffusion, images) -> None:
    assert torch.equal(diffusion.sdedit(images, 0.0, 10, range(5)), images)
    first, again, other = (diffusion.sdedit(images, 0.5, 6, [s] * 5) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert first.abs().max() <= 1


def test_a_weaker_edit_stays_nearer_to_the_image(diffusion, images) -> None:
    near, far = (diffusion.sdedit(images, s, 10, range(5)) for s in (0.1, 0.9))
    assert (near - images).square().mean() < (far - images).square().mean()


def test_rows_do_not_depend_on_their_batch_but_for_rounding(diffusion, images) -> None:
    mask = torch.zeros(1, 1, 16, 16)
    whole = diffusion.sdedit(images, 0.5, 4, [5, 6, 7, 8, 9])
    torch.testing.assert_close(diffusion.sdedit(images[2:3], 0.5, 4, [7]), whole[2:3], rtol=0, atol=1e-4)
    options = {"steps": 3, "jump_length": 1, "jump_n_sample": 2}
    whole = diffusion.repaint(images, mask, seeds=[5, 6, 7, 8, 9], **options)
    torch.testing.assert_close(
        diffusion.repaint(images[2:3], mask, seeds=[7], **options), whole[2:3], rtol=0, atol=1e-4
    )


def test_repaint_keeps_the_known_part_exactly_and_makes_the_rest(diffusion, images) -> None:
    mask = torch.zeros(5, 1, 16, 16)
    mask[:, :, :8] = 1
    mask[4] = 1
    made = diffusion.repaint(images, mask, steps=4, jump_length=2, jump_n_sample=2, seeds=range(5))
    kept = mask.bool().expand_as(images)
    assert torch.equal(made[kept], images[kept])
    assert torch.equal(made[4], images[4])
    assert (made - images)[~kept].abs().mean() > 0.05
    assert made.abs().max() <= 1
    other = diffusion.repaint(images, mask, steps=4, jump_length=2, jump_n_sample=2, seeds=range(10, 15))
    assert not torch.equal(made, other)


class Oracle(nn.Module):
    """Knows the image: predicts exactly the noise that leads to it."""

    def __init__(self, image: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.image, self.kept = image, kept

    def forward(self, x: Tensor, steps: Tensor) -> object:
        kept = self.kept[steps].to(x).view(-1, 1, 1, 1)
        noise = (x - kept.sqrt() * self.image) / (1 - kept).sqrt()
        return type("Out", (), {"sample": noise})


def test_with_a_perfect_noise_prediction_every_sampler_arrives_at_the_image(diffusion, images) -> None:
    diffusion.unet = Oracle(images, diffusion.kept)
    torch.testing.assert_close(diffusion.sdedit(-images, 1.0, 8, range(5)), images, rtol=0, atol=1e-4)
    mask = torch.zeros(1, 1, 16, 16)
    made = diffusion.repaint(-images, mask, steps=8, jump_length=2, jump_n_sample=3, seeds=range(5))
    torch.testing.assert_close(made, images, rtol=0, atol=1e-4)


def test_the_ancestral_step_keeps_the_schedules_variance(diffusion) -> None:
    image = torch.zeros(1, 3, 16, 16)
    diffusion.unet = Oracle(image, diffusion.kept)
    for step, to in ((800, 600), (300, 299), (40, 10)):
        noise = torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        x = (1 - diffusion.kept[step]).sqrt().float() * noise
        fresh = torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        found = diffusion._denoised(x, step, to, fresh).var()
        torch.testing.assert_close(found, (1 - diffusion.kept[to]).float(), rtol=0.02, atol=0)


def test_repaint_goes_back_after_each_stretch() -> None:
    assert jump_path(4, 2, 1) == [4, 3, 2, 1, 0]
    assert jump_path(4, 2, 2) == [4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0]
    assert jump_path(5, 2, 2) == [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0]
    assert jump_path(3, 10, 5) == [3, 2, 1, 0]


def test_the_noise_loss_is_1_for_a_network_that_predicts_nothing(diffusion, images) -> None:
    torch.nn.init.zeros_(diffusion.unet.conv_out.weight)
    torch.nn.init.zeros_(diffusion.unet.conv_out.bias)
    torch.manual_seed(0)
    assert diffusion.loss(images.repeat(8, 1, 1, 1)).item() == pytest.approx(1.0, abs=0.05)


def test_the_moving_average_is_published_and_survives_a_checkpoint(images) -> None:
    learner = DiffusionPriming({"config": UNET, "ema": 0.5}, given()).train()
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], 0.1)
    expected = nn.utils.parameters_to_vector(learner.student.parameters()).detach().clone()
    for step in range(4):
        optimizer.zero_grad()
        learner(Batch(images), 0.0)["loss"].backward()
        optimizer.step()
        if step < 3:
            now = nn.utils.parameters_to_vector(learner.student.parameters()).detach()
            expected = expected.lerp(now, 1 - min(0.5, (2 + step) / (11 + step)))
    now = nn.utils.parameters_to_vector(learner.student.parameters()).detach().clone()
    expected = expected.lerp(now, 1 - min(0.5, 5 / 14))
    package = DiffusionPackage.build(UNET)
    package.load_state_dict(learner.tensors())
    torch.testing.assert_close(nn.utils.parameters_to_vector(package.parameters()), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(nn.utils.parameters_to_vector(learner.student.parameters()), now)  # training goes on from these
    resumed = DiffusionPriming({"config": UNET, "ema": 0.5}, given())
    resumed.load_state_dict(learner.state_dict())
    assert torch.equal(resumed.tensors()["unet.conv_in.weight"], learner.tensors()["unet.conv_in.weight"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"attention": [2]}, "attention"), ({"size": 15}, "multiple"), ({"channels": [8, 9]}, "groups"), ({"x": 1}, "x")],
)
def test_a_wrong_diffusion_shape_is_refused(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        DiffusionPackage.build(UNET | wrong)


@pytest.mark.parametrize(("strength", "steps"), [(1.5, 4), (0.5, 0), (0.5, 1001)])
def test_wrong_arguments_of_an_edit_are_refused(diffusion, images, strength, steps) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        diffusion.sdedit(images, strength, steps, range(5))


def test_generators_import_diffusers_only_when_one_is_built() -> None:
    code = "import sys, methods.generators.priming; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_prior_of_one_row_and_one_code_is_still_a_prior() -> None:
    prior = LatentPrior(codes=3, side=1, width=8, layers=1, heads=1)
    made = prior.complete(torch.full((2, 1), 2), torch.tensor([0, 1]), 1.0, 1, torch.rand(2, 1))
    logits = prior(torch.tensor([[3]]))[0]
    assert made.tolist() == [[int(logits.argmax())], [2]]
