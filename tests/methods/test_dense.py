"""Decoders of pixels: what they read, what they give, and how they are fitted."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import CLASSES, SIDE, cnn, hybrid_vit, make_case, make_images, vit

from methods.contract import IGNORE, Structure, supervised_loss
from methods.dense import fit_conv_decoder, linear_decoder, structure_of
from methods.heads import fit_dense_head, fit_linear_head, pixel_rows
from methods.kd import distillation_loss
from methods.outputs import Output, read_outputs
from methods.parts.dense import dense_map, dense_width, finer_layers, segmenter, stage_channels

IMAGES = make_images(2)[0]


def masks_of(n: int, side: int = SIDE, classes: int = CLASSES) -> torch.Tensor:
    return torch.randint(0, classes, (n, side, side), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("registers", [0, 3])
def test_a_transformers_map_is_its_patch_tokens_after_the_final_norm(registers):
    network = vit(reg_tokens=registers)
    tokens = network.forward_features(IMAGES)
    assert tokens.shape[1] == 16 + 1 + registers
    found = dense_map(network, IMAGES)
    assert found.shape == (2, 48, 4, 4)
    for row in range(4):
        for column in range(4):
            token = tokens[:, 1 + registers + 4 * row + column]
            torch.testing.assert_close(found[:, :, row, column], token, rtol=0, atol=0)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)  # of a layer norm
    torch.testing.assert_close(read_outputs(network, IMAGES, [Output("dense")])["dense"], found, rtol=0, atol=0)


def test_a_transformer_that_normalises_after_pooling_has_its_tokens_normalised_here():
    network = vit(global_pool="avg", fc_norm=True, class_token=False)
    found = dense_map(network, IMAGES)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)
    assert network.forward_features(IMAGES).mean(2).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext", "test_mambaout"])
def test_a_cnns_map_is_its_last_one_enlarged_and_the_last_of_stride_16(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=CLASSES).eval()
    images = torch.randn(2, 3, 64, 64)
    found = dense_map(network, images)
    last, maps = network.forward_intermediates(images, indices=[-2, -1], output_fmt="NCHW")
    assert network.feature_info[-2]["reduction"] == 16
    assert found.shape == (2, dense_width(network), 4, 4)
    own = maps[0].shape[1]
    torch.testing.assert_close(found[:, -own:], maps[0], rtol=0, atol=0)
    last = last.permute(0, 3, 1, 2) if last.shape[-1] == network.num_features else last
    torch.testing.assert_close(F.adaptive_avg_pool2d(found[:, :-own], 2).shape, last.shape)
    wanted = F.interpolate(last, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, :-own], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("build", [vit, hybrid_vit, cnn], ids=["vit", "hybrid", "cnn"])
@pytest.mark.parametrize("decoder", ["linear", "conv"])
def test_logits_have_the_images_size_and_the_network_is_rebuilt_from_its_structure(build, decoder):
    network = segmenter(build(), 3, decoder).eval()
    logits = network(IMAGES)
    assert logits.shape == (2, 3, SIDE, SIDE)
    structure = structure_of(network)
    assert structure == Structure("methods.parts.dense:segmenter", {"num_classes": 3, "decoder": decoder})
    fresh = structure.apply(build(seed=9))
    assert not torch.equal(fresh.eval()(IMAGES), logits)
    fresh.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(fresh(IMAGES), logits, rtol=0, atol=0)
    assert structure_of(build()) is None


def test_the_convolutional_decoder_has_four_stages_that_shrink_with_the_width():
    assert stage_channels(768) == stage_channels(1408) == [256, 128, 64, 16]
    assert stage_channels(384) == [128, 64, 32, 8]
    assert stage_channels(48) == [16, 8, 8, 8]
    decoder = segmenter(vit(), 3, "conv").decoder
    assert [tuple(s[0].weight.shape[:2]) for s in decoder.stages] == [(16, 48), (8, 16), (8, 8), (8, 8)]
    # 4 -> 8 -> 16 -> 32, and no further: the image has 32 pixels
    assert decoder(torch.randn(1, 48, 4, 4), (SIDE, SIDE)).shape == (1, 3, SIDE, SIDE)
    assert decoder(torch.randn(1, 48, 4, 4), (100, 100)).shape == (1, 3, 64, 64)


def test_networks_without_a_coarse_last_map_read_it_alone():
    assert finer_layers(vit()) == []
    assert finer_layers(cnn()) == [3]


def test_features_at_pixels_are_those_of_the_interpolated_map():
    maps = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = masks_of(3, 20)
    for edge in (slice(3), slice(-3, None), slice(8, 11)):  # at the edges several pixels have the same features
        masks[:, edge], masks[:, :, edge] = IGNORE, IGNORE
    masks[2] = IGNORE
    features, labels, images = pixel_rows(maps, masks, limit=60)
    assert len(features) == len(labels) == 40  # as many of each image; the third has none that counts
    assert images.tolist() == [0] * 20 + [1] * 20
    enlarged = F.interpolate(maps, size=(20, 20), mode="bilinear", align_corners=False)
    for image in (0, 1):
        of_image = enlarged[image].flatten(1).T  # [400, 5]
        distance, pixel = (features[images == image][:, None] - of_image).abs().amax(2).min(1)
        assert distance.max() < 1e-5
        assert len(set(pixel.tolist())) == 20
        assert torch.equal(masks[image].flatten()[pixel], labels[images == image])
    assert set(labels.tolist()) <= set(range(CLASSES))


def test_a_linear_head_of_pixels_is_the_logistic_regression_of_the_interpolated_logits():
    maps = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = masks_of(4, 8, 3)
    features, labels, _ = pixel_rows(maps, masks, limit=10_000)
    weight, bias = fit_linear_head(features, labels, 3, l2=0.1)
    decoder = linear_decoder(weight, bias)
    logits = F.interpolate(decoder(maps, (8, 8)), size=(8, 8), mode="bilinear", align_corners=False)
    loss = F.cross_entropy(features @ weight.T + bias, labels)
    torch.testing.assert_close(supervised_loss(logits, masks, "segmentation"), loss, rtol=0, atol=1e-5)
    once, again = fit_dense_head(maps, masks, 3), fit_dense_head(maps, masks, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_convolutional_decoder_learns_masks_on_frozen_maps_and_is_deterministic():
    raster = torch.randint(0, 3, (8, 4, 4), generator=torch.Generator().manual_seed(0))
    maps = F.one_hot(raster, 3).permute(0, 3, 1, 2).float()
    maps = torch.cat([maps, torch.zeros(8, 29, 4, 4)], 1)
    masks = raster.repeat_interleave(4, 1).repeat_interleave(4, 2)
    decoders = [fit_conv_decoder(maps, masks, 3) for _ in range(2)]
    logits = [F.interpolate(d(maps, (16, 16)), size=(16, 16), mode="bilinear") for d in decoders]
    assert torch.equal(*logits)
    assert (logits[0].argmax(1) == masks).float().mean() > 0.95
    assert not any(m.training for m in decoders[0].modules())


# Losses


def test_ignored_pixels_have_no_part_in_the_loss():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = masks_of(2, 4, 3)
    masks[0, 1:] = IGNORE
    masks[1] = IGNORE
    loss = supervised_loss(logits, masks, "segmentation")
    by_hand = F.cross_entropy(logits[0, :, 0].T, masks[0, 0])
    torch.testing.assert_close(loss, by_hand)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[1].abs().max() == gradient[0, :, 1:].abs().max() == 0
    nothing = supervised_loss(logits, torch.full_like(masks, IGNORE), "segmentation")
    assert nothing.item() == 0
    assert nothing.requires_grad


def test_distillation_of_pixels_is_zero_at_equality_and_the_mean_over_pixels():
    student = torch.randn(2, 3, 8, 8)
    assert abs(float(distillation_loss(student, student, 4.0, "segmentation"))) < 1e-6
    teacher = torch.randn(2, 3, 2, 2)
    enlarged = F.interpolate(teacher, size=(8, 8), mode="bilinear", align_corners=False)
    total = 0.0
    for b in range(2):
        for i in range(8):
            for j in range(8):
                p, q = (enlarged[b, :, i, j] / 2).softmax(0), (student[b, :, i, j] / 2).softmax(0)
                total += float((p * (p / q).log()).sum())
    found = float(distillation_loss(student, teacher, 2.0, "segmentation"))
    assert found == pytest.approx(4 * total / (2 * 8 * 8), rel=1e-5)


def test_the_teachers_pixels_are_its_head_on_its_map():
    from methods.tuning import SoftTeacher, soft_targets

    case = make_case("vit", "cnn", task_kind="segmentation")
    targets = soft_targets("none", case.setting)
    weight, bias = torch.randn(CLASSES, 48), torch.randn(CLASSES)

    class Given:
        def result(self, name: str):
            return {"weight": weight, "bias": bias}

    maps = read_outputs(case.teacher, IMAGES, targets.outputs)
    logits = SoftTeacher(targets.params, Given())(maps)
    wanted = linear_decoder(weight, bias)(maps["dense"], (SIDE, SIDE))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
