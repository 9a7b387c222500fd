"""The loss of one conversation: a student with Nexus cells in place of finished segments against a teacher with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.decoder import Decoder
from kvlocal.nexus.examples import Example
from kvlocal.nexus.parameters import Parameters

N_WINDOW = 16  # queries that choose raw cells (SnapKV)

_CHUNK = 64  # rows whose probabilities over the vocabulary are held at a time


@dataclass(frozen=True)
class Compression:
    """How one conversation is compressed.

    ks: Nexus tokens behind each segment but the last
    n_gone: how many segments, from the first, lose raw cells once their Nexus tokens are read
    raw: share of their raw cells that stays, chosen per layer and KV head
    random: share of the raw cells that are chosen with another cell's score
    """

    ks: tuple[int, ...]
    n_gone: int
    raw: float
    random: float = 0.0

    @classmethod
    def fixed(cls, example: Example, ratio: float, share: float, largest: int) -> Compression:
        """All segments but the last, at a wanted ratio, of which Nexus tokens make up a share; at share 0 there are none."""
        raw = 0.0 if share == 1 else (1 - ratio) * (1 - share)
        n = len(example.segments) - 1
        return cls(_allot(example, ratio, share, largest) if share else (0,) * n, n, raw)

    @classmethod
    def sample(cls, rng: np.random.Generator, example: Example, ratios: Sequence[float], largest: int) -> Compression:
        """A ratio, and how much of the segments stays raw beside the Nexus tokens.

        In 4 of 10 cases nothing does; in 3 of 10 Nexus tokens and raw cells share what the ratio leaves; otherwise any share of the raw cells
        stays, from none to (in one case of 5) all. Of the segments, the last 1, 2 or 3 keep all their cells.
        """
        ratio = float(rng.choice(ratios))
        mode = rng.random()
        share = 1.0 if mode < 0.4 else float(rng.uniform(0.1, 0.9))
        if mode < 0.4:
            raw = 0.0
        elif mode < 0.7:
            raw = (1 - ratio) * (1 - share)
        else:
            raw = 1.0 if rng.random() < 0.2 else float(rng.random())
        n = len(example.segments)
        n_gone = max(1, n - int(rng.choice([1, 1, 1, 2, 3])))
        return cls(_allot(example, ratio, share, largest), n_gone, raw, float(rng.choice([0.0, 0.0, 0.25, 0.5])))


def _allot(example: Example, ratio: float, share: float, largest: int) -> tuple[int, ...]:
    return tuple(n_nexus(len(segment), ratio, share, largest) for segment in example.segments[:-1])


@dataclass(frozen=True)
class Layout:
    """The student's rows in order: prefix, then each segment's tokens followed by its Nexus tokens; int64 [T] each.

    tokens: 0 for Nexus tokens
    segments: which segment a row belongs to, -1 for the prefix
    nexus: the row of the table, -1 for tokens
    n_gone: as in Compression
    n_shared: rows before the first that differs from the teacher's: the prefix and the first segment
    """

    tokens: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    nexus: npt.NDArray[np.int64]
    n_gone: int
    n_shared: int

    @classmethod
    def of(cls, example: Example, compression: Compression) -> Layout:
        tokens, segments, nexus = [example.prefix], [np.full(len(example.prefix), -1)], [np.full(len(example.prefix), -1)]
        for i, (segment, k) in enumerate(zip(example.segments, (*compression.ks, 0), strict=True)):
            tokens += [segment, np.zeros(k, np.int64)]
            segments.append(np.full(len(segment) + k, i))
            nexus += [np.full(len(segment), -1), np.arange(k)]
        n_shared = len(example.prefix) + len(example.segments[0])
        joined = (np.concatenate(parts).astype(np.int64) for parts in (tokens, segments, nexus))
        return cls(*joined, compression.n_gone, n_shared)

    def hidden(self) -> npt.NDArray[np.bool_]:
        """Which raw cells of gone segments a row does not see unless they are kept: those of segments before its own, bool [T, T]."""
        gone = (self.nexus < 0) & (self.segments >= 0) & (self.segments < self.n_gone)
        return gone & (self.segments[:, None] > self.segments)

    def visible(self, kept: Tensor | None) -> Tensor:
        """What each row sees, bool [L or 1, H_kv or 1, T, T].

        kept: raw cells that stay, bool [L, H_kv, T], or None for none of them
        """
        n = len(self.tokens)
        causal, hidden = np.tri(n, dtype=bool), self.hidden()
        if kept is None:
            return torch.from_numpy(causal & ~hidden)[None, None]
        seen, hidden = (torch.from_numpy(part).to(kept.device) for part in (causal & ~hidden, causal & hidden))
        return seen | (hidden & kept[:, :, None])


@dataclass(frozen=True)
class Loss:
    """Of one conversation, each a scalar.

    kl: KL(teacher || student), mean over the rows behind the first segment, in nats
    attention: mean difference of the attention masses on a segment
    """

    kl: Tensor
    attention: Tensor


class Distillation:
    """One conversation read by the teacher; the students that are compared with it share that reading.

    decoder: the model
    example: the conversation
    with_masses: also take what the attention term needs
    """

    def __init__(self, decoder: Decoder, example: Example, *, n_gone: int, with_masses: bool) -> None:
        self._decoder, self._example = decoder, example
        self._plain = plain = Layout.of(example, Compression((0,) * (len(example.segments) - 1), 0, 1.0))
        n = len(plain.tokens)
        self._full = [i for i, window in enumerate(decoder.hyper.windows) if window is None]
        (ends,) = np.nonzero(plain.segments == n_gone - 1)
        device = decoder.device
        with torch.no_grad():
            self._pass = decoder.forward(
                decoder.embed(torch.from_numpy(plain.tokens).to(device)),
                torch.arange(n, device=device),
                plain.visible(None).to(device),
                columns=self._columns(plain) if with_masses else None,
                watch=torch.from_numpy(ends[-N_WINDOW:]).to(device),
            )
            # [L, H_kv, T], SnapKV's score
            self._scores = self._pass.watched.mean(2)

    def _columns(self, layout: Layout) -> Tensor:
        """Each segment's cells as a set, segments but the last, [1, 1, T, S]."""
        sets = layout.segments[:, None] == np.arange(len(self._example.segments) - 1)
        return torch.from_numpy(sets.astype(np.float32)).to(self._decoder.device)[None, None]

    def loss(self, parameters: Parameters, compression: Compression, rng: np.random.Generator) -> Loss:
        """What the student loses against the teacher."""
        decoder, device = self._decoder, self._decoder.device
        layout = Layout.of(self._example, compression)
        shared, n = layout.n_shared, len(layout.tokens)
        rows = np.arange(shared, n)
        is_nexus = layout.nexus[rows] >= 0
        nexus_rows = torch.from_numpy(np.flatnonzero(is_nexus)).to(device)
        x = decoder.embed(torch.from_numpy(layout.tokens[rows]).to(device))
        x = x.index_copy(0, nexus_rows, F.embedding(torch.from_numpy(layout.nexus[rows][is_nexus]).to(device), parameters.table))
        with_masses = self._pass.masses is not None
        positions = torch.arange(n, device=device)
        out = decoder.forward(
            x,
            positions[shared:],
            layout.visible(self._kept(layout, compression, rng)).to(device)[:, :, shared:],
            past=[cells.first(shared) for cells in self._pass.cells],
            past_positions=positions[:shared],
            adapter=parameters.adapter(decoder.dtype, nexus_rows) if len(nexus_rows) else None,
            columns=self._columns(layout) if with_masses else None,
        )
        # what the teacher has too: its own rows behind the first segment, in the same order
        judged = torch.from_numpy(np.flatnonzero(~is_nexus)).to(device)
        kl = _RowsKL.apply(out.hidden.index_select(0, judged), self._pass.hidden[shared:], decoder)
        attention = kl.new_zeros(())
        if with_masses and self._full:
            later = torch.from_numpy(layout.segments[rows][~is_nexus][:, None] > np.arange(len(compression.ks))).to(device)
            difference = out.masses[self._full][:, :, judged].float() - self._pass.masses[self._full][:, :, shared:].float()
            attention = (difference.abs() * later).sum() / (later.sum() * difference.shape[0] * difference.shape[1])
        return Loss(kl, attention)

    def _kept(self, layout: Layout, compression: Compression, rng: np.random.Generator) -> Tensor | None:
        """The raw cells of gone segments that stay, bool [L, H_kv, T]; layers with a sliding window lose none."""
        (cells,) = np.nonzero((layout.nexus < 0) & (layout.segments >= 0) & (layout.segments < layout.n_gone))
        n_kept = round(compression.raw * len(cells))
        has_windows = len(self._full) < self._decoder.hyper.n_layer
        if not n_kept and not has_windows:
            return None
        device = self._decoder.device
        # gone segments are the first ones, so their cells are in the same order in both layouts
        (own,) = np.nonzero((self._plain.segments >= 0) & (self._plain.segments < layout.n_gone))
        scores = self._scores[:, :, torch.from_numpy(own).to(device)]
        if compression.random:
            other = torch.from_numpy(rng.integers(0, len(cells), scores.shape)).to(device)
            replaced = torch.from_numpy(rng.random(scores.shape) < compression.random).to(device)
            scores = torch.where(replaced, scores.gather(-1, other), scores)
        best = scores.topk(n_kept, -1).indices
        kept = torch.zeros(*scores.shape[:2], len(layout.tokens), dtype=torch.bool, device=device)
        kept.scatter_(-1, torch.from_numpy(cells).to(device)[best], True)
        if has_windows:
            windowed = [i for i, window in enumerate(self._decoder.hyper.windows) if window is not None]
            kept[windowed] = True
        return kept


class _RowsKL(torch.autograd.Function):
    """KL(teacher || student) over the vocabulary, mean over rows, from hidden rows float32 [n, n_embd].

    The gradient is made on the way, chunk by chunk, so the probabilities of all rows are never held together.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, decoder: Decoder) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(student), _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            logits = decoder.logits(student[rows]).float()
            expected = F.log_softmax(decoder.logits(teacher[rows]).float(), -1)
            found = F.log_softmax(logits, -1)
            p = expected.exp()
            total += expected.sub_(found).mul_(p).sum()
            if gradient is not None:
                d = found.exp_().sub_(p)
                softcap = decoder.hyper.softcap
                if softcap:
                    d *= 1 - (logits / softcap) ** 2
                gradient[rows] = (d.to(decoder.dtype) @ decoder.weights.output).float() / len(student)
        ctx.gradient = gradient
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.gradient * scale, None, None
