"""The second evaluation: the last tokens of a conversation are taken back and evaluated once more, with the cells that were chosen by them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvlocal.cache.archive import Archive
from kvlocal.cache.ledger import Ledger
from kvlocal.llama.sequence_decoder import SequenceDecoder


class _Before(NamedTuple):
    """A recurrent state (Context.recurrent_state), how many tokens it stands for, and the position of the next one then."""

    n_tokens: int
    next_position: int
    state: npt.NDArray[np.uint8]


class SecondEvaluation:
    """Evaluates the last tokens of one sequence again.

    context: decodes
    has_state: whether there is a recurrent state, from whose end nothing can be cut off
    """

    def __init__(self, context: SequenceDecoder, has_state: bool) -> None:
        self._context, self._has_state = context, has_state
        self._before: _Before | None = None

    def note(self, ledger: Ledger) -> None:
        """What comes next may be evaluated a second time: the recurrent state, if there is one, is copied."""
        if self._has_state:
            self._before = _Before(ledger.n_tokens, ledger.next_position, self._context.recurrent_state())

    def forget(self) -> None:
        self._before = None

    def run(self, ledger: Ledger, archive: Archive, n: int) -> bool:
        """Evaluates the last n tokens a second time, or as many of them as every head has; where there is a recurrent state those that came since it
        was copied, if these are no more. Whether there were any. A copy serves once.

        The archive forgets them, so that it gets what they are now.
        """
        before, self._before = self._before, None
        n = min(n, ledger.n_cells)
        last = ledger.tokens[..., ledger.n_cells - n : ledger.n_cells] == np.arange(ledger.n_tokens - n, ledger.n_tokens)
        n = int(last.all(axis=(0, 1))[::-1].cumprod().sum())
        if self._has_state:
            n_since = ledger.n_tokens - before.n_tokens if before else 0
            # keys that were moved since have other positions
            is_there = before is not None and n_since <= n and n_since == ledger.next_position - before.next_position
            n = n_since if is_there else 0
        if not n:
            return False
        with ledger.changing():
            archive.truncate(ledger.n_tokens - n)
            if before:
                self._context.set_recurrent_state(0, before.state)
            self._context.remove(0, ledger.next_position - n, -1)
            self._context.decode(ledger.ids[ledger.n_tokens - n :], ledger.next_position - n)
        return True
