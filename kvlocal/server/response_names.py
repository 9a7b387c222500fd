"""Names of responses: each says which conversation the response is in and where, so that nothing has to be kept to go on from one."""

from __future__ import annotations

import re
import secrets

from kvlocal.serving.engine import Engine
from kvlocal.serving.request import UnknownConversation
from kvlocal.template.markup import Message

_NAME = re.compile(r"resp_([\w-]{1,64})_([1-9][0-9]{0,8})", re.ASCII)


def response_name(conversation: str, n_messages: int) -> str:
    """Of the response that is the last of the first n_messages turns of a conversation; for "", which is none, a name that leads nowhere."""
    return f"resp_{conversation}_{n_messages}" if conversation else f"resp_{secrets.token_hex(16)}"


def messages_up_to(engine: Engine, owner: str, name: str) -> list[Message] | None:
    """The conversation up to a response and with it, its system prompt first; None if there is no such response, or it is another's."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    try:
        messages = engine.messages(found[1], owner)
    except UnknownConversation:
        return None
    n = int(found[2]) + (messages[:1] != [] and messages[0]["role"] == "system")
    return messages[:n] if n <= len(messages) and messages[n - 1]["role"] == "assistant" else None
