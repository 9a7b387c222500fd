"""Recall: the newest cells, and what the last queries attend to in all that came before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kvlocal.policies.base import CacheState, Plan, keep_best, needed
from kvlocal.policies.nexus import Allotment
from kvlocal.policies.scoring import Scores, check_kernel, check_weight, pooled


@dataclass(frozen=True)
class Recall(Allotment):
    """A share of the budget by age, the rest by attention.

    With an archive its candidates are all tokens of the conversation, and it chooses anew behind what the user says and every `refresh` tokens of an
    answer; without, it chooses among the cells that are left. The scores are SnapKV's (section 3), the split of the budget is StreamingLLM's window
    beside it; choosing from an archive is what InfLLM and ArkVale do. With a share there are Nexus tokens too, of which the newest stay.

    The hyper-parameters are those of Allotment, whose share is 0 here, and these:
    recent: share of the budget for the newest cells
    asked: the same behind what the user says and at the beginning of an answer, in the heads that look for what was asked
    worth: attention that a head must win by that for it to be one of them
    refresh: tokens of an answer after which it chooses again, where there is an archive; sooner at the beginning of an answer
    late: tokens of an answer before a choice made in it takes effect where the cells are on a device, which decodes these while the processor
        chooses; 0 for at once, as everywhere else
    again: tokens at the end of what the user says that are evaluated a second time, with what they recalled in the cells; 0 for none
    pool: each score is raised to the largest of so many cells around it, 1 for none
    blocks: size of the blocks in which cells are taken, by the largest score of a block, 1 for single cells
    whole: share of what is neither pinned nor among the newest that goes by blocks, the rest by single cells
    """

    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    share: float = 0.0
    recent: float = 0.7
    asked: float = 0.3
    worth: float = 0.01
    refresh: int = 16
    late: int = 4
    again: int = 64
    pool: int = 1
    blocks: int = 16
    whole: float = 0.5

    def __post_init__(self) -> None:
        Allotment.__post_init__(self)
        check_weight("recent", self.recent)
        check_weight("asked", self.asked)
        check_weight("worth", self.worth)
        check_weight("whole", self.whole)
        check_kernel("pool", self.pool)
        for name, least in (("refresh", 1), ("late", 0), ("again", 0), ("blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores", "nexus"} if self.share else {"scores"})

    @property
    def for_question(self) -> RecallForQuestion:
        """The choice when something was just asked."""
        return RecallForQuestion(self)

    def plan(self, state: CacheState, budget: int) -> Plan:
        scores = pooled(needed(state.scores), state.window, self.pool)
        if self.share:
            state = self.standing(state, budget)
        n_recent = max(state.window, round(self.recent * budget))
        by_cell = _newest_first(scores, n_recent)
        n_free = budget - n_recent - int(np.count_nonzero(state.pinned[..., : scores.shape[-1] - n_recent], axis=-1).max())
        n_single = max(0, n_free - round(self.whole * n_free))
        if self.blocks > 1 and n_single < n_free:
            by_block = _newest_first(in_blocks(scores, self.blocks), n_recent)
            if n_single == 0:
                return Plan(keep_best(by_block, state, budget))
            chosen = keep_best(by_block, state, budget - n_single)
            np.put_along_axis(by_cell, chosen, np.inf, axis=-1)
        return Plan(keep_best(by_cell, state, budget))


@dataclass(frozen=True)
class RecallForQuestion:
    """As `usual`, but heads whose attention wins by it have a smaller share for the newest: `usual.asked`.

    Few heads look for what was asked; for the others nothing far away is worth the newest cells, which the first words of an answer will want, though
    the last of the question do not look at them.
    """

    evicts: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    usual: Recall

    @property
    def needs(self) -> frozenset[str]:
        return self.usual.needs

    def plan(self, state: CacheState, budget: int) -> Plan:
        scores = needed(state.scores)
        usual, asked = (policy.plan(state, budget).keep for policy in (self.usual, replace(self.usual, recent=self.usual.asked)))
        before, after = (np.take_along_axis(scores, keep, axis=-1).sum(axis=-1, keepdims=True) for keep in (usual, asked))
        return Plan(np.where(after - before > self.usual.worth, asked, usual))


def _newest_first(scores: Scores, n_recent: int) -> Scores:
    """Importance [L, H, C]: the scores, which are at most 1, but the newest cells are above all others and go by age, in case that much is pinned."""
    importance = scores.copy()
    importance[..., scores.shape[-1] - n_recent :] = np.arange(2, n_recent + 2)
    return importance


def in_blocks(scores: Scores, size: int) -> Scores:
    """Scores [L, H, C], each cell raised to the largest of its block of `size` cells, counted from the first, and a thousandth of its own above it:
    where not all of a block is taken, its best cells are."""
    n = scores.shape[-1]
    padded = np.zeros((*scores.shape[:-1], -(-n // size) * size), scores.dtype)
    padded[..., :n] = scores
    largest, rest = padded, size
    while rest % 2 == 0:
        # much faster than the maximum along a short axis
        largest, rest = np.maximum(largest[..., 0::2], largest[..., 1::2]), rest // 2
    largest = largest.reshape(*scores.shape[:-1], -1, rest).max(axis=-1)
    return np.repeat(largest, size, axis=-1)[..., :n] + scores * np.float32(1e-3)
