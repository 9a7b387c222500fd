"""Where the keys of all tokens are for the queries of now, in a conversation that may be longer than the context its model was trained for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int32]


class Frame(NamedTuple):
    """Positions of keys that no query is farther from than the trained context is long.

    When positions run out, the tokens to come go on at lower ones: a new frame. What is near then is moved along, so that distances among the
    newest tokens stay what they are, as in StreamingLLM. What is farther away is folded: it goes to one of `n_far` positions behind the pinned
    tokens, by the position it was made for. So neighbours stay neighbours, the whole past is at a distance that the model knows (InfLLM puts all
    of it at a single one), and there are few differences between the positions of stored keys and these: as many copies of the queries stand for
    all of them.

    n_pinned: the first tokens, which keep their positions
    n_far: positions behind those, for what is far away
    offset: the number of a near token minus its position
    """

    n_pinned: int
    n_far: int
    offset: int

    @classmethod
    def at(cls, n_pinned: int, n_ctx_train: int, n_tokens: int, next_position: int) -> Frame:
        """The frame in which the next token, number n_tokens, has this position."""
        return cls(n_pinned, _n_far(n_pinned, n_ctx_train), n_tokens - next_position)

    def positions(self, stored: Positions) -> Positions:
        """Of the keys of all tokens, int32 [n]; stored: those that they were made for, int32 [n]."""
        if self.offset == 0:
            return stored
        tokens = np.arange(len(stored), dtype=np.int32)
        near = tokens - np.int32(self.offset)
        folded = self.n_pinned + (stored - self.n_pinned) % np.int32(self.n_far)
        return np.where(tokens < self.n_pinned, stored, np.where(near >= self.n_pinned + self.n_far, near, folded))


def first_position(n_pinned: int, n_ctx_train: int, room: int, least: int) -> int:
    """At which position a new frame begins, so that as much is near as leaves a third of the trained context, or at least `room`, to new tokens.

    least: it may not be lower
    """
    n_far = _n_far(n_pinned, n_ctx_train)
    return max(least, n_pinned + n_far, min(n_pinned + 2 * n_far, n_ctx_train - room))


def stretches(shifts: Positions) -> tuple[Positions, Positions]:
    """Runs of equal shifts [n]: where each starts, and its shift, int32 [n_stretch] each."""
    starts = np.flatnonzero(np.diff(shifts, prepend=shifts[0] - 1)).astype(np.int32)
    return starts, shifts[starts]


def _n_far(n_pinned: int, n_ctx_train: int) -> int:
    return max(1, (n_ctx_train - n_pinned) // 3)
