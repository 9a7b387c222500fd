"""Conversations with a name: where they are, and what can be done with them while nobody leads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kvlocal.conversations.snapshot import snapshot_path
from kvlocal.conversations.transcript import Conversation, Transcript, TranscriptError, state_dir
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import staging_of

SUFFIX = ".jsonl"

_NAME = re.compile(r"\w[\w. -]{0,99}(?<![. ])")


def sessions_dir() -> Path:
    """Where the sessions with a name are; it need not exist."""
    return state_dir() / "sessions"


def session_path(text: str) -> Path:
    """The transcript that NAME|FILE means: FILE has a directory or ends in .jsonl.

    Raises:
        KvlocalError: it is neither.
    """
    if os.sep in text or text.endswith(SUFFIX):
        return Path(os.path.expanduser(text))
    if not _NAME.fullmatch(text):
        raise KvlocalError(f"{text[:60]!r} is no name for a session: use letters, digits, spaces, dots and dashes, or give a file as ./{text[:60]}")
    return sessions_dir() / f"{text}{SUFFIX}"


@dataclass(frozen=True)
class Session:
    """A session on disk.

    name: in the state directory, else the path
    path: of its transcript
    last_used: when something was said last
    n_bytes: of the transcript and the snapshot
    conversation: None if the transcript cannot be read
    """

    name: str
    path: Path
    last_used: datetime
    n_bytes: int
    conversation: Conversation | None

    @property
    def n_turns(self) -> int:
        """User turns; 0 if the transcript cannot be read."""
        return sum(message["role"] == "user" for message in self.conversation.messages) if self.conversation else 0


def sessions() -> list[Session]:
    """The sessions with a name, the last used first."""
    found = []
    for path in sessions_dir().glob(f"*{SUFFIX}"):
        try:
            found.append(_describe(path))
        except FileNotFoundError:
            continue  # deleted meanwhile
    return sorted(found, key=lambda session: session.last_used, reverse=True)


def session(text: str) -> Session:
    """The session of that name or file.

    Raises:
        KvlocalError: there is none, or its transcript cannot be read.
    """
    path = existing_path(text)
    Transcript.read(path)
    return _describe(path)


def existing_path(text: str) -> Path:
    """`session_path` of a session that is there.

    Raises:
        KvlocalError: there is none.
    """
    path = session_path(text)
    if not path.is_file():
        raise KvlocalError(f"there is no session {text}: `kvlocal sessions list` shows those there are")
    return path


def _describe(path: Path) -> Session:
    status = path.stat()
    try:
        conversation = Transcript.read(path) if status.st_size else Conversation()
    except TranscriptError:
        conversation = None
    snapshot = snapshot_path(path)
    n_bytes = status.st_size + (snapshot.stat().st_size if snapshot.is_file() else 0)
    name = path.stem if path.parent == sessions_dir() else str(path)
    return Session(name, path, datetime.fromtimestamp(status.st_mtime), n_bytes, conversation)


def delete(path: Path) -> None:
    """Removes a session with its snapshot.

    Raises:
        KvlocalError: it is in use, or it cannot be removed.
    """
    with _alone(path):
        for part in (snapshot_path(path), staging_of(snapshot_path(path)), path):
            part.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    """Gives a session and its snapshot another name.

    Raises:
        KvlocalError: it is in use, or there is a session of that name.
    """
    if target.exists() and target.stat().st_size:
        raise KvlocalError(f"{target} is there already: choose another name")
    with _alone(path), _alone(target):
        # by somebody else, in this moment
        if target.stat().st_size:
            raise KvlocalError(f"{target} is there already: choose another name")
        os.replace(path, target)
        if snapshot_path(path).is_file():
            os.replace(snapshot_path(path), snapshot_path(target))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no chat has the session; a failure of the system is a KvlocalError with what to do."""
    try:
        with Transcript.locked(path):
            yield
    except OSError as error:
        raise KvlocalError(f"cannot change {path} ({error.strerror}): check its directory") from error


def markdown(session: Session) -> str:
    """The conversation as Markdown."""
    conversation = session.conversation
    parts = [f"# {session.name}"]
    if conversation.system:
        parts += ["## System", conversation.system]
    for i, message in enumerate(conversation.messages):
        mark = " (cut off)" if i in conversation.cut_off else ""
        parts += [f"## {'You' if message['role'] == 'user' else 'Answer'}{mark}", message["content"]]
    return "\n\n".join(parts) + "\n"
