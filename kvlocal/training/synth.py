"""Lets a model write dialogues with itself, several sequences at a time."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

import kvlocal
from kvlocal.errors import KvlocalError
from kvlocal.files.fingerprint import fingerprint, run_key
from kvlocal.files.line_file import LineFile
from kvlocal.llama.context import MAX_SEQUENCES, Context
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.markup import Message
from kvlocal.template.pieces import Piece
from kvlocal.training.dialogue_plan import MIN_PAIRS, PairPlan, TurnPlan, draw_plan
from kvlocal.training.draw import draw
from kvlocal.training.turn_text import FENCE, flaw, in_code, sentence_ends

# The dialogues of a run have its seed times this, and the numbers that follow, as their own seeds.
SEEDS_PER_RUN = 10**6

_USER_TEMPERATURE, _ANSWER_TEMPERATURE = 0.9, 0.7
N_CELLS = 2048
# A turn that has reached its limit may go on to the end of its sentence, or of its code, for so many tokens.
_GRACE, _CODE_GRACE = 32, 96
# A turn with a flaw is written anew so many times.
_RETRIES = 2
# What a pair of turns takes at most, with what is given and the markup.
_TALK_CELLS, _RECALL_CELLS = 2 * (160 + _CODE_GRACE) + 160, 60 + _CODE_GRACE + 160


@dataclass(frozen=True)
class WrittenDialogue:
    """What became of one plan.

    seed: the plan's
    messages: user turns and answers, whole pairs; none if it is to be dropped
    n_tokens: what they take in the cache, with the template's markup
    flaw: why it was cut off or dropped
    """

    seed: int
    messages: tuple[Message, ...]
    n_tokens: int
    flaw: str | None = None


@dataclass(frozen=True)
class SynthSettings:
    """What dialogues depend on, besides the model.

    seed: of everything that is random, from 0
    parallel: how many are written at a time; batches of another size round differently, which gives other dialogues
    n_threads: threads; by default one per core this process may use
    """

    seed: int = 0
    parallel: int = 16
    n_threads: int | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise KvlocalError(f"the seed is {self.seed}, but must be at least 0")
        if not 1 <= self.parallel <= MAX_SEQUENCES:
            raise KvlocalError(f"{self.parallel} dialogues at a time cannot be written: choose 1 to {MAX_SEQUENCES}")

    def key(self, model: Model) -> str:
        """Names a run by everything its dialogues depend on."""
        depends = {"kvlocal": kvlocal.__version__, "model_sha256_of_blocks": fingerprint(model.path)}
        return run_key(depends | {"seed": self.seed, "parallel": self.parallel})


class DataFile:
    """The dialogues of one run, a JSON line each: `{"messages", "seed", "tokens", "run"}`; a context manager.

    n_dialogues, n_tokens: how much it holds
    next: which plan of the run comes next, counted from 0

    Raises:
        KvlocalError: it cannot be read or written, or it holds something else.
    """

    def __init__(self, path: Path, key: str, settings: SynthSettings) -> None:
        other = f"{path} holds something else than dialogues of this model and these settings: name another file"
        self._file, self._key = LineFile(path, b'{"messages": [', self._take, other), key
        self._first_seed = settings.seed * SEEDS_PER_RUN
        self.n_dialogues = self.n_tokens = self.next = 0

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def _take(self, line: bytes) -> None:
        """A dialogue that is there."""
        record = json.loads(line)
        if record["run"] != self._key:
            raise ValueError("it is of another run")
        self._count(record["seed"], record["tokens"])

    def add(self, dialogue: WrittenDialogue) -> None:
        """Keeps one more dialogue.

        Raises:
            KvlocalError: it cannot be written; the file then ends where it did before.
        """
        messages = list(dialogue.messages)
        self._file.append({"messages": messages, "seed": dialogue.seed, "tokens": dialogue.n_tokens, "run": self._key})
        self._count(dialogue.seed, dialogue.n_tokens)

    def _count(self, seed: int, n_tokens: int) -> None:
        self.n_dialogues += 1
        self.n_tokens += n_tokens
        self.next = seed - self._first_seed + 1

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()


def synthesize(model: Model, data: DataFile, n_tokens: int, settings: SynthSettings) -> Iterator[WrittenDialogue]:
    """Fills a file up to so many tokens, and yields each dialogue once it is in it, and those that were dropped.

    A file that was left unfinished ends as it would have without the interruption, bit by bit where llama.cpp runs on the CPU.

    Raises:
        KvlocalError: the file cannot be written, or llama.cpp failed.
    """
    if data.n_tokens >= n_tokens:
        return
    for dialogue in dialogues(model, settings, data.next):
        if dialogue.messages:
            data.add(dialogue)
        yield dialogue
        if data.n_tokens >= n_tokens:
            return


def dialogues(model: Model, settings: SynthSettings, start: int = 0) -> Iterator[WrittenDialogue]:
    """The run's dialogues in the order of their plans, without end, those to be dropped as well.

    One sequence each; a finished one makes place for the next. Every batch holds one token of every sequence, which is given or drawn, so
    that llama.cpp computes the same for a dialogue whatever stands beside it.

    Args:
        model: writes them.
        settings: how.
        start: the first plan.
    """
    n = settings.parallel
    scribe = _Scribe(model, min(N_CELLS, model.n_ctx_train))
    numbers = iter(range(start, SEEDS_PER_RUN))
    sequences = np.arange(n, dtype=np.int32)
    tokens, positions = np.empty((2, n), dtype=np.int32)
    finished: dict[int, WrittenDialogue] = {}
    with Context(model, n_cells=scribe.n_cells, n_ubatch=n, n_seq_max=n, n_threads=settings.n_threads) as context:

        def begin() -> _Sequence:
            number = next(numbers, None)
            if number is None:
                raise KvlocalError(f"a run has at most {SEEDS_PER_RUN} dialogues: start another one with another seed")
            return _Sequence(number, scribe, settings.seed * SEEDS_PER_RUN + number)

        writing = [begin() for _ in range(n)]
        while True:
            for i, sequence in enumerate(writing):
                if sequence.rewind:
                    context.remove(i, sequence.position - sequence.rewind, -1)
                tokens[i], positions[i] = sequence.advance()
            context.decode_sequences(tokens, positions, sequences)
            drawing = [i for i, sequence in enumerate(writing) if not sequence.feed]
            if not drawing:
                continue
            logits = context.logits_all()[drawing]
            scribe.forbid(logits, [writing[i].may_end for i in drawing])
            temperature = np.array([writing[i].temperature for i in drawing], dtype=np.float32)
            drawn = draw(logits, temperature, np.array([writing[i].random.random() for i in drawing]))
            for i, token in zip(drawing, drawn.tolist(), strict=True):
                done = writing[i].take(token)
                if done:
                    finished[writing[i].number] = done
                    context.clear(i)
                    writing[i] = begin()
            while start in finished:
                yield finished.pop(start)
                start += 1


@dataclass(frozen=True)
class _Step:
    """What a dialogue wants next: to go back, to be fed, and then a token.

    feed: at least one token
    rewind: how many of the last tokens are taken back before
    may_end: whether the turn may be over with the next token
    """

    feed: list[int]
    rewind: int
    temperature: float
    may_end: bool


class _Sequence:
    """A dialogue in a sequence of the context."""

    def __init__(self, number: int, scribe: _Scribe, seed: int) -> None:
        self.number, self.random = number, random.Random(f"tokens {seed}")
        self.position = 0
        self._author = _Author(scribe, seed).write()
        self._obey(next(self._author))

    def _obey(self, step: _Step) -> None:
        self.feed, self.rewind = deque(step.feed), step.rewind
        self.temperature, self.may_end = step.temperature, step.may_end

    def advance(self) -> tuple[int, int]:
        """The next token to decode, and its position."""
        position = self.position - self.rewind
        self.position, self.rewind = position + 1, 0
        return self.feed.popleft(), position

    def take(self, token: int) -> WrittenDialogue | None:
        """Goes on with the token that was drawn; the dialogue, if that ends it."""
        try:
            self._obey(self._author.send(token))
        except StopIteration as end:
            return end.value
        return None


class _Scribe:
    """What all dialogues share: the vocabulary and the markup."""

    def __init__(self, model: Model, n_cells: int) -> None:
        self.model, self.n_cells = model, n_cells
        self.template = template = ChatTemplate.from_model(model)
        control = load().llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
        controls = [token for token in range(model.n_vocab) if model.token_attributes(token) & control]
        # a sliding window forgets what would come back into it
        self.can_rewind = not model.n_swa and not model.is_hybrid
        self.ends = template.end_tokens
        self._ends = np.array(sorted(self.ends), dtype=np.int64)
        self._forbidden = np.array([token for token in controls if token not in self.ends], dtype=np.int64)
        texts = {model.token_bytes(token, special=True).decode("utf-8", "replace") for token in {*controls, *self.ends}}
        markup = [template.user_end([]), template.user_start([{"role": "user", "content": "a"}], "")]
        self.stops = tuple(text for pieces in markup if (text := "".join(piece.text for piece in pieces).strip()))
        self.markers = [*sorted(text for text in texts if len(text) > 2), *self.stops]

    def forbid(self, logits: np.ndarray, may_end: list[bool]) -> None:
        """Makes impossible, in place, what no turn may contain and, where a turn may not be over, its end."""
        logits[:, self._forbidden] = -np.inf
        must_go_on = np.flatnonzero(~np.array(may_end))
        logits[must_go_on[:, None], self._ends] = -np.inf

    def tokens(self, pieces: list[Piece]) -> list[int]:
        return [int(token) for _, tokens in self.template.tokens(self.model, pieces) for token in tokens]


class _Author:
    """Writes one dialogue: a coroutine that asks for tokens and ends with the dialogue."""

    def __init__(self, scribe: _Scribe, seed: int) -> None:
        self._scribe, self._template = scribe, scribe.template
        self._plan = draw_plan(seed)
        self._messages: list[Message] = []
        # what is not in the cache yet, before it is tokenized and after
        self._pieces = self._template.prefix(None)
        self._feed: list[int] = []
        self._rewind = 0
        # tokens in the cache
        self._length = 0

    def write(self) -> Generator[_Step, int, WrittenDialogue]:
        whole: tuple[Message, ...] = ()
        n_tokens, fault = 0, None
        for pair in self._plan.pairs:
            if self._length + (_RECALL_CELLS if pair.recalls else _TALK_CELLS) > self._scribe.n_cells:
                continue
            fault = yield from self._write_pair(pair)
            if fault:
                break
            whole = tuple(self._messages)
            n_tokens = self._length + len(self._feed) - self._rewind + len(self._scribe.tokens(self._pieces))
        if len(whole) < 2 * MIN_PAIRS:
            return WrittenDialogue(self._plan.seed, (), 0, fault or "too short")
        return WrittenDialogue(self._plan.seed, whole, n_tokens, fault)

    def _write_pair(self, pair: PairPlan) -> Generator[_Step, int, str | None]:
        before = list(self._messages)
        self._pieces += self._template.user_start(before, pair.user.given)
        fault = yield from self._write_turn("user", pair.user, _USER_TEMPERATURE)
        if fault:
            return fault
        self._pieces += self._template.user_end(before)
        if pair.answer.given:
            self._pieces += self._template.given_assistant(self._messages, pair.answer.given)
        else:
            self._pieces += self._template.answer_start(before)
        return (yield from self._write_turn("assistant", pair.answer, _ANSWER_TEMPERATURE))

    def _write_turn(self, role: str, part: TurnPlan, temperature: float) -> Generator[_Step, int, str | None]:
        """Adds a turn whose given part is among the pieces already; what is wrong with it, or None."""
        earlier = [message["content"] for message in self._messages]
        if not part.goes_on:
            self._messages.append({"role": role, "content": part.given})
            return None
        self._feed += self._scribe.tokens(self._pieces)
        self._pieces = []
        start, last = self._length + len(self._feed) - self._rewind, self._feed[-1]
        fault = None
        for _ in range(1 + _RETRIES if self._scribe.can_rewind else 1):
            if fault:
                # the last token before the turn is decoded again, for its logits
                self._rewind, self._feed = self._length - start + 1, [last]
            written = yield from self._go_on(part, temperature)
            text = (part.given + (written or "")).strip()
            fault = "no end" if written is None else flaw(role, text, written, self._scribe.markers, earlier)
            if not fault:
                self._messages.append({"role": role, "content": text})
                return None
        return fault

    def _go_on(self, part: TurnPlan, temperature: float) -> Generator[_Step, int, str | None]:
        """What the model writes after the given part of a turn; None if it comes to no end."""
        model, text = self._scribe.model, ""
        tokens: list[int] = []
        ends_given = part.given.endswith((".", "!", "?"))
        data = b""
        while True:
            self._length += len(self._feed) - self._rewind
            step = _Step(self._feed, self._rewind, temperature, may_end=ends_given or bool(tokens))
            self._feed, self._rewind = [], 0
            token = yield step
            if token in self._scribe.ends:
                return text
            tokens.append(token)
            self._feed = [token]
            data += model.token_bytes(token)
            text = data.decode("utf-8", "ignore")
            stop = min((at for mark in self._scribe.stops if (at := text.find(mark)) >= 0), default=None)
            if stop is not None:
                return self._cut(tokens, text, stop)
            if len(tokens) >= part.limit:
                ends, code = sentence_ends(text), in_code(text)
                if ends and ends[-1] == len(text) and not code:
                    return text
                if len(tokens) >= part.limit + (_CODE_GRACE if code else _GRACE):
                    return self._cut(tokens, text, ends[-1], FENCE if code else "") if ends else None

    def _cut(self, tokens: list[int], text: str, end: int, closing: str = "") -> str | None:
        """The first `end` characters of a text, the rest of which is taken back, and an ending; None if it cannot be taken back."""
        if not self._scribe.can_rewind:
            return None
        sizes = np.cumsum([len(self._scribe.model.token_bytes(token)) for token in tokens])
        n_back = int((sizes > len(text[:end].encode())).sum())
        if n_back:
            # the last token is not in the cache yet
            self._feed, self._rewind = [], n_back - 1
        if closing:
            self._feed += self._scribe.model.tokenize(closing, parse_special=False).tolist()
        return text[:end] + closing
