"""G-KV (arXiv 2512.00504): a global score that remembers the attention a cell got before, against its redundancy."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan, keep_best, needed
from kvlocal.policies.scoring import Scores, against_redundancy, check_kernel, check_weight, global_score, local_score


@dataclass(frozen=True)
class GKV:
    """Keeps the highest sel = lam * F - (1 - lam) * R, per layer and head.

    F = max(alpha * F before, local) carries each cell's history on; R is its redundancy over the largest of its head.

    alpha: how much of the earlier score is left at each compression, 0 to 1
    lam: weight of the score against the redundancy, 0 to 1 (lambda in the paper)
    values: the attention a cell gets is multiplied by the norm of its value, by which it adds to the output (not in the paper)
    free: the largest, which local scores are over, is that of the cells that may go: a pinned sink, which gets most of the attention, makes
        all others small against what they are compared with (not in the paper)
    now: the share of the budget, without pinned cells and window, that goes to the best by what the last queries attend to alone, as in
        SnapKV; the rest goes by sel (not in the paper)
    pool: a cell's local score is the largest of this many cells around it, odd; 1 for its own (not in the paper)
    """

    alpha: float = 0.8
    lam: float = 0.5
    values: bool = False
    free: bool = False
    now: float = 0.0
    pool: int = 1

    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha)
        check_weight("lam", self.lam)
        check_weight("now", self.now)
        check_kernel("pool", self.pool)
        for name in ("values", "free"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")

    @property
    def needs(self) -> frozenset[str]:
        weighed = {"redundancy": self.lam < 1, "values": self.values}
        return frozenset({"scores"} | {name for name, wanted in weighed.items() if wanted})

    def plan(self, state: CacheState, budget: int) -> Plan:
        score = global_score(state.history, self.local(state), self.alpha)
        select = score.copy() if self.lam == 1 else against_redundancy(score, needed(state.redundancy), state.window, self.lam)
        n_fixed = int(state.pinned.sum(axis=-1).max()) + state.window
        self.reserve(select, state, n_fixed, budget - n_fixed)
        return Plan(keep_best(select, state, budget), score)

    def reserve(self, select: Scores, state: CacheState, n_fixed: int, room: int) -> None:
        """Sets `select` to infinity where a share of the room keeps a cell; n_fixed: pinned cells and window of a head.

        At most `room` cells of a head, or pinned cells would have to go.
        """
        if self.now:
            now = keep_best(self.local_of(needed(state.scores), state), state, n_fixed + round(self.now * room))
            np.put_along_axis(select, now, np.inf, axis=-1)

    def local(self, state: CacheState) -> Scores:
        """The score of this compression alone, [L, H, C]."""
        return self.local_of(needed(state.scores), state)

    def local_of(self, attention: Scores, state: CacheState) -> Scores:
        """This attention [L, H, C] as a local score."""
        weighed = attention * needed(state.values) if self.values else attention
        return local_score(weighed, state.window, self.pool, state.pinned if self.free else None)
