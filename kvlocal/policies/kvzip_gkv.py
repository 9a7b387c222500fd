"""KVzip and G-KV together: a cell counts as much as the last queries or its turn's second read say, whichever is more."""

from dataclasses import dataclass

import numpy as np

from kvlocal.policies.base import CacheState
from kvlocal.policies.gkv import GKV
from kvlocal.scoring import Scores


@dataclass(frozen=True)
class KVzipGKV(GKV):
    """G-KV with local = max(attention of the last queries, attention in the second read), each normalised.

    Cells that were not read again yet have the attention of the last queries alone. The hyper-parameters are those of G-KV, for both.
    """

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"reread"}

    def local(self, state: CacheState) -> Scores:
        return np.maximum(super().local(state), self.local_of(np.nan_to_num(state.reread), state))
