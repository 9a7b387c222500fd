"""Bootstrap intervals: of means over chats, and of medians."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_BLOCK = 2**22  # counts in memory at once


class Estimate(NamedTuple):
    """A mean or a median and its 95 % interval."""

    value: float
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
    return _estimate(sums.sum() / counts.sum(), np.concatenate(means))


def mean_over_chats(sums: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0) -> tuple[float, float | None, float | None]:
    """As `bootstrap`, but of a single chat no interval is told: how much chats differ is not known then."""
    mean, lo, hi = bootstrap(sums, counts, seed=seed)
    return (mean, None, None) if np.size(sums) == 1 else (mean, lo, hi)


def shown(mean: float, lo: float | None, hi: float | None, digits: int = 3) -> str:
    """A mean with its interval, if there is one."""
    return f"{mean:.{digits}f}" if lo is None or hi is None else f"{mean:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]"


def bootstrap_median(values: npt.ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The median of values [n] that do not depend on each other, and its percentile bootstrap interval; seed and resamples as for bootstrap."""
    values = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return _estimate(np.median(values), np.median(values[drawn], axis=-1))


def _estimate(value: float, resampled: npt.NDArray[np.float64]) -> Estimate:
    lo, hi = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(lo), float(hi))
