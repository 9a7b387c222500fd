"""The ledger: which token, at which RoPE position, sits in which cell of each layer and head."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

# what stands in the place of a vocabulary entry for a Nexus token
NEXUS = -1


@dataclass
class Segment:
    """A stretch of the conversation: one turn, what comes before the first, or the Nexus tokens behind an answer.

    role: "system", "user", "assistant" or "nexus"
    start, end: its tokens are start .. end - 1, counted over the whole conversation
    text: the beginning of its content
    """

    role: str
    start: int
    end: int
    text: str = ""


class Ledger:
    """The cells of one sequence, [L, H, n_cells]; a cell's order in the cache is its order in the conversation.

    Before the first compression all heads hold the same. Tokens are numbered over the whole conversation and keep their number.

    tokens: int32 [L, H, capacity], number of the token in each cell
    positions: int32 [L, H, capacity], the RoPE position its key is rotated to
    carried: scores that cells carry along, each float32 [L, H, capacity], NaN for none: "history" (Plan.history), "sums" (the attention of
        all queries so far), "reread" (the largest attention of a second read); only those that were asked for
    returned: bool [L, H, capacity], whether the token had left the head's cells and came back; neither marks nor snapshots know
    n_pinned: the first n_pinned tokens of the conversation are never evicted
    n_summed: the queries of the first n_summed tokens are in "sums"
    n_reread: the first n_reread tokens were read a second time, or need not be
    block_of: int32 [n_split], the block of each of the first n_split tokens; blocks are numbered over the whole conversation
    n_nexus: how many of the tokens are Nexus tokens
    certain: whether the cells hold what is noted here; False while they are changed in place, and after a failure of that
    """

    def __init__(self, n_layer: int, n_head_kv: int, capacity: int, carries: Collection[str] = ()):
        shape = (n_layer, n_head_kv, capacity)
        self.tokens = np.zeros(shape, np.int32)
        self.positions = np.zeros(shape, np.int32)
        self.carried = {name: np.full(shape, np.nan, np.float32) for name in carries}
        self.returned = np.zeros(shape, np.bool_)
        self.n_pinned = 0
        self.n_summed = 0
        self.n_reread = 0
        self.block_of = np.zeros(0, np.int32)
        self.segments: list[Segment] = []
        self.n_cells = 0
        self.n_tokens = 0
        self.next_position = 0
        self.n_nexus = 0
        self.certain = True
        self._ids = np.zeros(capacity, np.int32)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """The whole conversation in the model's vocabulary, int32 [n_tokens], with NEXUS for each Nexus token."""
        return self._ids[: self.n_tokens]

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What is done to the cells inside leaves them uncertain if it fails."""
        before, self.certain = self.certain, False
        yield
        self.certain = before

    def begin_segment(self, role: str) -> Segment:
        """Tokens appended from now on belong to a new segment."""
        segment = Segment(role, self.n_tokens, self.n_tokens)
        self.segments.append(segment)
        return segment

    def append(self, ids: npt.NDArray[np.int32]) -> None:
        """Notes new tokens, int32 [n], in the next cells of every layer and head, at the next positions."""
        n = len(ids)
        cells = slice(self.n_cells, self.n_cells + n)
        self.tokens[..., cells] = np.arange(self.n_tokens, self.n_tokens + n)
        self.positions[..., cells] = np.arange(self.next_position, self.next_position + n)
        for array in self.carried.values():
            array[..., cells] = np.nan
        self.returned[..., cells] = False
        if self.n_tokens + n > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(len(self._ids) + n, np.int32)])
        self._ids[self.n_tokens : self.n_tokens + n] = ids
        self.n_nexus += int(np.count_nonzero(ids == NEXUS))
        self.n_cells += n
        self.n_tokens += n
        self.next_position += n
        self.segments[-1].end = self.n_tokens

    def pinned(self) -> npt.NDArray[np.bool_]:
        """Which cells must stay, [L, H, n_cells]."""
        return self.tokens[..., : self.n_cells] < self.n_pinned

    def nexus(self) -> npt.NDArray[np.bool_]:
        """Which cells hold Nexus tokens, [L, H, n_cells]."""
        return (self.ids == NEXUS)[self.tokens[..., : self.n_cells]]

    def scores(self, name: str) -> npt.NDArray[np.float32]:
        """A carried score of the used cells, [L, H, n_cells]; a view."""
        return self.carried[name][..., : self.n_cells]

    def blocks(self) -> npt.NDArray[np.int32]:
        """The block of each used cell, [L, H, n_cells]; tokens that are in no block yet count as one more block."""
        one_more = self.block_of[-1] + 1 if len(self.block_of) else 0
        rest = np.full(self.n_tokens - len(self.block_of), one_more, np.int32)
        return np.concatenate([self.block_of, rest])[self.tokens[..., : self.n_cells]]

    def append_blocks(self, ends: npt.NDArray[np.int32]) -> None:
        """Divides the tokens that follow those in a block into blocks that end before `ends`, int [n], counted from the first of them."""
        first = self.block_of[-1] + 1 if len(self.block_of) else 0
        lengths = np.diff(ends, prepend=0)
        self.block_of = np.concatenate([self.block_of, np.repeat(np.arange(first, first + len(ends), dtype=np.int32), lengths)])

    def compact(self, keep: npt.NDArray[np.intp], positions: npt.NDArray[np.int32] | None) -> None:
        """Moves cell keep[l, h, j] to cell j with all it carries, keep: [L, H, n_keep] ascending.

        positions: int32 [n_keep], where the kept keys were rotated to, the same for all heads; None if they stayed
        """
        n_keep = keep.shape[-1]
        for array in (self.tokens, self.positions, self.returned, *self.carried.values()):
            array[..., :n_keep] = np.take_along_axis(array, keep, axis=-1)
        if positions is not None:
            self.positions[..., :n_keep] = positions
            self.next_position = int(positions[-1]) + 1
        self.n_cells = n_keep

    def refill(
        self, gather: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], next_position: int
    ) -> None:
        """Cell j of a head holds token tokens[l, h, j] now, with its key at positions[l, h, j]; all int32 [L, H, n].

        gather: the cell it was in, whose scores it carries along, or n_cells and more for one that comes from elsewhere and has none
        next_position: where the conversation goes on
        """
        n, here = gather.shape[-1], gather < self.n_cells
        cells = np.where(here, gather, 0)
        for array in self.carried.values():
            array[..., :n] = np.where(here, np.take_along_axis(array, cells, axis=-1), np.nan)
        self.returned[..., :n] = ~here | np.take_along_axis(self.returned, cells, axis=-1)
        self.tokens[..., :n], self.positions[..., :n] = tokens, positions
        self.n_cells, self.next_position = n, next_position

    def truncate(self, n_tokens: int) -> int:
        """Forgets the tokens from n_tokens on; they must be the last cells of every head. Returns how many cells that frees."""
        n_drop = self.n_tokens - n_tokens
        self._forget(n_tokens)
        self.n_cells -= n_drop
        self.next_position -= n_drop
        return n_drop

    def go_back(self, n_tokens: int, next_position: int, tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> None:
        """Forgets the tokens from n_tokens on, wherever they were; the cells hold tokens[l, h, j], with their keys at positions[l, h, j], both int32
        [L, H, n], and carry no scores.
        """
        n = tokens.shape[-1]
        self._forget(n_tokens)
        self.tokens[..., :n], self.positions[..., :n], self.returned[..., :n] = tokens, positions, False
        for array in self.carried.values():
            array[..., :n] = np.nan
        self.n_cells, self.next_position = n, next_position

    def _forget(self, n_tokens: int) -> None:
        """All that is noted of the tokens from n_tokens on, but for the cells."""
        self.n_nexus -= int(np.count_nonzero(self.ids[n_tokens:] == NEXUS))
        self.n_tokens = n_tokens
        self.n_summed = min(self.n_summed, n_tokens)
        self.n_reread = min(self.n_reread, n_tokens)
        self.block_of = self.block_of[:n_tokens]
        while self.segments and self.segments[-1].start >= n_tokens:
            self.segments.pop()
        if self.segments:
            self.segments[-1] = replace(self.segments[-1], end=min(self.segments[-1].end, n_tokens))

    def segment_of_tokens(self) -> npt.NDArray[np.int64]:
        """The number of the segment of each token of the conversation, int64 [n_tokens]."""
        return np.repeat(np.arange(len(self.segments)), [segment.end - segment.start for segment in self.segments])

    def sums_per_segment(self, of_tokens: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The sums over the tokens of each segment of what each token of the conversation has, float [n_tokens]: [n_segments]."""
        sums = np.concatenate([[0.0], np.cumsum(of_tokens, dtype=np.float64)])
        return np.diff(sums[[*(segment.start for segment in self.segments), self.n_tokens]])

    def returned_per_segment(self) -> npt.NDArray[np.float64]:
        """Cells of each segment that had left and are here again, mean over layers and heads: [n_segments]."""
        back = self.tokens[..., : self.n_cells][self.returned[..., : self.n_cells]]
        return self.sums_per_segment(np.bincount(back, minlength=self.n_tokens)) / (self.tokens.shape[0] * self.tokens.shape[1])

    def cells_per_segment(self) -> npt.NDArray[np.int64]:
        """Cells each segment still holds, by layer and head: [n_segments, L, H]."""
        (n_layer, n_head), n = self.tokens.shape[:2], len(self.segments)
        # each layer and head counts in numbers of its own
        heads = np.arange(n_layer * n_head).reshape(n_layer, n_head, 1) * n
        counts = np.bincount((heads + self.segment_of_tokens()[self.tokens[..., : self.n_cells]]).ravel(), minlength=n_layer * n_head * n)
        return np.moveaxis(counts.reshape(n_layer, n_head, n), -1, 0)

    def segments_now(self) -> list[Segment]:
        """The segments as they are: what comes later changes none of these. Only the last of a ledger ever changes, so the others are shared."""
        return [*self.segments[:-1], *(replace(segment) for segment in self.segments[-1:])]

    def copy(self) -> Ledger:
        """An independent copy."""
        other = object.__new__(Ledger)
        other.__dict__.update(self.__dict__)
        other.tokens, other.positions, other._ids = self.tokens.copy(), self.positions.copy(), self._ids.copy()
        other.returned = self.returned.copy()
        other.carried = {name: array.copy() for name, array in self.carried.items()}
        other.segments = self.segments_now()
        return other

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All it holds, for a file; `take` reads it.

        numbers: int64 [4]; ids: int32 [n_tokens]; block_of: int32 [n_split]; segments: uint8 [bytes], JSON; tokens, positions: int32 [L, H, n_cells];
        each carried score by its name, float32 [L, H, n_cells]
        """
        return {
            "numbers": np.array([self.n_pinned, self.n_summed, self.n_reread, self.next_position], np.int64),
            "ids": self.ids,
            "block_of": self.block_of,
            "segments": np.frombuffer(json.dumps([vars(segment) for segment in self.segments]).encode(), np.uint8),
            "tokens": self.tokens[..., : self.n_cells],
            "positions": self.positions[..., : self.n_cells],
            **{name: self.scores(name) for name in self.carried},
        }

    def take(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes over what `arrays` of a ledger with the same carried scores and at most this capacity gave.

        Raises:
            ValueError: they contradict each other, and cannot have come from a ledger.
        """
        ids, tokens, positions = arrays["ids"], arrays["tokens"], arrays["positions"]
        n_pinned, n_summed, n_reread, next_position = arrays["numbers"].tolist()
        n_cells, n_tokens, n_split = tokens.shape[-1], len(ids), len(arrays["block_of"])
        segments = [Segment(**fields) for fields in json.loads(arrays["segments"].tobytes())]
        ends = [segment.end for segment in segments]
        consistent = (
            all(arrays[name].shape == tokens.shape for name in ("positions", *self.carried))
            and 0 < n_cells <= n_tokens
            and (np.diff(tokens, axis=-1) > 0).all() and tokens[..., 0].min() >= 0 and (tokens[..., -1] == n_tokens - 1).all()
            and positions.min() >= 0 and positions[..., :-1].max(initial=-1) < next_position - 1 and (positions[..., -1] == next_position - 1).all()
            and n_pinned == self.n_pinned and 0 <= n_summed <= n_tokens and 0 <= n_reread <= n_tokens
            and n_split <= n_tokens and (np.diff(arrays["block_of"], prepend=0) >= 0).all()
            and [segment.start for segment in segments] == [0, *ends[:-1]] and ends[-1] == n_tokens
        )  # fmt: skip
        if not consistent:
            raise ValueError("the ledger contradicts itself")
        self.n_summed, self.n_reread, self.next_position = n_summed, n_reread, next_position
        self.n_cells, self.n_tokens, self._ids, self.block_of, self.segments = n_cells, n_tokens, ids.copy(), arrays["block_of"].copy(), segments
        self.n_nexus = int(np.count_nonzero(ids == NEXUS))
        self.returned[..., :n_cells] = False
        for name, array in {"tokens": self.tokens, "positions": self.positions, **self.carried}.items():
            array[..., :n_cells] = arrays[name]
