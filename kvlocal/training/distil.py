"""The loss of one conversation: a student with Nexus cells in place of finished segments against a teacher with all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlocal.nexus.allotment import n_nexus
from kvlocal.training.decoder import Cells, Decoder, Pass
from kvlocal.training.examples import Example
from kvlocal.training.parameters import Parameters
from kvlocal.training.row_divergence import RowsKL

N_WINDOW = 16  # queries that choose raw cells (SnapKV)


@dataclass(frozen=True)
class Compression:
    """How one conversation is compressed, and how much of what follows is judged.

    ks: Nexus tokens behind each segment but the last
    n_gone: how many segments, from the first, lose raw cells once their Nexus tokens are read
    raw: share of their raw cells that stays, chosen per layer and KV head
    random: share of the raw cells that are chosen with another cell's score
    n_judged: how many segments behind those are compared with the teacher's
    """

    ks: tuple[int, ...]
    n_gone: int
    raw: float
    random: float = 0.0
    n_judged: int = 1

    @classmethod
    def fixed(cls, example: Example, ratio: float, share: float, largest: int) -> Compression:
        """All segments but the last, at a wanted ratio, of which Nexus tokens make up a share; at share 0 there are none."""
        raw = 0.0 if share == 1 else (1 - ratio) * (1 - share)
        n = len(example.segments) - 1
        return cls(_allot(example, ratio, share, largest) if share else (0,) * n, n, raw)

    @classmethod
    def sample(cls, rng: np.random.Generator, example: Example, ratios: Sequence[float], largest: int, n_gone: int | None = None) -> Compression:
        """A ratio, and how much of the segments stays raw beside the Nexus tokens.

        In 3 of 10 cases nothing does; in 5 of 10 Nexus tokens and raw cells share what the ratio leaves; otherwise any share of the raw cells
        stays, from none to (in one case of 5) all. The conversation is compressed behind any of its segments, or behind n_gone of them, and one
        or two that follow are judged.
        """
        ratio = float(rng.choice(ratios))
        mode = rng.random()
        share = 1.0 if mode < 0.3 else float(rng.uniform(0.05, 0.6))
        if mode < 0.3:
            raw = 0.0
        elif mode < 0.8:
            raw = (1 - ratio) * (1 - share)
        else:
            raw = 1.0 if rng.random() < 0.2 else float(rng.random())
        if n_gone is None:
            n_gone = int(rng.integers(1, len(example.segments)))
        return cls(_allot(example, ratio, share, largest), n_gone, raw, float(rng.choice([0.0, 0.0, 0.25, 0.5])), int(rng.integers(1, 3)))


def _allot(example: Example, ratio: float, share: float, largest: int) -> tuple[int, ...]:
    return tuple(n_nexus(len(segment), ratio, share, largest) for segment in example.segments[:-1])


@dataclass(frozen=True)
class SequenceLayout:
    """What the student has in its cache, in order: prefix, then each segment's tokens followed by its Nexus tokens; int64 [T] each.

    The tokens of segments that go are not read again: their cells are the teacher's. So the student's own rows are Nexus tokens and what is
    judged.

    tokens: 0 for Nexus tokens
    segments: which segment a row belongs to, -1 for the prefix
    nexus: the row of the table, -1 for tokens
    n_gone: as in Compression
    """

    tokens: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    nexus: npt.NDArray[np.int64]
    n_gone: int

    @classmethod
    def of(cls, example: Example, compression: Compression) -> SequenceLayout:
        n = min(compression.n_gone + compression.n_judged, len(example.segments))
        # nothing follows the last one
        ks = (*compression.ks[: n - 1], 0)
        tokens, segments, nexus = [example.prefix], [np.full(len(example.prefix), -1)], [np.full(len(example.prefix), -1)]
        for i, (segment, k) in enumerate(zip(example.segments[:n], ks, strict=True)):
            tokens += [segment, np.zeros(k, np.int64)]
            segments.append(np.full(len(segment) + k, i))
            nexus += [np.full(len(segment), -1), np.arange(k)]
        rows, owners, places = (np.concatenate(parts).astype(np.int64) for parts in (tokens, segments, nexus))
        return cls(rows, owners, places, compression.n_gone)

    @property
    def past(self) -> npt.NDArray[np.int64]:
        """The rows that are the teacher's cells, ascending."""
        return np.flatnonzero((self.nexus < 0) & (self.segments < self.n_gone))

    @property
    def own(self) -> npt.NDArray[np.int64]:
        """The rows that the student computes, ascending."""
        return np.flatnonzero((self.nexus >= 0) | (self.segments >= self.n_gone))

    @property
    def own_is_nexus(self) -> npt.NDArray[np.bool_]:
        """Which of the own rows are Nexus tokens, bool [T_own]."""
        return self.nexus[self.own] >= 0

    def visible(self, kept: Tensor | None) -> Tensor:
        """What the own rows see of past and own, bool [L or 1, H_kv or 1, T_own, T].

        kept: cells of the past that stay, bool [L, H_kv, T_past], or None for the prefix alone
        """
        past, own = self.past, self.own
        columns = np.concatenate([past, own])
        causal = columns <= own[:, None]
        # a segment's own Nexus tokens read it before it goes
        hidden = (np.arange(len(columns)) < len(past)) & (self.segments[columns] >= 0) & (self.segments[own][:, None] > self.segments[columns])
        if kept is None:
            return torch.from_numpy(causal & ~hidden)[None, None]
        seen, hidden = (torch.from_numpy(part).to(kept.device) for part in (causal & ~hidden, causal & hidden))
        return seen | (hidden & F.pad(kept, (0, len(own)))[:, :, None])


def student_pass(
    decoder: Decoder, parameters: Parameters, layout: SequenceLayout, cells: list[Cells], visible: Tensor, columns: Tensor | None
) -> Pass:
    """The student's own rows, over the teacher's cells and themselves; only Nexus tokens have the adapter.

    Args:
        cells: of each layer, the teacher's, of which the first are the past.
        visible: as SequenceLayout.visible gives it.
        columns: sets of past and own columns, as Decoder.forward takes them.
    """
    device, own, is_nexus = decoder.device, layout.own, layout.own_is_nexus
    past, nexus_rows = (torch.from_numpy(rows).to(device) for rows in (layout.past, np.flatnonzero(is_nexus)))
    x = decoder.embed(torch.from_numpy(layout.tokens[own]).to(device))
    x = x.index_copy(0, nexus_rows, F.embedding(torch.from_numpy(layout.nexus[own][is_nexus]).to(device), parameters.table))
    return decoder.forward(
        x,
        torch.from_numpy(own).to(device),
        visible,
        past=decoder.moved([layer.first(len(past)) for layer in cells], past - torch.arange(len(past), device=device)),
        past_positions=past,
        adapter=parameters.adapter(decoder.dtype, nexus_rows) if len(nexus_rows) else None,
        columns=columns,
    )


@dataclass(frozen=True)
class Loss:
    """Of one conversation, each a scalar.

    kl: KL(teacher || student), mean over the rows that are judged, in nats
    attention: mean difference of their attention masses on a segment
    """

    kl: Tensor
    attention: Tensor


class Distillation:
    """One conversation read by the teacher; the students that are compared with it share that reading.

    decoder: the model
    example: the conversation
    n_gone: the numbers of gone segments that compressions may have
    with_masses: also take what the attention term needs
    """

    def __init__(self, decoder: Decoder, example: Example, *, n_gone: Collection[int], with_masses: bool) -> None:
        self._decoder, self._example = decoder, example
        self._n_sets = len(example.segments) - 1
        self._segments = np.repeat(np.arange(-1, self._n_sets + 1), [len(example.prefix), *map(len, example.segments)])
        self._full = [i for i, window in enumerate(decoder.hyper.windows) if window is None]
        device, n = decoder.device, len(self._segments)
        windows = {number: np.flatnonzero(self._segments < number)[-N_WINDOW:] for number in sorted(set(n_gone))}
        with torch.no_grad():
            self._pass = decoder.forward(
                decoder.embed(torch.from_numpy(np.concatenate([example.prefix, *example.segments]).astype(np.int64)).to(device)),
                torch.arange(n, device=device),
                torch.ones(1, 1, n, n, dtype=torch.bool, device=device).tril_(),
                columns=self._columns(self._segments) if with_masses else None,
                watch=torch.from_numpy(np.concatenate(list(windows.values()))).to(device),
            )
            assert self._pass.watched is not None
            watched = self._pass.watched.split([len(rows) for rows in windows.values()], 2)
            # [L, H_kv, T] each, SnapKV's score
            self._scores = {number: weights.mean(2) for number, weights in zip(windows, watched, strict=True)}

    def _columns(self, segments: npt.NDArray[np.int64]) -> Tensor:
        """Each segment's cells as a set, segments but the last, [1, 1, T, S]."""
        sets = segments[:, None] == np.arange(self._n_sets)
        return torch.from_numpy(sets.astype(np.float32)).to(self._decoder.device)[None, None]

    def loss(self, parameters: Parameters, compression: Compression, rng: np.random.Generator) -> Loss:
        """What the student loses against the teacher.

        Raises:
            KeyError: the conversation was not read for this number of gone segments.
        """
        decoder, device = self._decoder, self._decoder.device
        layout = SequenceLayout.of(self._example, compression)
        past, own = layout.past, layout.own
        judged = torch.from_numpy(np.flatnonzero(~layout.own_is_nexus)).to(device)
        masses = self._pass.masses
        visible = layout.visible(self._kept(layout, compression, rng)).to(device)
        columns = self._columns(layout.segments[np.concatenate([past, own])]) if masses is not None else None
        out = student_pass(decoder, parameters, layout, self._pass.cells, visible, columns)
        # the same tokens, as the teacher has them behind the gone segments
        same = slice(len(past), len(past) + len(judged))
        kl = RowsKL.apply(out.hidden.index_select(0, judged), self._pass.hidden[same], decoder)
        attention = kl.new_zeros(())
        if masses is not None and out.masses is not None and self._full:
            later = torch.from_numpy(self._segments[same][:, None] > np.arange(self._n_sets)).to(device)
            difference = out.masses[self._full][:, :, judged].float() - masses[self._full][:, :, same].float()
            attention = (difference.abs() * later).sum() / (later.sum() * difference.shape[0] * difference.shape[1])
        return Loss(kl, attention)

    def _kept(self, layout: SequenceLayout, compression: Compression, rng: np.random.Generator) -> Tensor | None:
        """The cells of the past that stay beside the prefix, bool [L, H_kv, T_past]; layers with a sliding window lose none."""
        begin, end = len(self._example.prefix), len(layout.past)
        n_kept = round(compression.raw * (end - begin))
        has_windows = len(self._full) < self._decoder.hyper.n_layer
        if not n_kept and not has_windows:
            return None
        device = self._decoder.device
        scores = self._scores[layout.n_gone][:, :, begin:end]
        if compression.random:
            other = torch.from_numpy(rng.integers(0, end - begin, scores.shape)).to(device)
            replaced = torch.from_numpy(rng.random(scores.shape) < compression.random).to(device)
            scores = torch.where(replaced, scores.gather(-1, other), scores)
        kept = torch.zeros(*scores.shape[:2], end, dtype=torch.bool, device=device)
        kept.scatter_(-1, scores.topk(n_kept, -1).indices + begin, True)
        if has_windows:
            windowed = [i for i, window in enumerate(self._decoder.hyper.windows) if window is not None]
            kept[windowed] = True
        return kept
