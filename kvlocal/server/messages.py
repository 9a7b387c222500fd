"""Messages as clients send them, brought into the order that a session can have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvlocal.chat.messages import MessageError
from kvlocal.template.markup import Message

# "developer" is OpenAI's newer name of the system
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def canonical(messages: Sequence[Any]) -> list[Message]:
    """The conversation that a list of messages means: at most one system message, first, then turns of the user and of the assistant in alternation.

    Texts in parts are joined. Messages of one role in a row become one, with an empty line between them, and those that say nothing are left out. A
    system message behind the first turn stands before the next text of the user, so that what was read before stays as it is. An answer that the
    conversation begins with gets an empty turn of the user before it.

    Raises:
        MessageError: a message is none, or has something else than text.
    """
    system: list[str] = []
    turns: list[Message] = []
    remarks: list[str] = []  # of the system, for the next turn of the user
    for i, message in enumerate(messages):
        role, text = _message(i, message)
        if role == "system":
            if text:
                (remarks if turns else system).append(text)
        elif role == "user":
            _append(turns, "user", "\n\n".join([*remarks, *([text] if text else [])]))
            remarks = []
        elif role == "tool":
            if not turns or not (turns[-1].get("tool_calls") or turns[-1]["role"] == "tool"):
                raise MessageError(f"message {i + 1} is what a tool gave back, and the one before it calls none: put the call before it")
            turns.append({"role": "tool", "content": text, **_strings(message, "tool_call_id", "name")})
        else:
            calls = _calls(i, message.get("tool_calls"))
            if not text and not calls:
                continue
            if not turns:
                turns.append({"role": "user", "content": ""})
            _append(turns, "assistant", text)
            if calls:
                turns[-1]["tool_calls"] = [*turns[-1].get("tool_calls", ()), *calls]
    if remarks:
        _append(turns, "user", "\n\n".join(remarks))
    return [*([{"role": "system", "content": "\n\n".join(system)}] if system else []), *turns]


def _append(turns: list[Message], role: str, text: str) -> None:
    """A turn; more of the last one, if that has the same role."""
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] = "\n\n".join(filter(None, (turns[-1]["content"], text)))
    else:
        turns.append({"role": role, "content": text})


def _message(index: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise MessageError(f'message {index + 1} is not an object: write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise MessageError(f"message {index + 1} has the role {json.dumps(role)[:40]}: use one of {', '.join(_ROLES)}")
    return _ROLES[role], _text(index, message.get("content"))


def _strings(message: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {name: message[name] for name in names if isinstance(message.get(name), str)}


def _calls(index: int, calls: Any) -> list[dict[str, Any]]:
    """The calls of an answer, with their arguments as JSON in a string."""
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise MessageError(f"the tool_calls of message {index + 1} are no list: give the calls as the answer had them")
    return [_call(index, call) for call in calls]


def _call(index: int, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(call.get("id", ""), str):
        raise MessageError(f"message {index + 1} has a call without the name of a function: give the calls as the answer had them")
    arguments = function.get("arguments") or "{}"
    try:
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise MessageError(f"message {index + 1} has a call whose arguments are no JSON object: give the calls as the answer had them")
    return {"id": call.get("id", ""), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _text(index: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MessageError(f"the content of message {index + 1} is neither a string nor a list of parts: give its text")
    return "\n".join(_part(index, part) for part in content)


def _part(index: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise MessageError(f"message {index + 1} has a part of the type {json.dumps(kind)[:40]}: the model reads nothing but text")
