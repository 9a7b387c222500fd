"""H2O (arXiv 2306.14048): heavy hitters, the cells with the most attention of all queries so far."""

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.base import CacheState, Plan, keep_best, needed


@dataclass(frozen=True)
class H2O:
    """Keeps the largest sums of attention, per layer and head, beside the window."""

    needs: ClassVar[frozenset[str]] = frozenset({"sums"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def plan(self, state: CacheState, budget: int) -> Plan:
        return Plan(keep_best(needed(state.sums), state, budget))
