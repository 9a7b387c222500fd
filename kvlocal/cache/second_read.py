"""The second read of finished turns (KVzip, arXiv 2505.23416): which cells a model needs to repeat what was said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvlocal.cache.compression import Compressor
from kvlocal.cache.ledger import NEXUS, Ledger
from kvlocal.cache.rollback import taken_back
from kvlocal.cache.score_sources import REREAD_CHUNK
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.engine import Context, Model
from kvlocal.template.chat_template import ChatTemplate

INSTRUCTION = "Repeat the previous context exactly."
# what it comes behind, for templates that begin a conversation in another way
EXCHANGE = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]

# tokens before a stretch that are read along, so that the model finds its place
_LEAD_IN = 8


class SecondRead:
    """Reads tokens of the conversation again, behind an instruction to repeat them, and notes the attention they pay to their first copy.

    A stretch at a time: the instruction and a few tokens of what comes before, then the stretch; all these cells are removed right after.

    model, context, native: the cache; its ring holds REREAD_CHUNK queries
    compressor: makes room for cells and positions
    template: for the turn that holds the instruction
    """

    def __init__(self, model: Model, context: Context, native: NativeCache, compressor: Compressor, template: ChatTemplate):
        self._context, self._native, self._compressor = context, native, compressor
        parts = template.tokens(model, template.user_turn(EXCHANGE, INSTRUCTION))
        self._instruction = np.concatenate([ids for _, ids in parts])

    def run(self, ledger: Ledger, stop: Callable[[], bool]) -> bool:
        """Reads all tokens behind ledger.n_reread again, and raises "reread" of their cells to the largest attention they get, over queries and
        the group of query heads. Returns False if stop() ended it between two stretches.

        A stretch is as long as there are free cells; where there are few, the cache is compressed first.
        """
        while ledger.n_reread < ledger.n_tokens:
            if stop():
                return False
            if self._room(ledger) < REREAD_CHUNK:
                self._compressor.compress(ledger)
            lead_in = min(_LEAD_IN, ledger.n_reread)
            n = min(self._room(ledger) - lead_in, ledger.n_tokens - ledger.n_reread)
            if n <= 0:
                return True
            self._compressor.make_room(ledger, len(self._instruction) + lead_in + n)
            before = np.concatenate([self._instruction, _words(ledger.ids[ledger.n_reread - lead_in : ledger.n_reread])])
            with taken_back(self._context, self._native):
                self._read(before, ledger.n_reread + n, ledger)
        return True

    def _room(self, ledger: Ledger) -> int:
        """Tokens that can be read behind the instruction."""
        return min(self._context.n_ubatch, self._context.n_cells - ledger.n_cells) - len(self._instruction)

    def _read(self, batch: npt.NDArray[np.int32], end: int, ledger: Ledger) -> None:
        """Reads a batch and then the tokens ledger.n_reread .. end - 1, as many at once as the ring holds, and notes the attention of these."""
        position = ledger.next_position
        tokens, reread = ledger.tokens[..., : ledger.n_cells], ledger.scores("reread")
        again = (tokens >= ledger.n_reread) & (tokens < end)
        for start in range(ledger.n_reread, end, REREAD_CHUNK):
            chunk = _words(ledger.ids[start : min(start + REREAD_CHUNK, end)])
            if not len(chunk):
                continue
            batch = np.concatenate([batch, chunk])
            self._context.decode(batch, position, logits="none")
            attention = self._native.scores(n_query=len(chunk), largest=True)[..., : ledger.n_cells]
            np.fmax(reread, attention, out=reread, where=again)
            position, batch = position + len(batch), batch[:0]
        ledger.n_reread = end


def _words(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The tokens that can be read again: all but Nexus tokens."""
    return ids[ids != NEXUS]
