"""Recall: the newest cells, and what the last queries attend to in all that came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan, keep_best, needed
from kvlocal.policies.scoring import Scores, check_kernel, check_weight, pooled


@dataclass(frozen=True)
class Recall:
    """Half of the budget by age, half by attention.

    With an archive its candidates are all tokens of the conversation, and it chooses anew every `refresh` tokens of an answer; without, it chooses
    among the cells that are left. The scores are SnapKV's (section 3), the split of the budget is StreamingLLM's window beside it; choosing from an
    archive is what InfLLM and ArkVale do.

    recent: share of the budget for the newest cells
    refresh: tokens of an answer after which it chooses again, where there is an archive
    pool: each score is raised to the largest of so many cells around it, 1 for none
    blocks: cells are taken in blocks of so many by the largest score of a block, 1 for single cells
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    recent: float = 0.5
    refresh: int = 16
    pool: int = 1
    blocks: int = 1

    def __post_init__(self) -> None:
        check_weight("recent", self.recent)
        check_kernel("pool", self.pool)
        for name in ("refresh", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def plan(self, state: CacheState, budget: int) -> Plan:
        scores = in_blocks(pooled(needed(state.scores), state.window, self.pool), self.blocks)
        n_recent = max(state.window, round(self.recent * budget))
        importance = scores.astype(np.float64)
        # not all of the budget is left for the newest where much is pinned: they go by age
        importance[..., importance.shape[-1] - n_recent :] = np.arange(2, n_recent + 2)
        return Plan(keep_best(importance, state, budget))


def in_blocks(scores: Scores, size: int) -> Scores:
    """Scores [L, H, C], each cell raised to the largest of its block of `size` cells, counted from the first."""
    if size == 1:
        return scores
    n = scores.shape[-1]
    padded = np.zeros((*scores.shape[:-1], -(-n // size) * size), scores.dtype)
    padded[..., :n] = scores
    largest = padded.reshape(*scores.shape[:-1], -1, size).max(axis=-1)
    return np.repeat(largest, size, axis=-1)[..., :n]
