"""What goes on with texts as OpenAI's completions have it: whole, and as the chunks of a stream."""

from __future__ import annotations

import codecs
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlocal.chat.answer_piece import AnswerPiece, TokenLogprob
from kvlocal.chat.logprobs import finite
from kvlocal.openai_forms.chat_reply import Choice, finish_reason, usage
from kvlocal.serving.request import Finished


class TokenOffsets:
    """Where the tokens of a text begin in it, as they come.

    n: characters before the first of them
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, data: bytes) -> int:
        """Where the next token begins, whose bytes these are; one that begins within a character begins where that does."""
        before, self._n = self._n, self._n + len(self._decoder.decode(data))
        return max(0, before)


class TokensTold:
    """The log-probabilities of the tokens of a text, as they come.

    n_before: characters that it goes on with; None if all of the text is told
    """

    def __init__(self, n_before: int | None) -> None:
        self._n_before = n_before
        self._offsets: TokenOffsets | None = None

    def take(self, text: str, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of the next tokens, with the text that they come with. A token that nothing stands before has none."""
        if self._offsets is None:
            # a vocabulary that puts a space before every text says one character more
            is_first_more = self._n_before is None and told and told[0].token.startswith(b" ") and not text.startswith(" ")
            self._offsets = TokenOffsets(-bool(is_first_more) if self._n_before is None else self._n_before)
        offsets = self._offsets
        return {
            "tokens": [text_of(each.token) for each in told],
            "token_logprobs": [None if math.isnan(each.logprob) else finite(each.logprob) for each in told],
            "top_logprobs": [None if math.isnan(each.logprob) else _top(each) for each in told],
            "text_offset": [offsets.take(each.token) for each in told],
        }


@dataclass(frozen=True)
class CompletionReply:
    """What goes on with the texts of one request.

    model: its name
    lengths: of the text that each choice goes on with, in characters
    n: choices for each text
    echo: whether the texts come first
    with_logprobs: whether they were asked for
    with_usage: whether a stream tells it in a chunk of its own
    """

    model: str
    lengths: Sequence[int]
    n: int = 1
    echo: bool = False
    with_logprobs: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _told: dict[int, TokensTold] = field(default_factory=dict, init=False, repr=False)

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        told = [self._choice(i, choice.text, choice.logprobs, finish_reason(choice.finished)) for i, choice in enumerate(choices)]
        return {**self._head(), "choices": told, "usage": self._usage([choice.finished for choice in choices if choice.finished is not None])}

    def piece(self, index: int, piece: AnswerPiece) -> dict[str, Any]:
        """The chunk of a piece."""
        return self._chunk(self._choice(index, piece.text, piece.logprobs, None))

    def end(self, index: int, finished: Finished) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk(self._choice(index, "", (), finish_reason(finished)))

    def usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """The chunk behind all choices that tells what they took."""
        return {**self._head(), "choices": [], "usage": self._usage(ends)}

    def _usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """ends: in the order of the choices"""
        texts = [usage([end.usage for end in ends[i : i + self.n]]) for i in range(0, len(ends), self.n)]
        total = {name: sum(text[name] for text in texts) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return total | {"prompt_tokens_details": {"cached_tokens": sum(text["prompt_tokens_details"]["cached_tokens"] for text in texts)}}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _choice(self, index: int, text: str, told: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        chances = self._logprobs(index, text, told) if self.with_logprobs and (told or reason is None) else None
        return {"text": text, "index": index, "logprobs": chances, "finish_reason": reason}

    def _logprobs(self, index: int, text: str, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        if index not in self._told:
            self._told[index] = TokensTold(None if self.echo else self.lengths[index])
        return self._told[index].take(text, told)

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


def text_of(token: bytes) -> str:
    """A token's text, or what OpenAI writes for bytes that are no whole characters: names are to differ as tokens do."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest in its place, and the token itself."""
    return {text_of(each): finite(value) for each, value in (*token.top, (token.token, token.logprob))}
