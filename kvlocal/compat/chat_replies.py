"""Answers of a chat as llama-cpp-python's Llama gives them: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlocal.chat.answer_piece import AnswerPiece, TokenLogprob
from kvlocal.chat.logprobs import logprobs
from kvlocal.openai_forms.chat_reply import Choice, finish_reason
from kvlocal.serving.request import Event, Finished, Usage
from kvlocal.template.answer import THOUGHT_END, THOUGHT_START, with_thought
from kvlocal.template.compiled import Answer


@dataclass
class ChatAnswer:
    """The answer to one call.

    model: its name
    with_logprobs: whether they were asked for
    """

    model: str
    with_logprobs: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))
    _in_thought: bool = False

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """A reply that is not streamed."""
        choice = Choice()
        for event in events:
            if isinstance(event, Finished):
                return self._reply(choice, event)
            choice.add(event)
        raise AssertionError("an answer ends")

    def _reply(self, choice: Choice, finished: Finished) -> dict[str, Any]:
        calls = choice.message.get("tool_calls")
        message: dict[str, Any] = {"role": "assistant", "content": with_thought(Answer(choice.text, choice.reasoning)) or (None if calls else "")}
        if calls:
            # the older name of a call is that of the first one
            message |= {"tool_calls": calls, "function_call": calls[0]["function"]}
        reason = finish_reason(finished)
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": self._logprobs(choice.logprobs), "finish_reason": reason}],
            "usage": usage(finished.usage),
        }

    def chunks(self, events: Iterator[Event]) -> Iterator[dict[str, Any]]:
        """The chunks of a stream."""
        yield self._chunk({"role": "assistant"})
        for event in events:
            if isinstance(event, Finished):
                yield self._chunk({}, reason=finish_reason(event))
            else:
                yield self._chunk(self._delta(event), chances=event.logprobs)

    def _delta(self, piece: AnswerPiece) -> dict[str, Any]:
        text = self._text(piece)
        if not piece.tool_calls:
            return {"content": text}
        calls = [
            {
                "index": call.index,
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name or None, "arguments": call.arguments},
            }
            for call in piece.tool_calls
        ]
        # the older name of a call is that of the first one
        function = calls[0]["function"] if piece.tool_calls[0].index == 0 else None
        return {"role": None, "content": text or None, "function_call": function, "tool_calls": calls}

    def _text(self, piece: AnswerPiece) -> str:
        """Its text, with the markers of a thought that begins or ends in it."""
        before = THOUGHT_START if piece.reasoning and not self._in_thought else ""
        self._in_thought = self._in_thought or bool(piece.reasoning)
        behind = THOUGHT_END if piece.text and self._in_thought else ""
        self._in_thought = self._in_thought and not piece.text
        return before + piece.reasoning + behind + piece.text

    def _chunk(self, delta: dict[str, Any], chances: Sequence[TokenLogprob] = (), reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(chances) if chances else None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, chances: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": logprobs(chances), "refusal": None} if self.with_logprobs else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(used: Usage) -> dict[str, int]:
    """What an answer took."""
    prompt, completion = used.prompt_tokens, used.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
