"""The loss of one chat: a student whose cache is compressed, with an adapter, against the model with all of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvlocal import policies
from kvlocal.cache.config import CacheConfig
from kvlocal.training.chats import TrainingChat
from kvlocal.training.compressed_reading import read_compressed
from kvlocal.training.compression_times import Timetable
from kvlocal.training.decoder import Decoder, LowRankAdapter
from kvlocal.training.policy_choice import PolicyChoice
from kvlocal.training.row_divergence import RowsKL

FULL = "full"  # what a student without compression is called


@dataclass(frozen=True)
class Student:
    """How the cache of a student is compressed. ratio: the share of the chat that is removed; at 0 there is no policy."""

    policy: str
    ratio: float
    stride: int = 128

    @classmethod
    def sample(cls, rng: np.random.Generator, names: Sequence[str], ratios: Sequence[float], stride: int, whole: float) -> Student:
        """A policy and a ratio, each as likely as the others; in a share `whole` of the cases no compression."""
        if rng.random() < whole:
            return cls(FULL, 0.0, stride)
        return cls(str(rng.choice(list(names))), float(rng.choice(ratios)), stride)

    @property
    def name(self) -> str:
        """Such as "gkv@0.8"."""
        return f"{self.policy}@{self.ratio:g}" if self.ratio else FULL

    def config(self, n_tokens: int) -> CacheConfig:
        """For a chat of so many tokens: the cache grows with it, as `kvlocal eval` has it."""
        if not self.ratio:
            return CacheConfig(policy=FULL, budget=n_tokens)
        least = CacheConfig(policy=self.policy, archive="off").least_budget
        budget = max(least, round((1 - self.ratio) * n_tokens))
        return CacheConfig(policy=self.policy, ratio=self.ratio, budget=budget, stride=self.stride, archive="off")


class TaughtChat:
    """One chat read by the teacher; the students that are compared with it share that reading."""

    def __init__(self, decoder: Decoder, chat: TrainingChat) -> None:
        self._decoder, self._chat = decoder, chat
        device = decoder.device
        self._x = decoder.embed(torch.from_numpy(chat.tokens).to(device))
        self._judged = torch.from_numpy(chat.judged).to(device)
        n = len(self._x)
        with torch.no_grad():
            causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=device).tril_()
            self._teacher = decoder.forward(self._x, torch.arange(n, device=device), causal).hidden

    def kl(self, student: Student, adapter: LowRankAdapter | None, temperature: float = 1.0) -> Tensor | None:
        """KL(teacher || student) over the answers, mean over their tokens, in nats, times the temperature squared (RowsKL).

        Of a student that is compressed only what comes behind the first compression counts; None where there is none.
        """
        chat, decoder = self._chat, self._decoder
        config = student.config(len(self._x))
        # the teacher reads the whole chat at its own positions, so the student never comes to the end of the trained context
        timetable = Timetable.of(config, chat.lengths, chat.n_prefix, 2 * len(self._x) + config.stride, decoder.hyper.n_swa)
        if student.ratio and len(timetable.spans) < 2:
            return None
        rows = self._judged[self._judged >= timetable.spans[1].begin] if student.ratio else self._judged
        if not len(rows):
            return None
        choice = PolicyChoice(policies.make(config.policy), timetable, max(chat.n_prefix, config.n_sink), config.window)
        hidden = read_compressed(decoder, self._x, choice, adapter)
        found: Tensor = RowsKL.apply(hidden[rows], self._teacher[rows], decoder, temperature)
        return found
