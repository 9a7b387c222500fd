"""The one parser of messages that come from outside: which roles they have, and in which order a chat can have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvlocal.errors import KvlocalError
from kvlocal.template.markup import Message

ROLES = ("system", "user", "assistant")


class MessageError(KvlocalError):
    """Some data are no messages, or not those of a chat."""


def parse_messages(messages: Any, roles: Sequence[str] = ROLES) -> list[Message]:
    """The messages of a list as JSON gives it: their roles and texts; other keys are left out.

    Args:
        messages: to be `[{"role": ..., "content": ...}, ...]`; it may be empty.
        roles: those that are taken.

    Raises:
        MessageError: it is something else.
    """
    if not isinstance(messages, list):
        raise MessageError('its messages are not a list: write [{"role": ..., "content": ...}]')
    return [_message(i, message, roles) for i, message in enumerate(messages)]


def check_order(messages: Sequence[Message]) -> None:
    """Whether a chat can have these messages one after another: a system message only first, and an answer only to a user turn.

    Raises:
        MessageError: it cannot, or there is none.
    """
    if not messages:
        raise MessageError("it has no messages: give at least one message")
    for i, message in enumerate(messages):
        if message["role"] == "system" and i > 0:
            raise MessageError(f"message {i + 1} is a system message: it can only be the first")
        if message["role"] == "assistant" and (i == 0 or messages[i - 1]["role"] != "user"):
            raise MessageError(f"message {i + 1} answers nothing: put a user turn before it")


def _message(index: int, message: Any, roles: Sequence[str]) -> Message:
    if not isinstance(message, dict):
        raise MessageError(f'message {index + 1} is not an object: write {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in roles:
        raise MessageError(f"message {index + 1} has the role {json.dumps(role)[:40]}: use one of {', '.join(roles)}")
    if not isinstance(content, str):
        raise MessageError(f"the content of message {index + 1} is not a string: give its text")
    return {"role": role, "content": content}
