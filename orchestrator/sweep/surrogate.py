"""What trials will score, by those that have ended: a Gaussian process over all methods of a sweep at once.

A space of methods, each with knobs of its own, is no box. The kernel adds up what configurations may have in common:

    k(a, b) = v_method [same method] + v_teacher [same teacher] + v_student [same student]
            + sum over knobs of both methods, by name: v_knob exp(-d_knob^2 / 2 l_knob^2)
            + v_within [same method] exp(-sum over its knobs and networks: d^2 / 2 l^2)

So what a rate of learning does under one method tells something of the same rate under another, and trials of one
method tell most of each other. Variances and lengths are not fitted: they are drawn from priors, and each draw counts
as much as it makes the results likely, which is steady with the few results that a search begins with. What is proposed
next has the largest expected improvement. Kernel and priors are our own design, the parts are standard: Rasmussen and
Williams 2006; Jones et al. 1998; Snoek et al. 2012 (acquisition averaged over draws).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.knobs import Choice, Range
from orchestrator.sweep.space import Space, scale_of, unevenness
from orchestrator.trial.plan import Cell

DRAWS = 32  # of the kernel's variances and lengths
KEPT = 8  # likeliest draws that candidates are compared under
MOST = 100  # results that are looked at: a proposal's time does not grow with the sweep
LOWEST = 2.0  # `Surrogate.lowest` of a val metric
ZERO = 10.0  # a choice of 0 beside ratios lies as far below the next as this ratio

Point = tuple[Cell, Mapping[str, Any]]


@dataclass(frozen=True)
class Line:
    """The common line of the numbers of a knob's name: place 0 is its smallest value, 1 its largest."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """Where a number lies."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Places:
    """Configurations as rows of numbers: method, teacher, student, then a column for each searched knob's name.

    Args:
        spaces: knobs by method.
    """

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        self.methods = list(spaces)
        self.columns: list[tuple[str, Line | None]] = []  # knob's name, and its line if it has numbers
        self.common: list[bool] = []  # whether two methods have the column
        self._of: dict[tuple[str, str], int] = {}
        self._names: dict[tuple[int, str], int] = {}
        domains: dict[tuple[str, bool], dict[str, Any]] = {}
        for method, space in spaces.items():
            for knob, domain in space.items():
                if isinstance(domain, Range | Choice):
                    domains.setdefault((knob, _ends(domain) is not None), {})[method] = domain
        for (knob, numbers), by_method in domains.items():
            line = _line(list(by_method.values())) if numbers else None
            for method in by_method:
                self._of[method, knob] = len(self.columns)
            self.columns.append((knob, line))
            self.common.append(len(by_method) > 1)

    def __call__(self, points: Sequence[Point]) -> Tensor:
        """float64 [n, 3 + columns]; NaN where a method has no such knob."""
        rows = np.full((len(points), 3 + len(self.columns)), np.nan)
        for row, (cell, knobs) in zip(rows, points, strict=True):
            row[0] = self.methods.index(cell.method)
            row[1] = -1 if cell.teacher is None else cell.teacher
            row[2] = -1 if cell.student is None else cell.student
            for knob, value in knobs.items():
                column = self._of.get((cell.method, knob))
                if column is not None:
                    line = self.columns[column][1]
                    row[3 + column] = self._named(column, value) if line is None else line.place(value)
        return torch.from_numpy(rows)

    def _named(self, column: int, value: Any) -> int:
        return self._names.setdefault((column, repr(value)), len(self._names))

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared distances [n, m, 3 + columns] of rows [n, ...] and [m, ...]; 0 or 1 where there are no numbers."""
        between = a[:, None] - b[None]
        numbers = torch.tensor([False] * 3 + [line is not None for _, line in self.columns])
        return torch.where(numbers, between.square(), torch.where(between.isnan(), between, (between != 0).double()))


def _ends(domain: Range | Choice) -> tuple[float, float, bool] | None:
    """Smallest and largest number, and whether by ratios; None if it holds no numbers.

    Of a choice of 0 and of others that lie by ratios, the smallest is taken for a `ZERO`th of the next.
    """
    if isinstance(domain, Range):
        return domain.low, domain.high, domain.log
    scale = scale_of(domain)
    if scale is None:
        return None
    values = scale.values
    if values[0] == 0 and len(values) > 2:
        by_ratios = (values[1] / ZERO, *values[1:])
        if unevenness([math.log(v) for v in by_ratios]) < unevenness(values):
            return by_ratios[0], by_ratios[-1], True
    return values[0], values[-1], scale.log


def _line(domains: Sequence[Range | Choice]) -> Line:
    ends = [end for end in map(_ends, domains) if end is not None]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    ratios = any(log for _, _, log in ends) and all(e[0] >= 0 for e in ends)
    return Line(min(e[0] for e in ends if e[0] > 0) if ratios else low, high, ratios)


class Surrogate:
    """The model, told what has ended.

    Args:
        places: of the sweep's spaces.
        told: configurations that have ended, at least one.
        scores: [n] theirs, more is better.
        running: configurations whose scores are not known yet: near them nothing is uncertain any more (Desautels et
            al. 2014), so that trials at a time do not crowd.
        seed: of the draws.
        lowest: robust deviations below the median at which scores end, so that how bad a bad one was teaches nothing;
            infinite: every score counts.
        narrowest: deviation of the scores at least, where differences below it are nothing.
    """

    def __init__(
        self,
        places: Places,
        told: Sequence[Point],
        scores: Sequence[float],
        running: Sequence[Point],
        seed: int,
        lowest: float = math.inf,
        narrowest: float = 1e-9,
    ) -> None:
        self._places = places
        self._dice = torch.Generator().manual_seed(seed)
        given = torch.tensor(scores, dtype=torch.float64)
        kept = _worth_most(given)
        self._mean = given[kept].mean().item()
        self._deviation = max(given[kept].std(correction=0).item(), narrowest)
        z = (given[kept] - self._mean) / self._deviation
        middle = z.median()
        self._z = z.clamp_min((middle - lowest * (1.48 * (z - middle).abs().median() + 0.3)).item())
        self._rows = places([told[int(i)] for i in kept] + list(running)[-MOST:])
        self._draw()

    def _lognormal(self, centre: float, spread: float, *shape: int) -> Tensor:
        noise = torch.randn((DRAWS, *shape), generator=self._dice, dtype=torch.float64)
        return centre * torch.exp(spread * noise)

    def _draw(self) -> None:
        columns = self._rows.shape[1]
        used = (~self._rows[:, 3:].isnan()).sum(1).max().item() if columns > 3 else 0
        self._v = self._lognormal(0.5, 0.7, 3)  # of method, teacher, student
        self._v_knob = self._lognormal(0.7, 0.7, columns - 3)
        self._l_knob = self._lognormal(0.6, 0.5, columns - 3)
        self._v_within = self._lognormal(0.7, 0.7)
        # With more knobs configurations are farther apart, and no less alike (Hvarfner et al. 2024).
        self._l = self._lognormal(0.5 * math.sqrt(max(used, 1)), 0.6, columns)
        noise = self._lognormal(0.03, 1.0)
        n = len(self._z)
        apart = self._places.apart(self._rows, self._rows)
        covariance = self._kernels(apart, range(DRAWS))
        covariance.diagonal(dim1=1, dim2=2).add_(noise[:, None])
        # The first n rows of the whole's factor are the factor of what was told, so both come from one.
        factor = torch.linalg.cholesky(covariance)
        told = factor[:, :n, :n]
        centred = (self._z - self._z.mean())[None, :, None].expand(DRAWS, n, 1)
        likely = -0.5 * torch.linalg.solve_triangular(told, centred, upper=False).square().sum((1, 2))
        likely -= told.diagonal(dim1=1, dim2=2).log().sum(1)
        best = likely.topk(KEPT)
        self._likeliest = best.indices.tolist()
        self._weights = torch.softmax(best.values, 0)
        self._factor, self._solved = factor, torch.cholesky_solve(centred, told)

    def _kernels(self, apart: Tensor, draws: Sequence[int]) -> Tensor:
        """Covariances [draws, n, m] under some draws, of squared distances [n, m, columns]."""
        same = 1 - apart[..., :3]
        shared = [at for at, common in enumerate(self._places.common) if common]
        near = [apart[..., 3 + at].nan_to_num(math.inf) for at in shared]  # no knob in common: nothing in common
        inside = apart[..., 1:].nan_to_num(0)  # counts within a method alone, whose trials have the same knobs
        found = []
        for draw in draws:
            covariance = same @ self._v[draw]
            for at, square in zip(shared, near, strict=True):
                covariance += self._v_knob[draw, at] * torch.exp(-0.5 / self._l_knob[draw, at] ** 2 * square)
            within = (inside @ self._l[draw, 1:] ** -2).mul_(-0.5).exp_()
            found.append(covariance + self._v_within[draw] * same[..., 0] * within)
        return torch.stack(found)

    def improvements(self, candidates: Sequence[Point], best: float) -> Tensor:
        """[m] expected improvement over a score."""
        expected = torch.zeros(len(candidates), dtype=torch.float64)
        for weight, mean, deviation in self._beliefs(candidates):
            above = (mean - self._standard(best)) / deviation
            density = torch.exp(-0.5 * above.square()) / math.sqrt(2 * math.pi)
            expected += weight * deviation * (above * torch.special.ndtr(above) + density)
        return expected * self._deviation

    def chances(self, candidates: Sequence[Point], least: float) -> Tensor:
        """[m] probabilities that they score at least that."""
        found = torch.zeros(len(candidates), dtype=torch.float64)
        for weight, mean, deviation in self._beliefs(candidates):
            found += weight * torch.special.ndtr((mean - self._standard(least)) / deviation)
        return found

    def _beliefs(self, candidates: Sequence[Point]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Under each draw that is kept: its weight, and mean and deviation [m] of the standard scores."""
        rows = self._places(candidates)
        apart = self._places.apart(rows, self._rows)
        present = (~rows[:, 3:].isnan() & torch.tensor(self._places.common, dtype=torch.bool)).double()
        kernels = self._kernels(apart, self._likeliest)
        for weight, draw, across in zip(self._weights, self._likeliest, kernels, strict=True):
            mean = self._z.mean() + across[:, : len(self._z)] @ self._solved[draw, :, 0]
            prior = self._v[draw].sum() + self._v_within[draw] + present @ self._v_knob[draw]
            known = torch.linalg.solve_triangular(self._factor[draw], across.T, upper=False).square().sum(0)
            yield weight, mean, (prior - known).clamp_min(1e-9).sqrt()

    def _standard(self, score: float) -> float:
        return (score - self._mean) / self._deviation


def weighed(values: Sequence[Sequence[float]], signs: Sequence[int], seed: int) -> list[float]:
    """One score for each result, more is better.

    Several objectives are weighed anew for each proposal (ParEGO: Knowles 2006), so that all of their front is sought.

    Args:
        values: objectives of each result.
        signs: of each objective: 1 for more is better, -1 for less.
        seed: of the weights.
    """
    if not values:
        return []
    table = np.array(values, dtype=float) * np.array(signs)
    if len(signs) == 1:
        return [float(value) for value in table[:, 0]]
    span = np.ptp(table, axis=0)
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(signs)))
    short = (table.max(0) - table) / np.where(span > 0, span, 1) * shares
    return [float(score) for score in -(short.max(1) + 0.05 * short.sum(1))]


def _worth_most(scores: Tensor) -> Tensor:
    """Numbers of the results that are looked at: the better half of `MOST`, and as many of the others, evenly."""
    if len(scores) <= MOST:
        return torch.arange(len(scores))
    order = scores.argsort(descending=True, stable=True)
    half = MOST // 2
    rest = order[half:]
    evenly = torch.linspace(0, len(rest) - 1, MOST - half).round().long()
    return torch.cat([order[:half], rest[evenly]]).sort().values
