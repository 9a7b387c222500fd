"""KVzip and G-KV together: a cell counts as much as the last queries or its turn's second read say, whichever is more."""

from dataclasses import dataclass

import numpy as np

from kvlocal.policies.base import CacheState
from kvlocal.policies.gkv import GKV
from kvlocal.scoring import Scores, check_weight


@dataclass(frozen=True)
class KVzipGKV(GKV):
    """G-KV with local = max(attention of the last queries, weight * attention in the second read), each normalised.

    Cells that were not read again yet have the attention of the last queries alone. The hyper-parameters are those of G-KV, for both, and

    weight: of the second read, 0 to 1; less than 1 leaves more of the budget to what was said last
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("weight", self.weight)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"reread"}

    def local(self, state: CacheState) -> Scores:
        return np.maximum(super().local(state), self.weight * self.local_of(np.nan_to_num(state.reread), state))
