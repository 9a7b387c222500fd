"""Slots: conversations that decode together, each in a sequence of one context."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.llama.adapter import Adapter
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import CELL_BLOCK, Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.model import Model
from kvlocal.llama.scheduler import Scheduler, T
from kvlocal.llama.sequence_decoder import Outputs


@dataclass(eq=False)
class _Request:
    """What a slot wants to be decoded, and what became of it.

    rows: tokens, int32 [n], or vectors in their place, float32 [n, n_embd]
    adapter: what is on for this alone, besides those of the model
    result: the logits that were asked for, float32 [n or 1, n_vocab]
    """

    context: Context
    seq: int
    rows: npt.NDArray[Any]
    pos: int
    logits: Outputs
    adapter: Adapter | None
    result: npt.NDArray[np.float32] | None = None
    error: Exception | None = None

    @property
    def is_next_token(self) -> bool:
        return self.rows.shape == (1,) and self.logits == "last" and self.adapter is None

    def decode(self) -> None:
        """Alone."""
        context = self.context
        try:
            if self.adapter:
                context.use_adapter(self.adapter)
            try:
                decode = context.decode if self.rows.ndim == 1 else context.decode_embeddings
                decode(self.rows, self.pos, self.seq, self.logits)
            finally:
                if self.adapter:
                    context.use_adapter(None)
            if self.logits == "all":
                self.result = context.logits_all()
            elif self.logits == "last":
                self.result = context.logits()[None]
        except Exception as error:  # noqa: BLE001 - it is raised where the request comes from, and concerns no other
            self.error = error


class Rounds:
    """Decodes what slots wait for: single next tokens of a context together, everything longer by itself.

    So a text is read in the same batches as alone, which gives the same cache, and a next token sees nothing but its own slot. The logits are
    those of a conversation alone, bit by bit, wherever llama.cpp computes a row of a matrix product the same way whatever rows stand beside it.

    token_share: of the time while some read texts, the share that the next tokens of others get at least, below 1: a text is put off for so long,
        and then one micro-batch of one text is read. With 0 all of a round is carried out
    """

    def __init__(self, token_share: float = 0.0) -> None:
        self._ratio = token_share / (1 - token_share)
        self._owed = 0.0  # seconds of next tokens before the next text

    def carry_out(self, requests: Sequence[_Request]) -> Sequence[_Request]:
        """A round; returns what is put off."""
        tokens = [request for request in requests if request.is_next_token]
        texts = [request for request in requests if not request.is_next_token]
        n_texts = len(texts) if not (tokens and self._ratio) else 1 if self._owed <= 0 else 0
        started = time.perf_counter()
        for request in texts[:n_texts]:
            request.decode()
        read = time.perf_counter()
        for context in dict.fromkeys(request.context for request in tokens):
            _decode_together(context, [request for request in tokens if request.context is context])
        self._owed = (self._owed if texts[n_texts:] else 0.0) + self._ratio * (read - started) - (time.perf_counter() - read)
        return texts[n_texts:]


def _decode_together(context: Context, requests: list[_Request]) -> None:
    """One token of each, by ascending sequences, as llama.cpp works on neighbours at once."""
    requests.sort(key=lambda request: request.seq)
    if len(requests) > 1:
        tokens, positions, sequences = np.array([(request.rows[0], request.pos, request.seq) for request in requests], np.int32).T
        try:
            context.decode_sequences(tokens, positions, sequences)
        except EngineError:
            # whose fault it is shows when each is decoded alone
            pass
        else:
            for request, row in zip(requests, context.logits_all(), strict=True):
                request.result = row[None]
            return
    for request in requests:
        request.decode()


class Slots:
    """Gives each conversation a slot in one context, or in a context of its own if it needs more than a slot of that one holds.

    Conversations run in rounds, in whose turns slots are opened, used and closed.

    n: slots of the context
    model, n_cells and options: as for Context
    token_share: as for Rounds
    scheduler: carries out what is decoded

    Raises:
        EngineError: there is not enough memory.
    """

    def __init__(self, n: int, model: Model, *, token_share: float = 0.0, **options: Any) -> None:
        self.scheduler = Scheduler(Rounds(token_share).carry_out)
        self._context = Context(model, n_seq_max=n, **options)
        self._free = list(range(n))

    def open(self, model: Model, *, n_cells: int, n_recorded: int = 0, **options: Any) -> Slot:
        """A slot of at least n_cells cells that records at least n_recorded queries; the other options must be those of the context.

        Raises:
            EngineError: there is not enough memory.
        """
        if n_cells <= self._context.n_cells and n_recorded <= self._context.n_recorded and self._free:
            seq = heapq.heappop(self._free)
            return Slot(self.scheduler, self._context, seq, n_cells, lambda: self._give_back(seq))
        context = Context(model, n_cells=n_cells, n_recorded=n_recorded, **options)
        return Slot(self.scheduler, context, 0, n_cells, context.close)

    def _give_back(self, seq: int) -> None:
        if not self._context.closed:
            self._context.clear(seq)
        heapq.heappush(self._free, seq)

    def kv_bytes(self) -> int:
        """What the cells, the recurrent states and the recorded queries of all slots of the context take, in bytes."""
        context = self._context
        return context.kv_bytes() + context.state_bytes() + (NativeCache(context.pointer).layout().ring_bytes if context.n_recorded else 0)

    def close(self) -> None:
        """Frees the context that is shared. Closing twice is harmless."""
        self._context.close()


class Slot:
    """One sequence of a context that may have others, with the interface of a Context that has this one alone, as sequence 0.

    Decoding hands over until a round has done it, and what else computes until it is done. Everything else happens at once, in the conversation's
    turn.

    context, seq: the context, and the sequence's number there
    n_cells: how many cells are to be used, which is rounded up as for a context
    on_close: called when it is closed
    """

    def __init__(self, scheduler: Scheduler, context: Context, seq: int, n_cells: int, on_close: Callable[[], None]) -> None:
        self.model, self.seq = context.model, seq
        self.n_ubatch = context.n_ubatch
        self.n_cells = min(-(-n_cells // CELL_BLOCK) * CELL_BLOCK, context.n_cells)
        self._scheduler, self._context, self._on_close = scheduler, context, on_close
        self._adapter: Adapter | None = None
        self._logits: npt.NDArray[np.float32] | None = None
        self.closed = False

    @property
    def pointer(self) -> int:
        """The address of the llama_context."""
        if self.closed:
            raise EngineError("the slot is closed: open a new one")
        return self._context.pointer

    def call(self, function: Callable[[], T]) -> T:
        """As Context.call: hands over until it is done."""
        return self._scheduler.call(function)

    def decode(self, tokens: npt.ArrayLike, pos: int, seq: int = 0, logits: Outputs = "last") -> None:
        """As Context.decode."""
        self._decode(np.asarray(tokens, np.int32), pos, seq, logits)

    def decode_embeddings(self, embd: npt.ArrayLike, pos: int, seq: int = 0, logits: Outputs = "none") -> None:
        """As Context.decode_embeddings."""
        self._decode(np.asarray(embd, np.float32), pos, seq, logits)

    def _decode(self, rows: npt.NDArray[Any], pos: int, seq: int, logits: Outputs) -> None:
        self._check(seq)
        self._logits = None
        request = _Request(self._context, self.seq, rows, pos, logits, self._adapter)
        self._scheduler.wait(request)
        if request.error:
            raise request.error
        self._logits = request.result

    def use_adapter(self, adapter: Adapter | None) -> None:
        """What this slot decodes from now on is computed with this adapter besides those of the model, or with those alone."""
        self._adapter = adapter

    def check_output(self, i: int = -1) -> None:
        """Raise EngineError unless the last decode kept logits for token `i` of its batch."""
        if self._logits is None or not -len(self._logits) <= i < len(self._logits):
            raise EngineError(f"there are no logits for token {i} of the last batch: decode with logits='last' or 'all'")

    def logits(self, i: int = -1) -> npt.NDArray[np.float32]:
        """The logits after token `i` of what was decoded last, [n_vocab] float32."""
        self.check_output(i)
        assert self._logits is not None
        return self._logits[i]

    def logits_all(self) -> npt.NDArray[np.float32]:
        """The logits of what was decoded last with `logits="all"`, [n, n_vocab] float32."""
        self.check_output(0)
        assert self._logits is not None
        return self._logits

    def remove(self, seq: int, p0: int, p1: int) -> None:
        """As Context.remove."""
        self._check(seq)
        self._logits = None
        self._context.remove(self.seq, p0, p1)

    def clear(self, seq: int = 0) -> None:
        """Free all cells."""
        self.remove(seq, -1, -1)

    def pos_max(self, seq: int = 0) -> int:
        """The highest position, -1 when it is empty."""
        self._check(seq)
        return self._context.pos_max(self.seq)

    def pos_min(self, seq: int = 0) -> int:
        """As Context.pos_min."""
        self._check(seq)
        return self._context.pos_min(self.seq)

    def state_get(self, seq: int = 0, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """As Context.state_get."""
        self._check(seq)
        return self._context.state_get(self.seq, out)

    def state_set(self, seq: int, state: npt.NDArray[np.uint8] | bytes) -> None:
        """As Context.state_set."""
        self._check(seq)
        self._logits = None
        self._context.state_set(self.seq, state)

    def recurrent_state(self, seq: int = 0) -> npt.NDArray[np.uint8]:
        """As Context.recurrent_state."""
        self._check(seq)
        return self._context.recurrent_state(self.seq)

    def set_recurrent_state(self, seq: int, state: npt.NDArray[np.uint8]) -> None:
        """As Context.set_recurrent_state."""
        self._check(seq)
        self._logits = None
        self._context.set_recurrent_state(self.seq, state)

    def kv_bytes(self) -> int:
        """What the cells of this slot take, in bytes."""
        return self._context.kv_bytes() // self._context.n_seq_max

    def state_bytes(self) -> int:
        """What the recurrent state of this slot takes, in bytes."""
        return self._context.state_bytes() // self._context.n_seq_max

    def synchronize(self) -> None:
        """As Context.synchronize."""
        self._context.synchronize()

    def close(self) -> None:
        """Free the cells. Closing twice is harmless."""
        if not self.closed:
            self.closed = True
            self._on_close()

    def _check(self, seq: int) -> None:
        if self.closed:
            raise EngineError("the slot is closed: open a new one")
        if seq != 0:
            raise EngineError(f"there is no sequence {seq}: a slot has 1")


class SlotsInStep(Slots):
    """Slots whose conversations one thread has, without a driver: what they decode is decoded at once, and next tokens together where that is asked
    for ahead. It is made as Slots is.
    """

    def __init__(self, n: int, model: Model, **options: Any) -> None:
        super().__init__(n, model, **options)
        self.scheduler: _AtOnce = _AtOnce()

    def decode_ahead(self, tokens: Sequence[tuple[Slot, int, int]]) -> None:
        """Decodes one token of each of some slots together. What each of them decodes next has to be just that, and is there already.

        tokens: slot, token and position
        """
        requests = [_Request(slot._context, slot.seq, np.array([token], np.int32), pos, "last", slot._adapter) for slot, token, pos in tokens]
        for context in dict.fromkeys(request.context for request in requests):
            _decode_together(context, [request for request in requests if request.context is context])
        self.scheduler.ahead = {(request.context, request.seq): request for request in requests}


class _AtOnce(Scheduler):
    """Carries out in the thread that asks. ahead: what was decoded already, by context and sequence."""

    def __init__(self) -> None:
        super().__init__(lambda requests: None)
        self.ahead: dict[tuple[Context, int], _Request] = {}

    def wait(self, request: _Request) -> None:
        done = self.ahead.pop((request.context, request.seq), None)
        if done is None:
            request.decode()
        elif request.is_next_token and (request.rows[0], request.pos) == (done.rows[0], done.pos):
            request.result, request.error = done.result, done.error
        else:
            request.error = EngineError("another token was decoded ahead: decode that one")

    def call(self, function: Callable[[], T]) -> T:
        return function()
