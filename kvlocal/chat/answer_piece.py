"""AnswerPiece: what is new in an answer while it comes, its thought, its text and its tool calls told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvlocal.template.answer import ToolCallDelta


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was among all of the vocabulary, before anything that samples changed that.

    token: its bytes
    logprob: the natural logarithm of its probability; NaN for the first token of a text, before which there is nothing
    top: the likeliest tokens at its place and theirs, the likeliest first
    """

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]] = ()


@dataclass(frozen=True)
class AnswerPiece:
    """What is new in an answer; joined, the pieces are the answer.

    text: of what is said, never half a character, and never a part of a stop text
    reasoning: of the thought before it
    tool_calls: of the tools that are called
    logprobs: of the tokens that were drawn since the last piece, if they were asked for
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()
    logprobs: Sequence[TokenLogprob] = ()
