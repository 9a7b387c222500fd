"""KVzip (arXiv 2505.23416): what the model attends to when it repeats the conversation."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan, keep_best, needed


@dataclass(frozen=True)
class KVzip:
    """Keeps the largest attention in the second read of a cell's turn, per layer and head.

    Cells that were not read again yet, the unfinished turn, come before all others, the newest first.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reread"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def plan(self, state: CacheState, budget: int) -> Plan:
        reread = needed(state.reread)
        # attention is at most 1, so that every unread cell is above every read one
        unread = 2 + np.arange(reread.shape[-1], dtype=np.float32)
        return Plan(keep_best(np.where(np.isnan(reread), unread, reread), state, budget))
