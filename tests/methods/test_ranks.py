"""Losses that relate the rows of a batch are those of the global batch, whatever the number of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods.contract import Batch, Learner

WORLD = 2


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


CASES = {"rkd": rkd, "tdmr": tdmr, "prompt": prompt, "dime_fm": dime_fm, "texts": texts}


def run(rank: int, world: int, folder: str) -> None:
    """One step of every case on this rank's rows; rank 0 leaves losses and gradients."""
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        learner, batch = case()
        assert batch.labels is not None
        outputs = {k: v[rank::world] for k, v in batch.outputs.items()}
        own = batch.texts if batch.tokens is None or batch.texts is None else batch.texts[rank::world]
        tokens = batch.tokens[rank::world] if batch.tokens is not None else None
        part = Batch(batch.images[rank::world], batch.labels[rank::world], outputs, texts=own, tokens=tokens)
        wrapped: nn.Module = learner
        if world > 1:
            wrapped = DistributedDataParallel(learner, find_unused_parameters=True)
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
    mp.spawn(run, (WORLD, str(folder)), nprocs=WORLD)
    run(0, 1, str(folder))
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in (1, WORLD)}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_loss_and_the_gradients_of_one(steps, name: str) -> None:
    one, two = steps[1][name], steps[WORLD][name]
    assert one.keys() == two.keys()
    assert len(one) > 3
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=1e-5), key
