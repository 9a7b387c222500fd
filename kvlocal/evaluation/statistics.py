"""Means with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_BLOCK = 2**22  # counts in memory at once


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    lo: float
    hi: float


def bootstrap(sums: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of all values and its percentile bootstrap interval over chats.

    Values of one chat depend on each other, so whole chats are drawn.

    Args:
        sums, counts: [n_chats], the sum of each chat's values and how many they are, at least one; counts of 1 weigh chats equally.
        seed: of the resamples; the same ones for the same number of chats.
        resamples: how many.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    n, rng = len(sums), np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, rows := max(1, _BLOCK // n)):
        # how often each chat is drawn [rows, n]
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start))
        means.append((drawn @ sums) / (drawn @ counts))
    lo, hi = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(sums.sum() / counts.sum()), float(lo), float(hi))
