"""Two sides measured in alternation, as one row: a ratio with its 95 % interval, bootstrapped over the pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvlocal.evaluation.statistics import bootstrap, bootstrap_median


@dataclass(frozen=True)
class Comparison:
    """A result.

    name: what was measured
    ours, other: the compressed session, and what it is compared with
    ratio: ours over other
    lo, hi: its 95 % interval
    n: pairs
    unit: of ours and other
    """

    name: str
    ours: float
    other: float
    ratio: float
    lo: float
    hi: float
    n: int
    unit: str


def of_pairs(name: str, ours: npt.ArrayLike, other: npt.ArrayLike, unit: str) -> Comparison:
    """Repeated measurements of the same thing, [n] each: medians, and the median of the pairs' ratios."""
    ours, other = np.asarray(ours, float), np.asarray(other, float)
    return Comparison(name, float(np.median(ours)), float(np.median(other)), *bootstrap_median(ours / other), len(ours), unit)


def of_totals(name: str, ours: npt.ArrayLike, other: npt.ArrayLike, unit: str) -> Comparison:
    """The parts of one whole, such as the turns of a chat, [n] each: sums, and the ratio of the sums."""
    ours, other = np.asarray(ours, float), np.asarray(other, float)
    return Comparison(name, float(ours.sum()), float(other.sum()), *bootstrap(ours, other), len(ours), unit)


def of_speeds(name: str, n_tokens: int, ours: npt.ArrayLike, other: npt.ArrayLike) -> Comparison:
    """The parts of one whole in seconds, [n] each, as the speed of the whole of n_tokens: ours over other, so more is faster."""
    row = of_totals(name, other, ours, "tokens/s")
    return replace(row, ours=n_tokens / float(np.sum(ours)), other=n_tokens / float(np.sum(other)))


def of_amounts(name: str, ours: float, other: float, unit: str) -> Comparison:
    """Two amounts that do not scatter."""
    return Comparison(name, ours, other, ours / other, ours / other, ours / other, 1, unit)
