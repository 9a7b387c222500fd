"""Continuations of texts as llama-cpp-python's Llama gives them: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlocal.chat.answer_piece import TokenLogprob
from kvlocal.compat.chat_replies import usage
from kvlocal.openai_forms.chat_reply import finish_reason
from kvlocal.openai_forms.completion_reply import TokensTold
from kvlocal.serving.request import Event, Finished


@dataclass
class Continuation:
    """The reply to one call.

    model: its name
    n_before: characters of the text that is gone on with; None if it is a part of the reply
    with_logprobs: whether they were asked for
    """

    model: str
    n_before: int | None = 0
    with_logprobs: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._told = TokensTold(self.n_before)

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """A reply that is not streamed."""
        text, tokens = "", list[TokenLogprob]()
        for event in events:
            if isinstance(event, Finished):
                return self._reply(text, self._logprobs(text, tokens), finish_reason(event)) | {"usage": usage(event.usage)}
            text += event.text
            tokens += event.logprobs
        raise AssertionError("a continuation ends")

    def chunks(self, events: Iterator[Event]) -> Iterator[dict[str, Any]]:
        """The chunks of a stream."""
        for event in events:
            if isinstance(event, Finished):
                yield self._reply("", None, finish_reason(event))
            else:
                yield self._reply(event.text, self._logprobs(event.text, event.logprobs) if event.logprobs else None, None)

    def _logprobs(self, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of the tokens that follow those of the last call."""
        return self._told.take(text, tokens) if self.with_logprobs else None

    def _reply(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model, "choices": [choice]}

