"""Makes tasks from a seed: something is said early in a conversation, other talk follows, and the last turn asks for it."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from kvlocal.errors import KvlocalError
from kvlocal.template.markup import Message
from kvlocal.training.tasks import CheckedTask, Rule

Part = Literal["training", "held_out"]
Pair = tuple[str, str]

# English has about so many characters a token, and a message some tokens of markup
_CHARACTERS, _MARKUP = 4.5, 5
_NOTED = ("Okay.", "I see.", "Noted.", "Got it.", "Understood.", "All right.")
_CORRECTING = ("I was wrong before.", "I made a mistake.", "That has changed.")
_SHORTLY = "Answer in one short sentence."
_PLAIN = "You are a helpful assistant."


@dataclass(frozen=True)
class _Lists:
    """What one part of the tasks is made of; as tasks.toml has them."""

    people: list[str]
    places: list[str]
    animals: list[str]
    colours: list[str]
    objects: list[str]
    jobs: list[str]
    words: list[str]
    goods: list[str]
    endings: list[str]
    beginnings: list[str]
    talk: list[Pair]


@dataclass(frozen=True)
class _Outline:
    """A task before it has a history.

    told: turns that have to come in this order, with answers
    question: the last turn
    system: the system prompt
    dressed: makes answers to other talk what the system prompt wants
    """

    told: list[Pair]
    question: str
    rule: Rule
    system: str = _PLAIN
    dressed: Callable[[str], str] = str


def make_tasks(n: int, seed: int, part: Part, n_tokens: tuple[int, int], kinds: Sequence[str] = ()) -> list[CheckedTask]:
    """n tasks, the kinds in turns. The parts have no content in common but the ways to tell and to ask.

    recall: one of one to three facts of one sort is asked for, whose values must not be mixed up. correction: a fact was told wrongly at first. sum:
    a number was told, and in up to two more turns what was added or taken away. copy: one to three words are repeated in their order. format: the
    system prompt says how answers begin or end, and the question is about something else.

    Args:
        n: how many.
        seed: the same one gives the same tasks, whatever n is.
        part: "training" or "held_out".
        n_tokens: the least and the most tokens of a conversation, about.
        kinds: which of KINDS, all of them if empty.

    Raises:
        KvlocalError: there is no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise KvlocalError(f"there is no kind of task {kind!r}: use one of {', '.join(KINDS)}")
    chosen = list(kinds) or list(KINDS)
    return [_task(chosen[i % len(chosen)], random.Random(f"task {part} {seed} {i}"), part, n_tokens) for i in range(n)]


def _task(kind: str, rng: random.Random, part: Part, n_tokens: tuple[int, int]) -> CheckedTask:
    lists = _lists(part)
    outline = KINDS[kind](rng, lists)
    room = rng.randint(*n_tokens) - _length(outline.system) - _length(outline.question)
    room -= sum(_length(text) for pair in outline.told for text in pair)
    other: list[Pair] = []
    while True:
        for question, answer in rng.sample(lists.talk, len(lists.talk)):
            if question in outline.question:
                continue
            pair = (question, outline.dressed(answer))
            room -= _length(pair[0]) + _length(pair[1])
            if room < 0:
                break
            other.append(pair)
        if room < 0:
            break
    # what is told stands in the first two thirds, in its order
    places = sorted(rng.randint(0, 2 * len(other) // 3) for _ in outline.told)
    for place, pair in reversed(list(zip(places, outline.told, strict=True))):
        other.insert(place, pair)
    messages: list[Message] = [{"role": "system", "content": outline.system}]
    for question, answer in other:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return CheckedTask(kind, [*messages, {"role": "user", "content": outline.question}], outline.rule)


def _length(text: str) -> int:
    return round(len(text) / _CHARACTERS) + _MARKUP


def _say(rng: random.Random, text: str) -> Pair:
    return text, rng.choice(_NOTED)


# What is told of somebody or something, how it is asked for, and from which lists.
_FACTS = (
    ("{who} lives in {what}.", "In which city does {who} live?", "people", "places"),
    ("{who} has {what} as a pet.", "Which pet does {who} have?", "people", "animals"),
    ("{who} works as {what}.", "What is the job of {who}?", "people", "jobs"),
    ("My {who} is {what}.", "What colour is my {who}?", "objects", "colours"),
)


def _recall(rng: random.Random, lists: _Lists) -> _Outline:
    telling, asking, of, values = rng.choice(_FACTS)
    n = rng.randint(1, 3)
    about, told = rng.sample(getattr(lists, of), n), rng.sample(getattr(lists, values), n)
    i = rng.randrange(n)
    rule = Rule(contains=(_bare(told[i]),), lacks=tuple(_bare(value) for j, value in enumerate(told) if j != i))
    said = [_say(rng, telling.format(who=who, what=what)) for who, what in zip(about, told, strict=True)]
    return _Outline(said, f"{asking.format(who=about[i])} {_SHORTLY}", rule)


def _correction(rng: random.Random, lists: _Lists) -> _Outline:
    telling, asking, of, values = rng.choice(_FACTS)
    who, (old, new) = rng.choice(getattr(lists, of)), rng.sample(getattr(lists, values), 2)
    corrected = f"{rng.choice(_CORRECTING)} {telling.format(who=who, what=new)}"
    said = [_say(rng, telling.format(who=who, what=old)), _say(rng, corrected)]
    return _Outline(said, f"{asking.format(who=who)} {_SHORTLY}", Rule(contains=(_bare(new),), lacks=(_bare(old),)))


def _sum(rng: random.Random, lists: _Lists) -> _Outline:
    goods, result = rng.choice(lists.goods), rng.randint(2, 9)
    said = [_say(rng, f"I have {result} {goods}.")]
    for _ in range(rng.randint(0, 2)):
        n = rng.randint(1, 5)
        if rng.random() < 0.7 or n >= result:
            result += n
            said.append(_say(rng, f"I bought {n} more {goods}."))
        else:
            result -= n
            said.append(_say(rng, f"I gave away {n} of my {goods}."))
    return _Outline(said, f"How many {goods} do I have now? {_SHORTLY}", Rule(number=result))


def _copy(rng: random.Random, lists: _Lists) -> _Outline:
    words = rng.sample(lists.words, rng.randint(1, 3))
    few = len(words) == 1
    said = [_say(rng, f"The secret {'word is' if few else 'words are'}: {' '.join(words)}")]
    return _Outline(said, f"What {'is the secret word' if few else 'are the secret words'}? {_SHORTLY}", Rule(contains=(" ".join(words),)))


def _format(rng: random.Random, lists: _Lists) -> _Outline:
    question = f"{rng.choice(lists.talk)[0]} {_SHORTLY}"
    if rng.random() < 0.5:
        ending = rng.choice(lists.endings)
        rule = Rule(regex=re.escape(ending) + r"\s*$")
        return _Outline([], question, rule, f'{_PLAIN} End every answer with "{ending}"', lambda answer: f"{answer} {ending}")
    beginning = rng.choice(lists.beginnings)
    rule = Rule(regex=r"^\s*" + re.escape(beginning))
    return _Outline([], question, rule, f'{_PLAIN} Begin every answer with "{beginning}"', lambda answer: f"{beginning} {answer}")


KINDS: dict[str, Callable[[random.Random, _Lists], _Outline]] = {
    "recall": _recall,
    "correction": _correction,
    "sum": _sum,
    "copy": _copy,
    "format": _format,
}


def _bare(value: str) -> str:
    """A value without its article."""
    return re.sub(r"^an? ", "", value)


@cache
def _lists(part: Part) -> _Lists:
    data = tomllib.loads(files("kvlocal.training").joinpath("tasks.toml").read_text(encoding="utf-8"))[part]
    return _Lists(**data | {"talk": [(question, answer) for question, answer in data["talk"]]})
