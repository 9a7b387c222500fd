"""What every policy takes and gives: arrays of one sequence at one compression, and a plan of the cells to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvlocal.policies.segmentation import Splitter

_Array = TypeVar("_Array", bound=npt.NDArray[Any])


@dataclass(frozen=True)
class CacheState:
    """The cells of one sequence when a compression is due. L layers, H KV heads, C used cells, in order of age: the oldest first.

    pinned: bool [L, H, C], cells that must stay: the system prompt and the sinks
    history: float32 [L, H, C], the score each cell carries from earlier compressions, NaN where it has none
    window: the last `window` cells, the same for all heads, must stay

    What a policy needs besides, each [L, H, C]:
    scores: float32, the attention of the last queries (NativeCache.scores)
    redundancy: float32 (NativeCache.redundancy)
    sums: float32, the attention of all queries so far, added up
    reread: float32, the largest attention in the second read of a cell's turn, NaN where there was none yet
    blocks: int32, the block each cell belongs to, ascending along C, the same numbers for all heads
    values: float32, the L2 norm of each value
    nexus: bool, which cells hold Nexus tokens
    """

    pinned: npt.NDArray[np.bool_]
    history: npt.NDArray[np.float32]
    window: int
    scores: npt.NDArray[np.float32] | None = None
    redundancy: npt.NDArray[np.float32] | None = None
    sums: npt.NDArray[np.float32] | None = None
    reread: npt.NDArray[np.float32] | None = None
    blocks: npt.NDArray[np.int32] | None = None
    values: npt.NDArray[np.float32] | None = None
    nexus: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Plan:
    """What to keep.

    keep: int [L, H, n_keep], cells of each layer and head, ascending
    history: float32 [L, H, C], what each cell carries on from here if it is kept; None for nothing
    """

    keep: npt.NDArray[np.intp]
    history: npt.NDArray[np.float32] | None = None


class Policy(Protocol):
    """Chooses the cells to keep. One dataclass per method, its fields the hyper-parameters; pure, without side effects.

    needs: the optional arrays of CacheState it reads, by name; one that needs "blocks" is a SplittingPolicy
    evicts: False if it never removes anything
    rotates: True if kept keys move to their place in the cache at every compression
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def evicts(self) -> bool: ...

    @property
    def rotates(self) -> bool: ...

    def plan(self, state: CacheState, budget: int) -> Plan:
        """The `budget` cells of each layer and head that stay; budget < C."""
        ...


class SplittingPolicy(Policy, Protocol):
    """A policy that needs "blocks". splitter: what divides the conversation into them."""

    @property
    def splitter(self) -> Splitter: ...


def needed(array: _Array | None) -> _Array:
    """An optional array of CacheState that the policy names in its `needs`; ValueError if it got none."""
    if array is None:
        raise ValueError("a policy reads an array of the state that its `needs` does not name")
    return array


def keep_best(importance: npt.NDArray[np.floating], state: CacheState, budget: int) -> npt.NDArray[np.intp]:
    """The pinned cells, the window, and the rest of the budget by importance [L, H, C], for each layer and head: [L, H, budget] ascending.

    Of cells that are equally important the newest stay.
    """
    rank = np.where(state.pinned, np.inf, importance)
    rank[..., rank.shape[-1] - state.window :] = np.inf
    n_cells = rank.shape[-1]
    # where the least one is that stays takes half the time of an order
    least = np.partition(rank, n_cells - budget, axis=-1)[..., n_cells - budget, None]
    stays = rank >= least
    n_more = np.count_nonzero(stays, axis=-1) - budget
    for place in zip(*np.nonzero(n_more), strict=True):
        # of equals the newest stay
        stays[place][np.flatnonzero(rank[place] == least[place])[: n_more[place]]] = False
    return (np.flatnonzero(stays) % n_cells).reshape(*rank.shape[:-1], budget)
