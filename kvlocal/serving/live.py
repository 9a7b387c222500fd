"""LiveConversation: a conversation in a slot, which reads and answers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvlocal.chat.cache_map import CacheMap
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.messages import turns_of
from kvlocal.chat.session import ChatSession
from kvlocal.llama.model import Model
from kvlocal.llama.slots import Slots
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.serving.answering import Answering
from kvlocal.serving.request import AnswerRequest, TextRequest, Usage
from kvlocal.serving.shown_map import ShownMap
from kvlocal.template.markup import Message


class Cancelled(Exception):
    """Nobody wants the answer any more."""


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Calls a method as long as its object is there. Who has it does not keep the object: a session and what it reports to would otherwise keep each
    other, and with them the memory of both until Python happens to look for such circles."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        if found := reference():
            found(*arguments)

    return call


class LiveConversation:
    """A session in a slot, and the request that it works on. It is used in turns of the slots' scheduler.

    shown: gets maps of its cache while it is worked on

    session: the conversation so far
    usage: what the request has taken
    """

    def __init__(self, slots: Slots, model: Model, config: SessionConfig, nexus: NexusTokens | None, shown: ShownMap) -> None:
        self._answering: Answering | None = None
        self._shown = shown
        self.usage = Usage()
        self.session = ChatSession(model, config, nexus=nexus, progress=weakly(self._check), make_context=slots.open, begin=False)

    def _check(self, *_: Any) -> None:
        if self._answering is None:
            return
        if self._answering.cancelled:
            raise Cancelled
        self._show()

    def _show(self) -> None:
        cache = self.session.cache
        if not cache.uncertain and not cache.compressor.held:
            self._shown.refresh(self.map)

    def map(self, *, closely: bool = False) -> CacheMap:
        """Of its cache, as CacheMap.of has it."""
        return CacheMap.of(self.session.cache, closely=closely)

    def read(self, answering: Answering, turns: Sequence[Message], n_known: int) -> None:
        """Makes the conversation these turns, of which it has the first n_known, or as many as the way back leaves it.

        Raises:
            Cancelled: nobody waits for it any more.
            KvlocalError: they cannot be read.
        """
        self._answering, self.usage = answering, Usage()
        try:
            n = self.session.go_back_to(n_known)
            if n < len(turns):
                # what stands between two answers is read together
                n = self.session.go_back_to(max((i + 1 for i in range(n) if turns[i]["role"] == "assistant"), default=0))
            self.usage = Usage(cached_tokens=0 if self.session.cache.uncertain else self._n_tokens)
            for turn in turns_of(turns[n:]):
                self._check()
                self.session.add_messages(turn)
        finally:
            self._answering = None

    def answer(self, answering: Answering, said: Callable[[str], None]) -> None:
        """Answers the last turn; session.messages[-1] and session.last are the answer.

        said: gets what is new in the text of the answer before anybody else does

        Raises:
            KvlocalError: it cannot be answered, or not to its end.
        """
        session = self.session
        self._draw_as(answering.request)
        before, n_said, pieces = session.last, 0, session.pieces(answering.request.options)
        message = session.messages[-1]
        answering.can_stop(session.stop)
        try:
            for piece in pieces:
                said(message["content"][n_said:])
                n_said = len(message["content"])
                answering.emit(piece)
                self._show()
        finally:
            answering.can_stop(lambda: None)
            # where it was broken off, it ends here
            session.finish_turn()
            if session.last and session.last is not before:
                n = session.last.answer_tokens
                self.usage = replace(self.usage, prompt_tokens=self._n_tokens - n, completion_tokens=n)
        said(message["content"][n_said:])

    @property
    def _n_tokens(self) -> int:
        ledger = self.session.cache.ledger
        return ledger.n_tokens - ledger.n_nexus

    def _draw_as(self, request: AnswerRequest | TextRequest) -> None:
        """The same seed gives the same answer to the same conversation, also if it was answered before."""
        session = self.session
        wanted = request.sampling or session.config.sampling
        if session.sampling != wanted:
            session.set_sampling(wanted)
        if wanted.seed is not None:
            session.n_answers = sum(message["role"] == "assistant" for message in session.messages)

    def close(self) -> None:
        """Gives the slot back."""
        self.session.close()
