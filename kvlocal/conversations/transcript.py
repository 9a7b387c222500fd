"""Conversations on disk: the append-only transcript of every chat, and the file that holds one as it is now."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import kvlocal
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import atomic_write
from kvlocal.interrupts import CtrlCWaits

TRANSCRIPT_FORMAT = "kvlocal-transcript"
SAVED_FORMAT = "kvlocal-chat"
VERSION = 1
_HEADER = f'{{"record": "header", "format": "{TRANSCRIPT_FORMAT}"'

CUT = "cut"  # the reason an answer ended that a crash cut off

_ROLES = ("user", "assistant")
# records after which the last user turn has no answer
_UNANSWERED = ("user", "regen")


class TranscriptError(KvlocalError):
    """A transcript or a saved chat cannot be written or read."""


def state_dir() -> Path:
    """The absolute directory of what kvlocal keeps by itself: chats and the history of lines typed.

    `KVLOCAL_STATE_DIR`, else `kvlocal` in `XDG_STATE_HOME`, else in `~/.local/state`. It need not exist.

    Raises:
        TranscriptError: there is no home directory.
    """
    if chosen := os.environ.get("KVLOCAL_STATE_DIR"):
        return Path(os.path.expanduser(chosen)).absolute()
    state_home = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The XDG base directory specification says to ignore relative paths.
    if not state_home.is_absolute():
        try:
            state_home = Path.home() / ".local" / "state"
        except RuntimeError as error:
            raise TranscriptError("there is no home directory: set KVLOCAL_STATE_DIR") from error
    return state_home / "kvlocal"


def chat_path() -> Path:
    """Where the transcript of a chat that starts now belongs."""
    return state_dir() / "chats" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.jsonl"


@dataclass
class Conversation:
    """What was said.

    Attributes:
        messages: {"role": "user" or "assistant", "content": text} in order; a last user turn may have no answer.
        system: the system prompt.
        model: the MODEL it was led with, the last one if there were several.
        settings: by their option names; informative.
        cut_off: indices into `messages` of answers that a crash cut off.
        drawn: by index into `messages`, the tokens that an answer was drawn as, if they are known; of the last model only.
        n_tokens: tokens of the whole conversation after its last answer, if that is known.
        n_answers: answers since it began or was cleared, those that were taken back too.
        started: when, in ISO 8601.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    system: str | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    cut_off: list[int] = field(default_factory=list)
    drawn: dict[int, list[int]] = field(default_factory=dict)
    n_tokens: int | None = None
    n_answers: int = 0
    started: str | None = None


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
    def open(cls, path: str | os.PathLike[str], *, model: str, system: str | None) -> Self:
        """Begin a new transcript; its directory is made if need be, and only the owner can read either.

        Raises:
            TranscriptError: there is such a file already, or it cannot be written.
        """
        transcript = cls._open(Path(path), os.O_WRONLY | os.O_EXCL)
        try:
            transcript.begin(model=model, system=system)
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
        transcript = cls.locked(path)
        try:
            transcript._take_up()
        except BaseException:
            transcript.close()
            raise
        return transcript

    @classmethod
    def locked(cls, path: str | os.PathLike[str]) -> Self:
        """A file that no other process can `resume` until it is closed, as it is; it is made if need be.

        Raises:
            TranscriptError: it is open elsewhere, or cannot be written.
        """
        while True:
            transcript = cls._open(Path(path), os.O_RDWR)
            try:
                if transcript._lock():
                    return transcript
            except BaseException:
                transcript.close()
                raise
            # removed or renamed before it was locked
            transcript.close()

    @classmethod
    def _open(cls, path: Path, flags: int) -> Self:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls(path, os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o600))
        except OSError as error:
            raise TranscriptError(f"cannot write {path}: {error.strerror}") from error

    def _lock(self) -> bool:
        """Keeps other processes away; returns whether this is still the file of that name."""
        # not ours to remove, as far as is known
        self._empty = False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TranscriptError(f"{self.path} is in use by another kvlocal: leave that chat first, or choose another session") from error
        except OSError as error:
            raise TranscriptError(f"cannot lock {self.path}: {error.strerror}") from error
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        return False

    def _take_up(self) -> None:
        content = _read_bytes(self.path)
        self._size = content.rfind(b"\n") + 1
        if self._size:
            self.conversation = _replay(self.path, _text(content))
        elif not _HEADER.startswith(_text(content)[: len(_HEADER)]):
            raise _not_a_chat(self.path)
        self._empty = not self._size
        self._cut_back()
        if self._size:
            last = json.loads(_text(content[: self._size]).split("\n")[-2])["record"]
            self.awaits_answer = last in _UNANSWERED
            if last == "piece":
                self._append({"record": "end", "reason": CUT}, durable=True)

    def begin(self, *, model: str, system: str | None) -> None:
        """The first record of a new transcript."""
        self._append(
            {
                "record": "header",
                "format": TRANSCRIPT_FORMAT,
                "version": VERSION,
                "kvlocal": kvlocal.__version__,
                "model": model,
                "system": system,
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
            durable=True,
        )
        _sync_directory(self.path.parent)
        self._empty = True

    def add_user(self, content: str) -> None:
        """A user turn, before its answer begins."""
        self._append({"record": "user", "content": content}, durable=True, may_be_refused=True)

    def add_piece(self, text: str) -> None:
        """The next piece of the answer to the last user turn."""
        self._append({"record": "piece", "text": text})

    def end_answer(self, reason: str, drawn: Sequence[int] = (), n_tokens: int | None = None) -> None:
        """The answer is complete.

        Args:
            reason: why it ended: "end", "length", "stopped", "error".
            drawn: the tokens it was drawn as.
            n_tokens: tokens of the whole conversation with it.
        """
        record = {"record": "end", "reason": reason, "drawn": list(drawn), "n_tokens": n_tokens}
        self._append({key: value for key, value in record.items() if value}, durable=True)

    def add_regen(self) -> None:
        """The last answer is given up; another one follows."""
        self._append({"record": "regen"})

    def add_undo(self) -> None:
        """The last user turn and its answer are taken out."""
        self._append({"record": "undo"}, durable=True)

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
    def read(path: str | os.PathLike[str]) -> Conversation:
        """Replay a transcript. A torn last line is left out; an answer without an end is kept as far as it goes.

        Raises:
            TranscriptError: the file cannot be read or is no transcript.
        """
        return _replay(Path(path), _read_text(Path(path)))

    def _append(self, record: Mapping[str, Any], *, durable: bool = False, may_be_refused: bool = False) -> None:
        with CtrlCWaits():
            before = self._unwritten, self.awaits_answer
            self._unwritten += _json(record) + b"\n"
            self.awaits_answer = record["record"] in _UNANSWERED
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
            raise TranscriptError(f"cannot write {self.path}: {error.strerror}") from error
        self._size += len(self._unwritten)
        self._unwritten = b""

    def _cut_back(self) -> None:
        """Leaves whole records in the file, and none that did not get to its end."""
        # what has no size, as /dev/full, has nothing to cut off
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._size)


def save(path: str | os.PathLike[str], conversation: Conversation) -> None:
    """Write a conversation to a file of its own. Of the files that exist, only those written here are replaced.

    Raises:
        KvlocalError: it cannot be written, or another file is in the way.
    """
    path = Path(path)
    if os.path.lexists(path) and not _is_saved(path):
        raise TranscriptError(f"{path} was not written by /save: choose another name or remove it")
    atomic_write(path, saved(conversation))


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
    return _json(record, indent=2) + b"\n"


def load(path: str | os.PathLike[str]) -> Conversation:
    """Read a file of `save` or a transcript.

    Raises:
        TranscriptError: it cannot be read or is neither.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        # several lines, each an object, or nothing of ours
        return _replay(path, text)
    if isinstance(data, dict) and data.get("record") == "header":
        return _replay(path, text)
    if not isinstance(data, dict) or data.get("format") != SAVED_FORMAT:
        raise _not_a_chat(path)
    _check_version(path, data)
    messages, system = _checked_turns(path, data)
    settings = data.get("settings")
    return Conversation(messages, system, _text_or_none(data.get("model")), settings if isinstance(settings, dict) else {})


def _replay(path: Path, text: str) -> Conversation:
    chat: Conversation | None = None
    answering = False
    for number, record in _records(path, text):
        kind = record.get("record")
        if chat is None:
            if kind != "header" or record.get("format") != TRANSCRIPT_FORMAT:
                raise _not_a_chat(path)
            _check_version(path, record)
            system, model, started = (_text_or_none(record.get(name)) for name in ("system", "model", "started"))
            chat = Conversation(system=system, model=model, started=started)
            continue
        try:
            if kind in ("piece", "end"):
                if kind == "end" and not answering and chat.messages[-1]["role"] == "assistant":
                    # of an answer that was stopped before it began
                    continue
                if not answering:
                    chat.messages.append({"role": "assistant", "content": ""})
                    chat.n_answers += 1
                    # until its end is found
                    chat.cut_off.append(len(chat.messages) - 1)
                if kind == "piece":
                    chat.messages[-1]["content"] += record["text"]
                elif record.get("reason") != CUT:
                    chat.cut_off.pop()
                    chat.n_tokens = _count_or_none(record.get("n_tokens"))
                    if drawn := record.get("drawn"):
                        chat.drawn[len(chat.messages) - 1] = [int(token) for token in drawn]
                answering = kind == "piece"
                continue
            answering = False
            if kind == "user":
                chat.messages.append({"role": "user", "content": record["content"] + ""})
            elif kind == "regen":
                _drop_answer(chat)
            elif kind == "undo":
                _drop_answer(chat)
                chat.messages.pop()
            elif kind == "clear":
                chat.messages, chat.cut_off, chat.drawn, chat.n_tokens, chat.n_answers = [], [], {}, None, 0
            elif kind == "system":
                chat.system = _text_or_none(record["content"])
            elif kind == "model":
                chat.model, chat.drawn = record["model"] + "", {}
            elif kind == "load":
                chat.messages, chat.system = _checked_turns(path, record)
                chat.cut_off, chat.drawn, chat.n_tokens = [], {}, None
            else:
                raise KeyError(kind)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise TranscriptError(f"line {number} of {path} cannot be understood: load another file") from error
    if chat is None:
        raise _not_a_chat(path)
    return chat


def _drop_answer(chat: Conversation) -> None:
    if chat.messages and chat.messages[-1]["role"] == "assistant":
        chat.messages.pop()
    chat.cut_off = [i for i in chat.cut_off if i < len(chat.messages)]
    chat.drawn.pop(len(chat.messages), None)


def _records(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records with their line numbers. Only the last line can be torn: a line is written with its end."""
    *lines, torn = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_a_chat(path) if number == 1 else _damaged(path, number) from error
        if not isinstance(record, dict):
            raise _not_a_chat(path) if number == 1 else _damaged(path, number)
        yield number, record
    if torn and not lines:
        raise _not_a_chat(path)


def _checked_turns(path: Path, data: Mapping[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    messages = data.get("messages")
    if not isinstance(messages, list):
        raise TranscriptError(f"{path} has no list of messages: load another file")
    checked = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            raise TranscriptError(f"message {number} of {path} has no role user or assistant with a text: correct it")
        checked.append({"role": role, "content": content})
    return checked, _text_or_none(data.get("system"))


def _check_version(path: Path, data: Mapping[str, Any]) -> None:
    if data.get("version") != VERSION:
        raise TranscriptError(f"{path} has format version {data.get('version')!r}: a newer kvlocal may read it")


def _is_saved(path: Path) -> bool:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == SAVED_FORMAT


def _read_text(path: Path) -> str:
    return _text(_read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TranscriptError(f"cannot read {path}: {error.strerror}") from error


def _text(content: bytes) -> str:
    # a torn line may end within a character
    return content.decode("utf-8", "replace")


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count_or_none(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _not_a_chat(path: Path) -> TranscriptError:
    return TranscriptError(f"{path} is neither a saved chat nor a transcript: load one that kvlocal wrote")


def _damaged(path: Path, number: int) -> TranscriptError:
    return TranscriptError(f"line {number} of {path} is damaged: load another file")


def _json(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    # Half a surrogate pair, as from input that was not UTF-8, turns into the escape that JSON has for it.
    return json.dumps(record, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
