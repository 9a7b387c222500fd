"""Generates long chats from a seed: facts stated in early turns, other talk between them, and questions about every fact."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from kvlocal.conversations.dialogues import Dialogue
from kvlocal.evaluation.facts import Topic, load_facts
from kvlocal.evaluation.other_talk import Lengths, fill, messages_of, other_talk, scattered
from kvlocal.template.markup import Message

FACTS_PER_CHAT = 8
N_DISTRACTORS = 3
N_EXAMPLES = 2

_EARLY = 0.75  # facts are stated in this part of the other talk, and the examples asked for in the rest

@dataclass(frozen=True)
class Question:
    """A question about a fact of the chat.

    kind: of the fact, "correction" for one that was told twice, wrong at first
    text: of the user turn
    lead: how an answer begins, up to the value
    answer: the value
    distractors: other values of the same kind, which the chat does not name; of a correction, the first is the one it replaced
    distance: tokens between the end of the fact's turn and the end of the history
    """

    kind: str
    text: str
    lead: str
    answer: str
    distractors: tuple[str, ...]
    distance: int


@dataclass(frozen=True)
class RecallChat:
    """history: whole turns. n_prefix, n_history: tokens before the first turn, and in all."""

    history: list[Message]
    questions: tuple[Question, ...]
    n_prefix: int
    n_history: int


@dataclass(frozen=True)
class _ToldFact:
    """kind: as in Question. statements: user turns, the last of them states the value."""

    kind: str
    topic: Topic
    value: str
    distractors: tuple[str, ...]
    statements: tuple[str, ...]


def recall_chats(n_questions: int, n_tokens: int, seed: int, lengths: Lengths, dialogues: Sequence[Dialogue] = ()) -> list[RecallChat]:
    """Chats with `n_questions` questions in all, each with a history of at most, and about, `n_tokens` tokens.

    In each, the user already asks for N_EXAMPLES more facts late in the history and gets the right answers: without them a small model goes on
    to acknowledge what it is told, whatever it remembers.

    Args:
        n_questions: FACTS_PER_CHAT of them to a chat.
        n_tokens: of a history, as `lengths` counts them; it is longer only if the facts alone are.
        seed: the same one gives the same chats.
        lengths: counts the tokens of messages.
        dialogues: what else is talked about; without them small talk.
    """
    talk = other_talk(seed, dialogues)
    chats = []
    for start in range(0, n_questions, FACTS_PER_CHAT):
        rng = random.Random(f"recall {seed} {start}")
        facts = _facts(rng, min(FACTS_PER_CHAT, n_questions - start) + N_EXAMPLES)
        chats.append(_chat(rng, facts[:-N_EXAMPLES], facts[-N_EXAMPLES:], n_tokens, lengths, talk))
    return chats


def _facts(rng: random.Random, n: int) -> list[_ToldFact]:
    """About different things, of as many kinds as there are before one comes twice, one of them a correction."""
    topics = load_facts().topics
    kinds = sorted({topic.kind for topic in topics})
    rng.shuffle(kinds)
    chosen = ["correction", *(kinds[i % len(kinds)] for i in range(n - 1))]
    facts: list[_ToldFact] = []
    used: set[str] = set()
    for kind in chosen:
        of_kind = rng.choice(kinds) if kind == "correction" else kind
        topic = rng.choice([topic for topic in topics if topic.kind == of_kind and topic.about not in {fact.topic.about for fact in facts}])
        value, *distractors = rng.sample([value for value in topic.values if value not in used], 1 + N_DISTRACTORS)
        statements: tuple[str, ...] = (topic.say(rng.choice(topic.statements), value=value),)
        if kind == "correction":
            old = distractors[0]
            statements = topic.say(rng.choice(topic.statements), value=old), topic.say(rng.choice(load_facts().corrections), value=value, old=old)
        used.update([value, *distractors])
        facts.append(_ToldFact(kind, topic, value, tuple(distractors), statements))
    return facts


def _chat(
    rng: random.Random,
    facts: list[_ToldFact],
    examples: list[_ToldFact],
    n_tokens: int,
    lengths: Lengths,
    talk: Iterator[list[tuple[str, str]]],
) -> RecallChat:
    told = [[(statement, rng.choice(load_facts().acknowledgments)) for statement in fact.statements] for fact in (*facts, *examples)]
    asked = [(_question(rng, fact), f"{fact.topic.lead} {fact.value}.") for fact in examples]
    values = [value for fact in (*facts, *examples) for value in (fact.value, *fact.distractors)]
    other = fill(values, n_tokens - sum(lengths(messages_of([*chain(*told), *asked]))), lengths, talk)
    # places among the other turns; the second number decides at one place
    placed: list[tuple[tuple[float, float], tuple[str, str]]] = [((i, 2.0), pair) for i, pair in enumerate(other)]
    early = int(_EARLY * len(other))
    placed += scattered(rng, told, max(0, early - 1))
    placed += [((rng.randint(early, max(early, len(other) - 1)), 1 + rng.random()), pair) for pair in asked]
    history = messages_of([pair for _, pair in sorted(placed)])
    sizes = lengths(history)
    ends = {message["content"]: sum(sizes[: i + 2]) for i, message in enumerate(history)}
    questions = tuple(
        Question(
            fact.kind, _question(rng, fact), fact.topic.lead, fact.value, fact.distractors, sum(sizes) - ends[fact.statements[-1]]
        )
        for fact in facts
    )
    return RecallChat(history, questions, sizes[0], sum(sizes))


def _question(rng: random.Random, fact: _ToldFact) -> str:
    return fact.topic.say(rng.choice(fact.topic.questions))
