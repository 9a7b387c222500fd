"""Past conversations, those with a name and those without: the newest first, and what was said in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvlocal.conversations.named_sessions import SUFFIX, Session, chats_dir, described, sessions_dir
from kvlocal.conversations.records import Conversation, TranscriptError
from kvlocal.conversations.transcript import Transcript

_BEFORE, _AROUND = 30, 90  # characters of an excerpt, before what was found and in all


@dataclass(frozen=True)
class Place:
    """Where in a conversation something was said.

    turn: from 1 on, as in a chat
    role: "user", "assistant" or "tool"
    excerpt: some words around it, in one line
    n_words: how many of the words that were looked for are there
    """

    turn: int
    role: str
    excerpt: str
    n_words: int


def transcripts(*directories: Path) -> list[Path]:
    """The transcripts in these directories, the last used first."""
    used = []
    for directory in directories:
        for path in directory.glob(f"*{SUFFIX}"):
            # gone meanwhile
            with suppress(OSError):
                used.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(used, reverse=True)]


def past_chats() -> Iterator[Session]:
    """Sessions and chats in which something was said, the last used first, each read when it is asked for; damaged ones without a conversation."""
    for path in transcripts(sessions_dir(), chats_dir()):
        with suppress(FileNotFoundError):
            conversation = _read(path)
            if conversation is None or conversation.messages:
                yield described(path, conversation)


def _read(path: Path) -> Conversation | None:
    try:
        return Transcript.read(path) if path.stat().st_size else Conversation()
    except TranscriptError:
        return None


def find(conversation: Conversation, words: Sequence[str]) -> list[Place]:
    """Where these words were said, in any case of letters; nothing unless all of them were, be it in different turns."""
    wanted = [word.casefold() for word in words]
    found, seen, turn = [], set(), 0
    for message in conversation.messages:
        turn += message["role"] == "user"
        text = " ".join(message["content"].split())
        folded = text.casefold()
        there = [word for word in wanted if " ".join(word.split()) in folded]
        if there:
            seen.update(there)
            found.append(Place(turn, message["role"], _excerpt(text, folded.find(there[0])), len(there)))
    return found if seen >= {*wanted} else []


def _excerpt(text: str, at: int) -> str:
    start = max(0, at - _BEFORE)
    end = start + _AROUND
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"


def beginning(conversation: Conversation) -> str:
    """The first words of the user, in one line."""
    said = next((message["content"] for message in conversation.messages if message["role"] == "user"), "")
    return _excerpt(" ".join(said.split()), 0)
