"""G-KV (arXiv 2512.00504): a global score that remembers the attention a cell got before, against its redundancy."""

from dataclasses import dataclass
from typing import ClassVar

from kvlocal.policies.base import CacheState, Plan, keep_best
from kvlocal.scoring import Scores, against_redundancy, check_kernel, check_weight, global_score, local_score


@dataclass(frozen=True)
class GKV:
    """Keeps the highest sel = lam * F - (1 - lam) * R, per layer and head.

    F = max(alpha * F before, local) carries each cell's history on; R is its redundancy over the largest of its head.

    alpha: how much of the earlier score is left at each compression, 0 to 1
    lam: weight of the score against the redundancy, 0 to 1 (lambda in the paper)
    values: the attention a cell gets is multiplied by the norm of its value, by which it adds to the output (not in the paper)
    pool: a cell's local score is the largest of this many cells around it, odd; 1 for its own (not in the paper)
    """

    alpha: float = 0.8
    lam: float = 0.5
    values: bool = False
    pool: int = 1

    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha)
        check_weight("lam", self.lam)
        check_kernel("pool", self.pool)
        if not isinstance(self.values, bool):
            raise ValueError(f"values must be True or False, not {self.values!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores", "redundancy", "values"} if self.values else {"scores", "redundancy"})

    def plan(self, state: CacheState, budget: int) -> Plan:
        score = global_score(state.history, self.local(state), self.alpha)
        return Plan(keep_best(against_redundancy(score, state.redundancy, state.window, self.lam), state, budget), score)

    def local(self, state: CacheState) -> Scores:
        """The score of this compression alone, [L, H, C]."""
        return self.local_of(state.scores, state)

    def local_of(self, attention: Scores, state: CacheState) -> Scores:
        """This attention [L, H, C] as a local score."""
        return local_score(attention * state.values if self.values else attention, state.window, self.pool)
