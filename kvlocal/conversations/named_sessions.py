"""Conversations with a name: where they are, and what can be done with them while nobody leads them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kvlocal.conversations.archive_file import archive_path
from kvlocal.conversations.records import (
    Conversation,
    TranscriptError,
    is_remnant,
    is_transcript,
    read_bytes,
    replay,
    text_of_file,
)
from kvlocal.conversations.snapshot import snapshot_path
from kvlocal.conversations.transcript import Transcript, chat_path, in_use, write_fork
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import PRIVATE, remedy, replacing, staging_of
from kvlocal.files.lock import Busy, open_locked
from kvlocal.files.places import state_dir

SUFFIX = ".jsonl"

_NAME = re.compile(r"\w[\w. -]{0,99}(?<![. ])")


def sessions_dir() -> Path:
    """Where the sessions with a name are; it need not exist."""
    return state_dir() / "sessions"


def chats_dir() -> Path:
    """Where the transcripts of chats without a name are; it need not exist."""
    return chat_path().parent


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


def new_session_path(text: str) -> Path:
    """`session_path` of a session that may begin there.

    Raises:
        KvlocalError: it is neither a name nor a file in a directory that is there; none is made.
    """
    path = session_path(text)
    if path.parent != sessions_dir() and not path.parent.is_dir():
        raise KvlocalError(
            f"{text[:60]!r} is a file in {path.parent}, which is no directory: make its directory first, or give a name without {os.sep}"
        )
    return path


def kept_path(text: str) -> Path:
    """The transcript of the conversation that goes on, or begins, under a name: that of a chat without one, if no session has it and a chat has.

    Raises:
        KvlocalError: as `new_session_path` does.
    """
    path = new_session_path(text)
    return path if path.exists() else _of_chat(path) or path


def _of_chat(path: Path) -> Path | None:
    """The transcript of the chat that `kvlocal logs` calls as the session of this path would be called."""
    chat = chats_dir() / path.name
    return chat if path.parent == sessions_dir() and chat.is_file() else None


def outside(path: Path) -> str:
    """Where a session is that has no name, as the end of a sentence; "" for one with a name."""
    return "" if path.parent == sessions_dir() else f" in the file {path.absolute()}, which `kvlocal sessions list` does not show"


@dataclass(frozen=True)
class Session:
    """A session on disk, or a chat without a name.

    name: in the state directory, else the path
    path: of its transcript
    last_used: when something was said last
    n_bytes: of the transcript, the snapshot and the archive
    conversation: None if the transcript cannot be read
    """

    name: str
    path: Path
    last_used: datetime
    n_bytes: int
    conversation: Conversation | None

    @property
    def is_chat(self) -> bool:
        """Whether nobody has given it a name."""
        return self.path.parent == chats_dir()

    @property
    def n_turns(self) -> int:
        """User turns; 0 if the transcript cannot be read."""
        return sum(message["role"] == "user" for message in self.conversation.messages) if self.conversation else 0


def sessions() -> list[Session]:
    """The sessions with a name, the last used first; their conversations without the texts of answers."""
    found = []
    for path in sessions_dir().glob(f"*{SUFFIX}"):
        try:
            found.append(described(path, _skimmed(path)))
        except FileNotFoundError:
            continue  # deleted meanwhile
    return sorted(found, key=lambda session: session.last_used, reverse=True)


def session(text: str) -> tuple[Session, Conversation]:
    """The session of that name or file, with its conversation.

    Raises:
        KvlocalError: there is none, or its transcript cannot be read.
    """
    path = existing_path(text)
    conversation = Transcript.read(path)
    return described(path, conversation), conversation


def existing_path(text: str) -> Path:
    """`session_path` of a session that is there, or the transcript of the chat that `kvlocal logs` calls so.

    Raises:
        KvlocalError: there is none.
    """
    path = session_path(text)
    if not path.is_file():
        if chat := _of_chat(path):
            return chat
        where = "`kvlocal sessions list` shows those there are" if path.parent == sessions_dir() else "check the path"
        raise KvlocalError(f"there is no session {text}: {where}")
    return path


def last_used() -> Path:
    """The transcript of the chat or session in which something was said last.

    Raises:
        KvlocalError: there is none.
    """
    places = (sessions_dir(), chats_dir())
    found = [(status.st_mtime, path) for place in places for path in place.glob(f"*{SUFFIX}") if (status := path.stat()).st_size]
    if not found:
        raise KvlocalError("there is no chat yet to go on with: begin one, or a session with --session NAME")
    return max(found)[1]


def chat_file(text: str) -> Path:
    """The file of a chat to load: a file of that name, or else the transcript of the session of that name.

    Raises:
        KvlocalError: there is neither.
    """
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return path
    if _NAME.fullmatch(text) and (session_path(text).is_file() or _of_chat(session_path(text))):
        return existing_path(text)
    raise KvlocalError(f"there is no file {text[:200]} and no session of that name: check the path, or see `kvlocal sessions list`")


def _skimmed(path: Path) -> Conversation | None:
    try:
        return Transcript.skim(path) if path.stat().st_size else Conversation()
    except TranscriptError:
        return None


def described(path: Path, conversation: Conversation | None) -> Session:
    """What there is to say about a transcript. conversation: that it replays to, None if it does not.

    Raises:
        FileNotFoundError: it is gone.
    """
    status = path.stat()
    n_bytes = status.st_size + sum(part.stat().st_size for part in beside(path) if part.is_file())
    name = path.stem if path.parent in (sessions_dir(), chats_dir()) else str(path)
    return Session(name, path, datetime.fromtimestamp(status.st_mtime), n_bytes, conversation)


def delete(path: Path) -> None:
    """Removes a session with its snapshot and its archive.

    Raises:
        KvlocalError: it is none, it is in use, or it cannot be removed.
    """
    with alone(path):
        for part in (*beside(path), staging_of(snapshot_path(path)), path):
            part.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    """Gives a session, its snapshot and its archive another name, on another file system too.

    Raises:
        KvlocalError: it is none, it is in use, something has that name, or it cannot be moved; all is then as it was.
    """
    with alone(path):
        if target.parent == sessions_dir():
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # so that nobody else takes the name meanwhile
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
        except FileExistsError:
            raise KvlocalError(f"{target} is there already: choose another name") from None
        try:
            _move(path, target)
        except BaseException:
            target.unlink()
            raise
        staging_of(snapshot_path(path)).unlink(missing_ok=True)
        for part, new in zip(beside(path), beside(target), strict=True):
            # without one of them the conversation is read again
            with suppress(OSError, KvlocalError):
                _move(part, new)
            part.unlink(missing_ok=True)


def fork(path: Path, target: Path, n_turns: int | None = None) -> None:
    """Copies a session to another name, which then has the first n_turns turns of the user and their answers, or all of them if None. The session
    itself stays as it is.

    Raises:
        KvlocalError: it is none, it is in use, it has fewer turns, something has that name, or it cannot be written.
    """
    with alone(path):
        content = read_bytes(path)
        there = sum(message["role"] == "user" for message in replay(path, text_of_file(content)).messages) if content else 0
        n_turns = there if n_turns is None else n_turns
        if not 0 <= n_turns <= there:
            raise KvlocalError(f"{path.stem} has {there} turns of you: give --turns 0 to {there}")
        write_fork(content, target, there - n_turns)
        for part, new in zip(beside(path), beside(target), strict=True):
            # without one of them the conversation is read again
            with suppress(OSError, KvlocalError), replacing(new, PRIVATE) as staged:
                shutil.copyfile(part, staged)


def beside(path: Path) -> tuple[Path, Path]:
    """What may lie beside a transcript: the archive, and the snapshot that names its parts."""
    snapshot = snapshot_path(path)
    return archive_path(snapshot), snapshot


def _move(path: Path, target: Path) -> None:
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(target, PRIVATE) as staged:
            shutil.copyfile(path, staged)
        path.unlink()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no chat has the session; a failure of the system is a KvlocalError with what to do."""
    try:
        descriptor = open_locked(path, os.O_RDWR)
        try:
            is_ours = path.parent.resolve() in (sessions_dir().resolve(), chats_dir().resolve())
            if not (is_transcript(path) or (is_ours and is_remnant(path))):
                raise KvlocalError(f"{path} is no transcript, so it is left alone: name a session that `kvlocal sessions list` shows")
            yield
        finally:
            os.close(descriptor)
    except Busy:
        raise in_use(path) from None
    except OSError as error:
        raise KvlocalError(f"cannot change {path} ({error.strerror}): {remedy(error)}") from error


def markdown(name: str, conversation: Conversation) -> str:
    """A conversation as Markdown."""
    parts = [f"# {name}"]
    if conversation.system:
        parts += ["## System", conversation.system]
    for i, message in enumerate(conversation.messages):
        mark = " (cut off)" if i in conversation.cut_off else ""
        parts += [f"## {'You' if message['role'] == 'user' else 'Answer'}{mark}", message["content"]]
    return "\n\n".join(parts) + "\n"
