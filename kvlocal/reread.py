"""The second read of finished turns (KVzip, arXiv 2505.23416): which cells a model needs to repeat what was said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvlocal.compression import Compressor
from kvlocal.engine import Context, Model
from kvlocal.ledger import Ledger
from kvlocal.native import NativeCache
from kvlocal.tail import taken_back
from kvlocal.template import ChatTemplate

INSTRUCTION = "Repeat the previous context exactly."

# tokens before a chunk that are read along, so that the model finds its place
_LEAD_IN = 8


class SecondRead:
    """Reads tokens of the conversation again, behind an instruction to repeat them, and notes the attention they pay to their first copy.

    A chunk at a time: the instruction, a few tokens before the chunk and the chunk are one batch; its cells are removed right after.

    model, context, native: the cache; its ring holds a micro-batch
    compressor: makes room for the positions
    template: for the turn that holds the instruction
    """

    def __init__(self, model: Model, context: Context, native: NativeCache, compressor: Compressor, template: ChatTemplate):
        self._context, self._native, self._compressor = context, native, compressor
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        parts = template.tokens(model, template.user_turn(turns, INSTRUCTION))
        self._instruction = np.concatenate([ids for _, ids in parts])

    def run(self, ledger: Ledger, stop: Callable[[], bool]) -> bool:
        """Reads all tokens behind ledger.n_reread again, and raises "reread" of their cells to the largest attention they get, over queries and
        the group of query heads. Returns False if stop() ended it between two chunks."""
        while ledger.n_reread < ledger.n_tokens:
            if stop():
                return False
            room = min(self._context.n_ubatch, self._context.n_cells - ledger.n_cells) - len(self._instruction)
            lead_in = min(_LEAD_IN, ledger.n_reread)
            if room <= lead_in:
                return True
            end = min(ledger.n_tokens, ledger.n_reread + room - lead_in)
            batch = np.concatenate([self._instruction, ledger.ids[ledger.n_reread - lead_in : end]])
            self._compressor.make_room(ledger, len(batch))
            attention = self._attention(batch, end - ledger.n_reread, ledger)
            reread = ledger.scores("reread")
            tokens = ledger.tokens[..., : ledger.n_cells]
            chunk = (tokens >= ledger.n_reread) & (tokens < end)
            np.fmax(reread, attention, out=reread, where=chunk)
            ledger.n_reread = end
        return True

    def _attention(self, batch: np.ndarray, n_query: int, ledger: Ledger) -> np.ndarray:
        """What the last n_query tokens of a batch pay to the cells before it, [L, H, n_cells]; the batch leaves no trace."""
        with taken_back(self._context, self._native):
            self._context.decode(batch, ledger.next_position, logits="none")
            return self._native.scores(n_query=n_query, largest=True)[..., : ledger.n_cells]
