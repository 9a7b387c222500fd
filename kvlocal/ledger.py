"""The ledger: which token, at which RoPE position, sits in which cell of each layer and head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class Segment:
    """A stretch of the conversation: one turn, or what comes before the first.

    role: "system", "user" or "assistant"
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
    history: float32 [L, H, capacity], the score it carries from earlier compressions, NaN for none
    n_pinned: the first n_pinned tokens of the conversation are never evicted
    """

    def __init__(self, n_layer: int, n_head_kv: int, capacity: int):
        shape = (n_layer, n_head_kv, capacity)
        self.tokens = np.zeros(shape, np.int32)
        self.positions = np.zeros(shape, np.int32)
        self.history = np.full(shape, np.nan, np.float32)
        self.n_pinned = 0
        self.segments: list[Segment] = []
        self.n_cells = 0
        self.n_tokens = 0
        self.next_position = 0

    def begin_segment(self, role: str) -> Segment:
        """Tokens appended from now on belong to a new segment."""
        segment = Segment(role, self.n_tokens, self.n_tokens)
        self.segments.append(segment)
        return segment

    def append(self, n: int) -> None:
        """Notes n new tokens in the next cells of every layer and head, at the next positions."""
        cells = slice(self.n_cells, self.n_cells + n)
        self.tokens[..., cells] = np.arange(self.n_tokens, self.n_tokens + n)
        self.positions[..., cells] = np.arange(self.next_position, self.next_position + n)
        self.history[..., cells] = np.nan
        self.n_cells += n
        self.n_tokens += n
        self.next_position += n
        self.segments[-1].end = self.n_tokens

    def pinned(self) -> npt.NDArray[np.bool_]:
        """Which cells must stay, [L, H, n_cells]."""
        return self.tokens[..., : self.n_cells] < self.n_pinned

    def compact(self, keep: npt.NDArray[np.intp], positions: npt.NDArray[np.int32] | None, history: npt.NDArray[np.float32] | None) -> None:
        """Moves cell keep[l, h, j] to cell j, keep: [L, H, n_keep] ascending.

        positions: int32 [n_keep], where the kept keys were rotated to, the same for all heads; None if they stayed
        history: float32 [L, H, n_cells], the score each old cell carries on; None for none
        """
        n_keep = keep.shape[-1]
        for array in (self.tokens, self.positions):
            array[..., :n_keep] = np.take_along_axis(array, keep, axis=-1)
        self.history[..., :n_keep] = np.nan if history is None else np.take_along_axis(history, keep, axis=-1)
        if positions is not None:
            self.positions[..., :n_keep] = positions
            self.next_position = int(positions[-1]) + 1
        self.n_cells = n_keep

    def truncate(self, n_tokens: int) -> int:
        """Forgets the tokens from n_tokens on; they must be the last cells of every head. Returns how many cells that frees."""
        n_drop = self.n_tokens - n_tokens
        self.n_cells -= n_drop
        self.n_tokens = n_tokens
        self.next_position -= n_drop
        while self.segments and self.segments[-1].start >= n_tokens:
            self.segments.pop()
        if self.segments:
            self.segments[-1].end = min(self.segments[-1].end, n_tokens)
        return n_drop

    def cells_per_segment(self) -> npt.NDArray[np.int64]:
        """Cells each segment still holds, by layer and head: [n_segments, L, H]."""
        bounds = np.array([segment.start for segment in self.segments] + [self.n_tokens + 1])
        tokens = self.tokens[..., : self.n_cells]
        # tokens ascend along the cells of a head, so a segment's cells are a stretch between two insertion points
        counts = np.stack([(tokens < bound).sum(axis=-1) for bound in bounds])
        return np.diff(counts, axis=0)

    def copy(self) -> Ledger:
        """An independent copy."""
        other = object.__new__(Ledger)
        other.__dict__.update(self.__dict__)
        other.tokens, other.positions, other.history = self.tokens.copy(), self.positions.copy(), self.history.copy()
        other.segments = [Segment(**vars(segment)) for segment in self.segments]
        return other
