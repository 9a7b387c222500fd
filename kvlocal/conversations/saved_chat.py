"""Conversations as they are now, each in a file of its own, which /save writes and /load reads."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from kvlocal.conversations.named_sessions import markdown
from kvlocal.conversations.records import (
    VERSION,
    Conversation,
    TranscriptError,
    check_version,
    checked_turns,
    not_a_chat,
    read_text,
    replay,
    text_of_file,
    text_or_none,
    to_json,
)
from kvlocal.files.atomic import PRIVATE, atomic_write

SAVED_FORMAT = "kvlocal-chat"


def save(path: str | os.PathLike[str], conversation: Conversation, may_replace: Callable[[Path], bool] = lambda _: True) -> None:
    """Write a conversation to a file of its own, which only its owner may read: as Markdown if it ends in .md, else for `load`.

    Args:
        may_replace: asked of a file that is there already. Of files that do not end in .md, only those written here are replaced.

    Raises:
        KvlocalError: it cannot be written, or a file is in the way.
    """
    path = Path(path)
    as_text = path.suffix.lower() == ".md"
    if os.path.lexists(path):
        if not as_text and not _is_saved(path):
            raise TranscriptError(f"{path} was not written by /save: choose another name or remove it")
        if not may_replace(path):
            raise TranscriptError(f"{path} is there already: choose another name, or write /save --force {path}")
    atomic_write(path, markdown(path.stem, conversation).encode(errors="replace") if as_text else saved(conversation), PRIVATE)


def saved(conversation: Conversation) -> bytes:
    """What `save` writes: one JSON object, which `load` reads."""
    record = {
        "format": SAVED_FORMAT,
        "version": VERSION,
        "model": conversation.model,
        "system": conversation.system,
        "messages": conversation.messages,
        "settings": conversation.settings,
    }
    return to_json(record, indent=2) + b"\n"


def load(path: str | os.PathLike[str]) -> Conversation:
    """Read a file of `save` or a transcript.

    Raises:
        TranscriptError: it cannot be read or is neither.
    """
    path = Path(path)
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        # several lines, each an object, or nothing of ours
        return replay(path, text)
    if isinstance(data, dict) and data.get("record") == "header":
        return replay(path, text)
    if not isinstance(data, dict) or data.get("format") != SAVED_FORMAT:
        raise not_a_chat(path)
    check_version(path, data)
    messages, system = checked_turns(path, data)
    settings = data.get("settings")
    return Conversation(messages, system, text_or_none(data.get("model")), settings if isinstance(settings, dict) else {})


def _is_saved(path: Path) -> bool:
    try:
        data = json.loads(text_of_file(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == SAVED_FORMAT
