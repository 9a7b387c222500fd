"""Recall: the cells of one sequence are chosen among all tokens of the conversation, those in the cache and those in its archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvlocal.cache.archive import CHUNK, Archive, ArchiveFailed
from kvlocal.cache.frames import Frame, stretches
from kvlocal.cache.key_boxes import KeyBoxes
from kvlocal.cache.ledger import NEXUS, Ledger
from kvlocal.cache.marks import ArchivedMark
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.layout import BLOCK
from kvlocal.policies import CacheState, Policy


class _Search(NamedTuple):
    """How archived keys are looked through.

    far, least: so many times the budget, and at least so many tokens, are looked at among what is neither pinned nor new
    every: which of the queries look, 1 for all
    """

    far: int
    least: int
    every: int


# of the attention that the exact choice catches _QUICK leaves 0.95 in 8,000 tokens of dialogues; but a question is asked once, by few of its words:
# with each second query 0.50 of 48 facts came back where 0.625 do with all
_QUICK, _CLOSE = _Search(2, 2048, 2), _Search(4, 16384, 1)
# tokens that are archived together
_AT_ONCE = 1024
# an answer looks on in so many chunks that its question looked at most, so that it takes as long however much was said before
_NEAR = 64


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens that each layer and head shall hold.

    n_tokens: how many there were in the conversation when it was asked for
    tokens: int32 [L, H, n], ascending
    scores: float32 [L, H, n], the attention to each of them that they were chosen by; None if all are wanted
    attention: float64 [n_tokens], the attention to each token of the conversation that was looked at, mean over layers and heads; None as before
    """

    n_tokens: int
    tokens: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32] | None = None
    attention: npt.NDArray[np.float64] | None = None

    def with_new(self, n_tokens: int) -> ChosenTokens:
        """The same, and all tokens that have come since, which nobody has looked at."""
        if n_tokens == self.n_tokens:
            return self
        shape = *self.tokens.shape[:2], n_tokens - self.n_tokens
        new = np.broadcast_to(np.arange(self.n_tokens, n_tokens, dtype=np.int32), shape)
        return ChosenTokens(
            n_tokens,
            np.concatenate([self.tokens, new], axis=-1),
            None if self.scores is None else np.concatenate([self.scores, np.zeros(shape, np.float32)], axis=-1),
            None if self.attention is None else np.pad(self.attention, (0, shape[-1])),
        )


@dataclass(frozen=True)
class Refill:
    """What the cells shall hold, of each layer and head.

    gather: int32 [L, H, n], the cell each token is in now, or n_cells + its number where it comes from the archive
    tokens: int32 [L, H, n], ascending
    positions: int32 [L, H, n], the positions of their keys
    delta: int32 [L, H, n], by how many positions the keys are rotated on their way; None for none
    n_recalled: how many come from the archive, mean over layers and heads
    """

    gather: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    delta: npt.NDArray[np.int32] | None
    n_recalled: float


class Recaller:
    """Looks up what the last queries attend to in the whole conversation.

    native: the cache
    window: the queries that score
    archive: keys and values of all tokens
    n_ctx_train: positions the model was trained for
    """

    def __init__(self, native: NativeCache, window: int, archive: Archive, n_ctx_train: int) -> None:
        self._native, self._window, self.archive, self._n_ctx_train = native, window, archive, n_ctx_train
        self._boxes = KeyBoxes(native)
        # chunks of the archive that a question looked at most, None without one; and how many there were
        self._near: npt.NDArray[np.intp] | None = None
        self._n_asked = 0
        # int32 [L * H, tokens and more], the cell that a token is in while a refill is made, -1 for none
        self._cell_of = np.zeros((0, 0), np.int32)

    def write_through(self, ledger: Ledger) -> None:
        """Stores the tokens that came since the last time, which are the last cells of every head.

        Raises:
            ArchiveFailed: there is no room for them, or what was stored is there no more.
        """
        self.archive.check()
        n_new = ledger.n_tokens - self.archive.n_tokens
        if n_new == 0:
            return
        cells = np.arange(ledger.n_cells - n_new, ledger.n_cells)
        if not 0 < n_new <= ledger.n_cells or (ledger.tokens[..., cells[0]] != self.archive.n_tokens).any():
            raise ArchiveFailed("tokens have left the cache before they were archived")
        # tokens that were forgotten since the last time are not there now, and others come in their place
        self._boxes.cut(self.archive.n_tokens)
        # a long text at once would take as much memory again
        for some in np.array_split(cells, -(-n_new // _AT_ONCE)):
            self.archive.append(self._native.read_rows(some, self.archive.types), ledger.positions[0, 0, some])

    def go_back(self, ledger: Ledger, mark: ArchivedMark) -> None:
        """Fills the cells, which are empty, with what they held at a mark. What was archived since is forgotten.

        They are bit for bit what they were; where the archive has other types than the cache, what these make of it. What was beside them is not
        put back here.

        Raises:
            ValueError: the mark is none of this archive.
            ArchiveFailed: what was stored is there no more.
            NativeError: the native layer refused it or failed.
        """
        self.archive.check()
        tokens = mark.tokens(*ledger.tokens.shape[:2])
        self.archive.truncate(mark.n_tokens)
        if self.archive.n_tokens != mark.n_tokens:
            raise ValueError("a mark is behind the end of the archive")
        frame = Frame.at(ledger.n_pinned, self._n_ctx_train, mark.n_tokens, mark.next_position)
        ledger.go_back(mark.n_tokens, mark.next_position, tokens, frame.positions(self.archive.positions)[tokens])
        self.fill(ledger)

    def fill(self, ledger: Ledger) -> None:
        """Fills the cells, which are empty, with what the ledger says.

        Raises:
            ValueError: that is not what the archive has.
            NativeError: the native layer refused it or failed.
        """
        n, archive = ledger.n_cells, self.archive
        tokens, positions = ledger.tokens[..., :n], ledger.positions[..., :n]
        if archive.n_tokens != ledger.n_tokens or (positions[..., -1:] != ledger.next_position - 1).any():
            raise ValueError("ledger and archive differ")
        if (self.positions(ledger, ledger.next_position)[tokens] != positions).any():
            raise ValueError("ledger and archive differ")
        if n:
            delta = positions - archive.positions[tokens]
            self._native.compact(tokens, np.arange(ledger.next_position - n, ledger.next_position), delta if delta.any() else None, archive.chunks())

    def choice(self, ledger: Ledger, n_keep: int, policy: Policy, *, closely: bool = False, beside: bool = False) -> Callable[[], ChosenTokens]:
        """What finds the n_keep tokens of each layer and head that a policy wants, after `write_through`. It may need scores and Nexus tokens; of
        these the newest are candidates, and older ones where they are found as other tokens are.

        closely: whether it may take longer, because much depends on it; what is chosen without, until `look_everywhere`, is from what this looked at
        beside: what is returned may be called in another thread while the context decodes, as long as the archive stays as it is

        Raises:
            ArchiveFailed: there is no room for what finds them.
            NativeError: the native layer refused it or failed; what is returned raises it too.
        """
        n_tokens, shape = ledger.n_tokens, ledger.tokens.shape[:2]
        if closely:
            self.look_everywhere()
        if n_keep >= n_tokens:
            every = ChosenTokens(n_tokens, np.broadcast_to(np.arange(n_tokens, dtype=np.int32), (*shape, n_tokens)))
            return lambda: every
        candidates_of = self._candidates(ledger, n_keep, _CLOSE if closely else _QUICK, beside)
        n_pinned, is_nexus = ledger.n_pinned, ledger.ids == NEXUS if "nexus" in policy.needs else None

        def find() -> ChosenTokens:
            candidates, scores = candidates_of()
            nexus = None if is_nexus is None else is_nexus[candidates]
            state = CacheState(candidates < n_pinned, np.full((*shape, 1), np.nan, np.float32), self._window, scores, nexus=nexus)
            keep = policy.plan(state, n_keep).keep
            attention = np.bincount(candidates.ravel(), scores.ravel(), n_tokens) / (shape[0] * shape[1])
            if closely:
                self._near, self._n_asked = _most_looked_at(attention), n_tokens // CHUNK
            return ChosenTokens(n_tokens, np.take_along_axis(candidates, keep, axis=-1), np.take_along_axis(scores, keep, axis=-1), attention)

        return find

    def refill(self, ledger: Ledger, tokens: npt.NDArray[np.int32]) -> Refill:
        """For cells that are to hold these tokens, int32 [L, H, n] ascending. What the archive does not have yet is in the cells, and stays there.

        Raises:
            ArchiveFailed: what was stored is there no more.
        """
        self.archive.check()
        return self._refill(ledger, tokens, self.positions(ledger, ledger.next_position))

    def look_everywhere(self) -> None:
        """What is chosen next is not for the answer to what was asked last."""
        self._near = None

    def move(self, ledger: Ledger, next_position: int) -> Refill:
        """The tokens that are in the cells, with their keys where they have to be for a next token at this position, after `write_through`."""
        return self._refill(ledger, ledger.tokens[..., : ledger.n_cells], self.positions(ledger, next_position))

    def positions(self, ledger: Ledger, next_position: int) -> npt.NDArray[np.int32]:
        """Where the keys of all tokens have to be for a next token at this position, int32 [n_tokens]."""
        frame = Frame.at(ledger.n_pinned, self._n_ctx_train, ledger.n_tokens, next_position)
        return frame.positions(self._stored_positions(ledger))

    def _stored_positions(self, ledger: Ledger) -> npt.NDArray[np.int32]:
        """Those that the keys of all tokens were made for, int32 [n_tokens]; what is not archived yet is in the last cells, where it was made."""
        stored = self.archive.positions
        n_new = ledger.n_tokens - len(stored)
        return stored if n_new <= 0 else np.concatenate([stored, ledger.positions[0, 0, ledger.n_cells - n_new : ledger.n_cells]])

    def _candidates(
        self, ledger: Ledger, n_keep: int, search: _Search, beside: bool
    ) -> Callable[[], tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """What finds the tokens that each head may hold, int32 [L, H, C] ascending, and what the last queries pay to each of them, float32.

        The pinned ones, the newest n_keep, and of those between the blocks in which the queries can find most; while there are few enough, all.
        Before the first query after a rotation all scores are 0.
        """
        n_tokens, shape = ledger.n_tokens, ledger.tokens.shape[:2]
        n_query = min(self._window, len(self._native.query_positions()))
        every = np.broadcast_to(np.arange(n_tokens, dtype=np.int32), (*shape, n_tokens))
        if not n_query:
            return lambda: (every, np.zeros(every.shape, np.float32))
        archive, positions = self.archive, self.positions(ledger, ledger.next_position)
        keys, types, shifts = archive.key_chunks(), archive.types, positions - archive.positions
        moved = stretches(shifts) if shifts.any() else None
        first = -(-ledger.n_pinned // BLOCK) * BLOCK
        last = max(first, (n_tokens - max(n_keep, self._window)) // BLOCK * BLOCK)
        n_blocks = -(-max(search.far * n_keep, search.least) // BLOCK)
        if n_blocks * BLOCK >= last - first:
            queries = self._native.copy_queries(n_query, stretches=moved, beside=beside)
            return lambda: (every, queries.row_scores(keys, n_tokens, types=types))
        boxes = self._boxes.of(archive)
        where = self._chunks_to_search(len(keys), first, last, n_blocks)
        tokens = (where[:, None] * CHUNK + np.arange(CHUNK)).ravel()[: n_tokens - (len(keys) - len(where)) * CHUNK].astype(np.int32)
        n_left_out = last // CHUNK - int(np.count_nonzero(where < last // CHUNK))
        there = stretches(shifts[tokens]) if moved else None
        queries = self._native.copy_queries(n_query, every=search.every, stretches=there, beside=beside)

        def best() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
            rows, scores = queries.best_rows(
                [keys[i] for i in where], [boxes[i] for i in where], len(tokens),
                first=first, last=last - n_left_out * CHUNK, n_blocks=n_blocks, types=types,
            )  # fmt: skip
            return tokens[rows], scores

        return best

    def _chunks_to_search(self, n: int, first: int, last: int, n_blocks: int) -> npt.NDArray[np.intp]:
        """Of n chunks those that are looked through, ascending: the ones that a question looked at most, what came behind it, and all that hold
        tokens before `first` or from `last` on. All of them without a question, or where its chunks do not have n_blocks blocks.
        """
        every = np.arange(n)
        if self._near is None:
            return every
        where = every[np.isin(every, self._near) | (every * CHUNK < first) | (every >= min(self._n_asked, last // CHUNK))]
        between = np.count_nonzero((where * CHUNK >= first) & (where < last // CHUNK))
        return where if between * CHUNK > n_blocks * BLOCK else every

    def _refill(self, ledger: Ledger, tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> Refill:
        """A cell stays in use as long as its key is where it has to be, int32 [n_tokens]; others come from the archive, so that no key is ever
        rotated, or quantised, a second time.
        """
        n_layer, n_head, n_cells = *tokens.shape[:2], ledger.n_cells
        held = ledger.tokens[..., :n_cells]
        if self._cell_of.shape[-1] < ledger.n_tokens:
            self._cell_of = np.full((n_layer * n_head, 2 * ledger.n_tokens), -1, np.int32)
        # one flat index is much faster than one for each axis
        first = (np.arange(n_layer * n_head) * self._cell_of.shape[-1]).reshape(n_layer, n_head, 1)
        cell_of, where = self._cell_of.reshape(-1), first + held
        cell_of[where] = np.where(ledger.positions[..., :n_cells] == positions[held], np.arange(n_cells, dtype=np.int32), -1)
        gather = cell_of[first + tokens]
        cell_of[where] = -1
        missing = gather < 0
        gather = np.where(missing, n_cells + tokens, gather)
        shifts = positions - self._stored_positions(ledger)
        delta = np.where(missing, shifts[tokens], 0) if shifts.any() else None
        n_recalled = np.count_nonzero(missing) / (n_layer * n_head)
        return Refill(gather, tokens, positions[tokens], delta if delta is not None and delta.any() else None, n_recalled)


def _most_looked_at(attention: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """The _NEAR chunks that most of the attention to single tokens is in."""
    by_chunk = np.add.reduceat(attention, np.arange(0, len(attention), CHUNK))
    return np.argsort(by_chunk)[-_NEAR:]
