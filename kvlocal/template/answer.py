"""AnswerStream: the text of an answer as it is generated, with its thought if the model's family has thoughts."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kvlocal.llama.model import Model
from kvlocal.template.compiled import Answer, AnswerError, AnswerFormat, ToolCall
from kvlocal.template.textstream import TextStream, first_stop, n_begun, pieces_of

# How a thought is written in the text of an answer, whatever the model's own markers are.
THOUGHT_START, THOUGHT_END = "<think>\n", "\n</think>\n\n"

# the last characters of markers
MARKER_ENDS = (">", "]")

_THOUGHT = re.compile(r"\s*<think>\s*(.*?)(?:\s*</think>\s*(.*))?\Z", re.DOTALL)
_READ_SHARE = 2048  # an answer is read anew when it is longer by this part of its length, as that takes time in proportion to it
_MARKUP = 64  # characters that the markup between two parts of an answer has at most
_ID_CHARACTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9  # as the families have them that check ids of calls
_TAIL = 32  # characters by which the end of what was shown is found again


def with_thought(answer: Answer) -> str:
    """The text of an answer, its thought in front. A thought that nothing follows is not closed."""
    reasoning = answer.reasoning.lstrip()
    if not reasoning:
        return answer.content
    return THOUGHT_START + reasoning + (THOUGHT_END + answer.content if answer.content else "")


def with_thought_inside(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose thought, if it has one of its own ("reasoning_content"), is in front of its text, as a session has it."""
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    return {**rest, "content": with_thought(Answer(message["content"], message.get("reasoning_content", "")))}


def split_thought(text: str) -> tuple[str, bool, str]:
    """The thought at the start of the text of an answer ("" if there is none), whether it is closed, and what follows it."""
    found = _THOUGHT.match(text)
    if not found:
        return "", False, text
    return found[1], found[2] is not None, found[2] or ""


@dataclass(frozen=True)
class ToolCallDelta:
    """What is new of a tool call.

    index: which of the answer's calls it belongs to, from 0
    id, name: of the call, in its first delta, and "" in the others
    arguments: the next characters of its arguments, which are a JSON object when they are complete
    """

    index: int
    id: str
    name: str
    arguments: str


class Told(NamedTuple):
    """What is new in an answer.

    text: all that a person reads, the thought in front
    reasoning, content: the same, thought and text apart
    calls: of the tools that are called
    """

    text: str = ""
    reasoning: str = ""
    content: str = ""
    calls: Sequence[ToolCallDelta] = ()


class AnswerStream:
    """Makes what an answer says from its tokens, as they come.

    Args:
        model: whose tokens they are.
        stop: texts that end the answer, wherever they come.
        answer_format: how the family answers, where its thoughts are to be told apart; None for a text that is taken as it is.
        closing: what the template writes behind an answer. A model that writes it in several tokens has written some before the one that ends.
        asked_stop: texts that end what the answer says to the user, and do nothing in a thought.

    Attributes:
        stopped_as_asked: whether it was one of these that came.
        calls: the tools that are called, as far as it was told.
    """

    def __init__(
        self, model: Model, stop: Sequence[str] = (), answer_format: AnswerFormat | None = None, closing: str = "", asked_stop: Sequence[str] = ()
    ) -> None:
        self._model = model
        self._format = answer_format
        self._closing = closing
        self._asked_stop = tuple(asked_stop)
        # without a format all of it is said to the user
        self._stream = TextStream(stop if answer_format else (*stop, *asked_stop))
        self._raw, self._n_read = "", 0
        self._text = self._reasoning = self._content = ""
        # what is left out from a stop text on
        self._behind_stop = ""
        self.stopped_as_asked = False
        self.calls: list[ToolCall] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._stream.stopped or self.stopped_as_asked

    def push(self, token: int) -> str:
        """As `take`, the text alone."""
        return self.take(token).text

    def flush(self, cut: bool = False) -> str:
        """As `finish`, the text alone."""
        return self.finish(cut).text

    def take(self, token: int) -> Told:
        """Take the next token and give what is certain now."""
        text = self._stream.push(self._model.token_bytes(token, special=self._format is not None))
        if self._format is None:
            self.stopped_as_asked = self._stream.stopped_by in self._asked_stop
            return Told(text, "", text)
        if not text or self.stopped_as_asked:
            return Told()
        self._raw += text
        if (len(self._raw) - self._n_read) * _READ_SHARE < len(self._raw):
            return Told()
        self._n_read = len(self._raw)
        try:
            answer = self._format.parse(self._raw, is_partial=True)
        except AnswerError:
            return Told()
        return self._tell(self._up_to_stop(answer, is_partial=True), is_partial=True)

    def finish(self, cut: bool = False) -> Told:
        """Give what was kept back. The stream is then at its end.

        cut: the text would have gone on: the beginning of a character is left out, and that of a stop string
        """
        rest = self._stream.flush(cut)
        if self._format is None:
            return Told(rest, "", rest)
        if self.stopped_as_asked:
            return Told()
        self._raw += rest
        said = self._said()
        try:
            return self._tell(self._up_to_stop(self._format.parse(said), is_partial=cut))
        except AnswerError:
            pass
        try:
            told = self._tell(self._up_to_stop(self._format.parse(said, is_partial=True), is_partial=cut))
        except AnswerError:
            told = Told()
        # what was written behind what could be read is shown as it is, so that nothing is lost
        tail = self._text[-_TAIL:]
        at = said.rfind(tail)
        rest = said[at + len(tail) :] if at >= 0 else said
        # of an answer that was cut, it can be a marker that had begun
        if self.stopped_as_asked or self.calls or (cut and len(rest) < _MARKUP):
            return told
        return told._replace(text=told.text + rest, content=told.content + rest)

    @property
    def has_closing(self) -> bool:
        """Whether the model wrote a part of what the template writes behind answers; it ended with the rest then."""
        return self._n_closing() > 0

    def kept(self, tokens: Sequence[int], content: str) -> tuple[int, str, str]:
        """How many of the tokens say what is kept of the answer, and its last characters: those of a token that says something else, too.

        Args:
            tokens: all that were pushed.
            content: the text that they gave.

        Returns:
            The number, the text of so many tokens, and what is left of the text.
        """
        kept = content if self._format is None else self._said()
        if self._format is not None and self._behind_stop:
            kept = kept[: max(0, kept.rfind(self._behind_stop))]
        data = [self._model.token_bytes(token, special=self._format is not None) for token in tokens]
        n, n_characters = pieces_of(data, kept)
        return n, kept[:n_characters], kept[n_characters:]

    def _said(self) -> str:
        """What was written, without the closing."""
        return self._raw[: len(self._raw) - self._n_closing()]

    def _n_closing(self) -> int:
        """Characters at the end of what was written that are the first markers of the closing."""
        longest = min(len(self._raw), len(self._closing)) if self._format else 0
        return next((n for n in range(longest, 0, -1) if self._closing[n - 1] in MARKER_ENDS and self._raw.endswith(self._closing[:n])), 0)

    def _up_to_stop(self, answer: Answer, is_partial: bool) -> Answer:
        """The answer without what comes from a stop text on, and without what may be the beginning of one, of an answer that goes on."""
        if not self._asked_stop:
            return answer
        content = answer.content
        # no stop text ends in what was told already
        at, which = first_stop(content, self._asked_stop, max(0, len(self._content) - max(map(len, self._asked_stop))))
        self.stopped_as_asked = bool(which)
        if not which and is_partial:
            at -= n_begun(content, self._asked_stop)
        self._behind_stop = content[at:]
        return replace(answer, content=content[:at])

    def _tell(self, answer: Answer, is_partial: bool = False) -> Told:
        """What is new since the last time; what the answer takes back again is not told."""
        text, reasoning, content = with_thought(answer), answer.reasoning.lstrip(), answer.content
        if is_partial and not self.stopped_as_asked:
            # what follows decides whether space at the end belongs to it
            text, reasoning, content = text.rstrip(), reasoning if content else reasoning.rstrip(), content.rstrip()
        calls = self._new_calls(answer.tool_calls, is_partial)
        new = Told(_behind(self._text, text), _behind(self._reasoning, reasoning), _behind(self._content, content), calls)
        self._text, self._reasoning, self._content = self._text + new.text, self._reasoning + new.reasoning, self._content + new.content
        return new

    def _new_calls(self, calls: Sequence[ToolCall], is_partial: bool) -> list[ToolCallDelta]:
        """What is new of the calls of an answer."""
        new = []
        for i, call in enumerate(calls):
            if is_partial and not call.arguments:
                # its name may go on
                break
            is_first = i == len(self.calls)
            if is_first:
                self.calls.append(ToolCall(call.name, "", call.id or "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))))
            told = self.calls[i]
            arguments = _behind(told.arguments, call.arguments)
            self.calls[i] = told._replace(arguments=told.arguments + arguments)
            if is_first or arguments:
                new.append(ToolCallDelta(i, told.id if is_first else "", told.name if is_first else "", arguments))
        return new


def _behind(before: str, text: str) -> str:
    """What a text has behind what it had before; "" if it does not go on from there."""
    return text[len(before) :] if text.startswith(before) else ""
