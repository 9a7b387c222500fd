"""AnswerStream: the text of an answer as it is generated, with its thought if the model's family has thoughts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvlocal.llama.model import Model
from kvlocal.template.compiled import Answer, AnswerError, AnswerFormat
from kvlocal.template.textstream import TextStream, pieces_of

# How a thought is written in the text of an answer, whatever the model's own markers are.
THOUGHT_START, THOUGHT_END = "<think>\n", "\n</think>\n\n"

# the last characters of markers
MARKER_ENDS = (">", "]")

_THOUGHT = re.compile(r"\s*<think>\s*(.*?)(?:\s*</think>\s*(.*))?\Z", re.DOTALL)
_READ_SHARE = 2048  # an answer is read anew when it is longer by this part of its length, as that takes time in proportion to it
_MARKUP = 64  # characters that the markup between two parts of an answer has at most
_TAIL = 32  # characters by which the end of what was shown is found again


def with_thought(answer: Answer) -> str:
    """The text of an answer, its thought in front. A thought that nothing follows is not closed."""
    reasoning = answer.reasoning.lstrip()
    if not reasoning:
        return answer.content
    return THOUGHT_START + reasoning + (THOUGHT_END + answer.content if answer.content else "")


def split_thought(text: str) -> tuple[str, bool, str]:
    """The thought at the start of the text of an answer ("" if there is none), whether it is closed, and what follows it."""
    found = _THOUGHT.match(text)
    if not found:
        return "", False, text
    return found[1], found[2] is not None, found[2] or ""


class AnswerStream:
    """Makes the text of an answer from its tokens, as they come.

    Args:
        model: whose tokens they are.
        stop: texts that end the answer.
        answer_format: how the family answers, where its thoughts are to be told apart; None for a text that is taken as it is.
        closing: what the template writes behind an answer. A model that writes it in several tokens has written some before the one that ends.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, model: Model, stop: Sequence[str] = (), answer_format: AnswerFormat | None = None, closing: str = "") -> None:
        self._model = model
        self._format = answer_format
        self._closing = closing
        self._stream = TextStream(stop)
        self._raw, self._shown, self._n_read = "", "", 0

    @property
    def stopped(self) -> bool:
        return self._stream.stopped

    def push(self, token: int) -> str:
        """Take the next token and give the text that is certain now."""
        text = self._stream.push(self._model.token_bytes(token, special=self._format is not None))
        if self._format is None or not text:
            return text
        self._raw += text
        if (len(self._raw) - self._n_read) * _READ_SHARE < len(self._raw):
            return ""
        self._n_read = len(self._raw)
        try:
            answer = self._format.parse(self._raw, is_partial=True)
        except AnswerError:
            return ""
        # what follows decides whether space at the end belongs to it
        return self._show(with_thought(answer).rstrip())

    def flush(self, cut: bool = False) -> str:
        """Give what was kept back. The stream is then at its end.

        cut: the text would have gone on: the beginning of a character is left out, and that of a stop string
        """
        rest = self._stream.flush(cut)
        if self._format is None:
            return rest
        self._raw += rest
        said = self._said()
        try:
            return self._show(with_thought(self._format.parse(said)))
        except AnswerError:
            pass
        try:
            shown = self._show(with_thought(self._format.parse(said, is_partial=True)))
        except AnswerError:
            shown = ""
        rest = self._rest(said)
        # of an answer that was cut, it can be a marker that had begun
        return shown if cut and len(rest) < _MARKUP else shown + rest

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

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    def _rest(self, said: str) -> str:
        """What was written behind what could be read: it is shown as it is, so that nothing is lost."""
        tail = self._shown[-_TAIL:]
        at = said.rfind(tail)
        return said[at + len(tail) :] if at >= 0 else said
