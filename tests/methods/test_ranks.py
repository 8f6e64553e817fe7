"""Losses that relate the rows of a batch are those of the global batch, whatever the number of processes."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods.contract import Batch, Learner
from methods.ranks import GlobalBatchNorm, even_labels

WORLDS = (2, 3)


def rkd() -> tuple[Learner, Batch]:
    from learners import learner_of
    from tdmr_cases import batch_of
    from tiny import make_case, teacher_outputs

    from methods.heads import POOLED
    from methods.rkd import RKD

    case = make_case("vit", "vit")
    learner, stage = learner_of(case, RKD, distance=1.0, angle=2.0)
    batch = batch_of(case)
    outputs = teacher_outputs(case.teacher, batch.images, tuple({*stage.feed.outputs, POOLED}))
    return learner, Batch(batch.images, batch.labels, outputs)


def tdmr() -> tuple[Learner, Batch]:
    from tdmr_cases import batch_of, learner_of
    from tiny import make_case

    case = make_case("vit", "vit")
    learner, _, _ = learner_of(case, distance="similarity", transport=0.5, mode="none", lambda_end=1.0)
    return learner, batch_of(case)


def prompt() -> tuple[Learner, Batch]:
    from learners import learner_of
    from tdmr_cases import batch_of
    from tiny import make_case

    from methods.tdmr import TDMR

    case = make_case("vit", "vit")
    learner, _ = learner_of(case, TDMR, stage=0, input_prompt=2, projector="mlp", proxy_dim=16)
    return learner, batch_of(case)


def dime_fm() -> tuple[Learner, Batch]:
    from learners import learner_of
    from tiny import make_case, make_images, teacher_outputs, texts_of

    from methods.dime_fm import DimeFM
    from methods.vision_language import EMBEDDING

    case = make_case("clip", "vit")
    learner, _ = learner_of(case, DimeFM, mass=0.0, t_pvl=20.0, t_udist=30.0, udist_weight=0.2)
    images, labels = make_images(16)
    return learner, Batch(images, labels, teacher_outputs(case.teacher, images, (EMBEDDING,)), texts=texts_of())


def texts() -> tuple[Learner, Batch]:
    from learners import learner_of
    from tiny import make_case, make_images, texts_of

    from methods.dime_fm import DimeFM

    case = make_case("clip", "vit")
    learner, _ = learner_of(case, DimeFM, stage=0, text_student="small", text_width=32, text_layers=1)
    images, labels = make_images(16)
    tokens = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    return learner, Batch(images, labels, texts=texts_of(16), tokens=tokens)


def darts() -> tuple[Learner, Batch]:
    """Six of twelve rows have a label, as many on each rank, but not in each half; on three ranks halves are uneven."""
    from learners import learner_of
    from tdmr_cases import batch_of
    from tiny import make_case

    from methods.darts import DARTS

    case = make_case("vit", "cnn")
    learner, _ = learner_of(case, DARTS, stage=-2, cells=1, stages=2, width=8)
    return learner, batch_of(case, n=12, labelled=6)


def ota() -> tuple[Learner, Batch]:
    """The teacher is sure of four of twelve rows: of three and one on two ranks, of three, one and none on three."""
    from tiny import CLASSES, make_case, make_images

    from methods.contract import Given
    from methods.ota import OTALearner
    from methods.tuning import LOGITS

    params = {"weight": 1.0, "temperature": 2.0, "min_confidence": 0.9, "tuned": True}
    learner = OTALearner(params, Given(values={"student": make_case("vit", "vit").student}, num_classes=CLASSES))
    images, labels = make_images(12)
    sure = torch.zeros(12, 1).index_fill(0, torch.tensor([0, 3, 4, 6]), 9.0)
    return learner.train(), Batch(images, labels, {LOGITS.key: sure * torch.eye(CLASSES)[labels.roll(1)]})


CASES = {"rkd": rkd, "tdmr": tdmr, "prompt": prompt, "dime_fm": dime_fm, "texts": texts, "darts": darts, "ota": ota}
OF_THREE = ("darts", "ota")  # whose rows three ranks can share


def run(rank: int, world: int, folder: str) -> None:
    """One step of every case on this rank's rows; rank 0 leaves losses and gradients."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name in CASES if world < 3 else OF_THREE:
        torch.manual_seed(0)
        learner, batch = CASES[name]()
        assert batch.labels is not None
        outputs = {k: v[rank::world] for k, v in batch.outputs.items()}
        own = batch.texts if batch.tokens is None or batch.texts is None else batch.texts[rank::world]
        tokens = batch.tokens[rank::world] if batch.tokens is not None else None
        part = Batch(batch.images[rank::world], batch.labels[rank::world], outputs, texts=own, tokens=tokens)
        wrapped: nn.Module = learner
        if world > 1:
            wrapped = DistributedDataParallel(learner, find_unused_parameters=True)
        labelled = int((batch.labels >= 0).sum())
        even = labelled % world == 0 and len(batch.images) % world == 0
        with even_labels(even), GlobalBatchNorm() if world > 1 else nullcontext():
            loss = wrapped(part, 0.5)["loss"]
        loss.backward()
        value = loss.detach().clone()
        if world > 1:
            dist.all_reduce(value)
            value /= world
        gradients = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
        results[name] = {"loss": value, **gradients}
    if rank == 0:
        torch.save(results, Path(folder) / f"{world}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    for world in WORLDS:
        (folder / str(world)).mkdir()
        mp.spawn(run, (world, str(folder / str(world))), nprocs=world)
    run(0, 1, str(folder))
    return {int(path.stem): torch.load(path, weights_only=True) for path in folder.rglob("*.pt")}


def same(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor]) -> None:
    assert one.keys() == several.keys()
    assert len(one) > 3
    for key, value in one.items():
        assert torch.allclose(value, several[key], atol=1e-5), key


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_loss_and_the_gradients_of_one(steps, name: str) -> None:
    same(steps[1][name], steps[2][name])


@pytest.mark.parametrize("name", OF_THREE)
def test_three_ranks_give_the_loss_and_the_gradients_of_one(steps, name: str) -> None:
    same(steps[1][name], steps[3][name])
