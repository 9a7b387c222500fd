"""The word problems of GSM8K, told in turns: one sentence a turn, those of several problems mixed, and then what each of them asks for."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from kvlocal.conversations.data_file import DataError, read_data, records
from kvlocal.evaluation.facts import load_facts
from kvlocal.evaluation.memory_chats import Evidence, MemoryChat, MemoryQuestion
from kvlocal.evaluation.other_talk import messages_of

N_DISTRACTORS = 4

_LEAD = "####"  # how the data set begins its answers
_OPENING = ("I will tell you some problems bit by bit, and then ask you about each of them.", "All right. I will listen until you ask.")
_MANY_FACTS = 4
# the end of a sentence, and not of a title or a time
_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[ap]\.m\.)(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+"
)


@dataclass(frozen=True)
class Problem:
    """facts: the sentences before the last. question: the last one. answer: its number."""

    facts: tuple[str, ...]
    question: str
    answer: int


@dataclass(frozen=True)
class Problems:
    """A file of problems.

    problems: those that can be told in turns
    n_left_out: how many have a single sentence, or an answer that is no whole number
    digest: SHA-256 of the file
    """

    problems: tuple[Problem, ...]
    n_left_out: int
    digest: str


def load_problems(path: Path) -> Problems:
    """Reads `{"question", "answer"}` lines as GSM8K has them (Cobbe et al., 2021): the answer's number stands behind `####`.

    Raises:
        DataError: the file cannot be read, one of its lines is no such problem, or it holds none that can be told in turns.
    """
    content = read_data(path, "GSM8K's problems, one JSON object a line")
    found, n_left_out = [], 0
    for number, record in records(path, content):
        try:
            problem = _problem(record)
        except _BadProblem as error:
            raise DataError(f'{path}, line {number}: {error}: write {{"question": ..., "answer": "... {_LEAD} 18"}}') from None
        if problem:
            found.append(problem)
        else:
            n_left_out += 1
    if not found:
        raise DataError(f"{path} holds no problem of two sentences or more: give GSM8K's problems, one JSON object a line")
    return Problems(tuple(found), n_left_out, hashlib.sha256(content).hexdigest())


class _BadProblem(Exception):
    """What is wrong with a line."""


def _problem(record: Any) -> Problem | None:
    """None for one that cannot be told in turns."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
        raise _BadProblem("it has no question and answer as texts")
    _, lead, number = record["answer"].rpartition(_LEAD)
    if not lead:
        raise _BadProblem(f"its answer has no {_LEAD}")
    number = number.strip().replace(",", "")
    sentences = [sentence for sentence in _SENTENCE_END.split(record["question"].strip()) if sentence.strip()]
    if len(sentences) < 2 or not re.fullmatch(r"-?\d{1,15}", number):
        return None
    return Problem(tuple(sentences[:-1]), sentences[-1], int(number))


def gsm8k_chats(problems: Sequence[Problem], together: int, seed: int) -> list[MemoryChat]:
    """Chats of `together` problems each, in the order given. Their sentences come in user turns that name the problem, mixed so that each
    problem keeps its order; every problem's question comes at the end.

    An answer is `#### 18`, and the wrong ones are the numbers next to it, none of them below zero unless it is. The category of a question is how
    many sentences tell its facts.

    seed: mixes them
    """
    return [_chat(problems[start : start + together], random.Random(f"gsm8k {seed} {start}")) for start in range(0, len(problems), together)]


def _chat(problems: Sequence[Problem], rng: random.Random) -> MemoryChat:
    order = [i for i, problem in enumerate(problems) for _ in problem.facts]
    rng.shuffle(order)
    facts = [iter(problem.facts) for problem in problems]
    evidence: list[list[Evidence]] = [[] for _ in problems]
    pairs = [_OPENING]
    for i in order:
        told = _of_problem(i, next(facts[i]))
        evidence[i].append(Evidence(2 * len(pairs), told))
        pairs.append((told, rng.choice(load_facts().acknowledgments)))
    questions = tuple(
        MemoryQuestion(_category(problem), _of_problem(i, problem.question), _LEAD, str(problem.answer), nearest(problem.answer), tuple(evidence[i]))
        for i, problem in enumerate(problems)
    )
    return MemoryChat(messages_of(pairs), questions)


def _of_problem(index: int, sentence: str) -> str:
    return f"Problem {index + 1}: {sentence}"


def _category(problem: Problem) -> str:
    n = len(problem.facts)
    return f"{_MANY_FACTS} or more facts" if n >= _MANY_FACTS else f"{n} fact{'s' if n > 1 else ''}"


def nearest(number: int) -> tuple[str, ...]:
    """The N_DISTRACTORS whole numbers that are nearest to it, the smaller one first of two; none below zero unless it is."""
    around = (other for step in count(1) for other in (number - step, number + step) if other >= 0 or number < 0)
    return tuple(str(next(around)) for _ in range(N_DISTRACTORS))
