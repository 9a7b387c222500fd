"""Reads something and takes it back: the cache is afterwards what it was before."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvlocal.cache.ledger import Ledger
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.sequence_decoder import SequenceDecoder


@contextmanager
def taken_back(context: SequenceDecoder, native: NativeCache, ledger: Ledger) -> Iterator[None]:
    """What is decoded inside is removed again on exit, and the query ring is as it was. Nothing else may be removed or moved inside.

    Where that fails, the ledger is not certain any more.
    """
    end = context.pos_max(0) + 1
    # what leaves a sliding window can't be brought back by cutting off the tail
    state, ring = context.state_get() if native.layout().is_swa else None, native.ring_state()
    try:
        yield
    finally:
        with ledger.changing():
            if state is None:
                context.remove(0, end, -1)
            else:
                context.clear()
                context.state_set(0, state)
            native.set_ring_state(ring)
