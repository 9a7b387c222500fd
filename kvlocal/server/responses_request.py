"""A body of /v1/responses, OpenAI's newer API, as one of /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kvlocal.server.blocks import string_of, unknown
from kvlocal.server.body import validated
from kvlocal.server.errors import invalid
from kvlocal.server.schemas import MAX_TOP_LOGPROBS, ChatRequest, Fields, Tokens
from kvlocal.template.markup import Message

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
# calls of tools that are no functions, and their results, by what the argument or result is called
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_RESULTS = ("function_call_output", "custom_tool_call_output")


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Fields):
    format: TextFormat | None = None


class ResponsesRequest(Fields):
    """tools: those that are no functions, which only OpenAI's servers can run, are left out."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


def chat_request(fields: ResponsesRequest, earlier: Sequence[Message] = ()) -> ChatRequest:
    """The same in the form of chat completions.

    Args:
        earlier: the conversation up to the response that is gone on with; its system prompt counts where there are no instructions.

    Raises:
        ApiError: there is an item that the model cannot read.
    """
    messages: list[dict[str, Any]] = [dict(message) for message in earlier]
    if fields.instructions is not None:
        messages = [{"role": "system", "content": fields.instructions}, *(message for message in messages if message["role"] != "system")]
    if isinstance(fields.input, str):
        messages.append({"role": "user", "content": fields.input})
    else:
        for i, item in enumerate(fields.input):
            _add(messages, item, f"input.{i}")
    tools = [_tool(tool, f"tools.{i}") for i, tool in enumerate(fields.tools or ()) if tool.get("type") == "function"]
    body: dict[str, Any] = {
        "messages": messages,
        "stream": fields.stream,
        "max_tokens": fields.max_output_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "tools": tools or None,
        "tool_choice": _choice(fields.tool_choice, tools),
        "parallel_tool_calls": fields.parallel_tool_calls,
    }
    if fields.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": fields.top_logprobs}
    if fields.text is not None and fields.text.format is not None:
        wanted = fields.text.format
        body["response_format"] = {"type": wanted.type, "schema": wanted.schema_}
    return validated(ChatRequest, body)


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    """Appends what an item says. Thoughts and calls stand in the message of the answer that they belong to."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _text(item.get("content"), f"{place}.content")})
    elif kind == "reasoning":
        thought = _text(item.get("content") or item.get("summary") or "", f"{place}.content")
        if thought:
            messages.append({"role": "assistant", "content": "", "reasoning_content": thought})
    elif kind in _CALLS:
        arguments = string_of(item, _CALLS[kind], place)
        if kind != "function_call":
            # its input is a text; a template wants arguments that are an object
            arguments = json.dumps({"input": arguments}, ensure_ascii=False)
        function = {"name": string_of(item, "name", place), "arguments": arguments}
        call = {"id": string_of(item, "call_id", place), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind in _RESULTS:
        messages.append({"role": "tool", "tool_call_id": string_of(item, "call_id", place), "content": _text(item.get("output"), f"{place}.output")})
    else:
        raise unknown(kind, place)


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise invalid(f"{place} has to be a string or a list of parts", place)
    texts = []
    for j, part in enumerate(content):
        if part.get("type") not in _TEXT_PARTS:
            raise unknown(part.get("type"), f"{place}.{j}")
        texts.append(string_of(part, "text", f"{place}.{j}"))
    return "".join(texts)


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    function = {name: tool[name] for name in ("description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": {"name": string_of(tool, "name", place), **function}}


def _choice(choice: str | Mapping[str, Any] | None, tools: Sequence[object]) -> Any:
    """A choice of a tool that was left out leaves the model the others."""
    if isinstance(choice, Mapping):
        if choice.get("type") != "function":
            return None
        return {"type": "function", "function": {"name": string_of(choice, "name", "tool_choice")}}
    return None if choice == "required" and not tools else choice
