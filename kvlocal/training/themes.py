"""What seeded dialogues are about: subjects, requests, tasks, roles, and facts with the ways to tell them and to ask for them.

The texts are in themes.toml beside this file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class FactKind:
    """One sort of fact.

    things: what it may be about, as the user calls it
    values: what it may be
    statements: what the user says, with {thing}, {Thing} and {v}
    questions: what the user asks later, with {thing}
    answers: what is right, with {thing} and {Thing} (the user's "my" is "your" there) and {v}
    """

    things: tuple[str, ...]
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Themes:
    """All that dialogues are made of; themes.toml says of each list what it is for. names: first names, for sums with people in them."""

    subjects: tuple[str, ...]
    questions: tuple[str, ...]
    openings: tuple[str, ...]
    code: tuple[str, ...]
    maths: tuple[str, ...]
    roles: tuple[str, ...]
    role_play: tuple[str, ...]
    advice: tuple[str, ...]
    small_talk: tuple[str, ...]
    tasks: tuple[str, ...]
    follow_ups: tuple[str, ...]
    thanks: tuple[str, ...]
    changes: tuple[str, ...]
    names: tuple[str, ...]
    facts: tuple[FactKind, ...]


@cache
def themes() -> Themes:
    """The themes of themes.toml, read at the first call."""
    data = tomllib.loads(files("kvlocal.training").joinpath("themes.toml").read_text(encoding="utf-8"))
    values = {name: tuple(listed) for name, listed in data.pop("values").items()}
    values |= _made(values)
    general, facts = data.pop("general"), data.pop("facts")
    lists = {name: tuple(listed) for name, listed in data.items()}
    return Themes(**lists, names=values["first_names"], facts=tuple(_kind(fact, values, general) for fact in facts))


def _kind(fact: dict[str, Any], values: dict[str, tuple[str, ...]], general: dict[str, list[str]]) -> FactKind:
    texts = {name: (*fact.get(name, listed), *fact.get(f"more_{name}", ())) for name, listed in general.items()}
    return FactKind(tuple(fact["things"]), values[fact["values"]], **texts)


def _made(lists: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The values that are made from others, or from numbers."""
    days = ("1st", "2nd", "3rd", *(f"{day}th" for day in range(4, 21)), "21st", "22nd", "23rd", *(f"{day}th" for day in range(24, 31)))
    streets = zip(range(7, 787, 13), lists["street_names"] * 3, lists["street_kinds"] * 9, strict=False)
    three_digits = tuple(str(number) for number in range(103, 998, 7))
    minutes = (0, 10, 15, 20, 30, 40, 45, 50)
    return {
        "the_animals": tuple(f"the {animal}" for animal in lists["animals"]),
        "quoted_code_words": tuple(f'"{word}"' for word in lists["code_words"]),
        "full_names": tuple(f"{first} {last}" for first, last in zip(lists["first_names"], lists["last_names"] * 3, strict=False)),
        "hours": tuple(f"{hour}:{minute:02d} {half}" for hour in range(1, 13) for minute in minutes for half in ("am", "pm")),
        "dates": tuple(f"the {day} of {month}" for month in lists["months"] for day in days if (month, day) != ("February", "30th")),
        "streets": tuple(f"{number} {name} {kind}" for number, name, kind in streets),
        "small_numbers": tuple(str(number) for number in range(2, 60)),
        "three_digits": three_digits,
        "five_digits": tuple(str(number) for number in range(10427, 99991, 611)),
        "flights": tuple(f"{letters} {number}" for letters, number in zip(lists["airlines"] * 20, three_digits, strict=False)),
        "money": tuple(f"{amount} {unit}" for amount in range(40, 3000, 35) for unit in ("dollars", "euros")),
    }
