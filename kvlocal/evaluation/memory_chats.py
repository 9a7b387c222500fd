"""Long conversations with questions about them, and with the texts that each answer rests on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from kvlocal.template.markup import Message

N_DISTRACTORS = 7

# What stands before a conversation that somebody else than the user begins, and behind one that ends with the user.
_GREETING = "Hello."
_ACKNOWLEDGMENT = "I see."


@dataclass(frozen=True)
class Evidence:
    """A text that an answer rests on.

    message: the number of its message in the history
    text: it, a part of the message's content
    """

    message: int
    text: str


@dataclass(frozen=True)
class MemoryQuestion:
    """A question about a conversation.

    category: what sort of question it is
    text: of the user turn
    lead: how every answer begins, "" for nothing
    answer: the right one, behind the lead
    distractors: wrong ones
    evidence: what was said that makes it the right one; empty where nobody knows
    """

    category: str
    text: str
    lead: str
    answer: str
    distractors: tuple[str, ...]
    evidence: tuple[Evidence, ...]

    def with_lead(self, option: str) -> str:
        """A whole answer."""
        return f"{self.lead} {option}" if self.lead else option


@dataclass(frozen=True)
class MemoryChat:
    """history: user turns and answers in turns, beginning with the user and ending with an answer. questions: asked after it, each alone."""

    history: list[Message]
    questions: tuple[MemoryQuestion, ...]

    def with_questions(self, n: int, seed: int) -> Self:
        """The same chat with at most n of its questions, which the seed chooses, in their order."""
        chosen = random.Random(f"questions {seed}").sample(range(len(self.questions)), min(n, len(self.questions)))
        return replace(self, questions=tuple(self.questions[i] for i in sorted(chosen)))


class History:
    """Makes a chat of what two people say: what one of them says twice in a row becomes one message."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def say(self, role: str, text: str, before: str = "") -> Evidence:
        """Appends what the "user" or the "assistant" says, and returns where it is.

        before: put in front of it, such as a date, and no part of the evidence
        """
        if not self._messages and role == "assistant":
            self._messages.append({"role": "user", "content": _GREETING})
        text = text.strip()
        if self._messages and self._messages[-1]["role"] == role:
            self._messages[-1]["content"] += f"\n{before}{text}"
        else:
            self._messages.append({"role": role, "content": before + text})
        return Evidence(len(self._messages) - 1, text)

    def messages(self) -> list[Message]:
        """The chat so far, with an answer at its end."""
        ending = [{"role": "assistant", "content": _ACKNOWLEDGMENT}] if self._messages and self._messages[-1]["role"] == "user" else []
        return self._messages + ending


def draw_distractors(rng: random.Random, answer: str, pools: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """N_DISTRACTORS answers that are not the right one, from the first pool as long as it has some, then from the next; fewer if all have too few.

    What differs only in upper and lower case counts as the same.
    """
    found: dict[str, str] = {}
    for pool in pools:
        candidates = {other.casefold(): other for other in pool if other.casefold() not in {answer.casefold(), *found}}
        keys = sorted(candidates)
        for key in rng.sample(keys, min(len(keys), N_DISTRACTORS - len(found))):
            found[key] = candidates[key]
    return tuple(found.values())
