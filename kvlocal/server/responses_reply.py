"""Answers as OpenAI's /v1/responses has them: whole ones, and the events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvlocal.chat.answer_piece import AnswerPiece, ToolCallDelta
from kvlocal.chat.logprobs import logprobs
from kvlocal.openai_forms.chat_reply import Choice
from kvlocal.server.errors import ApiError
from kvlocal.server.responses_request import ResponsesRequest
from kvlocal.serving.request import Finished, Usage


@dataclass
class _Item:
    """An item of the output that still comes: a thought, a message, or a call (by its index)."""

    kind: str
    id: str
    text: str = ""
    name: str = ""
    call_id: str = ""


@dataclass
class ResponsesReply:
    """The response to one request, put together as its pieces come.

    model: its name
    fields: what was asked; the response says some of it again
    id: its name
    """

    model: str
    fields: ResponsesRequest
    id: str
    _created: int = field(default_factory=lambda: int(time.time()))
    _choice: Choice = field(default_factory=Choice)
    _items: list[_Item] = field(default_factory=list)
    _n_events: int = 0

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def piece(self, piece: AnswerPiece) -> Iterator[dict[str, Any]]:
        """The events of a piece, which is also noted for the whole response."""
        self._choice.add(piece)
        if piece.reasoning:
            yield from self._open("reasoning", "rs")
            yield self._delta("response.reasoning_text.delta", piece.reasoning, content_index=0)
        if piece.text:
            yield from self._open("message", "msg")
            chances = logprobs(piece.logprobs) if self.fields.top_logprobs else []
            yield self._delta("response.output_text.delta", piece.text, content_index=0, logprobs=chances)
        for call in piece.tool_calls:
            yield from self._open(f"call {call.index}", "fc", name=call.name, call_id=call.id)
            if call.arguments:
                yield self._delta("response.function_call_arguments.delta", call.arguments)

    def end(self, finished: Finished) -> Iterator[dict[str, Any]]:
        """The last events of a stream; from then on `response` is the whole response."""
        self._choice.finished = finished
        if not self._items:
            yield from self._open("message", "msg")
        yield from self._close()
        whole = self.response()
        yield self._event(f"response.{whole['status']}", response=whole)

    def take(self, choice: Choice) -> None:
        """A whole answer."""
        calls = [ToolCallDelta(i, call["id"], call["name"], call["arguments"]) for i, call in enumerate(choice.calls)]
        for _ in self.piece(AnswerPiece(choice.text, choice.reasoning, calls, choice.logprobs)):
            pass
        if choice.finished is not None:
            for _ in self.end(choice.finished):
                pass

    def fail(self, error: ApiError) -> dict[str, Any]:
        """The last event of a stream that failed."""
        response = self.response("failed") | {"error": {"code": error.code or error.type, "message": error.message}}
        return self._event("response.failed", response=response)

    def response(self, status: str | None = None) -> dict[str, Any]:
        """The response as far as it has come.

        Args:
            status: where it is not over.
        """
        end = self._choice.finished
        if status is None:
            status = "incomplete" if end is not None and end.stop_reason == "length" else "completed"
        over = status in ("completed", "incomplete")
        fields = self.fields
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "metadata": {},
            "model": self.model,
            "output": [self._output(item, status) for item in self._items] if over else [],
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "temperature": fields.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": fields.tool_choice or "auto",
            "tools": fields.tools or [],
            "top_p": fields.top_p,
            "truncation": "disabled",
            "usage": _usage(end.usage) if end is not None and over else None,
        }

    def _open(self, kind: str, prefix: str, name: str = "", call_id: str = "") -> Iterator[dict[str, Any]]:
        """Begins an item, unless the last one is of that kind."""
        if self._items and self._items[-1].kind == kind:
            return
        yield from self._close()
        item = _Item(kind, f"{prefix}_{secrets.token_hex(12)}", name=name, call_id=call_id)
        self._items.append(item)
        output = self._output(item, "in_progress")
        if kind in ("reasoning", "message"):
            output["content"] = []
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=output)
        if kind == "message":
            yield self._part("response.content_part.added", item)

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._items:
            return
        item = self._items[-1]
        place: dict[str, Any] = {"item_id": item.id, "output_index": len(self._items) - 1}
        if item.kind == "message":
            yield self._event("response.output_text.done", **place, content_index=0, text=item.text, logprobs=[])
            yield self._part("response.content_part.done", item)
        elif item.kind == "reasoning":
            yield self._event("response.reasoning_text.done", **place, content_index=0, text=item.text)
        else:
            yield self._event("response.function_call_arguments.done", **place, name=item.name, arguments=item.text)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=self._output(item, "completed"))

    def _part(self, kind: str, item: _Item) -> dict[str, Any]:
        return self._event(kind, item_id=item.id, output_index=len(self._items) - 1, content_index=0, part=_text_part(item.text))

    def _delta(self, kind: str, text: str, **others: Any) -> dict[str, Any]:
        item = self._items[-1]
        item.text += text
        return self._event(kind, item_id=item.id, output_index=len(self._items) - 1, delta=text, **others)

    def _output(self, item: _Item, status: str) -> dict[str, Any]:
        if item.kind == "reasoning":
            return {"id": item.id, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": item.text}]}
        if item.kind == "message":
            chances = logprobs(self._choice.logprobs) if self.fields.top_logprobs else []
            part = _text_part(item.text) | {"logprobs": chances}
            return {"id": item.id, "type": "message", "status": status, "role": "assistant", "content": [part]}
        return {
            "id": item.id, "type": "function_call", "status": status, "call_id": item.call_id, "name": item.name, "arguments": item.text,
        }  # fmt: skip

    def _event(self, kind: str, **others: Any) -> dict[str, Any]:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **others}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
