"""What is left of a long conversation when questions about it come late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Self

import numpy as np
import numpy.typing as npt

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.evaluation.dialogue import compare
from kvlocal.evaluation.distances import Distances
from kvlocal.evaluation.evidence import evidence_tokens, in_cache, survival
from kvlocal.evaluation.given_answer import read_answer
from kvlocal.evaluation.history import margin, read_history, turn_tokens
from kvlocal.evaluation.memory_chats import Evidence, MemoryChat, MemoryQuestion
from kvlocal.evaluation.recall import mean_log_probabilities
from kvlocal.evaluation.reference import Reference, log_softmax
from kvlocal.evaluation.runner import Measurement
from kvlocal.evaluation.variants import FULL, Variant
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.markup import Message

METRICS = ("choice", "reciprocal_rank", "nll", "kl", "survival")

# Nothing is removed, as in the full context, but the last queries are recorded, so that their attention can be had.
_RECORDED = Variant("snapkv", 0.0, "snapkv")
_CUT = 2048  # tokens of a conversation that are read for the attention to the evidence, where all of it is too long
_SLACK = 8  # tokens between an answer and the next turn

DISTANCES = Distances(2000, 8000, 20_000, 50_000)


@dataclass(frozen=True)
class _Chat:
    """A conversation in tokens.

    messages: how many each message has
    n_prefix, n_history: before the first message, and in all
    evidence: of each question, the tokens of its evidence, int [n]
    distances: of each question, tokens from the end of its oldest evidence to the end of the history; None without evidence
    spare: that the longest question with its longest answer takes
    """

    history: list[Message]
    questions: tuple[MemoryQuestion, ...]
    messages: list[int]
    n_prefix: int
    n_history: int
    evidence: list[npt.NDArray[np.intp]]
    distances: list[int | None]
    spare: int

    @classmethod
    def of(cls, model: Model, template: ChatTemplate, chat: MemoryChat) -> Self:
        turns = turn_tokens(model, template, chat.history)
        n_prefix, *messages = map(len, turns)
        n_history = n_prefix + sum(messages)
        evidence = [evidence_tokens(model, turns, question.evidence) for question in chat.questions]
        oldest = [sorted(question.evidence, key=lambda piece: piece.message)[:1] for question in chat.questions]
        distances = [n_history - int(evidence_tokens(model, turns, pieces)[-1]) - 1 if pieces else None for pieces in oldest]
        spare = max(_size(model, template, chat.history, question) for question in chat.questions)
        return cls(chat.history, chat.questions, messages, n_prefix, n_history, evidence, distances, spare + _SLACK)


def _size(model: Model, template: ChatTemplate, history: Sequence[Message], question: MemoryQuestion) -> int:
    """Tokens of a question with the longest answer to it."""
    options = map(question.with_lead, (question.answer, *question.distractors))
    longest = max(options, key=lambda option: len(model.tokenize(option, parse_special=False)))
    messages = [*history[-2:], {"role": "user", "content": question.text}, {"role": "assistant", "content": longest}]
    return sum(map(len, turn_tokens(model, template, messages)[-2:]))


@dataclass(frozen=True)
class _Answered:
    """How the model took the answers to a question.

    tokens, logits: of the right one behind its lead, int32 [n], and what was predicted for each, float32 [n, n_vocab]
    place: of the right one among all by likelihood, 0 for the first; None without wrong ones
    held: which of the evidence's tokens were in the cache, bool [L, H, n_evidence]
    weights: attention to them, float32 [L, H, n_evidence]; None where no queries are recorded for that
    """

    tokens: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    place: int | None
    held: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class _Expected:
    """What a reading says in which nothing is removed.

    full: metrics of the full context, and what it predicts for the right answer; None where it is too long
    weights: as in _Answered; None without evidence
    """

    full: tuple[dict[str, float], Reference] | None = None
    weights: npt.NDArray[np.float32] | None = None


class MemoryTask:
    """Long conversations, and questions that come at their end.

    A conversation is read once with compression on, turn by turn; then every question is asked with nothing more removed, its right answer given
    and, each for itself, the wrong ones. Metrics, one value a question:

    choice: 1 where the right answer has a higher mean log-probability per token than each of the others, from the first token in which they differ
    reciprocal_rank: 1 over its place among all of them by that
    nll: mean negative log-likelihood of the right answer's tokens behind its lead, in nats
    kl: KL(full || compressed) of what is predicted for them, mean per token, in nats; only where the full context fits what the model was trained for
    survival: evidence survival (kvlocal.evaluation.evidence.survival), with the attention that the last `window` queries of the right answer, which
        reach back into the question if it is short, pay to the evidence in the full context. Where that does not fit, it is the attention in a
        conversation of at most _CUT tokens, of the turns that hold the evidence and the newest ones.

    Each is also given by the question's category, `choice@category=date`, and by the tokens from the end of its oldest evidence to the end of the
    history, `choice@distance=2000-8000`.

    n_too_long: conversations that are too long for the full context: without `kl`, and without values of the full context
    """

    def __init__(
        self, model: Model, base: SessionConfig, chats: Sequence[MemoryChat], nexus: NexusTokens | None = None, name: str = "memory"
    ) -> None:
        """nexus: for the policies that need Nexus tokens. name: as rows name it."""
        self.name = name
        self._model, self._base, self._nexus = model, base, nexus
        self._template = ChatTemplate.from_model(model)
        self._chats = [_Chat.of(model, self._template, chat) for chat in chats]
        self.n_chats = len(chats)
        self.n_too_long = sum(not self._fits(chat) for chat in self._chats)
        categories = sorted({question.category for chat in chats for question in chat.questions})
        groups = [f"@category={name}" for name in categories] + [f"@distance={name}" for name in DISTANCES.names]
        self.metrics = tuple(f"{metric}{group}" for group in ("", *groups) for metric in METRICS)
        self._current: tuple[int, list[_Expected]] | None = None

    def _fits(self, chat: _Chat) -> bool:
        return chat.n_history + chat.spare + margin(self._base) <= self._model.n_ctx_train

    def measure(self, index: int, variant: Variant) -> Measurement:
        """Reads conversation `index` with one variant and asks all of its questions.

        Raises:
            KvlocalError: the conversation cannot be read so.
        """
        chat = self._chats[index]
        if variant == FULL and not self._fits(chat):
            return Measurement(0.0, {})
        expected = self._expected(index)
        values: dict[str, list[float]] = {}
        if variant == FULL:
            compression, found = 0.0, [reading.full[0] for reading in expected if reading.full]
        else:
            with self._read(chat, variant, self._base) as (session, compression):
                found = [
                    _metrics(ask(session, question, tokens), reading)
                    for question, tokens, reading in zip(chat.questions, chat.evidence, expected, strict=True)
                ]
        for question, distance, metrics in zip(chat.questions, chat.distances, found, strict=True):
            groups = ["", f"@category={question.category}", *([] if distance is None else [f"@distance={DISTANCES.name(distance)}"])]
            for name, value in metrics.items():
                for group in groups:
                    values.setdefault(f"{name}{group}", []).append(value)
        return Measurement(compression, values)

    def _read(self, chat: _Chat, variant: Variant, base: SessionConfig) -> AbstractContextManager[tuple[ChatSession, float]]:
        return read_history(self._model, base, variant, chat.history, chat.n_history, chat.n_prefix, chat.spare, self._nexus)

    def _expected(self, index: int) -> list[_Expected]:
        """What is expected of each question; kept for one conversation."""
        if self._current is None or self._current[0] != index:
            self._current = None
            chat = self._chats[index]
            self._current = index, self._read_all(chat) if self._fits(chat) else self._read_cut(chat)
        return self._current[1]

    def _read_all(self, chat: _Chat) -> list[_Expected]:
        with self._read(chat, _RECORDED, replace(self._base, budget=None)) as (session, _):
            answered = [ask(session, question, tokens, weigh=True) for question, tokens in zip(chat.questions, chat.evidence, strict=True)]
        found = []
        for answer in answered:
            reference = Reference.of(answer.tokens, answer.logits)
            metrics = _metrics(answer, _Expected(weights=answer.weights)) | {"kl": 0.0}
            found.append(_Expected((metrics, reference), answer.weights))
        return found

    def _read_cut(self, chat: _Chat) -> list[_Expected]:
        found = [_Expected() for _ in chat.questions]
        for members, turns in self._cuts(chat):
            place = {turn: i for i, turn in enumerate(turns)}
            history = [message for turn in turns for message in chat.history[2 * turn : 2 * turn + 2]]
            questions = [
                replace(
                    chat.questions[i],
                    distractors=(),
                    evidence=tuple(Evidence(2 * place[piece.message // 2] + piece.message % 2, piece.text) for piece in chat.questions[i].evidence),
                )
                for i in members
            ]
            cut = _Chat.of(self._model, self._template, MemoryChat(history, tuple(questions)))
            with self._read(cut, _RECORDED, replace(self._base, budget=None)) as (session, _):
                for i, question, tokens in zip(members, cut.questions, cut.evidence, strict=True):
                    assert len(tokens) == len(chat.evidence[i])
                    found[i] = _Expected(weights=ask(session, question, tokens, weigh=True).weights)
        return found

    def _cuts(self, chat: _Chat) -> Iterator[tuple[list[int], list[int]]]:
        """Questions that are asked after one short reading, and the turns (user turn and answer) of that, ascending.

        A question is left out if it has no evidence, or too much for any reading.
        """
        sizes = [sum(chat.messages[i : i + 2]) for i in range(0, len(chat.messages), 2)]
        most = self._model.n_ctx_train - margin(self._base) - chat.spare - chat.n_prefix
        members: list[int] = []
        turns: set[int] = set()
        for i, question in enumerate(chat.questions):
            wanted = {piece.message // 2 for piece in question.evidence}
            if not wanted or sum(sizes[turn] for turn in wanted) > most:
                continue
            if members and sum(sizes[turn] for turn in turns | wanted) > min(_CUT // 2, most):
                yield members, _with_newest(turns, sizes, min(_CUT, most))
                members, turns = [], set()
            members, turns = [*members, i], turns | wanted
        if members:
            yield members, _with_newest(turns, sizes, min(_CUT, most))


def _with_newest(turns: set[int], sizes: Sequence[int], n_tokens: int) -> list[int]:
    """These turns and as many of the newest as fit beside them, ascending."""
    left = n_tokens - sum(sizes[turn] for turn in turns)
    newest = []
    for turn in reversed(range(len(sizes))):
        if turn not in turns:
            left -= sizes[turn]
            if left < 0:
                break
            newest.append(turn)
    return sorted([*turns, *newest])


def ask(session: ChatSession, question: MemoryQuestion, evidence: npt.NDArray[np.intp], weigh: bool = False) -> _Answered:
    """Asks a question and gives each of its answers, and takes all of that back.

    evidence: the tokens of its evidence, int [n]
    weigh: the session has removed nothing and records the queries of its window: their attention to the evidence counts, after the right answer
    """
    cache, reads, weights = session.cache, [], None
    with session.hold():
        session.add_turn("user", question.text)
        held = in_cache(cache.ledger, evidence)
        for option in (question.answer, *question.distractors):
            with session.hold():
                reads.append(read_answer(session, question.with_lead(option)))
                if weigh and len(reads) == 1 and len(evidence):
                    n_query = min(session.config.window, len(cache.native.query_positions()))
                    weights = cache.native.scores(n_query=n_query)[..., evidence]
    tokens, logits = reads[0]
    lead = session.model.tokenize(question.lead, parse_special=False).tolist() if question.lead else []
    n_lead = min(len(list(takewhile(lambda pair: pair[0] == pair[1], zip(lead, tokens.tolist(), strict=False)))), len(tokens) - 1)
    place = None
    if question.distractors:
        right, *wrong = mean_log_probabilities(reads)
        place = sum(other >= right for other in wrong)
    return _Answered(tokens[n_lead:], logits[n_lead:], place, held, weights)


def _metrics(answered: _Answered, expected: _Expected) -> dict[str, float]:
    logp = log_softmax(answered.logits)
    found: dict[str, float] = {}
    if answered.place is not None:
        found |= {"choice": float(answered.place == 0), "reciprocal_rank": 1 / (1 + answered.place)}
    found["nll"] = -float(np.take_along_axis(logp, answered.tokens[:, None], axis=-1).mean(dtype=np.float64))
    if expected.full:
        reference = expected.full[1]
        found["kl"] = compare(reference, log_softmax(reference.logp), answered.logits)["kl"]
    if expected.weights is not None:
        found["survival"] = survival(expected.weights, answered.held)
    return found
