"""Tasks whose answers can be checked: conversations that end with the user, and rules that an answer follows or not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvlocal.chat.messages import MessageError, check_order, parse_messages
from kvlocal.conversations.data_file import DataError, read_data, records
from kvlocal.template.markup import Message

_RULES = ("contains", "lacks", "number", "regex")
_NUMBER = re.compile(r"(?<![\w.,])-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True)
class Rule:
    """What makes an answer right: all that it says has to be so.

    contains, lacks: texts that are in the answer, and that are not; as whole words, in upper or lower case alike
    number: the last number of the answer, None for any
    regex: a regular expression of Python's `re` that is found in the answer, None for none
    """

    contains: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    number: float | None = None
    regex: str | None = None

    @classmethod
    def parse(cls, record: Any) -> Rule:
        """The rule of an object as JSON gives it: {"contains": [...], "lacks": [...], "number": ..., "regex": ...}, each of them at will.

        Raises:
            DataError: it is none.
        """
        if not isinstance(record, dict) or not record.keys() & {*_RULES}:
            raise DataError('its check is no rule: write {"contains": ["..."]}, with lacks, number and regex in it at will')
        if unknown := sorted(record.keys() - {*_RULES}):
            raise DataError(f"its check has {unknown[0][:40]!r}, which no rule has: use {', '.join(_RULES)}")
        texts = {name: _texts(name, record[name]) for name in ("contains", "lacks") if name in record}
        number, regex = record.get("number"), record.get("regex")
        if "number" in record and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise DataError("the number of its check is none: write it without quotes")
        if "regex" in record:
            if not isinstance(regex, str) or not regex:
                raise DataError("the regex of its check is no text: write a regular expression in quotes")
            try:
                re.compile(regex)
            except (re.error, OverflowError, RecursionError) as error:
                raise DataError(f"the regex of its check cannot be used ({error}): correct it") from None
        return cls(**texts, number=None if number is None else float(number), regex=regex)

    def holds(self, answer: str) -> bool:
        """Whether an answer is right."""
        if self.number is not None:
            found = _NUMBER.findall(answer)
            if not found or float(found[-1].replace(",", "")) != self.number:
                return False
        return (
            all(pattern.search(answer) for pattern in self._wanted)
            and not any(pattern.search(answer) for pattern in self._unwanted)
            and (self.regex is None or re.search(self.regex, answer) is not None)
        )

    @cached_property
    def _wanted(self) -> Sequence[re.Pattern[str]]:
        return [_whole_words(text) for text in self.contains]

    @cached_property
    def _unwanted(self) -> Sequence[re.Pattern[str]]:
        return [_whole_words(text) for text in self.lacks]


@dataclass(frozen=True)
class CheckedTask:
    """kind: what sort of task it is. messages: a conversation that ends with the user. rule: what a right answer follows."""

    kind: str
    messages: Sequence[Message]
    rule: Rule

    @property
    def system(self) -> str | None:
        """The system prompt, None without one."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def turns(self) -> Sequence[Message]:
        """The messages without the system prompt."""
        return self.messages[0 if self.system is None else 1 :]

    def reward(self, answer: str) -> float:
        """1 for a right answer, 0 for another one."""
        return float(self.rule.holds(answer))

    def record(self) -> dict[str, Any]:
        """The object of a line of a file of tasks."""
        check: dict[str, Any] = {name: list(texts) for name in ("contains", "lacks") if (texts := getattr(self.rule, name))}
        check |= {name: value for name in ("number", "regex") if (value := getattr(self.rule, name)) is not None}
        return {"kind": self.kind, "messages": [dict(message) for message in self.messages], "check": check}


@dataclass(frozen=True)
class TaskFile:
    """The tasks of a file. digest: its SHA-256."""

    tasks: tuple[CheckedTask, ...]
    digest: str


def read_tasks(path: Path) -> TaskFile:
    """Reads a file of tasks, a JSON object a line: {"messages": [{"role", "content"}, ...], "check": {...}}, with a "kind" at will.

    The check is a rule (Rule.parse). Blank lines are skipped.

    Raises:
        DataError: the file cannot be read, one of its lines is no task, or it holds none.
    """
    content = read_data(path, "a file of tasks, one JSON object a line")
    tasks = []
    for number, record in records(path, content):
        try:
            tasks.append(_task(record))
        except (DataError, MessageError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not tasks:
        raise DataError(f'{path} holds no task: give one JSON object a line, {{"messages": [...], "check": {{...}}}}')
    return TaskFile(tuple(tasks), hashlib.sha256(content).hexdigest())


def _task(record: Any) -> CheckedTask:
    if not isinstance(record, Mapping) or "messages" not in record or "check" not in record:
        raise DataError('it has no messages or no check: write {"messages": [...], "check": {...}}')
    kind = record.get("kind", "task")
    if not isinstance(kind, str) or not kind.strip():
        raise DataError("its kind is no text: give a name for its sort of task, or leave it out")
    messages = parse_messages(record["messages"])
    check_order(messages)
    if messages[-1]["role"] != "user":
        raise DataError("its last message is not the user's: end with what is to be answered")
    return CheckedTask(kind, messages, Rule.parse(record["check"]))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"the {name} of its check is no text and no list of texts: give some")
    return tuple(texts)


def _whole_words(text: str) -> re.Pattern[str]:
    words = r"\s+".join(re.escape(word) for word in text.split())
    before, after = (r"(?<!\w)" if text.strip()[0].isalnum() else ""), (r"(?!\w)" if text.strip()[-1].isalnum() else "")
    return re.compile(before + words + after, re.IGNORECASE)
