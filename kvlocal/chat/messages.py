"""The one parser of messages that come from outside: which roles they have, and in which order a chat can have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from kvlocal.errors import KvlocalError
from kvlocal.template.answer import split_thought
from kvlocal.template.markup import Message

ROLES = ("system", "developer", "user", "assistant", "tool")

# the types of the parts of a content that are text, in the formats of several programs
_TEXT_PARTS = ("text", "input_text", "output_text")
_JOINT = "\n\n"


class MessageError(KvlocalError):
    """Some data are no messages, or not those of a chat."""


def parse_messages(messages: Any, roles: Sequence[str] = ROLES) -> list[Message]:
    """The messages of a list as JSON gives it, as OpenAI's chat completions have them: role and content, which is joined to one text; where they have
    them, calls of tools with id, type, name and arguments as text, the call that a result belongs to, name and thought; other keys are left out.

    Args:
        messages: to be `[{"role": ..., "content": ...}, ...]`; it may be empty.
        roles: those that are taken; a developer is taken for the system.

    Raises:
        MessageError: it is something else.
    """
    if not isinstance(messages, list):
        raise MessageError('its messages are not a list: write [{"role": ..., "content": ...}]')
    return [_message(i, message, roles) for i, message in enumerate(messages)]


def check_order(messages: Sequence[Message]) -> None:
    """Whether a chat can have these messages one after another: a system message only first, an answer only to a user turn or to what tools gave
    back, and that only behind an answer that calls tools.

    Raises:
        MessageError: it cannot, or there is none.
    """
    if not messages:
        raise MessageError("it has no messages: give at least one message")
    for i, message in enumerate(messages):
        before: Message = messages[i - 1] if i else {"role": ""}
        if message["role"] == "system" and i > 0:
            raise MessageError(f"message {i + 1} is a system message: it can only be the first")
        if message["role"] == "assistant" and before["role"] not in ("user", "tool"):
            raise MessageError(f"message {i + 1} answers nothing: put a user turn before it")
        if message["role"] == "tool" and before["role"] != "tool" and not before.get("tool_calls"):
            raise MessageError(f"message {i + 1} is of a tool that was not called: put an answer with tool_calls before it")


def canonical(messages: Sequence[Message]) -> list[Message]:
    """The same conversation in the order that a session can have: at most one system message, which is the first, then turns and answers that
    alternate; results of tools stand behind the answer that called them, and the user's text behind these.

    Messages of one role in a row are joined. A system message in the middle goes with the user's text beside it, as does the result of a tool that
    was not called. An answer to nothing gets an empty text of the user before it. Thoughts are parted from what is said.
    """
    ordered: list[Message] = []
    for message in map(_with_thought_apart, messages):
        last = ordered[-1] if ordered else None
        role = message["role"]
        if role == "system" and last is not None and last["role"] != "system":
            role = "user"
        if role == "tool" and not _may_follow_call(ordered):
            role = "user"
        if role == "assistant" and (last is None or last["role"] == "system"):
            ordered.append({"role": "user", "content": ""})
        if last is not None and role == last["role"] and role != "tool":
            ordered[-1] = _joined(last, message)
        elif role == "tool":
            ordered.append(_named(message, ordered))
        elif role == message["role"]:
            ordered.append(message)
        else:
            ordered.append({"role": role, "content": message["content"]})
    return ordered


def turns_of(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages, those that are read together in a list: an answer, or what stands between two."""
    return [list(turn) for _, turn in groupby(messages, lambda message: message["role"] == "assistant")]


def _may_follow_call(ordered: Sequence[Message]) -> bool:
    return bool(ordered) and (ordered[-1]["role"] == "tool" or "tool_calls" in ordered[-1])


def _with_thought_apart(message: Message) -> Message:
    if message["role"] != "assistant" or message.get("reasoning_content"):
        return dict(message)
    thought, is_closed, said = split_thought(message["content"])
    return {**message, "content": said, "reasoning_content": thought} if thought and is_closed else dict(message)


def _joined(one: Message, other: Message) -> Message:
    joined = {**one, "content": _JOINT.join(filter(None, (one["content"], other["content"])))}
    if calls := [*one.get("tool_calls", ()), *other.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    if thought := _JOINT.join(filter(None, (one.get("reasoning_content"), other.get("reasoning_content")))):
        joined["reasoning_content"] = thought
    return joined


def _named(result: Message, before: Sequence[Message]) -> Message:
    """The result of a tool with the tool's name, which some templates want."""
    calls: list[Message] = next((message["tool_calls"] for message in reversed(before) if "tool_calls" in message), [])
    names = {call["id"]: call["function"]["name"] for call in calls}
    name = result.get("name") or names.get(result.get("tool_call_id", ""), calls[0]["function"]["name"] if calls else "")
    return {**result, "name": name}


def _message(index: int, message: Any, roles: Sequence[str]) -> Message:
    if not isinstance(message, dict):
        raise MessageError(f'message {index + 1} is not an object: write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if not isinstance(role, str) or role not in roles:
        raise MessageError(f"message {index + 1} has the role {json.dumps(role)[:40]}: use one of {', '.join(roles)}")
    calls = message.get("tool_calls") if role == "assistant" else None
    parsed: Message = {"role": "system" if role == "developer" else role, "content": _content(index, message.get("content"), bool(calls))}
    if calls:
        if not isinstance(calls, list):
            raise MessageError(f"the tool_calls of message {index + 1} are not a list: give a list of calls")
        parsed["tool_calls"] = [_call(index, i, call) for i, call in enumerate(calls)]
    for name in {"tool": ("tool_call_id", "name"), "assistant": ("reasoning_content",)}.get(role, ()):
        value = message.get(name)
        if value is not None and not isinstance(value, str):
            raise MessageError(f"the {name} of message {index + 1} is not a string: give a text or leave it out")
        if value:
            parsed[name] = value
    return parsed


def _content(index: int, content: Any, may_be_null: bool) -> str:
    if content is None and may_be_null:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MessageError(f"the content of message {index + 1} is not a string: give its text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise MessageError(f"the content of message {index + 1} has a part that is not a text ({json.dumps(kind)[:40]}): give texts alone")
        texts.append(part["text"])
    return "\n".join(texts)


def _call(index: int, number: int, call: Any) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise MessageError(f'call {number + 1} of message {index + 1} has no name: write {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments") or "{}"
    try:
        is_object = isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise MessageError(f"the arguments of call {number + 1} of message {index + 1} are no JSON object: give one, as a text")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    identity = call.get("id")
    return {
        "id": identity if isinstance(identity, str) and identity else f"call{number:05}",
        "type": "function",
        "function": {"name": name, "arguments": text},
    }
