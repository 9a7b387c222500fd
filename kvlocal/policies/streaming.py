"""StreamingLLM (arXiv 2309.17453): the sinks and the most recent cells, keys rotated to their place in the cache."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan, keep_best


@dataclass(frozen=True)
class Streaming:
    """Keeps what is pinned (the sinks are) and the newest of the rest."""

    needs: ClassVar[frozenset[str]] = frozenset()
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = True

    def plan(self, state: CacheState, budget: int) -> Plan:
        age = np.broadcast_to(np.arange(state.pinned.shape[-1], dtype=np.float32), state.pinned.shape)
        return Plan(keep_best(age, state, budget))
