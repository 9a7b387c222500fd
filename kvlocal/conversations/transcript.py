"""The append-only transcript of a chat: what was said is on the disk before the next thing happens."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import kvlocal
from kvlocal.conversations.records import (
    CUT,
    TRANSCRIPT_FORMAT,
    UNANSWERED,
    UNDO,
    VERSION,
    Conversation,
    TranscriptError,
    is_remnant,
    is_transcript,
    not_a_chat,
    read_bytes,
    read_text,
    replay,
    text_of_file,
    to_json,
)
from kvlocal.files.atomic import PRIVATE, atomic_write, cannot_write
from kvlocal.files.lock import Busy, NoLocks, open_locked
from kvlocal.files.places import state_dir
from kvlocal.interrupts import CtrlCWaits
from kvlocal.template.markup import Message


def chat_path() -> Path:
    """Where the transcript of a chat that starts now belongs."""
    return state_dir() / "chats" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.jsonl"


class Transcript:
    """Appends what happens in a chat to a file, one JSON record a line, and replays such files.

    What a method was given has reached the operating system when it returns, so a killed process loses nothing; user
    turns and the ends of answers have reached the disk. Undoing is a record too: nothing is ever taken out of the file.
    Ctrl-C waits until a record is written. What cannot be written leaves the file as it was; a user turn is then as if it
    had not been given, any other record is kept and written before the next one.

    Attributes:
        path: the file.
        conversation: what `resume` found in it; None if that was nothing.
        awaits_answer: the last record is a user turn, or gives its answer up.

    Raises:
        TranscriptError: by every method that writes, when it cannot.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.conversation: Conversation | None = None
        self.awaits_answer = False
        self._descriptor = descriptor
        self._empty = True
        self._size = 0  # of the records in the file
        self._unwritten = b""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, model: str, system: str | None, tools: Sequence[Mapping[str, Any]] = ()) -> Self:
        """Begin a new transcript; its directory is made if need be, and only the owner can read either. tools: that may be called in all of it.

        Raises:
            TranscriptError: there is such a file already, or it cannot be written.
        """
        path = Path(path)
        try:
            transcript = cls._open(path, os.O_WRONLY | os.O_EXCL)
        except NoLocks:
            # nobody else has what was made just now, and nobody can resume it there
            transcript = cls(path, os.open(path, os.O_WRONLY | os.O_APPEND))
        try:
            transcript.begin(model=model, system=system, tools=tools)
        except BaseException:
            transcript.close()
            raise
        return transcript

    @classmethod
    def resume(cls, path: str | os.PathLike[str]) -> Self:
        """Go on with a transcript, or with a new one that `begin` is still to be called for; no other process can until it is closed.

        A torn last line is dropped, and an answer without an end gets one that says so.

        Raises:
            TranscriptError: it is open elsewhere, it is no transcript, or it cannot be written.
        """
        path = Path(path)
        try:
            transcript = cls._open(path, os.O_RDWR)
        except NoLocks as error:
            raise TranscriptError(f"{path} cannot be kept to one chat ({error.strerror}): keep the session on another disk") from error
        # not ours to remove, as far as is known
        transcript._empty = False
        try:
            transcript._take_up()
        except BaseException:
            transcript.close()
            raise
        return transcript

    @classmethod
    def _open(cls, path: Path, flags: int) -> Self:
        """Raises NoLocks, TranscriptError."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(path, open_locked(path, flags | os.O_CREAT | os.O_APPEND, PRIVATE))
        except Busy:
            raise in_use(path) from None
        except NoLocks:
            raise
        except OSError as error:
            raise TranscriptError(cannot_write(path, error)) from error

    def _take_up(self) -> None:
        content = read_bytes(self.path)
        self._size = content.rfind(b"\n") + 1
        if self._size:
            self.conversation = replay(self.path, text_of_file(content))
        elif not (is_remnant(self.path) or is_transcript(self.path)):
            raise not_a_chat(self.path)
        self._empty = not self._size
        self._cut_back()
        if self._size:
            last = json.loads(text_of_file(content[: self._size]).split("\n")[-2])["record"]
            self.awaits_answer = last in UNANSWERED
            if last == "piece":
                self._append({"record": "end", "reason": CUT}, durable=True)

    def begin(self, *, model: str, system: str | None, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """The first record of a new transcript."""
        with_tools = {"tools": list(tools)} if tools else {}
        self._append(
            {
                "record": "header",
                "format": TRANSCRIPT_FORMAT,
                "version": VERSION,
                "kvlocal": kvlocal.__version__,
                "model": model,
                "system": system,
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                **with_tools,
            },
            durable=True,
        )
        _sync_directory(self.path.parent)
        self._empty = True

    def add_user(self, content: str) -> None:
        """A user turn, before its answer begins."""
        self._append({"record": "user", "content": content}, durable=True, may_be_refused=True)

    def add_turns(self, messages: Sequence[Message]) -> None:
        """Messages that a program gives together, before the answer to the last of them begins: of the user and of tools, and answers that were given
        elsewhere."""
        self._append({"record": "turns", "messages": [dict(message) for message in messages]}, durable=True, may_be_refused=True)

    def add_piece(self, text: str) -> None:
        """The next piece of the answer to the last user turn."""
        self._append({"record": "piece", "text": text})

    def end_answer(
        self, reason: str, drawn: Sequence[int] = (), n_tokens: int | None = None, tool_calls: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """The answer is complete.

        Args:
            reason: why it ended: "end", "length", "stopped", "error".
            drawn: the tokens it was drawn as.
            n_tokens: tokens of the whole conversation with it.
            tool_calls: of its message.
        """
        record = {"record": "end", "reason": reason, "drawn": list(drawn), "n_tokens": n_tokens, "tool_calls": list(tool_calls)}
        self._append({key: value for key, value in record.items() if value}, durable=True)

    def add_regen(self) -> None:
        """The last answer is given up; another one follows."""
        self._append({"record": "regen"})

    def add_undo(self, n_turns: int = 1) -> None:
        """The last user turns and their answers are taken out; where there is none, what was cleared or replaced last is back."""
        self._append(*n_turns * [UNDO], durable=True)

    def fork(self, path: Path) -> "Transcript":
        """A copy at another path, which is open as this one is and stays so.

        Raises:
            TranscriptError: something is there already, or what was said is not in this file yet and cannot be written there either.
            KvlocalError: it cannot be written.
        """
        if self._unwritten:
            self._flush(durable=True)
        write_fork(read_bytes(self.path)[: self._size], path)
        return Transcript.resume(path)

    def add_clear(self) -> None:
        """All turns are taken out."""
        self._append({"record": "clear"}, durable=True)

    def add_system(self, content: str | None) -> None:
        """Another system prompt, for the whole conversation."""
        self._append({"record": "system", "content": content}, durable=True)

    def add_model(self, model: str) -> None:
        """Another model answers from now on."""
        self._append({"record": "model", "model": model}, durable=True)

    def add_load(self, messages: Sequence[Mapping[str, str]], system: str | None) -> None:
        """These turns and this system prompt take the place of all there was."""
        record = {"record": "load", "system": system, "messages": [dict(message) for message in messages]}
        self._append(record, durable=True)

    def close(self) -> None:
        """Close the file, and remove it if nothing was said. Closing twice is harmless."""
        if self._descriptor < 0:
            return
        if self._unwritten:
            with contextlib.suppress(TranscriptError):
                self._flush(durable=True)
        if self._empty:
            # before another process can have the lock
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def skim(path: str | os.PathLike[str]) -> Conversation:
        """As `read`, but with the texts of answers left empty, which takes a fraction of the time.

        Raises:
            TranscriptError: as `read` does, but for what is wrong with these texts.
        """
        return replay(Path(path), read_text(Path(path)), answers=False)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Conversation:
        """Replay a transcript. A torn last line is left out; an answer without an end is kept as far as it goes.

        Raises:
            TranscriptError: the file cannot be read or is no transcript.
        """
        return replay(Path(path), read_text(Path(path)))

    def _append(self, *records: Mapping[str, Any], durable: bool = False, may_be_refused: bool = False) -> None:
        with CtrlCWaits():
            before = self._unwritten, self.awaits_answer
            self._unwritten += _lines(records)
            self.awaits_answer = records[-1]["record"] in UNANSWERED
            try:
                self._flush(durable=durable)
            except TranscriptError:
                if may_be_refused:
                    self._unwritten, self.awaits_answer = before
                raise
            self._empty = False

    def _flush(self, *, durable: bool) -> None:
        rest = memoryview(self._unwritten)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            self._cut_back()
            raise TranscriptError(cannot_write(self.path, error)) from error
        self._size += len(self._unwritten)
        self._unwritten = b""

    def _cut_back(self) -> None:
        """Leaves whole records in the file, and none that did not get to its end."""
        # what has no size, as /dev/full, has nothing to cut off
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._size)


def write_fork(content: bytes, path: Path, n_undone: int = 0) -> None:
    """Writes the records of a transcript to another file, and that the last user turns and their answers are taken out there.

    Raises:
        TranscriptError: something is there already.
        KvlocalError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # so that nobody else takes the name meanwhile
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
    except FileExistsError:
        raise TranscriptError(f"{path} is there already: choose another name") from None
    except OSError as error:
        raise TranscriptError(cannot_write(path, error)) from error
    try:
        atomic_write(path, content[: content.rfind(b"\n") + 1] + _lines(n_undone * [UNDO]))
    except BaseException:
        path.unlink()
        raise


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(to_json(record) + b"\n" for record in records)


def in_use(path: Path) -> TranscriptError:
    """What to say of a transcript that another process has."""
    return TranscriptError(f"{path} is in use by another kvlocal: leave that chat first, or choose another session")


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
