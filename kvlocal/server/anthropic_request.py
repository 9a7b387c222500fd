"""A body of /v1/messages, Anthropic's API, as one of /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kvlocal.server.blocks import string_of, unknown
from kvlocal.server.body import validated
from kvlocal.server.errors import invalid
from kvlocal.server.schemas import ChatRequest, Fields

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class TextBlock(Fields):
    text: str


class AnthropicTool(Fields):
    """One that the client calls, if it has a schema; those of Anthropic's own servers have none."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class AnthropicChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicMessage(Fields):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicRequest(Fields):
    messages: list[AnthropicMessage]
    max_tokens: Annotated[int, Field(ge=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None


def chat_request(fields: AnthropicRequest) -> ChatRequest:
    """The same in OpenAI's form.

    Raises:
        ApiError: a message has something else than text, thoughts, calls of tools and their results.
    """
    system = fields.system if isinstance(fields.system, str) else "\n\n".join(block.text for block in fields.system or ())
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(fields.messages):
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant(message.content, i))
        else:
            messages += _user(message.role, message.content, i)
    body: dict[str, Any] = {
        "messages": messages,
        "max_tokens": fields.max_tokens,
        "stop": fields.stop_sequences,
        "stream": fields.stream,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": fields.top_k,
    }
    tools = [tool for tool in fields.tools or () if tool.input_schema is not None]
    if tools:
        body["tools"] = [_tool(tool) for tool in tools]
    if fields.tool_choice is not None:
        choice = fields.tool_choice
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}} if choice.type == "tool" else _CHOICES[choice.type]
        body["parallel_tool_calls"] = choice.disable_parallel_tool_use is not True
    return validated(ChatRequest, body)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _assistant(blocks: Sequence[Mapping[str, Any]], index: int) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for j, block in enumerate(blocks):
        place = f"messages.{index}.content.{j}"
        match block.get("type"):
            case "text":
                texts.append(string_of(block, "text", place))
            case "thinking":
                thoughts.append(string_of(block, "thinking", place))
            case "redacted_thinking":
                pass
            case "tool_use":
                arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
                function = {"name": string_of(block, "name", place), "arguments": arguments}
                calls.append({"id": string_of(block, "id", place), "type": "function", "function": function})
            case kind:
                raise unknown(kind, place)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(role: str, blocks: Sequence[Mapping[str, Any]], index: int) -> list[dict[str, Any]]:
    """The results of tools first, as they answer the calls before; then what the user says."""
    results, texts = [], []
    for j, block in enumerate(blocks):
        place = f"messages.{index}.content.{j}"
        match block.get("type"):
            case "text":
                texts.append(string_of(block, "text", place))
            case "tool_result":
                content = block.get("content") or ""
                if not isinstance(content, str):
                    content = _texts(content, f"{place}.content")
                results.append({"role": "tool", "tool_call_id": string_of(block, "tool_use_id", place), "content": content})
            case kind:
                raise unknown(kind, place)
    return [*results, *([{"role": role, "content": "\n\n".join(texts)}] if texts or not results else [])]


def _texts(blocks: Any, place: str) -> str:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise invalid(f"{place} has to be a string or a list of blocks", place)
    if other := [block.get("type") for block in blocks if block.get("type") != "text"]:
        raise unknown(other[0], place)
    return "\n".join(string_of(block, "text", place) for block in blocks)
