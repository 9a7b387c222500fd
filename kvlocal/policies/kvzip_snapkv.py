"""KVzip and SnapKV together: most of the budget to what the last queries attend to, the rest to what it takes to repeat the conversation."""

from dataclasses import dataclass

from kvlocal.policies.kvzip_gkv import KVzipGKV


@dataclass(frozen=True)
class KVzipSnapKV(KVzipGKV):
    """The share `now` of the budget goes by the attention of the last queries alone, the rest by the larger of this and the second read.

    No memory of earlier scores and no redundancy: local scores that are normalised without the pinned cells do better without them
    (docs/results.md). The hyper-parameters are those of KVzipGKV, with other defaults.
    """

    alpha: float = 0.0
    lam: float = 1.0
    free: bool = True
    now: float = 0.7
