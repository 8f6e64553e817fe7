"""Which sentences of a corpus teach: chosen by the teacher's own space, once for all trials that want the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.contract import FitStage, Given, Table
from methods.vision_language import EMBEDDING

Rule = Literal["random", "grounded", "coverage"]
TEXTS = "texts"
CHUNK = 8192  # rows that are compared at a time
EXACT = 20_000  # images up to which every sentence is compared with every image
OFFERED = 64  # images that an approximate search offers each sentence to
TWINS = 0.98  # cosine above which two sentences of a cluster count as one
POOL = 8  # times the wanted number: what the fill by groundedness looks at


def chunks(table: Table, size: int = CHUNK, step: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(first row, [n, d] float32 rows at length 1), over every `step`-th row of a table, in order."""
    wanted = torch.arange(0, len(table), step)
    for part in wanted.split(size):
        yield int(part[0]), F.normalize(table.rows(part.numpy()).float(), dim=-1)


def groundedness(sentences: Table, images: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """How close each sentence is to an image, and which sentences are the closest of each image.

    Args:
        sentences: [n, d].
        images: [m, d] at length 1; beyond `EXACT` of them neighbours are sought approximately (faiss, inverted lists).
        top: k.

    Returns:
        `g(u) = max_i cos(u, v_i)` [n]; for each image its k best sentences [m, k] and their cosines [m, k].
    """
    top = min(top, len(sentences))
    best = torch.full((len(images), top), -2.0)
    who = torch.zeros(len(images), top, dtype=torch.int64)
    scores = torch.empty(len(sentences))
    index = _index(images) if len(images) > EXACT else None
    for start, rows in chunks(sentences):
        numbers = torch.arange(start, start + len(rows))
        if index is None:
            cosines = rows @ images.T
            scores[numbers] = cosines.amax(1)
            values, where = cosines.topk(min(top, len(rows)), dim=0)
            merged, order = torch.cat([best, values.T], 1).topk(top, dim=1)
            who = torch.cat([who, numbers[where.T]], 1).gather(1, order)
            best = merged
        else:
            found, near = (torch.from_numpy(x) for x in index.search(rows.numpy(), max(top, OFFERED)))
            scores[numbers] = found[:, 0]
            _offer(best, who, found, near, numbers)
    return scores, who, best


def _offer(best: Tensor, who: Tensor, found: Tensor, near: Tensor, numbers: Tensor) -> None:
    """Enters what an index found for a chunk of sentences [n, k] into the lists of the images [m, k], in place."""
    for column in range(found.shape[1]):
        order = found[:, column].argsort()  # so that of two offers to one image the better is the last
        image, value, number = near[order, column], found[order, column], numbers[order]
        known = image >= 0
        image, value, number = image[known], value[known], number[known]
        worst = best[image].argmin(1)
        better = value > best[image, worst]
        best[image[better], worst[better]] = value[better]
        who[image[better], worst[better]] = number[better]


def _index(images: Tensor) -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Choosing sentences for {len(images)} images compares them approximately, with faiss: "
            "pip install 'transfer-orchestrator[scale]', or lower text_anchors."
        ) from error
    lists = max(1, int(4 * len(images) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(images.shape[1]), images.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.train(images.numpy())
    index.add(images.numpy())
    index.nprobe = max(16, lists // 4)
    return index


def clusters_of(rows: Tensor, count: int, seed: int, rounds: int = 10) -> Tensor:
    """[n] the cluster of each row [n, d] (at length 1): spherical k-means, started at random rows."""
    generator = torch.Generator().manual_seed(seed)
    count = min(count, len(rows))
    centres = rows[torch.randperm(len(rows), generator=generator)[:count]]
    nearest = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(rounds):
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in rows.split(CHUNK)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        filled = torch.bincount(nearest, minlength=count) > 0
        centres = torch.where(filled[:, None], F.normalize(sums, dim=-1), centres)
    return nearest


def select(params: Mapping[str, Any], given: Given) -> dict[str, Tensor]:
    """`rows` [M] int64, ascending, of the sentences that are kept, and `grounded` [M], their groundedness.

    `random`: any. `grounded`: those with the largest `g(u) = max_i cos(u, v_i)`. `coverage`: the `top` closest of every
    image, then further ones by descending g, no cluster beyond its share, near-duplicates (cosine above 0.98 within a
    cluster) once. All of it is our reading of what the paper calls a filtered corpus [inferred].
    """
    sentences = given.texts("sentences")
    wanted = min(int(params["budget"]), len(sentences))
    rule, seed = params["rule"], int(params["seed"])
    generator = torch.Generator().manual_seed(seed)
    if rule == "random":
        rows = torch.randperm(len(sentences), generator=generator)[:wanted].sort().values
        return {"rows": rows, "grounded": torch.zeros(len(rows))}
    table = given.table(EMBEDDING)
    chosen = torch.randperm(len(table), generator=generator)[: int(params["anchors"])].sort().values
    images = F.normalize(table.rows(chosen.numpy()).float(), dim=-1)
    scores, closest, cosines = groundedness(sentences, images, int(params["top"]))
    order = scores.argsort(descending=True, stable=True)
    if rule == "grounded":
        rows = order[:wanted]
    else:
        rows = _cover(sentences, scores, order, closest, cosines, wanted, params)
    rows = rows.sort().values
    return {"rows": rows, "grounded": scores[rows]}


def _cover(
    sentences: Table,
    scores: Tensor,
    order: Tensor,
    closest: Tensor,
    cosines: Tensor,
    wanted: int,
    params: Mapping[str, Any],
) -> Tensor:
    """Each image's closest sentences, the best of all images first, then a fill under a cap for each cluster."""
    ranked = closest.T.flatten()[cosines.T.flatten().argsort(descending=True, stable=True)]
    union = list(dict.fromkeys(ranked.tolist()))[:wanted]
    pool = torch.tensor(list(dict.fromkeys([*union, *order[: POOL * wanted].tolist()])))
    rows = F.normalize(sentences.rows(pool.numpy()).float(), dim=-1)
    groups = clusters_of(rows, int(params["clusters"]), int(params["seed"]))
    cap = max(1, round(params["cap"] * wanted / min(int(params["clusters"]), len(pool))))
    kept: dict[int, list[int]] = {}
    result: list[int] = []
    covered = set(union)
    for position, (number, group) in enumerate(zip(pool.tolist(), groups.tolist(), strict=True)):
        if len(result) == wanted:
            break
        members = kept.setdefault(group, [])
        if number not in covered and len(members) >= cap:
            continue
        if members and float((rows[members] @ rows[position]).max()) > TWINS:
            continue
        members.append(position)
        result.append(number)
    return torch.tensor(result, dtype=torch.int64)


def texts_stage(params: Mapping[str, Any]) -> FitStage:
    """The stage that chooses sentences; `params`: rule, budget, top, clusters, cap, anchors, seed."""
    return FitStage(
        name=TEXTS,
        version=1,
        fit=select,
        params=params,
        outputs=() if params["rule"] == "random" else (EMBEDDING,),
        images="corpus",
        reads=("sentences",),
    )
