"""Reads files of dialogues, one JSON object a line: MT-Bench-101's format and plain messages."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvlocal.chat.messages import MessageError, check_order, parse_messages
from kvlocal.conversations.data_file import DataError, read_data, records
from kvlocal.template.markup import Message


@dataclass(frozen=True)
class Dialogue:
    """User turns and their answers, in order; at least one pair, no text empty.

    labels: what else its line says of it in texts, such as MT-Bench-101's `task`, by their names
    """

    turns: tuple[tuple[str, str], ...]
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def messages(self) -> list[Message]:
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for turn in self.turns for role, text in zip(roles, turn, strict=True)]


@dataclass(frozen=True)
class Data:
    """A file of dialogues.

    dialogues: those that can be used
    n_empty: how many were left out because a text of theirs is empty, or because they have no answer
    digest: SHA-256 of the file
    """

    dialogues: tuple[Dialogue, ...]
    n_empty: int
    digest: str


def load(path: Path) -> Data:
    """Reads `{"task", "id", "history": [{"user", "bot"}]}` and `{"messages": [{"role", "content"}]}` lines, also mixed.

    The former are MT-Bench-101's and, with more fields, SafeDialBench's. Blank lines are skipped, a system message and a last user turn without an
    answer are left out.

    Raises:
        DataError: the file cannot be read, one of its lines is no dialogue, or it holds none.
    """
    content = read_data(path, "a file of dialogues, one JSON object a line")
    dialogues, n_empty = [], 0
    for number, record in records(path, content):
        try:
            turns = _turns(record)
        except MessageError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        if turns and all(text.strip() for turn in turns for text in turn):
            dialogues.append(Dialogue(tuple(turns), {name: value for name, value in record.items() if isinstance(value, str)}))
        else:
            n_empty += 1
    if not dialogues:
        raise DataError(f"{path} holds no dialogue: give one JSON object a line, with its turns as history or messages")
    return Data(tuple(dialogues), n_empty, hashlib.sha256(content).hexdigest())


def shuffled(dialogues: Sequence[Dialogue], seed: int) -> list[Dialogue]:
    """The same dialogues in an order that depends on the seed alone."""
    order = list(dialogues)
    random.Random(f"dialogues {seed}").shuffle(order)
    return order


def _turns(record: Any) -> list[tuple[str, str]]:
    if isinstance(record, dict) and "history" in record:
        return _from_history(record["history"])
    if not isinstance(record, dict) or "messages" not in record:
        raise MessageError('it has no messages: write {"messages": [{"role": ..., "content": ...}]}')
    messages = parse_messages(record["messages"])
    check_order(messages)
    return _from_messages(messages)


def _from_history(history: Any) -> list[tuple[str, str]]:
    if not isinstance(history, list):
        raise MessageError('its history is not a list: write {"history": [{"user": ..., "bot": ...}]}')
    for i, turn in enumerate(history, 1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("user", "bot")):
            raise MessageError(f'turn {i} of its history is not {{"user": ..., "bot": ...}} with two texts')
    return [(turn["user"], turn["bot"]) for turn in history]


def _from_messages(messages: Sequence[Message]) -> list[tuple[str, str]]:
    turns = [message for message in messages if message["role"] != "system"]
    for i, (message, following) in enumerate(pairwise(turns), 1):
        if message["role"] == following["role"]:
            raise MessageError(f"after turn {i}, of the {message['role']}, comes another one of the same: user and assistant must alternate")
    texts = [turn["content"] for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=False))
