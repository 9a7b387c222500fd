"""Generates conversations of any length from a seed: facts of several kinds all over them, other talk between, and questions at the end."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from kvlocal.conversations.dialogues import Dialogue
from kvlocal.evaluation.facts import Topic, load_facts, load_values
from kvlocal.evaluation.memory_chats import Evidence, MemoryChat, MemoryQuestion
from kvlocal.evaluation.other_talk import Lengths, fill, messages_of, other_talk, scattered

CATEGORIES = ("single fact", "updated fact", "two-hop", "date")
FACTS_PER_CATEGORY = 6
N_DISTRACTORS = 3


@dataclass(frozen=True)
class _GeneratedFact:
    """A question without evidence, the user turns that tell the fact, and how many of the last of them it rests on."""

    question: MemoryQuestion
    statements: tuple[str, ...]
    n_evidence: int


class _DistinctValues:
    """Draws values of which no two facts of a conversation have the same, not even as a wrong answer."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self.used = rng, set[str]()

    def draw(self, values: Sequence[str], n: int) -> list[str]:
        drawn = self._rng.sample([value for value in values if value not in self.used], n)
        self.used.update(drawn)
        return drawn


def memory_chats(n_chats: int, n_tokens: int, seed: int, lengths: Lengths, dialogues: Sequence[Dialogue] = ()) -> list[MemoryChat]:
    """Conversations of at most, and about, `n_tokens` tokens, each with FACTS_PER_CATEGORY questions of each category.

    single fact: told once. updated fact: told, and corrected later; the correction counts, and the first wrong answer is what was said before.
    two-hop: somebody's name is told in one turn and something of them in another; the first wrong answer is what was said of somebody else. date: a
    day, told once. All other wrong answers are of the same kind and are not named in the conversation.

    Args:
        n_chats: how many.
        n_tokens: of a history, as `lengths` counts them; it is longer only if the facts alone are.
        seed: the same one gives the same conversations.
        lengths: counts the tokens of messages.
        dialogues: what else is talked about; without them small talk.
    """
    talk = other_talk(seed, dialogues)
    return [_chat(random.Random(f"memory {seed} {i}"), n_tokens, lengths, talk) for i in range(n_chats)]


def _chat(rng: random.Random, n_tokens: int, lengths: Lengths, talk: Iterator[list[tuple[str, str]]]) -> MemoryChat:
    values = _DistinctValues(rng)
    facts = _facts(rng, values)
    told = [[(statement, rng.choice(load_facts().acknowledgments)) for statement in fact.statements] for fact in facts]
    other = fill(values.used, n_tokens - sum(lengths(messages_of(pair for pairs in told for pair in pairs))), lengths, talk)
    # places among the other turns; the second number decides at one place
    placed: list[tuple[tuple[float, float], tuple[str, str]]] = [((i, 1.0), pair) for i, pair in enumerate(other)]
    placed += scattered(rng, told, len(other))
    pairs = [pair for _, pair in sorted(placed)]
    place = {statement: 2 * i for i, (statement, _) in enumerate(pairs)}
    questions = tuple(
        replace(fact.question, evidence=tuple(Evidence(place[said], said) for said in fact.statements[-fact.n_evidence :]))
        for fact in facts
    )
    return MemoryChat(messages_of(pairs), questions)


def _facts(rng: random.Random, values: _DistinctValues) -> list[_GeneratedFact]:
    of_kind: dict[str, list[Topic]] = {}
    for topic in load_facts().topics:
        of_kind.setdefault(topic.kind if topic.kind in ("name", "date") else "other", []).append(topic)
    other = rng.sample(of_kind["other"], 2 * FACTS_PER_CATEGORY)
    return [
        *(_single(rng, values, topic, "single fact") for topic in other[:FACTS_PER_CATEGORY]),
        *(_updated(rng, values, topic) for topic in other[FACTS_PER_CATEGORY:]),
        *_two_hops(rng, values, rng.sample(of_kind["name"], FACTS_PER_CATEGORY)),
        *(_single(rng, values, topic, "date") for topic in rng.sample(of_kind["date"], FACTS_PER_CATEGORY)),
    ]


def _single(rng: random.Random, values: _DistinctValues, topic: Topic, category: str) -> _GeneratedFact:
    value, *wrong = values.draw(topic.values, 1 + N_DISTRACTORS)
    question = MemoryQuestion(category, topic.say(rng.choice(topic.questions)), topic.lead, value, tuple(wrong), ())
    return _GeneratedFact(question, (topic.say(rng.choice(topic.statements), value=value),), 1)


def _updated(rng: random.Random, values: _DistinctValues, topic: Topic) -> _GeneratedFact:
    value, old, *wrong = values.draw(topic.values, 1 + N_DISTRACTORS)
    question = MemoryQuestion("updated fact", topic.say(rng.choice(topic.questions)), topic.lead, value, (old, *wrong), ())
    told = topic.say(rng.choice(topic.statements), value=old), topic.say(rng.choice(load_facts().corrections), value=value, old=old)
    return _GeneratedFact(question, told, 1)


def _two_hops(rng: random.Random, values: _DistinctValues, people: Sequence[Topic]) -> list[_GeneratedFact]:
    """A fact about each of some people, of each kind about as many, and of each about two at least."""
    names = [values.draw(topic.values, 1)[0] for topic in people]
    hops = [_hops()[i % len(_hops())] for i in range(len(people))]
    drawn = [values.draw(load_values()[hop["values"]], N_DISTRACTORS) for hop in hops]
    facts = []
    for i, (topic, name, hop, (value, *wrong)) in enumerate(zip(people, names, hops, drawn, strict=True)):
        of_others = [drawn[j][0] for j, other in enumerate(hops) if other is hop and j != i]
        relation = topic.about.removeprefix("the name of ")
        yours = relation.replace("my ", "your ")
        lead = hop["lead"].format(Relation=yours[:1].upper() + yours[1:], relation=yours)
        question = MemoryQuestion("two-hop", hop["question"].format(relation=relation), lead, value, (rng.choice(of_others), *wrong), ())
        told = topic.say(rng.choice(topic.statements), value=name), rng.choice(hop["statements"]).format(name=name, value=value)
        facts.append(_GeneratedFact(question, told if rng.random() < 0.5 else told[::-1], 2))
    return facts


@cache
def _hops() -> list[dict[str, Any]]:
    hops: list[dict[str, Any]] = tomllib.loads(files("kvlocal.evaluation").joinpath("two_hops.toml").read_text(encoding="utf-8"))["hops"]
    return hops
