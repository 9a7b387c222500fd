"""LiveConversation: a conversation in a slot, which reads and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.llama.slots import Slots
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.serving.answering import Answering
from kvlocal.serving.request import AnswerRequest, Event, Usage
from kvlocal.template.markup import Message


class Cancelled(Exception):
    """Nobody wants the answer any more."""


class LiveConversation:
    """A session in a slot, and the request that it works on. It is used in turns of the slots' scheduler.

    session: the conversation so far
    usage: what the request has taken
    """

    def __init__(self, slots: Slots, model: Model, config: SessionConfig, nexus: NexusTokens | None) -> None:
        self._answering: Answering | None = None
        self.usage = Usage()
        self.session = ChatSession(model, config, nexus=nexus, progress=self._check, make_context=slots.open)

    def _check(self, done: int = 0, total: int = 0) -> None:
        if self._answering is not None and self._answering.cancelled:
            raise Cancelled

    def work(self, answering: Answering, turns: Sequence[Message], n_known: int, said: Callable[[Event], None]) -> None:
        """Makes the conversation the turns of a request and answers the last one; session.messages[-1] and session.last are the answer.

        turns: without the system prompt
        n_known: the conversation has so many of them
        said: gets each piece of the answer before anybody else does

        Raises:
            Cancelled: before the answer began.
            KvlocalError: they cannot be read, or not be answered.
        """
        self._answering, self.usage = answering, Usage()
        try:
            self._read(turns, n_known)
            self._answer(answering, said)
        finally:
            self._answering = None

    def _read(self, turns: Sequence[Message], n_known: int) -> None:
        session, cache = self.session, self.session.cache
        self._check()
        n = session.go_back_to(n_known)
        cached = 0 if cache.uncertain else cache.ledger.n_tokens - cache.ledger.n_nexus
        self.usage = replace(self.usage, cached_tokens=cached)
        for message in turns[n:]:
            self._check()
            session.add_turn(message["role"], message["content"])

    def _answer(self, answering: Answering, said: Callable[[Event], None]) -> None:
        session, request = self.session, answering.request
        self._draw_as(request)
        pieces = session.pieces(request.options)
        answering.can_stop(session.stop)
        try:
            for piece in pieces:
                said(piece)
                answering.emit(piece)
        finally:
            answering.can_stop(lambda: None)
            if session.last:
                n = session.last.answer_tokens
                ledger = session.cache.ledger
                self.usage = replace(self.usage, prompt_tokens=ledger.n_tokens - ledger.n_nexus - n, completion_tokens=n)

    def _draw_as(self, request: AnswerRequest) -> None:
        """The same seed gives the same answer to the same conversation, also if it was answered before."""
        session = self.session
        wanted: SamplingParams = request.sampling or session.config.sampling
        if session.sampling != wanted:
            session.set_sampling(wanted)
        if wanted.seed is not None:
            session.n_answers = sum(message["role"] == "assistant" for message in session.messages)

    def close(self) -> None:
        """Gives the slot back."""
        self.session.close()
