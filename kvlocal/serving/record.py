"""Record: a conversation on the disk, as a named session is there: a transcript, a snapshot and an archive."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kvlocal.conversations.named_sessions import SUFFIX, beside, delete
from kvlocal.conversations.records import Conversation as Replayed
from kvlocal.conversations.records import TranscriptError
from kvlocal.conversations.snapshot import Snapshots, snapshot_path
from kvlocal.conversations.transcript import Transcript
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import staging_of
from kvlocal.files.lock import Busy, NoLocks, open_locked
from kvlocal.template.markup import Message

_LOCK = "lock"


def new_id() -> str:
    """A name that no other conversation has."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


class Record:
    """One conversation on the disk; its transcript is open from `open` to `close`.

    path: of the transcript
    snapshots: of the session
    snapshots_in_use: held while one is written, or from when it is read until a session has it
    """

    def __init__(self, path: Path) -> None:
        self.path, self.snapshots = path, Snapshots(snapshot_path(path))
        self._transcript: Transcript | None = None
        self.snapshots_in_use = threading.Lock()
        self._deleting = threading.Lock()

    def begin(self, model: str, system: str | None, tools: Sequence[Mapping[str, Any]]) -> None:
        """A new conversation."""
        self._transcript = Transcript.open(self.path, model=model, system=system, tools=tools)

    def open(self) -> None:
        """Before something is added."""
        if self._transcript is None:
            self._transcript = Transcript.resume(self.path)

    def add_turns(self, turns: Sequence[Message]) -> None:
        """What is new before the next answer."""
        if turns:
            self._open.add_turns(turns)

    def add_piece(self, text: str) -> None:
        """What is new of an answer: it survives the process when this returns."""
        if text:
            self._open.add_piece(text)

    def end_answer(self, reason: str, drawn: Sequence[int], n_tokens: int, answer: Message) -> None:
        """The answer is complete, and on the disk when this returns."""
        self._open.end_answer(reason, drawn, n_tokens, answer.get("tool_calls") or ())

    @property
    def _open(self) -> Transcript:
        assert self._transcript is not None, "the transcript is not open"
        return self._transcript

    def close(self) -> None:
        """Nothing is added for now. Closing twice is harmless."""
        if self._transcript is not None:
            self._transcript.close()
            self._transcript = None

    def delete(self) -> None:
        """Removes all of it. Two threads may do so at once: whoever asks for it, and the one that was just writing.

        Raises:
            KvlocalError: it cannot be removed.
        """
        with self._deleting:
            self.close()
            if self.path.exists():
                delete(self.path)
            # what was just being written when the transcript went
            for path in (*beside(self.path), staging_of(snapshot_path(self.path))):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def n_bytes(self) -> int:
        """What it takes on the disk."""
        total = 0
        for path in (self.path, *beside(self.path)):
            with suppress(OSError):
                total += path.stat().st_size
        return total


class Directory:
    """Where the conversations of an engine are, which has it to itself: a directory for each owner.

    Raises:
        KvlocalError: another engine has it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: int | None = open_locked(path / _LOCK, os.O_RDWR | os.O_CREAT)
        except Busy:
            raise KvlocalError(f"another kvlocal serves the conversations in {path}: stop it, or give another directory") from None
        except NoLocks as error:
            raise KvlocalError(f"{path} cannot be kept to one kvlocal ({error.strerror}): give a directory on another disk") from error
        except OSError as error:
            raise KvlocalError(f"conversations cannot be kept in {path} ({error.strerror}): give a directory that can be written") from error

    def record(self, owner: str, conversation: str) -> Record:
        """Of a conversation that is there or is to be begun. owner: kvlocal.serving.chain.owner_digest"""
        return Record(self.path / owner / f"{conversation}{SUFFIX}")

    def found(self) -> Iterator[tuple[str, Record, Replayed, float]]:
        """The conversations that are there: owner, record, what was said, and when last; those that cannot be read are left alone."""
        for path in sorted(self.path.glob(f"*/*{SUFFIX}")):
            with suppress(TranscriptError, OSError):
                yield path.parent.name, Record(path), Transcript.read(path), path.stat().st_mtime

    def close(self) -> None:
        """Lets others have it. Closing twice is harmless."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
