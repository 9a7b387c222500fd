"""What a benchmark is made of: the configuration of the session under test and the size of each measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlocal import policies
from kvlocal.chat.config import SessionConfig
from kvlocal.llama.placement import ALL, Placement

_SESSION = SessionConfig()
_ALL = Placement(ALL)
_LEAST = 64  # cells


@dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    model: the GGUF file
    stock: the directory that holds libllama without our patches
    nexus: Nexus tokens for the policies that need them: a file, or None for one that is found (kvlocal.nexus.discovery)
    policy, policy_args, stride, window, n_ubatch, type_k, type_v, n_threads: of the session (SessionConfig); micro-batch, types and threads
        are the same for stock llama.cpp
    ratio: the share of the history that there is no room for in the session's cache (see budget), and that it removes
    histories: tokens of conversation at which decode and prefill are measured; the last one is where memory is
    cells: of the comparison at an equal number of cells
    turns, answer: of the whole chat: how many turns, and how many tokens each answer has
    placement: on which devices the model is put, of both
    read_stride: what a session there may grow by while a text is read (kvlocal.cache.fitting)
    pairs: slices of each kind that are compared; the comparison at equal cells, where the difference is small, takes twice as many
    parts: a slice of decoding is done in this many pieces, in alternation
    piece: tokens that stock llama.cpp decodes in a piece; the session decodes its share of a stride
    """

    model: Path
    stock: Path
    nexus: str | None = None
    policy: str = policies.DEFAULT_POLICY
    policy_args: Mapping[str, Any] = field(default_factory=dict)
    ratio: float = 0.8
    type_k: str = _SESSION.type_k
    type_v: str = _SESSION.type_v
    n_threads: int | None = None
    placement: Placement = _ALL
    stride: int = _SESSION.stride
    read_stride: int = _SESSION.slack
    window: int = _SESSION.window
    n_ubatch: int = _SESSION.n_ubatch
    histories: tuple[int, ...] = (1000, 2000, 4000, 8000)
    cells: int = 1600
    turns: int = 40
    answer: int = 120
    pairs: int = 10
    parts: int = 4
    piece: int = 16

    def budget(self, history: int) -> int:
        """Cells that stay of so many tokens: with those they grow by and the recorded queries they take (1 - ratio) of the history at most.

        A short history, as in a trial run, keeps what a system prompt and the windows need all the same.
        """
        room = round((1 - self.ratio) * history)
        return max(room // 2, room - self.read_stride - self.stride // 2, _LEAST)

    def session(self, budget: int, ratio: float | None) -> dict[str, Any]:
        """The fields of a SessionConfig."""
        names = ("policy", "stride", "window", "n_ubatch", "type_k", "type_v", "n_threads")
        return {name: getattr(self, name) for name in names} | {"policy_args": dict(self.policy_args), "budget": budget, "ratio": ratio}

    def context(self, n_cells: int) -> dict[str, Any]:
        """The arguments of a Context for stock llama.cpp."""
        names = ("n_ubatch", "type_k", "type_v", "n_threads")
        return {name: getattr(self, name) for name in names} | {"n_cells": n_cells}


# The sizes of a run of a minute or so, which shows that everything works and measures nothing well.
QUICK: dict[str, Any] = {
    "stride": 32,
    "read_stride": 32,
    "n_ubatch": 64,
    "histories": (500,),
    "cells": 256,
    "turns": 4,
    "answer": 24,
    "pairs": 3,
    "parts": 2,
    "piece": 8,
}
