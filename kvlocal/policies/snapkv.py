"""SnapKV (arXiv 2404.14469): what the last queries attend to, and the cells around it."""

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.base import CacheState, Plan, keep_best, needed
from kvlocal.policies.scoring import check_kernel, local_score


@dataclass(frozen=True)
class SnapKV:
    """Keeps the highest local scores, pooled over neighbours, per layer and head. Nothing is carried on.

    pool: a cell counts as the largest of this many cells around it, odd
    """

    pool: int = 5

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kernel("pool", self.pool)

    def plan(self, state: CacheState, budget: int) -> Plan:
        return Plan(keep_best(local_score(needed(state.scores), state.window, self.pool), state, budget))
