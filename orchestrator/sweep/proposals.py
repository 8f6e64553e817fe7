"""What to try next, by what is known of all trials: candidates, compared under the surrogate."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from methods.knobs import Choice, Range
from orchestrator.sweep.space import Dice, Space, count, grid, has_range, neighbours, sample
from orchestrator.sweep.surrogate import LOWEST, MOST, Places, Surrogate, weighed
from orchestrator.trial.plan import Cell, same_key

WHOLE = 1000  # configurations in all, up to which every one is compared
DRAWN = 400  # with more: so many by chance, and
BEST = 4  # neighbours of so many of the best
WITHIN = 0.1  # root of the share of a limit, which excesses that are much alike are told apart by
UNLIKELY = 0.1  # what keeps the limits with less than that chance comes last, by its chance

Configuration = tuple[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Told:
    """What is known of a trial.

    Attributes:
        point: its cell and the knobs that are searched.
        values: the sweep's objectives; None: it has not all of them.
        over: by how much it exceeds the limit that it exceeds most, as a share of it, not above 0 if it keeps all;
            None: not known.
        running: whether it has not ended.
    """

    point: Configuration
    values: list[float] | None
    over: float | None
    running: bool


def most_promising(
    told: Sequence[Told],
    cells: Sequence[Cell],
    spaces: Mapping[str, Space],
    seen: Collection[str],
    signs: Sequence[int],
    seed: int,
) -> list[Configuration]:
    """Configurations that were not proposed yet, the one with the largest expected improvement first.

    Where limits were broken, an improvement counts as often as the limits are likely to be kept (Gardner et al. 2014);
    what hardly keeps them comes last. None before anything is known.

    Args:
        told: every trial.
        cells, spaces: what can be proposed.
        seen: `key_of` what was proposed.
        signs: of each objective: 1 for more is better, -1 for less.
        seed: of everything that is drawn.
    """
    spaces = {method: space for method, space in spaces.items() if any(cell.method == method for cell in cells)}
    running = [one.point for one in told if one.running]
    ended = [one for one in told if not one.running]
    valued = [one for one in ended if one.values is not None]
    limited = [(one.point, one.over) for one in ended if one.over is not None]
    if not valued and not limited:
        return []
    worth = weighed([one.values for one in valued if one.values is not None], signs, seed)
    order = sorted(range(len(valued)), key=lambda at: -worth[at])
    good = [at for at in order if (valued[at].over or 0) <= 0]
    near = [valued[at].point for at in good] or [point for point, _ in sorted(limited, key=lambda one: one[1])]
    among = candidates(cells, spaces, seen, near[:BEST] or [valued[at].point for at in order[:BEST]], seed)
    if not among:
        return []
    places = Places(spaces)
    hope = torch.ones(len(among), dtype=torch.float64)
    # What failed, or was stopped without all objectives, counts as bad; else it would be new for ever.
    bad = [one.point for one in ended if one.values is None and one.over is None]
    if good:
        worst = min(worth) - (max(worth) - min(worth) or 1.0)
        points = [one.point for one in valued] + bad
        model = Surrogate(places, points, [*worth, *[worst] * len(bad)], running, seed, lowest=LOWEST)
        hope = model.improvements(among, worth[good[0]])
    if any(over > 0 for _, over in limited):
        told_of = _nearest_the_limit(limited) + ([] if good else [(point, 1.0) for point in bad[-MOST:]])
        kept = [-math.copysign(math.sqrt(abs(over)), over) for _, over in told_of]  # finest at the limit
        model = Surrogate(places, [point for point, _ in told_of], kept, running, seed, narrowest=WITHIN)
        chances = model.chances(among, 0.0)
        hope = torch.where(chances >= UNLIKELY, 1 + _share(hope * chances), chances)
    # Rounded, since the last bits depend on the machine; where equal, the candidates' own random order counts.
    ranks = _share(hope).round(decimals=9).argsort(descending=True, stable=True)
    return [among[at] for at in ranks.tolist()]


def _share(hope: torch.Tensor) -> torch.Tensor:
    return hope / hope.max().clamp_min(1e-300)


def _nearest_the_limit(limited: list[tuple[Configuration, float]]) -> list[tuple[Configuration, float]]:
    """As many as the surrogate looks at, half of them broken and half kept where there are as many."""
    order = sorted(limited, key=lambda one: abs(one[1]))
    broken, kept = [one for one in order if one[1] > 0], [one for one in order if one[1] <= 0]
    share = max(MOST // 2, MOST - len(kept))
    broken = broken[:share]
    return broken + kept[: MOST - len(broken)]


def candidates(
    cells: Sequence[Cell],
    spaces: Mapping[str, Space],
    seen: Collection[str],
    best: Sequence[Configuration],
    seed: int,
) -> list[Configuration]:
    """What is compared: everything that was not proposed yet, or of many, some by chance and neighbours of the best."""
    dice = random.Random(seed)
    if not any(map(has_range, spaces.values())) and sum(count(spaces[cell.method]) for cell in cells) <= WHOLE:
        drawn = [(cell, knobs) for cell in cells for knobs in grid(spaces[cell.method], cell.method)]
    else:
        methods = list(dict.fromkeys(cell.method for cell in cells))
        drawn = []
        for _ in range(DRAWN):
            method = dice.choice(methods)
            cell = dice.choice([c for c in cells if c.method == method])
            drawn.append((cell, sample(spaces[method], method, Dice(dice.getrandbits(32)))))
        for cell, knobs in best:
            space = spaces[cell.method]
            fixed = {knob: value for knob, value in space.items() if not isinstance(value, Range | Choice)}
            drawn += [(cell, one) for one in neighbours(space, fixed | knobs, dice)]
    fresh = list({key: point for point in drawn if (key := same_key(*point)) not in seen}.values())
    dice.shuffle(fresh)
    return fresh
