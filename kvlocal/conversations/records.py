"""The records of a transcript, a JSON object a line, and the conversation that they replay to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlocal.chat.messages import MessageError, parse_messages
from kvlocal.errors import KvlocalError
from kvlocal.files.text import text_of
from kvlocal.template.markup import Message

TRANSCRIPT_FORMAT = "kvlocal-transcript"
VERSION = 1
HEADER = f'{{"record": "header", "format": "{TRANSCRIPT_FORMAT}"'  # how a transcript begins
# of an answer, one after another
_PIECES = re.compile(r'(?:^\{"record": "piece"[^\n]*\n)+', re.MULTILINE)
_EMPTY_PIECE = '{"record": "piece", "text": ""}\n'

CUT = "cut"  # the reason an answer ended that a crash cut off

_ROLES = ("user", "assistant", "tool")
# records after which the last user turn has no answer
UNANSWERED = ("user", "regen", "turns")
# takes the last user turn and its answer out
UNDO = {"record": "undo"}


class TranscriptError(KvlocalError):
    """A transcript or a saved chat cannot be written or read."""


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
        tokens_after: by index into `messages`, the tokens of the whole conversation after an answer, if they are known.
        n_answers: answers since it began or was cleared, those that were taken back too.
        started: when, in ISO 8601.
        tools: that may be called in all of it.
        before: what a "clear" or a "load" has put aside, which taking back behind the first turn brings again.
    """

    messages: list[Message] = field(default_factory=list)
    system: str | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    cut_off: list[int] = field(default_factory=list)
    drawn: dict[int, list[int]] = field(default_factory=dict)
    tokens_after: dict[int, int] = field(default_factory=dict)
    n_answers: int = 0
    started: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    before: Conversation | None = None

    def put_aside(self) -> Conversation | None:
        """What `before` becomes when other turns take the place of these."""
        if not self.messages:
            return self.before
        return Conversation(self.messages, self.system, cut_off=self.cut_off, before=self.before)

    @property
    def n_tokens(self) -> int | None:
        """Tokens of the whole conversation after its last answer, None if that is not known."""
        answers = (i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "assistant")
        return self.tokens_after.get(next(answers, -1))


def replay(path: Path, text: str, *, answers: bool = True) -> Conversation:
    """answers: False leaves their texts empty, and errors without the right numbers of lines."""
    if not answers:
        text = _PIECES.sub(_EMPTY_PIECE, text)
    chat: Conversation | None = None
    answering = False
    for number, record in _records(path, text):
        kind = record.get("record")
        if chat is None:
            if kind != "header" or record.get("format") != TRANSCRIPT_FORMAT:
                raise not_a_chat(path)
            check_version(path, record)
            system, model, started = (text_or_none(record.get(name)) for name in ("system", "model", "started"))
            tools = record.get("tools")
            chat = Conversation(system=system, model=model, started=started, tools=tools if isinstance(tools, list) else [])
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
                    if isinstance(n_tokens := record.get("n_tokens"), int):
                        chat.tokens_after[len(chat.messages) - 1] = n_tokens
                    if drawn := record.get("drawn"):
                        chat.drawn[len(chat.messages) - 1] = [int(token) for token in drawn]
                    if tool_calls := record.get("tool_calls"):
                        chat.messages[-1]["tool_calls"] = [dict(call) for call in tool_calls]
                answering = kind == "piece"
                continue
            answering = False
            if kind == "user":
                chat.messages.append({"role": "user", "content": record["content"] + ""})
            elif kind == "turns":
                chat.messages += [_given_turn(message) for message in record["messages"]]
            elif kind == "regen":
                _drop_answer(chat)
            elif kind == "undo" and not chat.messages and chat.before:
                before = chat.before
                chat.messages, chat.cut_off, chat.system, chat.before = before.messages, before.cut_off, before.system, before.before
            elif kind == "undo":
                _drop_answer(chat)
                chat.messages.pop()
            elif kind == "clear":
                chat.before = chat.put_aside()
                chat.messages, chat.cut_off, chat.drawn, chat.tokens_after, chat.n_answers = [], [], {}, {}, 0
            elif kind == "system":
                chat.system, chat.tokens_after = text_or_none(record["content"]), {}
            elif kind == "model":
                chat.model, chat.drawn, chat.tokens_after = record["model"] + "", {}, {}
            elif kind == "load":
                chat.before = chat.put_aside()
                chat.messages, chat.system = checked_turns(path, record)
                chat.cut_off, chat.drawn, chat.tokens_after = [], {}, {}
            else:
                raise KeyError(kind)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise TranscriptError(f"line {number} of {path} is none of a transcript: correct it, or cut the file off before it") from error
    if chat is None:
        raise not_a_chat(path)
    return chat


def _given_turn(message: Message) -> Message:
    """A message as a program gave it; with calls of tools, or what they gave back, if it has them.

    Raises:
        KeyError, TypeError: it is none.
    """
    if message["role"] not in (*_ROLES, "tool"):
        raise KeyError(message["role"])
    return {**message, "content": message["content"] + ""}


def _drop_answer(chat: Conversation) -> None:
    if chat.messages and chat.messages[-1]["role"] == "assistant":
        chat.messages.pop()
    chat.cut_off = [i for i in chat.cut_off if i < len(chat.messages)]
    chat.drawn.pop(len(chat.messages), None)
    chat.tokens_after.pop(len(chat.messages), None)


def _records(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records with their line numbers. Only the last line can be torn: a line is written with its end."""
    *lines, torn = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise not_a_chat(path) if number == 1 else _damaged(path, number) from error
        if not isinstance(record, dict):
            raise not_a_chat(path) if number == 1 else _damaged(path, number)
        yield number, record
    if torn and not lines:
        raise not_a_chat(path)


def is_transcript(path: Path) -> bool:
    """Whether a file begins as a transcript does, in whatever state the rest is."""
    return _compact(_head(path)).startswith(_compact(HEADER.encode()))


def is_remnant(path: Path) -> bool:
    """Whether a file holds less than that, as when a crash came while the transcript was begun."""
    return _compact(HEADER.encode()).startswith(_compact(_head(path)))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(2 * len(HEADER))
    except OSError as error:
        raise TranscriptError(f"cannot read {path} ({error.strerror}): name a file that you can read") from error


def _compact(data: bytes) -> str:
    """The text without white space, which another program may have set otherwise."""
    return "".join(text_of(data, "replace").split())


def checked_turns(path: Path, data: Mapping[str, Any]) -> tuple[list[Message], str | None]:
    try:
        return parse_messages(data.get("messages"), _ROLES), text_or_none(data.get("system"))
    except MessageError as error:
        raise TranscriptError(f"{path} cannot be read: {error}") from None


def check_version(path: Path, data: Mapping[str, Any]) -> None:
    if data.get("version") != VERSION:
        raise TranscriptError(f"{path} has format version {data.get('version')!r}, and this kvlocal reads {VERSION}: update kvlocal")


def read_text(path: Path) -> str:
    return text_of_file(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TranscriptError(f"cannot read {path} ({error.strerror}): name a file that you can read") from error


def text_of_file(content: bytes) -> str:
    # a torn line may end within a character
    return text_of(content, "replace")


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def not_a_chat(path: Path) -> TranscriptError:
    return TranscriptError(f"{path} is neither a saved chat nor a transcript: name one that kvlocal wrote")


def _damaged(path: Path, number: int) -> TranscriptError:
    return TranscriptError(f"line {number} of {path} is damaged: correct it, or cut the file off before it")


def to_json(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    # Half a surrogate pair, as from input that was not UTF-8, turns into the escape that JSON has for it.
    return json.dumps(record, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")
