"""Facts that a person may tell of themselves, ways to tell them and to ask for them, and values to choose from.

The texts are in facts.toml beside this file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Topic:
    """One fact without its value.

    kind: what sort of value it has
    about: what the user calls it, as "my locker number"
    statements: what the user may say, with {about}, {About} and {value}
    questions: what the user may ask, with {about}
    verb: between what it is about and the value, "is", "is the" or "is on"
    values: all that it may have; no other kind has any of them
    """

    kind: str
    about: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    verb: str
    values: tuple[str, ...]

    def say(self, text: str, **values: str) -> str:
        """A text about this topic."""
        return text.format(about=self.about, About=_capitalised(self.about), verb=self.verb, **values)

    @property
    def lead(self) -> str:
        """How an answer begins, up to the value."""
        return f"{_capitalised(self.about.replace('my ', 'your '))} {self.verb}"


@dataclass(frozen=True)
class Facts:
    """All that is told and asked.

    corrections: what the user says to take a value back, with {about}, {verb}, {old} and {value}
    acknowledgments: what is answered to a statement
    """

    topics: tuple[Topic, ...]
    corrections: tuple[str, ...]
    acknowledgments: tuple[str, ...]


@cache
def load_facts() -> Facts:
    """The facts of facts.toml, read at the first call."""
    data = _texts()
    topics = tuple(topic for entry in data["topics"] for topic in _topics(entry, load_values(), data))
    return Facts(topics, tuple(data["corrections"]), tuple(data["acknowledgments"]))


@cache
def load_values() -> dict[str, tuple[str, ...]]:
    """What facts may be, by the names that facts.toml gives to these lists."""
    values = {name: tuple(listed) for name, listed in _texts()["values"].items()}
    values["dates"] = tuple(f"{month} {day}" for month in values["months"] for day in range(2, 29))
    values["numbers"] = tuple(str(number) for number in range(2113, 9973, 37))  # four digits that are no year
    return values


def _texts() -> dict[str, Any]:
    return tomllib.loads(files("kvlocal.evaluation").joinpath("facts.toml").read_text(encoding="utf-8"))


def _topics(entry: dict[str, Any], values: dict[str, tuple[str, ...]], data: dict[str, Any]) -> list[Topic]:
    statements = (*data["statements"], *entry.get("more_statements", ()))
    questions = tuple(data["questions_of_dates" if entry["kind"] == "date" else "questions"])
    return [Topic(entry["kind"], about, statements, questions, entry.get("verb", "is"), values[entry["values"]]) for about in entry["about"]]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
