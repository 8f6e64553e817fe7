"""The remapping family: grown, remapped and searched networks (Net2Net, FNA, DARTS); decisive tests carry their ids."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from learners import learner_of
from tiny import CLASSES, SIDE, cnn, make_case, make_images, run_chain, teacher_outputs, vit
from torch import nn
from tuned import planned, refusal

from methods.contract import Batch
from methods.darts import DARTS, CellLearner, DARTSConfig, SearchLearner, SuperNetwork, chosen, discretised
from methods.fna import FNA, FNAConfig, counterparts, family, remap, remapped
from methods.heads import POOLED, TEACHER_HEAD
from methods.net2net import (
    Net2Net,
    Net2NetConfig,
    Net2NetLearner,
    identity_block,
    net2deeper,
    net2wider,
    replication,
    widen_block,
)
from methods.outputs import Output, read_outputs
from methods.parts.cells import CHOICES, CellNetwork
from methods.parts.grown import grown, hidden_units

# Net2Net


def small_net():
    """Two convolutions with used batch statistics, one depthwise, and a linear map on the mean."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip
    for _ in range(3):
        network(torch.randn(16, 3, 16, 16))
    return network.eval()


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_vt_7_net2wider_keeps_the_logits_of_a_convolutional_net_with_batch_norm(noise):
    network, images = small_net(), torch.randn(8, 3, 16, 16)
    expected = network(images)
    giving, reading = [network[i] for i in (0, 1, 3, 4)], [network[6]]
    given, read = net2wider(giving, reading, 17, noise)
    for i, layer in zip((0, 1, 3, 4, 6), (*given, *read), strict=True):
        network[i] = layer
    assert network[1].running_mean.shape == network[4].running_var.shape == (17,)
    assert network[3].groups == 17
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-6)
    given, read = net2wider([network[6], network[7]], [network[11]], 9, noise)
    network[6], network[7], network[11] = (*given, *read)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-6)


def test_vt_7_net2deeper_keeps_the_logits_of_a_convolutional_net_with_batch_norm():
    network, images = small_net(), torch.randn(8, 3, 16, 16)
    for norm in (True, False):
        deeper = nn.Sequential(*network[:9], *net2deeper(4, 5, norm), nn.ReLU(), *network[9:]).eval()
        torch.testing.assert_close(deeper(images), network(images), rtol=0, atol=1e-6)


def test_vt_7_wider_units_are_copies_and_noise_tells_them_apart_without_changing_the_sum():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    (wide,), (read,) = net2wider([first], [second], 8, noise=0.5)
    assert torch.equal(wide.weight[:3], first.weight)
    copies = [[i for i in range(8) if torch.equal(wide.weight[i], first.weight[j])] for j in range(3)]
    assert sorted(i for group in copies for i in group) == list(range(8))
    for j, group in enumerate(copies):
        torch.testing.assert_close(read.weight[:, group].sum(1), second.weight[:, j])
        if len(group) > 1:
            assert not torch.allclose(read.weight[:, group[0]], read.weight[:, group[1]])
    with pytest.raises(ValueError, match="only adds units"):
        replication(8, 4)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "tf_efficientnet_lite0", "test_convnext"]
)
def test_vt_7_net2net_keeps_the_logits_of_timm_networks_and_can_be_rebuilt(name):
    network = cnn(name, seed=1)
    assert any(hidden_units(m) for m in network.modules())
    images, _ = make_images(4)
    expected = network(images)
    learner = Net2NetLearner.__new__(Net2NetLearner)
    nn.Module.__init__(learner)
    identities = [m for m in network.modules() if isinstance(m, nn.Sequential) and len(m) and identity_block(m[-1])]
    params = {"transformer": False, "width": 1.5, "deeper": 2 if identities else 0, "noise": 0.05, "layer_decay": 1.0}
    parameters = sum(p.numel() for p in network.parameters())
    wide = learner.adapt(copy.deepcopy(network), params)
    assert sum(p.numel() for p in wide.parameters()) > 1.1 * parameters
    torch.testing.assert_close(wide(images), expected, rtol=0, atol=1e-6 * max(1.0, expected.abs().max().item()))
    fresh = grown(timm.create_model(name, num_classes=CLASSES), **learner.grown).eval()
    fresh.load_state_dict(wide.state_dict(), strict=True)
    assert torch.equal(fresh(images), wide(images))


@pytest.mark.parametrize("kind", ["vit", "hybrid"])
@pytest.mark.parametrize(("width", "deeper", "noise"), [(1.5, 0, 0.02), (1.0, 4, 0.0), (2.0, 3, 0.5)])
def test_vt_7_net2net_keeps_the_logits_of_a_transformer(kind, width, deeper, noise):
    case = make_case(kind)
    images, _ = make_images(8)
    learner, _ = learner_of(case, Net2Net, width=width, deeper=deeper, noise=noise)
    plain, _ = learner_of(case, Net2Net, width=1.0, deeper=1, noise=0.0)
    assert len(learner.student.blocks) == 6 + deeper
    assert learner.student.blocks[0].mlp.fc1.out_features == 192 * width
    torch.testing.assert_close(learner.student(images), plain.student(images), rtol=0, atol=1e-5)
    with torch.no_grad():
        network = copy.deepcopy(case.teacher)
        network.head.weight.copy_(plain.student.head.weight)
        network.head.bias.copy_(plain.student.head.bias)
    torch.testing.assert_close(plain.student(images), network(images), rtol=0, atol=1e-6)


def test_net2net_of_a_transformer_is_a_plain_timm_network_and_learns_apart():
    case = make_case()
    chain = run_chain(Net2Net, Net2NetConfig(budget=4.0, noise=0.02), case, *make_images(), steps=3)
    assert chain.deployed.changes == {"depth": 7, "mlp_ratio": 6.0}
    assert chain.deployed.structure is None
    fc1 = chain.deployed.network.blocks[0].mlp.fc1.weight
    assert len(torch.unique(fc1, dim=0)) == len(fc1)  # no two units are still the same
    maps = read_outputs(chain.deployed.network, make_images(2)[0], [Output("map", layer=6, grid=2)])
    assert maps["map_6_grid2"].shape == (2, 48, 2, 2)


def test_net2net_refuses_what_it_cannot_keep():
    assert "full_tuning" in Net2Net.invalid(Net2NetConfig(width=1.0, deeper=0), make_case().setting)
    assert widen_block(nn.Conv2d(3, 3, 3), 2.0, 0.0) == []
    learner = Net2NetLearner.__new__(Net2NetLearner)
    nn.Module.__init__(learner)
    with pytest.raises(ValueError, match="without changing what it computes"):
        learner.adapt(cnn("test_byobnet"), {"transformer": False, "width": 2.0, "deeper": 0, "noise": 0.0})


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}),
        ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}),
        ("hiera_tiny_224", {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)}),
        ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 4}),
        ("edgenext_xx_small", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "heads": (2, 2, 2, 2)}),
    ],
)
def test_net2net_says_at_planning_that_it_cannot_deepen_a_network(name, kwargs):
    setting = planned(name, **kwargs)
    assert f"net2net cannot serve timm/{name}: " in refusal("net2net", setting)
    assert refusal("net2net", setting, deeper=0) is None  # wider it can be


@pytest.mark.parametrize(("name", "kind"), [("test_vit", "vit"), ("test_resnet", "cnn"), ("test_convnext", "cnn")])
def test_net2net_passes_at_planning_what_it_can_grow(name, kind):
    assert refusal("net2net", planned(name, kind)) is None


def test_net2net_says_at_planning_that_it_cannot_insert_a_block():
    setting = planned("cait_xxs24_224", "vit", embed_dim=48, depth=2, num_heads=4)
    assert "cannot insert a transformer block of kind LayerScaleBlock" in refusal("net2net", setting)


# FNA


@pytest.mark.parametrize("kind", ["vit", "cnn", "hybrid"])
def test_vt_8_fna_with_target_equal_to_seed_is_the_identity(kind):
    case = make_case(kind, kind)
    student, teacher = copy.deepcopy(case.student), case.teacher
    assert remap(student, teacher) == 1.0
    head = {id(t) for t in student.get_classifier().parameters()}
    theirs, before = teacher.state_dict(), case.student.state_dict()
    for name, tensor in student.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name] if id(tensor) in head else theirs[name]), name


def test_fna_deeper_layers_repeat_the_last_and_names_decide():
    target = {f"blocks.{i}.weight": torch.zeros(1) for i in range(4)} | {"stem.0.weight": torch.zeros(1)}
    seed = {f"blocks.{i}.weight": torch.zeros(1) for i in range(2)} | {"norm.weight": torch.zeros(1)}
    assert counterparts(target, seed) == {f"blocks.{i}.weight": f"blocks.{min(i, 1)}.weight" for i in range(4)}


def test_fna_copies_first_channels_and_kernel_centres():
    seed = torch.arange(2 * 2 * 3 * 3.0).view(2, 2, 3, 3) + 1
    wider = remapped(torch.full((3, 2, 3, 3), -1.0), seed)
    assert torch.equal(wider[:2], seed)
    assert (wider[2] == -1).all()
    larger = remapped(torch.full((2, 1, 5, 5), -1.0), seed)
    assert torch.equal(larger[:, :, 1:4, 1:4], seed[:, :1])
    assert larger.sum() == seed[:, :1].sum()  # zeros around
    smaller = remapped(torch.zeros(2, 2, 1, 1), seed)
    assert torch.equal(smaller, seed[:, :, 1:2, 1:2])


def test_fna_remaps_a_fused_qkv_part_by_part():
    teacher, student = vit(seed=1, dim=48), vit(seed=2, dim=24)
    remap(student, teacher)
    mine, theirs = student.blocks[3].attn.qkv.weight, teacher.blocks[3].attn.qkv.weight
    for part in range(3):
        assert torch.equal(mine[24 * part : 24 * part + 24], theirs[48 * part : 48 * part + 24, :24])


def test_fna_between_depths_and_image_sizes():
    teacher, student = vit(3, seed=1), vit(5, seed=2)
    assert remap(student, teacher) == 1.0
    for i in range(5):
        assert torch.equal(student.blocks[i].mlp.fc1.weight, teacher.blocks[min(i, 2)].mlp.fc1.weight)
    big = timm.create_model("test_vit", img_size=96, num_classes=CLASSES)
    small = timm.create_model("test_vit", img_size=64, num_classes=CLASSES)
    assert remap(small, big) == 1.0
    assert not torch.equal(small.pos_embed, big.pos_embed[:, : small.pos_embed.shape[1]])
    assert torch.equal(small.pos_embed[:, 0], big.pos_embed[:, 0])


def test_fna_share_and_noise():
    teacher, student = vit(seed=1), vit(seed=2)
    before = copy.deepcopy(student)
    remap(student, teacher, share=0.5)
    assert torch.equal(student.blocks[0].mlp.fc1.weight, teacher.blocks[0].mlp.fc1.weight)
    assert torch.equal(student.blocks[5].mlp.fc1.weight, before.blocks[5].mlp.fc1.weight)
    remap(student, teacher, noise=0.02)
    apart = (student.blocks[0].mlp.fc1.weight - teacher.blocks[0].mlp.fc1.weight).std()
    assert apart.item() == pytest.approx(0.02 * teacher.blocks[0].mlp.fc1.weight.std().item(), rel=0.1)


def test_fna_refuses_other_families_by_name():
    case = make_case("vit", "cnn")
    assert "tiny/cnn is no relative of tiny/vit" in FNA.refuses(case.setting)
    case = make_case("cnn", "cnn")
    assert FNA.refuses(case.setting) is None
    resnet = replace(case.setting, student=replace(case.setting.student, name="timm/resnet18.a1_in1k"))
    assert "no relative" in FNA.refuses(resnet)
    assert family("timm/test_resnet") == family("timm/resnet50") != family("timm/resnetv2_50")
    assert family("packaged/efficientnet_lite0") == family("timm/tf_efficientnet_b0") == family("timm/mobilenetv2_050")
    assert family("timm/mobilenetv3_small_050") != family("timm/mobilenetv2_050")
    assert family("local:mine.safetensors") is None
    stranger = replace(case, teacher=cnn("test_resnet"))  # a local file says nothing of its family
    with pytest.raises(ValueError, match="one family"):
        learner_of(stranger, FNA)


def test_fna_starts_where_the_teacher_stands():
    case = make_case("vit", "vit")
    chain = run_chain(FNA, FNAConfig(lr=1e-6), case, *make_images(), steps=1)
    images, _ = make_images(8)
    own, theirs = (read_outputs(n, images, [POOLED])["pooled"] for n in (chain.deployed.network, case.teacher))
    torch.testing.assert_close(own, theirs, rtol=1e-2, atol=1e-2)


# DARTS


def super_network(seed=0):
    torch.manual_seed(seed)
    network = SuperNetwork(4, 2, 6, CLASSES).train()
    network(torch.randn(16, 3, SIDE, SIDE))
    return network.eval()


@pytest.mark.parametrize("choices", [(0, 1, 2, 3), (3, 3, 3, 3), (2, 0, 0, 1)])
def test_vt_11_one_hot_alphas_equal_the_discretised_network(choices):
    network = super_network()
    with torch.no_grad():
        network.alphas.fill_(-1e4)
        for block, choice in enumerate(choices):
            network.alphas[block, choice] = 1e4
    plain = discretised(network)
    assert type(plain) is CellNetwork
    assert chosen(network.alphas) == [CHOICES[c] for c in choices]
    images, _ = make_images(8)
    torch.testing.assert_close(network(images), plain(images), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in network.parameters())


def test_darts_mixes_the_choices():
    network = super_network()
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        network.alphas[0] = torch.tensor([0.0, 0.0, math.log(2.0), 0.0])
    by_hand = sum(share * op(x) for share, op in zip((0.2, 0.2, 0.4, 0.2), network.cells[0], strict=True))
    torch.testing.assert_close(network.cell(0, x), by_hand)


HALVES = [0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0]  # parity of the ones in 0, 1, 10, 11, 100, ...


def test_darts_each_half_moves_its_own_side_only():
    case = make_case()
    learner, stage = learner_of(case, DARTS, stage=-2)
    assert isinstance(learner, SearchLearner)
    images, labels = make_images(16)
    outputs = teacher_outputs(case.teacher, images, stage.feed.outputs)
    learner.eval()  # batch statistics would tie the halves together

    halves = torch.tensor(HALVES)

    def gradients(changed):
        labels_now = labels.clone()
        labels_now[halves == changed] = (labels_now[halves == changed] + 1) % CLASSES
        learner.zero_grad()
        learner(Batch(images, labels_now, outputs), 0.0)["loss"].backward()
        own = dict(learner.student.named_parameters())
        return own.pop("alphas").grad.clone(), own["head.weight"].grad.clone()

    learner(Batch(images, labels, outputs), 0.0)["loss"].backward()
    own = dict(learner.student.named_parameters())
    plain = own["alphas"].grad.clone(), own["head.weight"].grad.clone()
    even, odd = gradients(0), gradients(1)
    assert torch.equal(even[0], plain[0])
    assert not torch.equal(even[1], plain[1])
    assert not torch.equal(odd[0], plain[0])
    assert torch.equal(odd[1], plain[1])


def test_darts_first_order_gradients_are_those_of_the_plain_losses():
    case = make_case()
    learner, stage = learner_of(case, DARTS, stage=-2)
    images, labels = make_images(16)
    batch = Batch(images, labels, teacher_outputs(case.teacher, images, stage.feed.outputs))
    learner.eval()
    learner(batch, 0.0)["loss"].backward()
    for name in ("alphas", "head.weight", "stem.0.weight"):
        half = torch.tensor(HALVES) == (1 if name == "alphas" else 0)
        rows = Batch(images[half], labels[half], {k: v[half] for k, v in batch.outputs.items()})
        parameter = learner.student.get_parameter(name)
        (expected,) = torch.autograd.grad(learner.distillation(learner.student(rows.images), rows)["loss"], parameter)
        torch.testing.assert_close(parameter.grad, expected)


def test_darts_distils_what_it_found_from_scratch():
    case = make_case()
    alphas = torch.zeros(6, 4)
    found = [0, 3, 1, 2, 2, 0]
    alphas[range(6), found] = 1.0
    learner, stage = learner_of(case, DARTS, {"search": {"alphas": alphas}})
    assert isinstance(learner, CellLearner)
    arguments = learner.deployed().structure.arguments
    assert arguments["choices"] == [CHOICES[i] for i in found]
    assert stage.inputs == (TEACHER_HEAD, "search")
    search = DARTS.stages(DARTSConfig(), case.setting)[-2]
    assert (search.publishes, stage.publishes) == ("tensors", "network")


def test_darts_learns_and_its_choices_move():
    images, labels = make_images()
    config = DARTSConfig(cells=1, stages=2, width=8, budget=4.0, search_budget=2.0, lr=5e-3)
    chain = run_chain(DARTS, config, make_case(), images, labels, steps=15)
    assert chain.results["search"]["alphas"].abs().max() > 0.01
    distilled = chain.losses[30:]
    assert sum(distilled[-5:]) < 0.6 * sum(distilled[:5])
    network = chain.deployed.network
    assert network.num_classes == CLASSES
    assert network.forward_head(network.forward_features(images[:2]), pre_logits=True).shape == (2, 16)
    network.reset_classifier(3)
    assert network(images[:2]).shape == (2, 3)


def test_cells_are_dealt_out_evenly():
    with pytest.raises(ValueError, match="evenly"):
        CellNetwork(["skip"] * 3, 2, 8, 2)
    with pytest.raises(ValueError, match="allowed: conv3x3, dw5x5, inverted, skip"):
        CellNetwork(["conv"], 1, 8, 2)
