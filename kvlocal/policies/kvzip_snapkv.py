"""KVzip, G-KV and SnapKV together: most of the budget to what the last queries attend to, the rest to what the conversation is remembered by."""

from dataclasses import dataclass

from kvlocal.policies.kvzip_gkv import KVzipGKV


@dataclass(frozen=True)
class KVzipSnapKV(KVzipGKV):
    """The share `now` of the budget goes by the attention of the last queries alone, the rest as in KVzipGKV, which has the hyper-parameters.

    The present alone (SnapKV) forgets, and memory alone (KVzipGKV) loses the thread; docs/results.md has the numbers.
    """

    now: float = 0.6
