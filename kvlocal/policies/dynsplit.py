"""DynSplit-KV (arXiv 2602.03184): blocks that end where the text parts are kept or dropped whole, by G-KV's score."""

from dataclasses import dataclass
from typing import get_args

import numpy as np

from kvlocal.policies.base import CacheState, Plan, needed
from kvlocal.policies.blocks import Fold, UniformMap
from kvlocal.policies.gkv import GKV
from kvlocal.policies.scoring import against_redundancy, global_score
from kvlocal.policies.segmentation import Dynamic, FixedDelimiters, FixedInterval, Splitter


@dataclass(frozen=True)
class DynSplit(GKV):
    """Keeps the blocks of the highest sel of G-KV, folded over their cells, per layer and head; one more's best cells fill the budget.

    The hyper-parameters are those of G-KV and

    fold: a block's sel is the "mean" or the "max" of its cells'
    split: blocks end at "dynamic" delimiters, at all "delimiters", or after every "interval"
    shared: all heads of a layer keep the same, by the mean of their sel
    min_block, max_block: tokens of a dynamic block; max_block also of one between delimiters
    length: tokens of an interval
    """

    fold: Fold = "mean"
    split: str = "dynamic"
    shared: bool = False
    min_block: int = 4
    max_block: int = 32
    length: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold not in get_args(Fold):
            raise ValueError(f"fold must be one of {', '.join(get_args(Fold))}, not {self.fold!r}")
        if self.split not in ("dynamic", "delimiters", "interval"):
            raise ValueError(f"split must be one of dynamic, delimiters, interval, not {self.split!r}")
        if not isinstance(self.shared, bool):
            raise ValueError(f"shared must be True or False, not {self.shared!r}")
        _ = self.splitter  # refuses lengths it can't work with

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"blocks"}

    @property
    def splitter(self) -> Splitter:
        """What divides the conversation into blocks."""
        if self.split == "dynamic":
            return Dynamic(self.min_block, self.max_block)
        return FixedDelimiters(self.max_block) if self.split == "delimiters" else FixedInterval(self.length)

    def plan(self, state: CacheState, budget: int) -> Plan:
        score = global_score(state.history, self.local(state), self.alpha)
        select = against_redundancy(score, needed(state.redundancy), state.window, self.lam)
        stays = state.pinned.copy()
        stays[..., stays.shape[-1] - state.window :] = True
        blocks = needed(state.blocks)
        if self.shared:
            # heads that always kept the same hold the same cells
            select, stays, blocks = select.mean(axis=1, keepdims=True), stays[:, :1], blocks[:, :1]
        uniform = UniformMap.from_blocks(blocks, stays)
        keep = uniform.keep(uniform.scores(select, self.fold), select, budget)
        return Plan(np.broadcast_to(keep, (*state.pinned.shape[:2], budget)), score)
