"""Nexus tokens (SONIC) for the gist of finished turns, and the best raw cells beside them."""

from dataclasses import dataclass

from kvlocal.policies.base import CacheState, Plan
from kvlocal.policies.kvzip_snapkv import KVzipSnapKV
from kvlocal.policies.nexus import Allotment


@dataclass(frozen=True)
class Hybrid(Allotment, KVzipSnapKV):
    """Pins the Nexus cells as far as their share goes; the rest of the budget goes as in KVzipSnapKV.

    The hyper-parameters are those of Allotment and of KVzipSnapKV.
    """

    share: float = 0.02

    def __post_init__(self) -> None:
        Allotment.__post_init__(self)
        KVzipSnapKV.__post_init__(self)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"nexus"}

    def plan(self, state: CacheState, budget: int) -> Plan:
        return super().plan(self.standing(state, budget), budget)
