"""KVzip, G-KV and SnapKV together: most of the budget to what the last queries attend to, the rest to what the conversation is remembered by."""

from dataclasses import dataclass

from kvlocal.policies.kvzip_gkv import KVzipGKV


@dataclass(frozen=True)
class KVzipSnapKV(KVzipGKV):
    """Half of the budget goes by the attention of the last queries alone, up to half to what was not read again yet, the rest as in KVzipGKV.

    The present alone (SnapKV) forgets, and memory alone (KVzipGKV) loses the thread; docs/results.md has the numbers. KVzipGKV has the
    hyper-parameters.
    """

    now: float = 0.5
    fresh: float = 0.5
