"""Nexus tokens alone (SONIC, arXiv 2601.21927): they stand for finished turns, whose raw cells go, the oldest first."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvlocal.policies.base import CacheState, Plan, keep_best, needed
from kvlocal.policies.scoring import check_weight


@dataclass(frozen=True)
class Allotment:
    """How much of the budget Nexus tokens get; hyper-parameters of every policy that has them.

    share: of the cells that are kept, at most so many are Nexus tokens, 0 to 1; beyond that the oldest lose their place and compete with raw
        cells
    compression: with a budget in cells, the ratio by which the number of a turn's Nexus tokens is found; with a ratio it is that one
    """

    share: float = 1.0
    compression: float = 0.9

    def __post_init__(self) -> None:
        check_weight("share", self.share)
        check_weight("compression", self.compression)

    def standing(self, state: CacheState, budget: int) -> CacheState:
        """The state with the newest Nexus cells pinned, as far as their share of the budget goes."""
        nexus = needed(state.nexus)
        # ascending, head by head; and how many there are of the same head from each on
        cells, counts = np.flatnonzero(nexus), np.count_nonzero(nexus, axis=-1).ravel()
        n_newer = np.repeat(np.cumsum(counts), counts) - np.arange(len(cells))
        room = min(self.share * budget, budget - state.window - state.pinned.sum(axis=-1).max())
        pinned = state.pinned.copy()
        pinned.reshape(-1)[cells[n_newer <= room]] = True
        return replace(state, pinned=pinned)


@dataclass(frozen=True)
class Nexus(Allotment):
    """Keeps the Nexus cells, and of the raw cells the newest. The hyper-parameters are those of Allotment."""

    needs: ClassVar[frozenset[str]] = frozenset({"nexus"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def plan(self, state: CacheState, budget: int) -> Plan:
        shape = needed(state.nexus).shape
        age: npt.NDArray[np.float32] = np.arange(shape[-1], dtype=np.float32)
        return Plan(keep_best(np.broadcast_to(age, shape), self.standing(state, budget), budget))
