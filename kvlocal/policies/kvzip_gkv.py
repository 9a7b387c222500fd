"""KVzip and G-KV together: a cell counts as much as the last queries or its turn's second read say, whichever is more."""

from dataclasses import dataclass

import numpy as np

from kvlocal.policies.base import CacheState, needed
from kvlocal.policies.gkv import GKV
from kvlocal.policies.scoring import Scores, check_weight


@dataclass(frozen=True)
class KVzipGKV(GKV):
    """G-KV with local = max(attention of the last queries, weight * attention in the second read), each normalised.

    Cells that were not read again yet have the attention of the last queries alone. The hyper-parameters are those of G-KV, for both, and

    weight: of the second read, 0 to 1; less than 1 leaves more of the budget to what was said last
    fresh: the share of the budget, without pinned cells and window, that the newest cells get which were not read again yet, if there are so
        many: what the second read says of them is not known (not in the paper)
    """

    weight: float = 1.0
    fresh: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("weight", self.weight)
        check_weight("fresh", self.fresh)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"reread"}

    def local(self, state: CacheState) -> Scores:
        return np.maximum(super().local(state), self.weight * self.local_of(np.nan_to_num(needed(state.reread)), state))

    def reserve(self, select: Scores, state: CacheState, n_fixed: int, room: int) -> None:
        super().reserve(select, state, n_fixed, room)
        n_fresh = min(round(self.fresh * room), room - round(self.now * room))
        before = slice(0, select.shape[-1] - state.window)
        unread = (np.isnan(needed(state.reread)) & ~state.pinned)[..., before]
        # how many there are from a cell on
        n_newer = np.cumsum(unread[..., ::-1], axis=-1)[..., ::-1]
        select[..., before][unread & (n_newer <= n_fresh)] = np.inf
