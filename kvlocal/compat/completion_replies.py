"""Continuations of texts as llama-cpp-python's Llama gives them: whole ones, and the chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvlocal.chat.answer_piece import TokenLogprob
from kvlocal.compat.chat_replies import usage
from kvlocal.openai_forms.chat_reply import finish_reason
from kvlocal.openai_forms.completion_reply import completion_logprobs
from kvlocal.serving.request import Event, Finished


@dataclass
class Continuation:
    """The reply to one call.

    model: its name
    n_before: characters of the text that is gone on with, unless that is a part of the reply
    with_logprobs: whether they were asked for
    n_given: how many tokens the text has that comes first in the reply, without what the model has in front of texts; None if it does not come
    """

    model: str
    n_before: int = 0
    with_logprobs: bool = False
    n_given: int | None = None
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """A reply that is not streamed."""
        text, tokens = "", list[TokenLogprob]()
        for event in events:
            if isinstance(event, Finished):
                return self._reply(text, self._logprobs(tokens), finish_reason(event)) | {"usage": usage(event.usage)}
            text += event.text
            tokens += self._told(event.logprobs)
        raise AssertionError("a continuation ends")

    def chunks(self, events: Iterator[Event]) -> Iterator[dict[str, Any]]:
        """The chunks of a stream."""
        for event in events:
            if isinstance(event, Finished):
                yield self._reply("", None, finish_reason(event))
            else:
                tokens = self._told(event.logprobs)
                yield self._reply(event.text, self._logprobs(tokens) if tokens else None, None)

    def _told(self, tokens: Sequence[TokenLogprob]) -> Sequence[TokenLogprob]:
        """Those of a piece without what the model has in front of texts; how likely the first of a text was is not told, as OpenAI does not."""
        n_given, self.n_given = self.n_given, None
        if n_given is None:
            return tokens
        return [replace(token, logprob=math.nan) if i == 0 else token for i, token in enumerate(tokens[max(0, len(tokens) - n_given) :])]

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of the tokens that follow those of the last call."""
        if not self.with_logprobs:
            return None
        told = completion_logprobs(tokens, self.n_before)
        self.n_before += sum(map(len, told["tokens"]))
        return told

    def _reply(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model, "choices": [choice]}

