"""Other talk, to stand between what matters in a generated chat: small talk, or dialogues that somebody gives."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import count

from kvlocal.conversations.dialogues import Dialogue, shuffled
from kvlocal.evaluation.small_talk import small_talk
from kvlocal.template.markup import Message

_MISSES = 8  # so many dialogues in a row whose first turn cannot be taken mean that the chat is long enough

# The tokens of what comes before the first turn, and of each message.
Lengths = Callable[[Sequence[Message]], list[int]]


def other_talk(seed: int, dialogues: Sequence[Dialogue]) -> Iterator[list[tuple[str, str]]]:
    """Dialogues as lists of turns, without end; small talk if none are given."""
    if dialogues:
        for again in count():
            for dialogue in shuffled(dialogues, seed + again):
                yield list(dialogue.turns)
    else:
        for pair in small_talk(random.Random(f"small talk {seed}")):
            yield [pair]


def fill(values: Collection[str], n_tokens: int, lengths: Lengths, talk: Iterator[list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Turns of other talk with at most, and about, `n_tokens` tokens, which name none of the values."""
    named = re.compile("|".join(rf"\b{re.escape(value)}\b" for value in values), re.IGNORECASE)
    # what a later turn takes, as every dialogue but the first one begins with one
    before = [("Hello.", "Hello.")]
    n_before = sum(lengths(messages_of(before)))
    pairs: list[tuple[str, str]] = []
    misses = 0
    while misses < _MISSES:
        misses += 1
        for pair in next(talk):
            n = sum(lengths(messages_of([*before, pair]))) - n_before
            if n > n_tokens or named.search("\n".join(pair)):
                # what follows would refer to it
                break
            misses = 0
            n_tokens -= n
            pairs.append(pair)
    return pairs


def scattered(
    rng: random.Random, told: Iterable[Sequence[tuple[str, str]]], last: int
) -> Iterator[tuple[tuple[float, float], tuple[str, str]]]:
    """Turns with places among other ones, numbered from 0: those of a fact in their order, before turn `last` or another one ahead of it.

    The second number of a place decides between turns at one place; it is less than 1.
    """
    for pairs in told:
        yield from zip(sorted((rng.randint(0, last), rng.random()) for _ in pairs), pairs, strict=True)


def messages_of(pairs: Iterable[tuple[str, str]]) -> list[Message]:
    """User turns and answers as messages."""
    return Dialogue(tuple(pairs)).messages
