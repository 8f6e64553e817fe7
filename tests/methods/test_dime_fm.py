"""DIME-FM's decisive tests: DM-1 to DM-8, DM-11 and DM-12 on the losses and a learner of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learners import learner_of
from small import small_spec
from tiny import EMBEDDING as WIDTH
from tiny import Rows, make_case, make_images, run_chain, teacher_outputs
from torch import Tensor

from methods.contract import Batch, Given
from methods.dime_fm import TEMPERATURES, DimeFM, DimeFMConfig, calibrate, diagonal_mass, pvl_loss, udist_loss, vl_loss
from methods.paired_contrastive import PairedContrastive
from methods.texts import clusters_of, groundedness, select
from methods.vision_language import EMBEDDING, similarities
from orchestrator.trial.plan import Cell, setting_of

T1, T2, T3, SCALE = 1.0, 3.0, 7.0, 100.0


def drawn(rows: int, seed: int, shared: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[rows, 24] with a direction in common, as the embeddings of real towers have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 24, generator=generator, dtype=dtype) + shared


def losses(v_t: Tensor, v_s: Tensor, u_t: Tensor) -> Tensor:
    """L_vl, L_p-vl, L_udist."""
    parts = (vl_loss(v_t, v_s, u_t, T1, SCALE), pvl_loss(v_t, v_s, T2, SCALE), udist_loss(v_t, v_s, T3, SCALE))
    return torch.stack(parts)


def test_dm_1_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    v, u = drawn(12, 0), drawn(9, 1)
    mine = v.clone().requires_grad_(True)
    found = losses(v, mine, u)
    assert found.abs().max() <= 1e-6
    (gradient,) = torch.autograd.grad(found.sum(), mine)
    assert gradient.abs().max() <= 1e-6


def test_dm_2_the_length_of_the_students_embeddings_does_not_matter() -> None:
    v_t, v_s, u = drawn(12, 0), drawn(12, 1), drawn(9, 2)
    assert torch.allclose(losses(v_t, v_s, u), losses(v_t, 3.7 * v_s, u), atol=1e-5)


def test_dm_3_a_rotation_is_free_for_udist_alone() -> None:
    v, u = drawn(12, 0), drawn(9, 1)
    rotation = torch.linalg.qr(drawn(24, 3, shared=0.0)).Q
    vl, pvl, udist = losses(v, v @ rotation, u)
    assert udist <= 1e-5
    assert vl > 1
    assert pvl > 1


def test_dm_4_the_order_of_texts_and_the_joint_order_of_images_do_not_matter() -> None:
    v_t, v_s, u = drawn(12, 0), drawn(12, 1), drawn(9, 2)
    expected = losses(v_t, v_s, u)
    assert torch.allclose(losses(v_t, v_s, u[torch.randperm(9)]), expected, atol=1e-5)
    order = torch.randperm(12)
    assert torch.allclose(losses(v_t[order], v_s[order], u), expected, atol=1e-5)


def test_dm_5_stored_embeddings_of_other_images_raise_the_loss() -> None:
    v_t, u = drawn(12, 0), drawn(9, 2)
    v_s = v_t + 0.1 * drawn(12, 1, shared=0.0)
    aligned = vl_loss(v_t, v_s, u, T1, SCALE)
    assert vl_loss(v_t.roll(1, 0), v_s, u, T1, SCALE) > 5 * aligned


def test_dm_6_of_a_single_text_images_cannot_be_told_apart_but_texts_can() -> None:
    v_t, v_s, u = drawn(12, 0), drawn(12, 1), drawn(1, 2)
    rows = F.softmax(similarities(v_s, u, SCALE), dim=-1)
    assert torch.equal(rows, torch.ones_like(rows))
    columns = [F.log_softmax(similarities(u, v, SCALE), dim=-1) for v in (v_t, v_s)]
    other = F.kl_div(columns[1], columns[0], reduction="batchmean", log_target=True)
    assert float(vl_loss(v_t, v_s, u, T1, SCALE)) == pytest.approx(float(other), rel=1e-12)
    assert other > 1


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_dm_7_a_case_of_two_by_two_by_hand(scale: float) -> None:
    v_t = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    v_s = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)  # at length 1: (.6, .8) and (0, 1)
    u_t = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def kl(p: list[list[float]], q: list[list[float]], t: float) -> float:
        total = 0.0
        for left, right in zip(p, q, strict=True):
            a, b = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
            one, two = (scale * a / t).softmax(0), (scale * b / t).softmax(0)
            log_one, log_two = (scale * a / t).log_softmax(0), (scale * b / t).log_softmax(0)
            assert torch.isfinite(two).all()
            total += float((one * (log_one - log_two)).sum())
        return total / len(p)

    vl = kl([[1, 0], [0.6, 0.8]], [[0.6, 0.8], [0, 1]], T1) + kl([[1, 0.6], [0, 0.8]], [[0.6, 0], [0.8, 1]], T1)
    pvl = 2 * kl([[1, 0.6], [0.6, 1]], [[0.6, 1], [0, 0.8]], T2)
    udist = 2 * kl([[1, 0.6], [0.6, 1]], [[1, 0.8], [0.8, 1]], T3)
    assert float(vl_loss(v_t, v_s, u_t, T1, scale)) == pytest.approx(vl, abs=1e-6)
    assert float(pvl_loss(v_t, v_s, T2, scale)) == pytest.approx(pvl, abs=1e-6)
    assert float(udist_loss(v_t, v_s, T3, scale)) == pytest.approx(udist, abs=1e-6)
    learner, _ = learner_of(make_case("clip", "cnn"), DimeFM, mass=0.0)
    learner.scale = scale  # type: ignore[assignment]
    total = learner.combine(v_t, v_s, u_t)["loss"]  # type: ignore[operator]
    assert float(total) == pytest.approx(0.7 * vl + 0.3 * pvl, abs=1e-6)


def test_dm_8_a_loss_of_weight_zero_leaves_no_trace() -> None:
    v_t, v_s, u = drawn(12, 0), drawn(12, 1), drawn(9, 2)
    alone, _ = learner_of(make_case("clip", "cnn"), DimeFM, mass=0.0, pvl_weight=0.0, udist_weight=0.0)
    found = alone.combine(v_t, v_s, u)  # type: ignore[operator]
    assert set(found) == {"loss", "vl"}
    assert torch.equal(found["loss"], vl_loss(v_t, v_s, u, T1, SCALE))


def test_dm_11_which_image_a_caption_belongs_to_plays_no_part() -> None:
    case = make_case("clip", "vit")
    learner, _ = learner_of(case, DimeFM, mass=0.0)
    images, _ = make_images(8)
    outputs = teacher_outputs(case.teacher, images, (EMBEDDING,))
    texts, captions = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    found = [
        learner.loss(Batch(images, None, outputs, texts=texts, captions=pairing), 0.0)["loss"]
        for pairing in (captions, captions.flip(0), None)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_dm_12_sixty_four_images_are_learned_by_heart() -> None:
    case = make_case("clip", "cnn", labelled=20, unlabelled=44)
    images, labels = make_images(64)
    config = DimeFMConfig(mass=0.0, lr=3e-3, pvl_weight=0.0, weight_decay=0.01)
    chain = run_chain(DimeFM, config, case, images, labels, steps=250, batch=64)
    assert sum(chain.losses[-10:]) / 10 <= 0.1 * chain.losses[0]
    assert chain.deployed is not None
    with torch.no_grad():
        mine = chain.deployed.network(images)
    theirs = teacher_outputs(case.teacher, images, (EMBEDDING,))[EMBEDDING.key]
    texts = chain.batches[-1].texts
    assert texts is not None
    agree = (similarities(mine, texts, 1).argmax(1) == similarities(theirs, texts, 1).argmax(1)).float().mean()
    assert agree >= 0.95


def test_the_calibrated_temperature_leaves_the_wanted_mass_on_the_diagonal() -> None:
    v = drawn(200, 0, dtype=torch.float32)
    given = Given(values={}, num_classes=2, outputs={EMBEDDING.key: Rows(v)})
    found = calibrate({"mass": 0.7, "scale": SCALE, "batches": [50, 25]}, given)
    assert found["mass"].tolist() == pytest.approx([0.7, 0.7], abs=1e-4)
    assert diagonal_mass(v, 1.0, SCALE, 50) > 0.99
    shuffled = v[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    whole, half = found["temperature"].tolist()
    assert diagonal_mass(shuffled, whole, SCALE, 50) == pytest.approx(0.7, abs=1e-4)
    assert diagonal_mass(shuffled, half, SCALE, 25) == pytest.approx(0.7, abs=1e-4)
    assert diagonal_mass(shuffled, whole, SCALE, 25) > 0.75


def test_temperatures_are_calibrated_for_the_rows_that_a_loss_sees(colours: Path, tmp_path: Path) -> None:
    task = make_case("clip", "cnn").setting.task
    for accumulate, rows in ((1, 12), (2, 6), (4, 3)):
        train = {"steps": 6, "batch": 12, "accumulate": accumulate}
        spec = small_spec(colours, tmp_path, train=train)
        brought = setting_of(spec, task, Cell("finetune", None, None)).task
        setting = replace(make_case("clip", "cnn").setting, task=brought)
        temperatures = next(s for s in DimeFM.stages(DimeFMConfig(), setting) if s.name == TEMPERATURES)
        assert temperatures.params["batches"] == [rows, rows // 2]


def test_micro_batches_half_as_large_as_planned_have_the_temperature_of_theirs() -> None:
    """As where a training that ran out of memory is tried again."""
    found = {TEMPERATURES: {"temperature": torch.tensor([5.0, 2.0]), "mass": torch.tensor([0.7, 0.7])}}
    learner, _ = learner_of(make_case("clip", "cnn"), DimeFM, found)
    v_t, v_s, u = drawn(16, 0), drawn(16, 1), drawn(9, 2)
    for rows, temperature in ((16, 5.0), (8, 2.0)):
        pvl = learner.combine(v_t[:rows], v_s[:rows], u)["pvl"]  # type: ignore[operator]
        assert torch.equal(pvl, pvl_loss(v_t[:rows], v_s[:rows], temperature, SCALE))
        assert learner.facts() == {"t_vl": T1, "t_pvl": temperature, "t_udist": temperature}


# Contrastive training on pairs


def test_a_learned_temperature_starts_at_its_limit_at_the_least_and_can_come_back() -> None:
    learner, _ = learner_of(make_case("clip", "vit"), PairedContrastive, temperature=0.005)
    assert learner.facts()["temperature"] == pytest.approx(0.01)
    images, _ = make_images(8)
    batch = Batch(images, None, captions=torch.randn(8, WIDTH))  # of no image: a softer temperature is better
    optimizer = torch.optim.SGD([learner.log_scale], lr=1e-2)
    learner(batch, 0.0)["loss"].backward()
    optimizer.step()
    assert learner.facts()["temperature"] > 0.0105


def test_a_learned_temperature_beyond_its_limit_is_told_as_it_acts() -> None:
    learner, _ = learner_of(make_case("clip", "vit"), PairedContrastive, temperature=0.01)
    images, _ = make_images(8)
    batch = Batch(images, None, captions=torch.randn(8, WIDTH))
    at_the_limit = learner(batch, 0.0)["loss"]
    with torch.no_grad():
        learner.log_scale.add_(1.0)
    assert learner.facts()["temperature"] == pytest.approx(0.01)
    assert torch.allclose(learner(batch, 0.0)["loss"], at_the_limit)


def sentences_near(images: Tensor) -> Tensor:
    """Two sentences at each image, one of them a near-duplicate, then 40 that are far from all."""
    generator = torch.Generator().manual_seed(3)
    near = images + 0.05 * torch.randn(images.shape, generator=generator)
    far = -images.mean(0) + 0.5 * torch.randn(40, images.shape[1], generator=generator)
    return torch.cat([near, near * 1.001, far])


def chosen(rule: str, budget: int, images: Tensor, sentences: Tensor) -> dict[str, Tensor]:
    given = Given(values={"sentences": Rows(sentences)}, num_classes=2, outputs={EMBEDDING.key: Rows(images)})
    params = {"rule": rule, "budget": budget, "top": 1, "clusters": 4, "cap": 100.0, "anchors": 1000, "seed": 0}
    return select(params, given)


def test_grounded_sentences_are_those_nearest_to_an_image() -> None:
    images = drawn(20, 0, shared=0.0, dtype=torch.float32)
    sentences = sentences_near(images)
    found = chosen("grounded", 40, images, sentences)
    assert found["rows"].tolist() == list(range(40))
    cosines = (F.normalize(sentences, dim=-1) @ F.normalize(images, dim=-1).T).amax(1)
    assert torch.allclose(found["grounded"], cosines[:40], atol=1e-5)


def test_coverage_keeps_a_sentence_for_each_image_and_near_duplicates_once() -> None:
    images = drawn(20, 0, shared=0.0, dtype=torch.float32)
    sentences = sentences_near(images)
    rows = chosen("coverage", 30, images, sentences)["rows"]
    assert {int(r) % 20 for r in rows if r < 40} == set(range(20))
    assert int((rows < 40).sum()) == 20
    assert len(rows) == 30


def test_random_sentences_look_at_no_image() -> None:
    given = Given(values={"sentences": Rows(drawn(100, 0))}, num_classes=2)
    rows = select({"rule": "random", "budget": 10, "seed": 1}, given)["rows"]
    assert len(set(rows.tolist())) == 10


def test_neighbours_are_merged_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = F.normalize(drawn(7, 0, shared=0.0, dtype=torch.float32), dim=-1)
    sentences = drawn(50, 1, shared=0.0, dtype=torch.float32)
    cosines = F.normalize(sentences, dim=-1) @ images.T
    monkeypatch.setattr(
        "methods.texts.chunks",
        lambda table: ((i, F.normalize(table.values[i : i + 8], dim=-1)) for i in range(0, 50, 8)),
    )
    scores, who, best = groundedness(Rows(sentences), images, 3)
    assert torch.allclose(scores, cosines.amax(1), atol=1e-6)
    assert torch.equal(who, cosines.topk(3, dim=0).indices.T)
    assert torch.allclose(best, cosines.topk(3, dim=0).values.T, atol=1e-6)


def test_clusters_are_found_and_always_the_same() -> None:
    centres = F.normalize(drawn(3, 0, shared=0.0, dtype=torch.float32), dim=-1)
    rows = F.normalize(centres.repeat_interleave(30, 0) + 0.02 * drawn(90, 1, shared=0.0, dtype=torch.float32), dim=-1)
    found = clusters_of(rows, 6, seed=0)
    assert torch.equal(found, clusters_of(rows, 6, seed=0))
    groups = [set(part.tolist()) for part in found.split(30)]
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]


def test_what_no_text_can_feed_is_refused_by_name() -> None:
    setting = make_case("clip", "cnn").setting
    reason = DimeFM.invalid(DimeFMConfig(pvl_weight=0.6, udist_weight=0.5), setting)
    assert reason == "pvl_weight 0.6 + udist_weight 0.5 leave L_vl nothing"
    reason = DimeFM.refuses(make_case("vit", "cnn").setting)
    assert reason == "dime_fm needs a clip teacher, and tiny/vit is of kind vit"


def test_approximate_neighbours_are_nearly_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="faiss comes with the extra `scale`")
    images = F.normalize(drawn(4000, 0, dtype=torch.float32), dim=-1)
    sentences = Rows(drawn(3000, 1, dtype=torch.float32))
    exact = groundedness(sentences, images, 4)
    monkeypatch.setattr("methods.texts.EXACT", 1000)
    found = groundedness(sentences, images, 4)
    assert ((found[0] - exact[0]).abs() < 1e-5).float().mean() > 0.9
    kept = sum(len(set(a) & set(b)) for a, b in zip(found[1].tolist(), exact[1].tolist(), strict=True))
    assert kept / exact[1].numel() > 0.7
