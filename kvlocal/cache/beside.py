"""Beside: what the tokens to come depend on besides the cells, and what is therefore kept wherever a conversation may come back to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvlocal.llama.cells import NativeCache
from kvlocal.llama.layout import Layout
from kvlocal.llama.sequence_decoder import SequenceDecoder


class Beside:
    """The recorded queries of one sequence, and behind them the state of its recurrent layers, if the model has any, as bytes.

    Cells can be cut off or filled again; a ring is overwritten, and a recurrent state stands for all tokens together: these are as they were only
    where they were copied.

    context, native, layout: of the sequence
    """

    def __init__(self, context: SequenceDecoder, native: NativeCache, layout: Layout) -> None:
        self._context, self._native, self._has_state = context, native, layout.is_recurrent
        self._n_ring = 0 if (ring := native.ring_state()) is None else len(ring)

    @property
    def n_most(self) -> int:
        """The most bytes that it can be."""
        return self._n_ring + most_state_bytes(self._context)

    def get(self) -> npt.NDArray[np.uint8] | None:
        """As it is now, uint8 [bytes]; None if there is nothing."""
        ring = self._native.ring_state()
        if not self._has_state:
            return ring
        state = self._context.recurrent_state()
        return state if ring is None else np.concatenate([ring, state])

    def set(self, data: npt.NDArray[np.uint8] | None) -> None:
        """Puts back what `get` gave. Where it fails, cells and state do not go together any more.

        Raises:
            KvlocalError, ValueError: it is of another cache.
        """
        if not self._has_state:
            self._native.set_ring_state(data)
            return
        if data is None or len(data) <= self._n_ring:
            raise ValueError("there is no recurrent state")
        self._context.set_recurrent_state(0, data[self._n_ring :])
        self._native.set_ring_state(data[: self._n_ring] if self._n_ring else None)


def most_state_bytes(context: SequenceDecoder) -> int:
    """What a copy of a recurrent state takes at most; 0 without one."""
    n = context.state_bytes()
    return n + n // 50 + 2**16 if context.model.is_hybrid else 0
