"""What reads the script: a compressed session, or a plain context of llama.cpp that keeps everything or shifts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvlocal.benchmark.script import Script, Tokens, Turn
from kvlocal.cache.budgeted import Passage
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens

Figures = dict[str, float]


class Reader(ABC):
    """A conversation that follows the script, and how long it takes. Tokens are never sampled: what is read is given.

    history: tokens of the conversation so far
    """

    def __init__(self, script: Script, n_ubatch: int):
        self._script, self._n_ubatch = script, n_ubatch
        self._n_turns = 0

    @property
    @abstractmethod
    def history(self) -> int: ...

    @abstractmethod
    def read_user(self, turn: Turn) -> None:
        """A user turn, a micro-batch at once."""

    @abstractmethod
    def read_passage(self, tokens: Tokens) -> None:
        """More of a text of the user's, a micro-batch at once."""

    @abstractmethod
    def read_answer(self, tokens: Tokens, at_once: int) -> None:
        """The answer, or more of it."""

    @abstractmethod
    def figures(self) -> Figures:
        """The cache in numbers."""

    @abstractmethod
    def close(self) -> None:
        """Frees the cache."""

    def extend(self, history: int, at_most: int) -> int:
        """Reads turns until the conversation has exactly `history` tokens, or stops after `at_most` more; returns how many it has.

        Where the next user turn would be too long, the last answer goes on.
        """
        start = self.history
        while (left := history - self.history) > 0 and self.history - start < at_most:
            turn = self._script.turn(self._n_turns)
            if len(turn.user) < left:
                self.idle()
                self._n_turns += 1
                self.read_user(turn)
                self.read_answer(turn.answer[: left - len(turn.user)], self._n_ubatch)
            else:
                self.read_answer(self._script.filler(left), self._n_ubatch)
        return self.history

    def slice(self, n: int, at_once: int) -> float:
        """Seconds for n tokens more of the answer."""
        tokens = self._script.filler(n)
        started = time.perf_counter()
        self.read_answer(tokens, at_once)
        return time.perf_counter() - started

    def read_text(self, n: int) -> float:
        """Seconds for n tokens more of a text of the user's."""
        tokens = self._script.filler(n)
        started = time.perf_counter()
        self.read_passage(tokens)
        return time.perf_counter() - started

    def turn(self) -> Figures:
        """Seconds for the next turn: a micro-batch at once for the user's part, a token at a time for the answer."""
        turn = self._script.turn(self._n_turns)
        self._n_turns += 1
        started = time.perf_counter()
        self.read_user(turn)
        self.read_answer(turn.answer, 1)
        return {"seconds": time.perf_counter() - started, "tokens": len(turn.user) + len(turn.answer)}

    def idle(self) -> None:  # noqa: B027 - nothing, unless a reader says otherwise
        """What is done between an answer and the next user turn."""


class PlainReader(Reader):
    """llama.cpp as it is: all tokens stay in the cache. A slice is taken back after it was timed.

    context: arguments of the Context
    shift: where the cache is full, throw away the older half of what comes after the system prompt and go on (llama-cli's context shift)
    window: queries to record, with our library
    """

    def __init__(self, model: Model, script: Script, context: Mapping[str, Any], shift: bool = False, window: int = 0):
        super().__init__(script, context["n_ubatch"])
        self._context = Context(model, n_outputs=1, n_recorded=window, **context)
        self._lib = load().llama_cpp
        self._shift = shift
        if shift and not self._lib.llama_memory_can_shift(self._context.memory):
            self._context.close()
            raise EngineError(f"llama.cpp cannot shift the context of {model.path}: leave that measurement out")
        self._ring_bytes = NativeCache(self._context.pointer).layout().ring_bytes if window else 0
        self._history = self._position = 0
        self._read(script.prefix, self._n_ubatch)

    @property
    def history(self) -> int:
        return self._history

    def _read(self, tokens: Tokens, at_once: int) -> None:
        for start in range(0, len(tokens), at_once):
            chunk = tokens[start : start + at_once]
            if self._shift and self._position + len(chunk) > self._context.n_cells:
                self._discard_half()
            self._context.decode(chunk, self._position)
            self._context.synchronize()
            self._position += len(chunk)
            self._history += len(chunk)

    def _discard_half(self) -> None:
        n_keep = len(self._script.prefix)
        n_discard = (self._position - n_keep) // 2
        self._context.remove(0, n_keep, n_keep + n_discard)
        self._lib.llama_memory_seq_add(self._context.memory, 0, n_keep + n_discard, self._position, -n_discard)
        self._position -= n_discard

    def read_user(self, turn: Turn) -> None:
        self._read(turn.user, self._n_ubatch)

    def read_passage(self, tokens: Tokens) -> None:
        self._read(tokens, self._n_ubatch)

    def read_answer(self, tokens: Tokens, at_once: int) -> None:
        self._read(tokens, at_once)

    def slice(self, n: int, at_once: int) -> float:
        state = self._context.recurrent_state() if self._context.model.is_hybrid else None
        seconds = super().slice(n, at_once)
        if state is not None:
            self._context.set_recurrent_state(0, state)
        self._context.remove(0, self._position - n, -1)
        self._position -= n
        self._history -= n
        return seconds

    def figures(self) -> Figures:
        return {
            "history": self._history,
            "peak_cells": self._position,
            "capacity": self._context.n_cells,
            "kv_bytes": self._context.kv_bytes() + self._context.state_bytes() + self._ring_bytes,
        }

    def close(self) -> None:
        self._context.close()


class SessionReader(Reader):
    """A ChatSession, compressed as it goes; a slice stays in the conversation.

    Nexus tokens and a second read, if the policy wants them, come between turns.
    """

    def __init__(self, model: Model, script: Script, config: SessionConfig, nexus: NexusTokens | None = None):
        super().__init__(script, config.n_ubatch)
        self._session = ChatSession(model, config, nexus=nexus)

    @property
    def history(self) -> int:
        return self._session.kv.history_tokens

    def read_user(self, turn: Turn) -> None:
        self._session.add_turn("user", turn.text)

    def read_passage(self, tokens: Tokens) -> None:
        cache = self._session.cache
        cache.read([Passage("user", tokens)])
        cache.context.synchronize()

    def read_answer(self, tokens: Tokens, at_once: int) -> None:
        session, cache = self._session, self._session.cache
        if session.messages[-1]["role"] == "user":
            session.add_answer("", ())
        while len(tokens):
            batch, tokens = np.split(tokens, [min(at_once, cache.room)])
            cache.append(batch, "decode" if at_once == 1 else "prefill")
            cache.context.synchronize()

    def idle(self) -> None:
        self._session.finish_turn()
        self._session.second_read()

    def turn(self) -> Figures:
        """Besides, the seconds for each part of a compression, and for what comes after the turn, which the turn's do not include."""
        before = dict(vars(self._session.seconds))
        figures = super().turn()
        parts = {name: getattr(self._session.seconds, name) - before[name] for name in ("score", "plan", "compact", "recall")}
        self.idle()
        return figures | parts | {name: getattr(self._session.seconds, name) - before[name] for name in ("nexus", "reread")}

    def figures(self) -> Figures:
        """Besides, how many tokens more make a compression due, how many there were, and how many queries the ring holds."""
        kv, cache = self._session.kv, self._session.cache
        return {
            "history": kv.history_tokens,
            "peak_cells": kv.peak_cells,
            "capacity": kv.capacity,
            "kv_bytes": cache.kv_bytes,
            "until_compression": max(1, kv.budget + self._session.config.stride - kv.used),
            "compressions": kv.compressions,
            "window": cache.layout.n_window,
        }

    def close(self) -> None:
        self._session.close()
