"""No compression: every cell stays until the cache is full."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan


@dataclass(frozen=True)
class Full:
    """Keeps everything; the baseline the others are measured against."""

    needs: ClassVar[frozenset[str]] = frozenset()
    evicts: ClassVar[bool] = False
    rotates: ClassVar[bool] = False

    def plan(self, state: CacheState, budget: int) -> Plan:
        return Plan(np.broadcast_to(np.arange(state.pinned.shape[-1]), state.pinned.shape))
