"""Rollouts: several answers to each task, drawn by llama.cpp with compression going on, and what every token of them saw."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from kvlocal import policies
from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.kept_tokens import Change, KeptTokens
from kvlocal.cache.noted_cells import Arrays
from kvlocal.chat.answering import text_of
from kvlocal.chat.beside import slots_of_kind
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import log_probabilities
from kvlocal.llama.slots import Slot, SlotsInStep
from kvlocal.policies import Policy
from kvlocal.template.answer import AnswerStream
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.markup import Message
from kvlocal.training.draw import TOP_P, draw
from kvlocal.training.tasks import CheckedTask


@dataclass(frozen=True)
class DrawnAnswer:
    """One answer.

    text: what it says
    tokens: int32 [n], as they were drawn, the one that ends it among them; at least one
    logprobs: float64 [n], the logarithm of each one's probability at the temperature it was drawn with; at temperature 0 at 1
    cut: it was not at its end after the most tokens it may have
    reward: 1 if it is right, else 0
    changes: of the cells, those while the conversation was read among them
    """

    text: str
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float64]
    cut: bool
    reward: float
    changes: Sequence[Change]


@dataclass(frozen=True)
class Group:
    """The answers to one task.

    prompt: int32 [P], all tokens before the answers
    changes: of the cells, while these were read
    """

    task: CheckedTask
    prompt: npt.NDArray[np.int32]
    changes: Sequence[Change]
    answers: Sequence[DrawnAnswer]

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """Of each answer, [n]."""
        return np.array([answer.reward for answer in self.answers])


@dataclass(frozen=True)
class _Read:
    """A conversation as it is before an answer. logits: float32 [n_vocab], of the answer's first token. snapshot: of its cells."""

    prompt: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    n_pinned: int
    kept: KeptTokens
    snapshot: Arrays
    template: ChatTemplate


class _Drawing:
    """An answer that is drawn.

    number: of its task
    read: the conversation
    kept: the record of what its tokens see
    logits: of its next token, float32 [n_vocab]
    """

    def __init__(self, number: int, read: _Read, rng: np.random.Generator) -> None:
        self.number, self.read, self.rng = number, read, rng
        self.kept, self.logits = read.kept.copy(), read.logits
        self.stream: AnswerStream | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.cut = False


def exact_cache(config: SessionConfig) -> SessionConfig:
    """The same with a cache of which a record of kept tokens says all: keys stay at their positions, and what is evicted is gone.

    Raises:
        KvlocalError: the policy does not allow that.
    """
    known = [name for name in policies.POLICIES if _is_recorded(policies.make(name))]
    if not _is_recorded(policies.make(config.policy, config.policy_args)):
        raise KvlocalError(f"answers under the policy {config.policy} depend on more than the cells that are kept: choose one of {', '.join(known)}")
    return replace(config, positions="original", archive="off", idle=False, read_stride=config.slack)


def _is_recorded(policy: Policy) -> bool:
    return not (policy.rotates or policy.needs & {"nexus", "reread"} or isinstance(policy, policies.Recall))


class _Reader(ChatSession):
    """A session that stops where an answer begins."""

    def read_up_to_answer(self, messages: Sequence[Message]) -> npt.NDArray[np.float32]:
        """Reads a conversation; returns the logits of the answer's first token, float32 [n_vocab]."""
        self.restore(messages)
        self._reader.read(self.template.answer_start(self._history_for_template()))
        return self.cache.context.logits().copy()


class Rollouts:
    """Answers tasks, several at a time in cells of their own; a context manager.

    A conversation is read once, and its answers go on from a copy of its cells. What is drawn depends on the seeds, on how many decode together, and
    on the machine.

    model: the weights, with the adapters that are on
    config: as `exact_cache` gives it
    parallel: how many answers decode together
    temperature: what logits are divided by; with 0 the likeliest token is taken
    max_tokens: the longest answer

    Raises:
        KvlocalError: no session is possible with this configuration, or there is not enough memory.
    """

    def __init__(self, model: Model, config: SessionConfig, *, parallel: int, temperature: float, max_tokens: int) -> None:
        self._model, self._config = model, config
        self._temperature, self._max_tokens = temperature, max_tokens
        self._slots, _ = slots_of_kind(SlotsInStep, parallel, model, config)
        self.parallel = parallel

    def groups(self, tasks: Sequence[CheckedTask], seeds: Sequence[Sequence[int]], n_answers: int) -> list[Group]:
        """n_answers to each task.

        seeds: of the random numbers of each task

        Raises:
            KvlocalError: llama.cpp failed, or a conversation is too long for the cache.
        """
        read = [self._read(task) for task in tasks]
        waiting = deque(
            _Drawing(i, conversation, np.random.default_rng([*seed, n]))
            for i, (conversation, seed) in enumerate(zip(read, seeds, strict=True))
            for n in range(n_answers)
        )
        answers: list[list[DrawnAnswer]] = [[] for _ in tasks]
        drawings = list(waiting)
        self._draw_all(waiting)
        for drawing in drawings:
            answers[drawing.number].append(self._answer(tasks[drawing.number], drawing))
        return [
            Group(task, found.prompt, found.kept.changes, of_task) for task, found, of_task in zip(tasks, read, answers, strict=True)
        ]

    def _draw_all(self, waiting: deque[_Drawing]) -> None:
        """Draws answers to their ends; where one ends, the next one begins in its place."""
        under_way: list[tuple[_Drawing, BudgetedCache]] = []
        try:
            while waiting or under_way:
                while waiting and len(under_way) < self.parallel:
                    drawing = waiting.popleft()
                    under_way.append((drawing, self._continued(drawing)))
                ended = [cache for drawing, cache in under_way if not self._draw(drawing)]
                for cache in ended:
                    cache.close()
                under_way = [(drawing, cache) for drawing, cache in under_way if cache not in ended]
                self._slots.decode_ahead(
                    [(cast(Slot, cache.context), drawing.tokens[-1], cache.ledger.next_position) for drawing, cache in under_way]
                )
                for drawing, cache in under_way:
                    cache.append(np.array([drawing.tokens[-1]], np.int32), "decode")
                    drawing.logits = cache.context.logits()
        finally:
            for _, cache in under_way:
                cache.close()

    def _read(self, task: CheckedTask) -> _Read:
        config = replace(self._config, system=task.system)
        with _Reader(self._model, config, undo=False, make_context=self._slots.open, begin=False) as session:
            kept = session.cache.compressor.observe = KeptTokens()
            logits = session.read_up_to_answer(task.turns)
            ledger = session.cache.ledger
            return _Read(ledger.ids.copy(), logits, ledger.n_pinned, kept, session.cache.snapshot(), session.template)

    def _continued(self, drawing: _Drawing) -> BudgetedCache:
        """A copy of the cells in which a conversation is, whose changes the answer's record notes."""
        cache = BudgetedCache(self._model, self._config, undo=False, make_context=self._slots.open)
        try:
            cache.begin(drawing.read.n_pinned)
            cache.resume(drawing.read.snapshot)
        except BaseException:
            cache.close()
            raise
        cache.compressor.observe = drawing.kept
        template = drawing.read.template
        drawing.stream = template.answer_stream(self._model, (), template.answer_format())
        return cache

    def _draw(self, drawing: _Drawing) -> bool:
        """Draws the next token of an answer; whether the answer goes on behind it."""
        assert drawing.stream is not None
        token, logprob = _draw(drawing.logits, self._temperature, drawing.rng)
        drawing.tokens.append(token)
        drawing.logprobs.append(logprob)
        if token in drawing.read.template.end_tokens:
            return False
        drawing.stream.push(token)
        if drawing.stream.stopped:
            return False
        drawing.cut = len(drawing.tokens) == self._max_tokens
        return not drawing.cut

    def _answer(self, task: CheckedTask, drawing: _Drawing) -> DrawnAnswer:
        template = drawing.read.template
        text = text_of(template.answer_stream(self._model, (), template.answer_format()), drawing.tokens, template.end_tokens)
        return DrawnAnswer(
            text, np.array(drawing.tokens, np.int32), np.array(drawing.logprobs), drawing.cut, task.reward(text), drawing.kept.changes
        )

    def close(self) -> None:
        """Frees the cells. Closing twice is harmless."""
        self._slots.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _draw(logits: npt.NDArray[np.float32], temperature: float, rng: np.random.Generator) -> tuple[int, float]:
    """A token by these logits [n_vocab] and the logarithm of its probability at the temperature, among all tokens. At temperature 0 it is the
    likeliest one, with its probability at 1.
    """
    if not temperature:
        token = int(logits.argmax())
    else:
        token = int(draw(logits[None], np.array([temperature], np.float32), np.array([rng.random()]), TOP_P, min_p=0.0)[0])
    return token, log_probabilities(logits / (temperature or 1.0), token, 0)[0]
