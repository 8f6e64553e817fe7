"""Views of many images at once: the numbers of `orchestrator.data.views.draw`, in a fifth to a tenth of its time.

What is slow there is to make a generator for an image and to ask it number by number. Here numpy's Philox is computed
for all images together, as far as nearly all of them need it; the few that need more are left to be drawn alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

BLOCKS = 3  # of four numbers, for each image
TRIES = 3  # to find a crop; with the five numbers after them they fit
FACTORS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
STEPS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def _product(factor: np.uint64, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(upper, lower) 64 bits of the 128-bit products."""
    f0, f1 = factor & LOW, factor >> HALF
    v0, v1 = values & LOW, values >> HALF
    low = f0 * v0
    one = f1 * v0 + (low >> HALF)
    two = f0 * v1 + (one & LOW)
    return f1 * v1 + (one >> HALF) + (two >> HALF), factor * values


def philox(keys: np.ndarray) -> np.ndarray:
    """uint64 [n, 4 BLOCKS]: what numpy's Philox gives first for each key [n, 2].

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": 4x64 with ten rounds.
    """
    first, second = (np.repeat(keys[:, i], BLOCKS) for i in (0, 1))
    count = np.tile(np.arange(1, BLOCKS + 1, dtype=np.uint64), len(keys))
    zero = np.zeros_like(count)
    state = [count, zero, zero, zero]
    for number in range(ROUNDS):
        if number:
            first, second = first + STEPS[0], second + STEPS[1]
        (upper0, lower0), (upper1, lower1) = _product(FACTORS[0], state[0]), _product(FACTORS[1], state[2])
        state = [upper1 ^ state[1] ^ first, lower1, upper0 ^ state[3] ^ second, lower0]
    return np.stack(state, 1).reshape(len(keys), -1)


class _Numbers:
    """What each image's generator has given and will give."""

    def __init__(self, keys: np.ndarray) -> None:
        self.values = philox(keys)
        self.rows = np.arange(len(keys))
        self.place = np.zeros(len(keys), dtype=np.int64)
        self.kept = np.zeros(len(keys), dtype=np.uint64)  # the upper half of a number whose lower half was asked for
        self.keeps = np.zeros(len(keys), dtype=bool)
        self.redrawn = np.zeros(len(keys), dtype=bool)  # it would have to be asked once more

    def _next(self, who: np.ndarray) -> np.ndarray:
        found = self.values[who, self.place[who]]
        self.place[who] += 1
        return found

    def uniform(self, who: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """In [low, high), of the images `who`."""
        return low + (high - low) * ((self._next(who) >> np.uint64(11)) * (1.0 / 9007199254740992.0))

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """Uniform integers below these, of all images (Lemire 2019); where the bound is 1, nothing is asked for."""
        ask = bounds > 1
        new = np.flatnonzero(ask & ~self.keeps)
        half = np.where(self.keeps, self.kept, np.uint64(0))
        whole = self._next(new)
        half[new], self.kept[new] = whole & LOW, whole >> HALF
        self.keeps ^= ask
        product = half * bounds.astype(np.uint64)
        self.redrawn |= ask & ((product & LOW) < bounds.astype(np.uint64))
        return np.where(ask, product >> HALF, np.uint64(0)).astype(np.int64)


def draw_many(
    texts: Sequence[str], sizes: np.ndarray, crop_scale: float, color: float
) -> tuple[np.ndarray, Sequence[int]]:
    """([n, 8] float32 as `views.draw` gives them; which rows of it are not drawn, for they need more numbers).

    Args:
        texts: what each image's numbers are drawn from.
        sizes: [n, 2] height and width.
        crop_scale, color: of the policy.
    """
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    numbers = _Numbers(np.frombuffer(digests, dtype="<u8").reshape(-1, 2).astype(np.uint64))
    heights, widths = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    h, w = np.zeros_like(heights), np.zeros_like(widths)
    open_ = numbers.rows
    for _ in range(TRIES):
        area = heights[open_] * widths[open_] * numbers.uniform(open_, crop_scale, 1.0)
        logs = numbers.uniform(open_, math.log(3 / 4), math.log(4 / 3))
        ratio = np.array([math.exp(value) for value in logs.tolist()])  # numpy's own may differ in the last bit
        h[open_], w[open_] = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        good = (h[open_] > 0) & (h[open_] <= heights[open_]) & (w[open_] > 0) & (w[open_] <= widths[open_])
        open_ = open_[~good]
    h[open_], w[open_] = heights[open_], widths[open_]  # any that fit: these are not drawn
    top, left = numbers.below(heights - h + 1), numbers.below(widths - w + 1)
    columns = [top, left, h, w, numbers.uniform(numbers.rows) < 0.5]
    columns += [numbers.uniform(numbers.rows, 1 - color, 1 + color) if color else np.ones(len(h)) for _ in range(3)]
    found = np.stack([column.astype(np.float32) for column in columns], 1)
    return found, np.union1d(open_, np.flatnonzero(numbers.redrawn)).tolist()
