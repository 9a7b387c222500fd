"""AnswerInProgress: one answer from the time its user turn is read until it has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from kvlocal.cache.budgeted import BudgetedCache, Passage
from kvlocal.chat.answer_piece import AnswerPiece, TokenLogprob
from kvlocal.chat.config import SessionError
from kvlocal.chat.looked_at import recalled_turns
from kvlocal.chat.stats import StopReason, TurnStats
from kvlocal.llama.sampling import Sampler, log_probabilities
from kvlocal.template.answer import AnswerStream, Told
from kvlocal.template.markup import Message
from kvlocal.template.pieces import Piece


class PieceReader(Protocol):
    """Brings text into a cache: that of turns (kvlocal.chat.turn_reader), or any.

    cache: where it goes
    end_tokens: those that end an answer
    """

    @property
    def cache(self) -> BudgetedCache: ...

    @property
    def end_tokens(self) -> Collection[int]: ...

    def passages(self, pieces: Sequence[Piece]) -> list[Passage]:
        """The tokens of pieces."""
        ...

    def read(self, pieces: Sequence[Piece]) -> int:
        """Evaluates pieces; returns the number of tokens."""
        ...


class AnswerInProgress:
    """Draws the tokens of an answer, token by token into the cache, and its text out of it.

    There is one at a time that may. Once it is over, whoever ended it, it touches nothing any more, and what iterates over it gets a SessionError.

    reader: the cache, and how texts come into it

    stopped: it is to end as it is, without the token that is on its way; may be set
    over: whether it has ended
    message: what it is in the conversation, as far as it came; None before it is begun
    stats: in numbers, None before it has ended
    """

    def __init__(self, reader: PieceReader) -> None:
        self._reader, self._cache = reader, reader.cache
        self.stopped = self.over = False
        self.message: Message | None = None
        self.stats: TurnStats | None = None
        self._fed: list[int] = []
        self._drawn: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        # of these, those that a piece had
        self._n_told = 0

    def begin(self, sampler: Sampler, stream: AnswerStream, start: Sequence[Piece], prompt_tokens: int, prompt_seconds: float) -> Message:
        """The answer is part of the conversation from now on; returns its message.

        stream: makes what it says of its tokens
        start: what only generated answers begin with (ChatTemplate.answer_start)
        prompt_tokens, prompt_seconds: what the turn took to read
        """
        self._sampler, self._stream, self._start, self._started = sampler, stream, start, time.perf_counter()
        self._prompt_tokens, self._prompt_seconds = prompt_tokens, prompt_seconds
        self.message = {"role": "assistant", "content": ""}
        return self.message

    def pieces(self, max_tokens: int, top_logprobs: int | None = None) -> Iterator[tuple[str, AnswerPiece]]:
        """What it says as it comes, never half a character: as text for a person, and with its parts told apart. Closing the iterator ends the
        answer, as does an exception inside it.

        Args:
            max_tokens: the longest it may be.
            top_logprobs: as AnswerOptions has it.

        Raises:
            SessionError: it is over.
        """
        self._check_current()
        cache, ends, stream, message = self._cache, self._reader.end_tokens, self._stream, self._begun
        reason: StopReason = "stopped"
        self._started = time.perf_counter()
        try:
            if not self.stopped:
                self._prompt_tokens += self._reader.read(self._start)
            while not self.stopped:
                if len(self._fed) >= max_tokens:
                    reason = "length"
                    break
                sampling = time.perf_counter()
                token = self._sampler.sample(cache.context)
                self._drawn.append(token)
                if top_logprobs is not None:
                    self._logprobs.append(token_logprob(cache, token, top_logprobs))
                cache.seconds.sample += time.perf_counter() - sampling
                if token in ends:
                    reason = "end"
                    break
                cache.append(np.array([token], np.int32), "decode")
                self._fed.append(token)
                if self.stopped:
                    # whoever asked for that has not seen this token; it leaves the cache with the rest that is not said
                    self._drawn.pop()
                    del self._logprobs[-1:]
                    break
                told = stream.take(token)
                if any(told):
                    message["content"] += told.text
                    yield self._piece(told)
                    self._check_current()
                if stream.stopped:
                    reason = "stop" if stream.stopped_as_asked else "end"
                    break
            rest = stream.finish(cut=not ended_by_model(self._drawn, ends))
            message["content"] += rest.text
            self.end("tool_calls" if reason == "end" and stream.calls else reason)
        except GeneratorExit:
            self.end()
            raise
        if any(rest) or self._n_told < len(self._logprobs):
            yield self._piece(rest)

    def _piece(self, told: Told) -> tuple[str, AnswerPiece]:
        start, self._n_told = self._n_told, len(self._logprobs)
        return told.text, AnswerPiece(told.content, told.reasoning, tuple(told.calls), tuple(self._logprobs[start:]))

    @property
    def _begun(self) -> Message:
        assert self.message is not None, "the answer is not begun"
        return self.message

    def _check_current(self) -> None:
        if self.over:
            raise SessionError("this answer has ended, as the conversation went on without it: ask again with regenerate() or send()")

    def end(self, reason: StopReason = "stopped") -> None:
        """It ends as far as it came: what is in the cache is what it says."""
        if self.over or self.message is None:
            return
        self.over = True
        if calls := [call for call in self._stream.calls if is_object(call.arguments)]:
            self._begun["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        n = len(self._fed)
        if not ended_by_model(self._drawn, self._reader.end_tokens) or self._stream.has_closing:
            n = keep_said(self._reader, self._sampler, self._stream, self._fed, self._begun["content"])
        self._close(n, reason)

    def break_off(self) -> None:
        """It ends after an exception, with the cache as it is."""
        self.over = True
        self._close(len(self._fed), "stopped")

    def _close(self, n_tokens: int, reason: StopReason) -> None:
        self._cache.describe(self._begun["content"])
        seconds, recalled = time.perf_counter() - self._started, recalled_turns(self._cache)
        self.stats = TurnStats(self._prompt_tokens, n_tokens, self._prompt_seconds, seconds, reason, self._drawn, recalled, self._logprobs)


def token_logprob(cache: BudgetedCache, token: int, n_top: int) -> TokenLogprob:
    """How likely the token was that was just drawn, and which ones were likeliest."""
    data = cache.model.token_bytes
    logprob, top = log_probabilities(cache.context.logits(), token, n_top)
    return TokenLogprob(data(token, special=True), logprob, [(data(each, special=True), value) for each, value in top])


def is_object(text: str) -> bool:
    """Whether a text is a JSON object; the arguments of a call that was cut off are none."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def ended_by_model(drawn: Sequence[int], ends: Collection[int]) -> bool:
    """Whether these tokens are those of an answer that the model ended by a token."""
    return bool(drawn) and drawn[-1] in ends


def text_of(stream: AnswerStream, drawn: Sequence[int], ends: Collection[int]) -> str:
    """What an answer says that was drawn as these tokens; the stream is new."""
    text = "".join(stream.push(token) for token in drawn if token not in ends)
    return text + stream.flush(cut=not ended_by_model(drawn, ends))


def keep_said(reader: PieceReader, sampler: Sampler, stream: AnswerStream, fed: Sequence[int], content: str) -> int:
    """Takes tokens at the end of an answer out of the cache that say what is not in it: a stop string, the beginning of a character or of a stop
    string, or of what the template writes behind answers. Returns how many tokens the answer has then.

    sampler: remembers them no more either
    stream: made the text of the answer
    fed: the tokens of the answer, the last that were evaluated
    """
    cache = reader.cache
    n, before, rest = stream.kept(fed, content)
    n_drop = len(fed) - n
    if not n_drop or cache.uncertain:
        return len(fed)
    for _ in range(min(n_drop, len(sampler.recent))):
        sampler.recent.pop()
    if not cache.set_length(cache.ledger.n_tokens - n_drop):
        return n
    # a token may say the end of the answer and the beginning of what is left out
    return n + cache.read(reader.passages([Piece("assistant", rest, "content", before=before or "a")])) if rest else n
