"""The second read of finished turns (KVzip, arXiv 2505.23416): which cells a model needs to repeat what was said."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.ledger import NEXUS
from kvlocal.cache.score_sources import REREAD_CHUNK

# what the instruction comes behind, for templates that begin a conversation in another way
EXCHANGE = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
INSTRUCTION = "Repeat the previous context exactly."

# tokens before a stretch that are read along, so that the model finds its place
_LEAD_IN = 8


class SecondRead:
    """Reads tokens of the conversation again, behind an instruction to repeat them, and notes the attention they pay to their first copy.

    A stretch at a time: the instruction and a few tokens of what comes before, then the stretch; all these cells are removed right after.

    cache: the conversation; it records REREAD_CHUNK queries at least
    instruction: the tokens of the turn that holds the instruction, int32 [n]
    """

    def __init__(self, cache: BudgetedCache, instruction: npt.NDArray[np.int32]):
        self._cache, self._instruction = cache, instruction

    def run(self, stop: Callable[[], bool]) -> bool:
        """Reads all tokens behind ledger.n_reread again, and raises "reread" of their cells to the largest attention they get, over queries and
        the group of query heads. Returns False if stop() ended it between two stretches.

        A stretch is as long as there are free cells; where there are few, the cache is compressed first.
        """
        cache, ledger = self._cache, self._cache.ledger
        started = time.perf_counter()
        try:
            while ledger.n_reread < ledger.n_tokens:
                if stop():
                    return False
                if self._room < REREAD_CHUNK:
                    cache.compress()
                lead_in = min(_LEAD_IN, ledger.n_reread)
                n = min(self._room - lead_in, ledger.n_tokens - ledger.n_reread)
                if n <= 0:
                    return True
                cache.make_positions(len(self._instruction) + lead_in + n)
                before = np.concatenate([self._instruction, _words(ledger.ids[ledger.n_reread - lead_in : ledger.n_reread])])
                with cache.taken_back():
                    self._read(before, ledger.n_reread + n)
            return True
        finally:
            cache.seconds.reread += time.perf_counter() - started

    @property
    def _room(self) -> int:
        """Tokens that can be read behind the instruction."""
        context = self._cache.context
        return min(context.n_ubatch, context.n_cells - self._cache.ledger.n_cells) - len(self._instruction)

    def _read(self, batch: npt.NDArray[np.int32], end: int) -> None:
        """Reads a batch and then the tokens ledger.n_reread .. end - 1, as many at once as the ring holds, and notes the attention of these."""
        cache, ledger = self._cache, self._cache.ledger
        position = ledger.next_position
        tokens, reread = ledger.tokens[..., : ledger.n_cells], ledger.scores("reread")
        again = (tokens >= ledger.n_reread) & (tokens < end)
        for start in range(ledger.n_reread, end, REREAD_CHUNK):
            chunk = _words(ledger.ids[start : min(start + REREAD_CHUNK, end)])
            if not len(chunk):
                continue
            batch = np.concatenate([batch, chunk])
            cache.context.decode(batch, position, logits="none")
            attention = cache.native.scores(n_query=len(chunk), largest=True)[..., : ledger.n_cells]
            np.fmax(reread, attention, out=reread, where=again)
            position, batch = position + len(batch), batch[:0]
        ledger.n_reread = end


def _words(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The tokens that can be read again: all but Nexus tokens."""
    return ids[ids != NEXUS]
