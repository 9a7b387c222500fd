"""G-KV (arXiv 2512.00504): a global score that remembers the attention a cell got before, against its redundancy."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan, keep_best
from kvlocal.scoring import global_score, local_score, normalised


@dataclass(frozen=True)
class GKV:
    """Keeps the highest sel = lam * F - (1 - lam) * R, per layer and head.

    F = max(alpha * F before, local) carries each cell's history on; R is its redundancy over the largest of its head.

    alpha: how much of the earlier score is left at each compression, 0 to 1
    lam: weight of the score against the redundancy, 0 to 1 (lambda in the paper)
    """

    alpha: float = 0.8
    lam: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"scores", "redundancy"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("alpha", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    def plan(self, state: CacheState, budget: int) -> Plan:
        score = global_score(state.history, local_score(state.scores, state.window), self.alpha)
        select = self.lam * score - (1 - self.lam) * normalised(state.redundancy, state.window)
        return Plan(keep_best(select, state, budget), score)
