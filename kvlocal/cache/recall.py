"""Recall: the cells of one sequence are chosen among all tokens of the conversation, those in the cache and those in its archive."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvlocal.cache.archive import Archive, ArchiveFailed
from kvlocal.cache.ledger import Ledger
from kvlocal.cache.marks import ArchivedMark
from kvlocal.llama.cells import NativeCache, Rows
from kvlocal.policies import CacheState, Policy


@dataclass(frozen=True)
class Refill:
    """What the cells shall hold, of each layer and head.

    gather: int32 [L, H, n], the cell each token is in now, or n_cells + r for row r of rows
    rows: of the tokens that are not in the cache; a head that needs fewer than others has some that nobody names
    tokens: int32 [L, H, n], ascending
    positions: int32 [L, H, n], the positions of their keys
    n_recalled: how many rows are named, mean over layers and heads
    scores: float32 [L, H, n_tokens], the attention that they were chosen by; None if all are wanted
    """

    gather: npt.NDArray[np.int32]
    rows: Rows
    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    n_recalled: float
    scores: npt.NDArray[np.float32] | None = None


class Recaller:
    """Looks up what the last queries attend to in the whole conversation.

    native: the cache
    window: the queries that score
    archive: keys and values of all tokens
    """

    def __init__(self, native: NativeCache, window: int, archive: Archive) -> None:
        self._native, self._window, self.archive = native, window, archive

    def write_through(self, ledger: Ledger) -> None:
        """Stores the tokens that came since the last time, which are the last cells of every head.

        Raises:
            ArchiveFailed: there is no room for them.
        """
        n_new = ledger.n_tokens - self.archive.n_tokens
        if n_new == 0:
            return
        cells = np.arange(ledger.n_cells - n_new, ledger.n_cells)
        if not 0 < n_new <= ledger.n_cells or (ledger.tokens[..., cells[0]] != self.archive.n_tokens).any():
            raise ArchiveFailed("tokens have left the cache before they were archived")
        self.archive.append(self._native.read_rows(cells), ledger.positions[0, 0, cells])

    def go_back(self, ledger: Ledger, mark: ArchivedMark) -> None:
        """Fills the cells, which are empty, with what they held at a mark: bit for bit what they were. What was archived since is forgotten.

        Raises:
            ValueError: the mark is none of this archive.
            NativeError: the native layer refused it or failed.
        """
        tokens = mark.tokens(*ledger.tokens.shape[:2])
        self.archive.truncate(mark.n_tokens)
        if self.archive.n_tokens != mark.n_tokens:
            raise ValueError("a mark is behind the end of the archive")
        ledger.go_back(mark.n_tokens, mark.next_position, tokens, self.archive.positions[tokens])
        self.fill(ledger)
        self._native.set_ring_state(mark.ring)

    def fill(self, ledger: Ledger) -> None:
        """Fills the cells, which are empty, with what the ledger says.

        Raises:
            ValueError: that is not what the archive has.
            NativeError: the native layer refused it or failed.
        """
        n, archive = ledger.n_cells, self.archive
        tokens, positions = ledger.tokens[..., :n], ledger.positions[..., :n]
        differ = archive.n_tokens != ledger.n_tokens or (archive.positions[tokens] != positions).any()
        if differ or (positions[..., -1:] != ledger.next_position - 1).any():
            raise ValueError("ledger and archive differ")
        if n:
            everything = np.broadcast_to(np.arange(n, dtype=np.int32), tokens.shape)
            self._native.compact(everything, np.arange(ledger.next_position - n, ledger.next_position), rows=archive.rows(tokens))

    def choose(self, ledger: Ledger, n_keep: int, policy: Policy) -> Refill:
        """The n_keep tokens of each layer and head that a policy wants which needs no more than scores, after `write_through`."""
        n_tokens, shape = ledger.n_tokens, ledger.tokens.shape[:2]
        every = np.arange(n_tokens, dtype=np.int32)
        if n_keep < n_tokens:
            n_query = min(self._window, len(self._native.query_positions()))
            scores = self._native.row_scores(self.archive.key_chunks(), n_tokens, n_query)
            pinned = np.broadcast_to(every < ledger.n_pinned, scores.shape)
            state = CacheState(pinned, np.full((*shape, 1), np.nan, np.float32), self._window, scores)
            tokens = policy.plan(state, n_keep).keep.astype(np.int32)
            return replace(self._refill(ledger, tokens), scores=scores)
        return self._refill(ledger, np.broadcast_to(every, (*shape, n_tokens)))

    def _refill(self, ledger: Ledger, tokens: npt.NDArray[np.int32]) -> Refill:
        cell_of = np.full((*tokens.shape[:2], ledger.n_tokens), -1, np.int32)
        cells = np.broadcast_to(np.arange(ledger.n_cells, dtype=np.int32), (*tokens.shape[:2], ledger.n_cells))
        np.put_along_axis(cell_of, ledger.tokens[..., : ledger.n_cells], cells, axis=-1)
        gather = np.take_along_axis(cell_of, tokens, axis=-1)
        missing = gather < 0
        n_missing = missing.sum(axis=-1)
        # the r-th token that a head misses is its row r
        row = np.cumsum(missing, axis=-1, dtype=np.int32) - 1
        gather[missing] = ledger.n_cells + row[missing]
        wanted = np.zeros((*tokens.shape[:2], int(n_missing.max())), np.intp)
        layer, head, _ = np.nonzero(missing)
        wanted[layer, head, row[missing]] = tokens[missing]
        return Refill(gather, self.archive.rows(wanted), tokens, self.archive.positions[tokens], float(n_missing.mean()))
