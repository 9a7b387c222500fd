"""ChatSession: one conversation inside a fixed KV budget, and the answers in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.cache.budgeted import Passage
from kvlocal.cache.noted_cells import Arrays, Limits
from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.chat.answer_rules import answer_rules
from kvlocal.chat.answering import AnswerInProgress, ended_by_model, keep_said, text_of
from kvlocal.chat.config import SessionError
from kvlocal.chat.looked_at import LookedAt, looked_at
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.state import SessionState, limits, with_state, without_state
from kvlocal.chat.turns import Turns
from kvlocal.errors import KvlocalError
from kvlocal.llama.grammar import Grammar
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.markup import Message


class ChatSession(Turns):
    """A conversation that never ends, in a cache that never grows.

    Every token is evaluated once, but the end of what the user says a second time where there is an archive. The cache is compressed when it
    exceeds the budget by the stride, also in the middle of a long prompt or answer; the system prompt and the sinks always stay. When positions
    come near the end of the trained context, kept keys are rotated back to low positions and the conversation goes on.

    After a failure in the middle of a change the cache is not used any more: the next call reads the conversation again.

    It is made as Turns is.
    """

    def send(self, text: str, options: AnswerOptions = AnswerOptions()) -> Iterator[str]:
        """Appends a user turn and generates the answer: yields its text as it comes, never half a character."""
        self.add_turn("user", text)
        return self.answer(options)

    def answer(self, options: AnswerOptions = AnswerOptions()) -> Iterator[str]:
        """Generates the answer to the last user turn: yields its text as it comes, with its thought as kvlocal.template.answer writes it.

        The answer is part of the conversation from this call on. Closing the iterator, stop(), or an exception inside it, ends the answer; what
        there is of it stays. So does the next call that changes the conversation; the iterator raises SessionError after that.
        """
        return self._until_end(self._begin_answer(options), options, lambda text, _: text)

    def pieces(self, options: AnswerOptions = AnswerOptions()) -> Iterator[AnswerPiece]:
        """As `answer`, for programs: thought, text and tool calls are told apart."""
        return self._until_end(self._begin_answer(options), options, lambda _, piece: piece)

    def told(self, options: AnswerOptions = AnswerOptions()) -> Iterator[tuple[str, AnswerPiece]]:
        """As `answer` and `pieces` at once, for who keeps the text and shows its parts."""
        return self._until_end(self._begin_answer(options), options, lambda text, piece: (text, piece))

    def _begin_answer(self, options: AnswerOptions) -> AnswerInProgress:
        self.settle()
        if not self.messages or self.messages[-1]["role"] == "assistant":
            raise SessionError("there is no user turn to answer: send one first")
        answer_format, rules = answer_rules(self.template, options)
        grammar = Grammar(self.model, rules) if rules else None
        answer = self._answer = self._answer or AnswerInProgress(self._reader)
        start = self.template.answer_start(self._history_for_template(len(self.messages) - 1))
        stream = self.template.answer_stream(self.model, options.stop, answer_format)
        self.messages.append(answer.begin(self._sampler, stream, start, *self._prompt))
        self._sampler.begin(self.n_answers, grammar)
        self.n_answers += 1
        return answer

    def _recover(self) -> None:
        self._try_to_read_again(self.messages)

    def regenerate(self, options: AnswerOptions = AnswerOptions()) -> Iterator[str]:
        """Takes the last answer back and generates another one."""
        self.take_answer_back()
        return self.answer(options)

    def take_answer_back(self) -> None:
        """Takes the last answer back, so that its turn awaits another one.

        Raises:
            SessionError: there is none.
        """
        self._end_answer()
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SessionError("there is no answer to replace: send something first")
        start = next((i + 1 for i in reversed(range(len(self.messages) - 1)) if self.messages[i]["role"] == "assistant"), 0)
        asked = self.messages[start:-1]
        self._answer = None
        self._go_back(start)
        self.add_messages(asked)

    def add_answer(self, content: str, drawn: Sequence[int], tool_calls: Sequence[Mapping[str, Any]] = ()) -> None:
        """As add_turn("assistant", content), for an answer that was drawn as these tokens (TurnStats.drawn): they are evaluated one by one, so
        that the cache becomes what it was then, and not only nearly so. If they are not the tokens of that text, it is added as any other.

        tool_calls: the tools it calls, as a message has them
        """
        self._end_answer()
        self.settle()
        if max(drawn, default=0) >= self.model.n_vocab or min(drawn, default=0) < 0:
            drawn = ()
        stream = self.template.answer_stream(self.model, (), self.template.answer_format())
        message: Message = {"role": "assistant", "content": content} | ({"tool_calls": list(tool_calls)} if tool_calls else {})
        # the calls are compared by name and arguments: ids are drawn anew
        called = [(call["function"]["name"], call["function"]["arguments"]) for call in tool_calls]
        said = text_of(stream, drawn, self.template.end_tokens), [(call.name, call.arguments) for call in stream.calls]
        if said != (content, called) or not self.messages or self.messages[-1]["role"] == "assistant":
            self.add_messages([message])
            return
        self._answer = None
        start = self.template.answer_start(self._history_for_template(len(self.messages) - 1)) if drawn else []
        self.messages.append(message)
        try:
            self._reader.read(start)
            fed = []
            for token in drawn:
                self._sampler.accept(token)
                if token not in self.template.end_tokens:
                    self.cache.append(np.array([token], np.int32), "decode")
                    fed.append(token)
            if not ended_by_model(drawn, self.template.end_tokens) or stream.has_closing:
                keep_said(self._reader, self._sampler, stream, fed, content)
        except BaseException:
            self._take_back(1)
            raise
        self.n_answers += 1
        self.cache.describe(content)

    def answer_passages(self, content: str) -> list[Passage]:
        """What a given answer to the last user turn would append to the cache."""
        return self._reader.passages(self.template.given_assistant(self._history_for_template(), content))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is compressed inside, and on exit cache, ledger and messages are as they were. Can be nested.

        What is read inside must fit into the free and the spare cells. A user turn from outside cannot be followed by answer() inside any more.
        """
        self._end_answer()
        self.settle()
        messages, last, marks, prediction, answer = list(self.messages), self.last, self._marks, self.prediction, self._answer
        n_answers, recent = self.n_answers, list(self._sampler.recent)
        self._marks = []
        try:
            with self.cache.hold():
                yield
        finally:
            # a conversation that was begun anew inside has others
            self._marks = [] if self.cache.uncertain else marks
            self.last, self.prediction, self._answer, self.messages[:] = last, prediction, answer, messages
            self.n_answers = n_answers
            self._sampler.recent.clear()
            self._sampler.recent.extend(recent)

    # a copy of the cache that outlives the process

    @property
    def nexus(self) -> NexusTokens | None:
        """The Nexus tokens in use."""
        return self._reader.nexus

    def snapshot(self) -> Arrays:
        """What the answers to come depend on, after an answer and besides `cache.signature`, model, messages and system prompt; `resume` takes it.

        As BudgetedCache.snapshot, with what kvlocal.chat.state adds.
        """
        return with_state(self.cache.snapshot(), SessionState(self.n_answers, list(self._sampler.recent), self._marks))

    def snapshot_limits(self, n_text: int) -> Limits:
        """The type and the largest shape of each array of a `snapshot`, whose last dimension may be smaller. n_text: tokens there can be."""
        return limits(self.cache.snapshot_limits(n_text), self._sampler.params.n_recent, n_text)

    def resume(
        self, messages: Sequence[Message], arrays: Mapping[str, npt.NDArray[Any]], parts: Sequence[npt.NDArray[np.uint8]] = (), copy: bool = True
    ) -> None:
        """Goes on from a `snapshot` that a session with the same signature, model and system prompt gave after these messages.

        parts: the data of the parts that its archive had (kvlocal.cache.archive.Archive.parts), if there was one
        copy: take memory for them, and do not use them where they are

        Raises:
            SessionError: it does not fit; the session is then at its beginning.
        """
        self._reset()
        try:
            of_cache, state = without_state(arrays)
            for token in {token for recent in (state.recent, *(mark.recent for mark in state.marks)) for token in recent}:
                self.model.check_token(token)
            if any(not 0 <= mark.n_messages < len(messages) for mark in state.marks):
                raise ValueError("a mark is of another conversation")
            self.cache.resume(of_cache, parts, copy)
        except (KvlocalError, LookupError, TypeError, ValueError, AttributeError) as error:
            self._begin()
            raise SessionError(f"this is no state of such a session ({error}): read the messages again") from error
        there = {*self.cache.marked}
        self.n_answers, self._marks = state.n_answers, [mark for mark in state.marks if mark.n_tokens in there]
        self._sampler.recent.extend(state.recent)
        self.messages[:] = [dict(message) for message in messages]

    # what can be asked

    def looked_at(self) -> LookedAt:
        """What the last answer looked at.

        Raises:
            SessionError: there is no answer, or its attention is not known.
        """
        self._end_answer()
        self.settle()
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise SessionError("there is no answer yet: send something first")
        return looked_at(self.cache)
