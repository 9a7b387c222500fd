"""R-KV (arXiv 2505.24133): the attention of the last queries against the redundancy of keys."""

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.base import CacheState, Plan, keep_best, needed
from kvlocal.policies.scoring import against_redundancy, check_kernel, check_weight, local_score


@dataclass(frozen=True)
class RKV:
    """Keeps the highest sel = lam * local - (1 - lam) * R, per layer and head. Nothing is carried on.

    local is pooled over neighbours; R is the redundancy of a cell over the largest of its head.

    lam: weight of the score against the redundancy, 0 to 1 (lambda in the paper)
    pool: a cell counts as the largest of this many cells around it, odd
    """

    lam: float = 0.1
    pool: int = 5

    needs: ClassVar[frozenset[str]] = frozenset({"scores", "redundancy"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weight("lam", self.lam)
        check_kernel("pool", self.pool)

    def plan(self, state: CacheState, budget: int) -> Plan:
        local = local_score(needed(state.scores), state.window, self.pool)
        return Plan(keep_best(against_redundancy(local, needed(state.redundancy), state.window, self.lam), state, budget))
