"""The plan of one dialogue, drawn from its seed: what is given of its turns, and where the model writes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from kvlocal.training.themes import FactKind, themes

MIN_PAIRS, MAX_PAIRS = 3, 8
_MIN_TURN, _MAX_TURN = 20, 160

# What the user says of themselves, as an answer has it.
_YOURS = (("my", "your"), ("our", "your"), ("I am", "you are"), ("I was", "you were"), ("I", "you"))


@dataclass(frozen=True)
class TurnPlan:
    """One turn.

    given: how it begins; may be empty
    goes_on: the model writes the rest, else nothing follows
    limit: after how many written tokens it is to end
    """

    given: str
    goes_on: bool
    limit: int


@dataclass(frozen=True)
class PairPlan:
    """A user turn and its answer.

    recalls: the user asks for a fact that an earlier turn stated
    """

    user: TurnPlan
    answer: TurnPlan
    recalls: bool = False


@dataclass(frozen=True)
class DialoguePlan:
    """One dialogue, as its seed has it."""

    seed: int
    pairs: tuple[PairPlan, ...]


def draw_plan(seed: int) -> DialoguePlan:
    """The plan of the dialogue with this seed.

    Three to eight pairs of turns: up to four facts stated in the first half, talk about changing topics, and questions for some of the
    facts at the end.
    """
    rng = random.Random(f"plan {seed}")
    n_pairs = rng.randint(MIN_PAIRS, MAX_PAIRS)
    kinds = rng.sample(themes().facts, min(rng.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4)), n_pairs // 2 + 1))
    facts = [_Fact.draw(kind, rng) for kind in kinds]
    asked = rng.sample(facts, min(len(facts), max(1, n_pairs // 2 - 1))) if facts else []
    n_talk = n_pairs - len(asked)
    told = sorted(rng.choices(range(max(1, n_pairs // 2 - (len(asked) > 1))), k=len(facts)))
    pairs = []
    for i in range(n_talk):
        stated = " ".join(fact.statement for fact, at in zip(facts, told, strict=True) if at == i)
        pairs.append(_told(stated, rng) if stated else PairPlan(_talk(i, rng), TurnPlan("", True, _limit(rng))))
    pairs += [fact.recall(rng) for fact in asked]
    return DialoguePlan(seed, tuple(pairs))


@dataclass(frozen=True)
class _Fact:
    statement: str
    question: str
    answer: str
    value: str

    @classmethod
    def draw(cls, kind: FactKind, rng: random.Random) -> _Fact:
        thing, value = rng.choice(kind.things), rng.choice(kind.values)

        def text(templates: tuple[str, ...], thing: str) -> str:
            filled = rng.choice(templates).format(thing=thing, Thing=_capital(thing), v=value)
            return _capital(filled)

        yours = thing
        for mine, your in _YOURS:
            yours = re.sub(rf"\b{mine}\b", your, yours)
        return cls(text(kind.statements, thing), text(kind.questions, thing), text(kind.answers, yours), value)

    def recall(self, rng: random.Random) -> PairPlan:
        question = self.question if rng.random() < 0.7 else f"{rng.choice(themes().changes[:-1])} {self.question}"
        goes_on = rng.random() < 0.4
        return PairPlan(TurnPlan(question, False, 0), TurnPlan(self.answer, goes_on, rng.randint(_MIN_TURN, 60)), recalls=True)


def _limit(rng: random.Random) -> int:
    return rng.randint(_MIN_TURN, _MAX_TURN)


def _told(statement: str, rng: random.Random) -> PairPlan:
    """The user states facts: alone, before or after a request, or before whatever the model makes of it."""
    way, free = rng.random(), TurnPlan("", True, _limit(rng))
    if way < 0.25:
        thanks = TurnPlan(rng.choice(themes().thanks), rng.random() < 0.5, rng.randint(_MIN_TURN, 80))
        return PairPlan(TurnPlan(statement, False, 0), thanks)
    if way < 0.45:
        return PairPlan(TurnPlan(statement, True, rng.randint(_MIN_TURN, 80)), free)
    request = _request(rng)
    return PairPlan(TurnPlan(f"{statement} {request}" if way < 0.85 else f"{request} {statement}", False, 0), free)


def _talk(i: int, rng: random.Random) -> TurnPlan:
    """A user turn without facts: the first one is about a topic, later ones follow up or change it."""
    way = rng.random()
    if i == 0:
        if way < 0.6:
            return TurnPlan(_request(rng), way < 0.2, rng.randint(_MIN_TURN, 100))
        return TurnPlan(_opening(rng) if way < 0.9 else "", True, _limit(rng))
    if way < 0.12:
        return TurnPlan("", True, rng.randint(_MIN_TURN, 100))
    if way < 0.7:
        return TurnPlan(rng.choice(themes().follow_ups), True, rng.randint(_MIN_TURN, 100))
    if way < 0.85:
        return TurnPlan(f"{rng.choice(themes().changes)} {_request(rng)}", False, 0)
    return TurnPlan(_opening(rng) if way < 0.92 else _request(rng), way < 0.92, rng.randint(_MIN_TURN, 100))


def _opening(rng: random.Random) -> str:
    return rng.choice(themes().openings).format(s=rng.choice(themes().subjects))


def _request(rng: random.Random) -> str:
    """A whole request."""
    s, t = rng.sample(themes().subjects, 2)
    r, q = rng.sample(themes().roles, 2)
    a, b, c = rng.randint(2, 12), rng.randint(2, 40), rng.randint(2, 9)
    filled: tuple[tuple[int, Callable[[], str]], ...] = (
        (12, lambda: rng.choice(themes().questions).format(s=s, t=t)),
        (3, lambda: rng.choice(themes().code)),
        (3, lambda: rng.choice(themes().maths).format(a=a, b=b, c=c, n=rng.choice(themes().names))),
        (2, lambda: rng.choice(themes().role_play).format(r=r, q=q, s=s)),
        (5, lambda: rng.choice(themes().advice)),
        (2, lambda: rng.choice(themes().small_talk)),
        (3, lambda: rng.choice(themes().tasks)),
    )
    (make,) = rng.choices([make for _, make in filled], [weight for weight, _ in filled])
    return _capital(make())


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
