"""Answers as OpenAI's chat completions have them: whole ones, and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvlocal.chat.answer_piece import AnswerPiece, TokenLogprob
from kvlocal.chat.logprobs import logprobs
from kvlocal.serving.request import Finished, Usage

# why an answer ended, in OpenAI's words: "end" is the model's own end, "stop" a stop text, "stopped" somebody who wanted no more
FINISH_REASONS = {"end": "stop", "stop": "stop", "stopped": "stop", "length": "length", "tool_calls": "tool_calls"}


@dataclass
class Choice:
    """One answer, put together from its pieces."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, piece: AnswerPiece) -> None:
        """What is new in it."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.logprobs += piece.logprobs
        for delta in piece.tool_calls:
            while delta.index >= len(self.calls):
                self.calls.append({"id": "", "name": "", "arguments": ""})
            call = self.calls[delta.index]
            call["id"] = call["id"] or delta.id
            call["name"] = call["name"] or delta.name
            call["arguments"] += delta.arguments

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message that a client sends back in the next request."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in self.calls
            ]
        return message


@dataclass(frozen=True)
class ChatReply:
    """The answers to one request.

    model: its name
    with_logprobs: whether they were asked for
    with_usage: whether a stream tells it in a chunk of its own
    """

    model: str
    with_logprobs: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ends = [choice.finished for choice in choices if choice.finished is not None]
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": i,
                    "message": choice.message,
                    "logprobs": {"content": logprobs(choice.logprobs)} if self.with_logprobs else None,
                    "finish_reason": finish_reason(choice.finished),
                }
                for i, choice in enumerate(choices)
            ],
            "usage": usage([end.usage for end in ends]),
            "conversation": ends[0].conversation if ends else "",
        }

    def begin(self, index: int, conversation: str = "") -> dict[str, Any]:
        """The first chunk of an answer. conversation: the one it belongs to"""
        return self._chunk(index, {"role": "assistant", "content": ""}) | {"conversation": conversation}

    def piece(self, index: int, piece: AnswerPiece) -> dict[str, Any]:
        """The chunk of a piece."""
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.tool_calls:
            delta["tool_calls"] = [
                {
                    "index": call.index,
                    **({"id": call.id, "type": "function"} if call.id else {}),
                    "function": {**({"name": call.name} if call.name else {}), "arguments": call.arguments},
                }
                for call in piece.tool_calls
            ]
        return self._chunk(index, delta, chances=piece.logprobs)

    def end(self, index: int, finished: Finished) -> dict[str, Any]:
        """The last chunk of an answer."""
        return self._chunk(index, {}, finish_reason(finished)) | {"conversation": finished.conversation}

    def usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """The chunk behind all answers that tells what they took."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage([end.usage for end in ends])}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None, chances: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
        choice["logprobs"] = {"content": logprobs(chances)} if self.with_logprobs and chances else None
        return {**self._head("chat.completion.chunk"), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def finish_reason(finished: Finished | None) -> str:
    """OpenAI's word for why an answer ended."""
    return FINISH_REASONS.get(finished.stop_reason, "stop") if finished else "stop"


def usage(uses: Sequence[Usage]) -> dict[str, Any]:
    """What the answers to one conversation took together: its tokens count once, those that were read again as often as that was."""
    prompt = max((use.prompt_tokens for use in uses), default=0)
    cached = min((use.cached_tokens for use in uses), default=0)
    completion = sum(use.completion_tokens for use in uses)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
