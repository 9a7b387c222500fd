"""What a policy wants to know of the cells, gathered from the native layer and carried in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt

from kvlocal.cache.ledger import Ledger
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.layout import Layout
from kvlocal.policies import CacheState, Policy
from kvlocal.policies.base import SplittingPolicy

# the attention that finds block boundaries is averaged over this many layers, spread evenly
_MAP_LAYERS = 4

# the ring holds so many queries of a second read
REREAD_CHUNK = 32


def n_recorded(policy: Policy, window: int, n_ubatch: int) -> int:
    """How many queries the ring must hold for a policy, 0 for none.

    Those of the window where the last queries count, of a whole micro-batch where every query does, of a chunk of a second read.
    """
    at_once = {"sums": n_ubatch, "blocks": n_ubatch, "reread": max(window, REREAD_CHUNK), "scores": window}
    return max((at_once.get(name, 0) for name in policy.needs), default=0)


def carried_scores(policy: Policy) -> list[str]:
    """The scores a ledger must carry for a policy."""
    return [name for name in ("history", "sums", "reread") if name == "history" or name in policy.needs]


class ScoreSources:
    """Looks at one sequence on behalf of a policy.

    native, layout: the cache; its ring holds the queries that the policy needs
    policy: says what it needs
    window: the queries that score the cells
    n_ubatch: tokens that may come at once
    text_of: the bytes of a token
    """

    def __init__(
        self, native: NativeCache, layout: Layout, policy: Policy, window: int, n_ubatch: int, text_of: Callable[[int], bytes]
    ):
        self._native, self._layout, self._policy, self._window, self._text_of = native, layout, policy, window, text_of
        self._n_ring = n_recorded(policy, window, n_ubatch)

    def before_append(self, ledger: Ledger, n: int) -> None:
        """Before n more tokens: uses the queries that they would push out of the ring."""
        if ledger.n_tokens + n - ledger.n_summed > self._n_ring:
            self.before_removal(ledger)

    def before_removal(self, ledger: Ledger) -> None:
        """Before cells go or move: adds up what the queries since the last time paid to them."""
        if "sums" not in self._policy.needs:
            return
        n = min(ledger.n_tokens - ledger.n_summed, len(self._native.query_positions()))
        if n:
            sums = ledger.scores("sums")
            sums[:] = np.nan_to_num(sums) + n * self._native.scores(n_query=n)
        ledger.n_summed = ledger.n_tokens

    def state(self, ledger: Ledger) -> CacheState:
        """The cells as they are now."""
        self.before_removal(ledger)
        needs, arrays = self._policy.needs, {}
        if "scores" in needs:
            n_query = min(self._window, len(self._native.query_positions()))
            arrays["scores"] = self._native.scores(n_query=n_query)
        if "redundancy" in needs:
            arrays["redundancy"] = self._native.redundancy()
        if "values" in needs:
            arrays["values"] = np.stack([np.linalg.norm(self._native.read_values(i), axis=-1) for i in range(self._layout.n_layer)])
        if "blocks" in needs:
            self._split(ledger)
            arrays["blocks"] = ledger.blocks()
        if "nexus" in needs:
            arrays["nexus"] = ledger.nexus()
        for name in needs & {"sums", "reread"}:
            arrays[name] = ledger.scores(name)
        return CacheState(ledger.pinned(), ledger.scores("history"), self._window, **arrays)

    def _split(self, ledger: Ledger) -> None:
        """Divides the tokens that are in no block yet, turn by turn, up to the window, which may still grow into a longer block."""
        end = ledger.n_tokens - self._window
        for segment in ledger.segments:
            start, stop = max(segment.start, len(ledger.block_of)), min(segment.end, end)
            if start < stop:
                texts = [self._text_of(token) for token in ledger.ids[start:stop].tolist()]
                ledger.append_blocks(cast(SplittingPolicy, self._policy).splitter.split(texts, self._attention(ledger, start, stop)))

    def _attention(self, ledger: Ledger, start: int, stop: int) -> npt.NDArray[np.float32] | None:
        """Attention of tokens start .. stop - 1 to each other, [n, n], mean over heads and some layers; None if not all of them are recorded.

        Tokens in no block yet came after the last compression, or were in its window: they are the last cells of every head.
        """
        n_query = ledger.n_tokens - start
        if n_query > len(self._native.query_positions()):
            return None
        layers = np.linspace(0, self._layout.n_layer - 1, _MAP_LAYERS + 2)[1:-1].astype(int)
        attention = self._native.attention_map(np.unique(layers).tolist(), n_query=n_query).mean(axis=0)
        first = ledger.n_cells - n_query
        return attention[: stop - start, first : first + stop - start]
