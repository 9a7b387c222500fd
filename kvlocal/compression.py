"""The one place that decides when to compress, and that carries a policy's plan out on the cache and the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvlocal.ledger import Ledger
from kvlocal.native import Layout, NativeCache
from kvlocal.policies import CacheState, Policy


@dataclass
class Seconds:
    """Where the time of a session went, in seconds."""

    prefill: float = 0.0
    decode: float = 0.0
    sample: float = 0.0
    score: float = 0.0
    plan: float = 0.0
    compact: float = 0.0


@dataclass
class Compressor:
    """Keeps one sequence within its budget.

    native, layout: the cache
    policy: what to keep
    budget: cells of each layer and head after a compression
    stride: a compression is due when the cache holds more than budget + stride cells
    window: the most recent cells, which always stay
    n_batch: tokens that may come at once
    n_ctx_train: positions the model was trained for
    n_swa: size of the sliding window of the layers that are not compressed, 0 without any
    before: called before anything is removed; None once the cache is closed
    """

    native: NativeCache
    layout: Layout
    policy: Policy
    budget: int
    stride: int
    window: int
    n_batch: int
    n_ctx_train: int
    n_swa: int
    before: Callable[[], None] | None
    seconds: Seconds = field(default_factory=Seconds)
    compressions: int = 0
    rotations: int = 0

    def make_room(self, ledger: Ledger, n: int) -> None:
        """Before n more tokens: moves the keys back if their positions would leave the trained context."""
        if ledger.next_position + n > self.n_ctx_train and self.policy.evicts and self.layout.can_rotate:
            everything = np.broadcast_to(np.arange(ledger.n_cells), (self.layout.n_layer, self.layout.n_head_kv, ledger.n_cells))
            self._compact(ledger, everything, ledger.history[..., : ledger.n_cells], rotate=True)

    def after_append(self, ledger: Ledger) -> None:
        """After new tokens: compresses if it is due."""
        if ledger.n_cells > self.budget + self.stride and self.policy.evicts:
            self._compress(ledger)

    def _compress(self, ledger: Ledger) -> None:
        started = time.perf_counter()
        arrays = {}
        if "scores" in self.policy.needs:
            n_query = min(self.window, len(self.native.query_positions()))
            arrays["scores"] = self.native.scores(n_query=n_query)
        if "redundancy" in self.policy.needs:
            arrays["redundancy"] = self.native.redundancy()
        scored = time.perf_counter()
        state = CacheState(ledger.pinned(), ledger.history[..., : ledger.n_cells], self.window, **arrays)
        plan = self.policy.plan(state, self.budget)
        planned = time.perf_counter()
        self.seconds.score += scored - started
        self.seconds.plan += planned - scored
        near_end = ledger.next_position + self.stride + 2 * self.n_batch > self.n_ctx_train
        self._compact(ledger, plan.keep, plan.history, rotate=self.policy.rotates or near_end)
        self.compressions += 1

    def _compact(self, ledger: Ledger, keep: np.ndarray, history: np.ndarray | None, *, rotate: bool) -> None:
        self.before()
        started = time.perf_counter()
        n_keep = keep.shape[-1]
        if rotate and self.layout.can_rotate:
            # the sliding-window cache moves along, and none of its positions may fall below zero
            first = max(0, self.n_swa + 1 - n_keep)
            positions = np.arange(first, first + n_keep, dtype=np.int32)
            delta = positions - np.take_along_axis(ledger.positions, keep, axis=-1)
            shift = int(positions[-1]) + 1 - ledger.next_position
            self.native.compact(keep, positions, delta)
            self.native.shift_window_cache(shift)
            self.rotations += 1
        else:
            # the mask wants ascending positions; the window's are the true ones
            positions = None
            self.native.compact(keep, np.arange(ledger.next_position - n_keep, ledger.next_position))
        ledger.compact(keep, positions, history)
        self.seconds.compact += time.perf_counter() - started
