"""Answers as Anthropic's /v1/messages has them: whole ones, and the events of a stream."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal.openai_forms.chat_reply import Choice
from kvlocal.server.errors import ApiError
from kvlocal.serving.request import Finished, Usage

STOP_REASONS = {"end": "end_turn", "stop": "stop_sequence", "stopped": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

_ERRORS = {"server_error": "api_error"}


@dataclass
class AnthropicReply:
    """The answer to one request.

    model: its name
    """

    model: str
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    _block: str | None = None  # what the open block of a stream is: text, thinking, or the index of a call
    _n_blocks: int = 0

    def whole(self, choice: Choice) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.text or not (choice.calls or choice.reasoning):
            content.append({"type": "text", "text": choice.text})
        content += [{"type": "tool_use", "id": call["id"], "name": call["name"], "input": _object(call["arguments"])} for call in choice.calls]
        end = choice.finished
        return self._message(content, stop_reason(end), usage(end.usage if end else Usage()))

    def begin(self) -> dict[str, Any]:
        """The first event of a stream."""
        return {"type": "message_start", "message": self._message([], None, usage(Usage()))}

    def piece(self, piece: AnswerPiece) -> Iterator[dict[str, Any]]:
        """The events of a piece: each kind of content is in a block of its own."""
        if piece.reasoning:
            yield from self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": piece.reasoning})
        if piece.text:
            yield from self._open("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": piece.text})
        for call in piece.tool_calls:
            yield from self._open(f"call {call.index}", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def end(self, finished: Finished) -> Iterator[dict[str, Any]]:
        """The last events of a stream."""
        yield from self._close()
        yield {"type": "message_delta", "delta": {"stop_reason": stop_reason(finished), "stop_sequence": None}, "usage": usage(finished.usage)}
        yield {"type": "message_stop"}

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Opens a block, unless the open one is that already."""
        if kind != self._block:
            yield from self._close()
            self._block = kind
            yield {"type": "content_block_start", "index": self._n_blocks, "content_block": block}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._block is not None:
            yield {"type": "content_block_stop", "index": self._n_blocks}
            self._block = None
            self._n_blocks += 1

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._n_blocks, "delta": delta}

    def _message(self, content: list[dict[str, Any]], reason: str | None, used: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": reason, "stop_sequence": None, "usage": used,
        }  # fmt: skip


def stop_reason(finished: Finished | None) -> str:
    """Anthropic's word for why an answer ended."""
    return STOP_REASONS.get(finished.stop_reason, "end_turn") if finished else "end_turn"


def usage(used: Usage) -> dict[str, Any]:
    """What the answer took; Anthropic does not count among the input what was not read again."""
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_read_input_tokens": used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": used.completion_tokens,
    }


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """An error in Anthropic's format."""
    return {"type": "error", "error": {"type": _ERRORS.get(error.type, error.type), "message": error.message}}


def _object(arguments: str) -> Any:
    """Of a call that was cut off there may be half an object."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {}
