"""Reads a text as a compressed cache has it: each layer and head sees what was left to it, and that changes as the text goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvlocal.training.decoder import Cells, Decoder, LowRankAdapter, Masks


@dataclass(frozen=True)
class Span:
    """Tokens of the text that are read with nothing removed or moved in between.

    begin, end: tokens begin .. end - 1
    position: RoPE position of the first of them
    """

    begin: int
    end: int
    position: int


@dataclass(frozen=True)
class Held:
    """What the heads of one layer have in their cells when a span begins.

    tokens: int64 [H_kv, n], numbers of tokens of the text, ascending
    positions: int64 [H_kv, n], where their keys are rotated to
    """

    tokens: Tensor
    positions: Tensor


@dataclass(frozen=True)
class SpanRead:
    """One layer at the end of a span.

    queries: [H_kv, G, T, d], of all tokens from the first of the text to the last of the span
    cells: the C cells of each head in order of age, with rotated keys
    held: which tokens they are; the last ones are those of the span
    scale: of the scores before the softmax
    """

    queries: Tensor
    cells: Cells
    held: Held
    scale: float


class CellChoice(Protocol):
    """Says what is in the cells: what was recorded, or what a policy chooses while the text is read.

    spans: they follow each other from the first token of the text to the last
    """

    @property
    def spans(self) -> Sequence[Span]: ...

    def held(self, layer: int, span: int, before: SpanRead) -> Held:
        """The cells when a span begins, not the first one.

        layer: counted among those that are compressed, as in the ledger: all that have no sliding window
        before: the same layer at the end of the span before; layer by layer, it is called for one span after the other
        """
        ...


@dataclass(frozen=True)
class RecordedCells:
    """Cells that were noted while an engine read a text.

    spans: at most one more than there were compressions
    tokens, positions: for each span int64 [L, H_kv, n], the ledger's when it began; the first has none, [L, H_kv, 0]

    Raises ValueError if the spans do not follow each other, or cells name tokens that were not read yet.
    """

    spans: Sequence[Span]
    tokens: Sequence[Tensor]
    positions: Sequence[Tensor]

    def __post_init__(self) -> None:
        if not len(self.spans) == len(self.tokens) == len(self.positions):
            raise ValueError("there must be tokens and positions for each span")
        end = 0
        for span, tokens, positions in zip(self.spans, self.tokens, self.positions, strict=True):
            if span.begin != end or span.end <= span.begin:
                raise ValueError(f"a span begins at token {span.begin}, and the one before ends at {end}")
            if tokens.shape != positions.shape:
                raise ValueError(f"cells of the shape {list(tokens.shape)} have positions of the shape {list(positions.shape)}")
            if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < span.begin:
                raise ValueError(f"cells hold tokens that are not read before token {span.begin}")
            end = span.end

    def held(self, layer: int, span: int, before: SpanRead) -> Held:
        device = before.cells.keys.device
        return Held(self.tokens[span][layer].to(device), self.positions[span][layer].to(device))


def read_compressed(decoder: Decoder, x: Tensor, choice: CellChoice, adapter: LowRankAdapter | None = None) -> Tensor:
    """Hidden rows of a text, float32 [T, n_embd] behind the last norm, `Decoder.logits` makes predictions of them.

    Gradients flow through what is read, into kept keys and values too, and not through the choice of cells. Layers with a sliding window are not
    compressed and see what they always see.

    Args:
        decoder: the model.
        x: float32 [T, n_embd], embeddings of the text (`Decoder.embed`).
        choice: what is in the cells.
        adapter: what rows get on top of the weights.
    """
    spans = choice.spans
    if spans[-1].end != len(x):
        raise ValueError(f"the spans end at token {spans[-1].end} and the text has {len(x)}")
    reading = _Reading(decoder, choice)
    return decoder.through_layers(x, reading.positions, reading.attention, adapter)


class _Reading:
    """positions: int64 [T], where queries and keys of the text are rotated to when they are read"""

    def __init__(self, decoder: Decoder, choice: CellChoice) -> None:
        self._decoder, self._choice, windows = decoder, choice, decoder.hyper.windows
        self.positions = torch.cat([torch.arange(span.position, span.position + span.end - span.begin) for span in choice.spans]).to(decoder.device)
        # of each layer, its number among those that are compressed
        self._numbers = [sum(window is None for window in windows[:i]) for i in range(len(windows))]
        self._masks: dict[tuple[int, int], Tensor] = {}
        n = len(self.positions)
        self._rows = torch.arange(n, device=decoder.device)
        if any(windows):
            causal = torch.ones(1, 1, n, n, dtype=torch.bool, device=decoder.device).tril_()
            self._windowed = Masks(causal, self._rows, self._rows, decoder.dtype)

    def attention(self, i: int, q: Tensor, own: Cells) -> Tensor:
        """What the heads of layer i read, [T, H * d]."""
        window = self._decoder.hyper.windows[i]
        if window is not None:
            # the cache of these layers moves along, so distances in it are those in the text
            q, keys = (self._moved(i, part, self._rows) for part in (q.flatten(0, 1), own.keys))
            return self._decoder.read(q.unflatten(0, (len(keys), -1)), Cells(keys, own.values), self._windowed.of(i, window))
        n_head, _, size = own.keys.shape
        empty = torch.zeros(n_head, 0, dtype=torch.int64, device=own.keys.device)
        held, outs, before = Held(empty, empty), [], None
        for s, span in enumerate(self._choice.spans):
            if before:
                held = self._choice.held(self._numbers[i], s, before)
            rows = self._rows[span.begin : span.end].expand(n_head, -1)
            index = held.tokens[..., None].expand(-1, -1, size)
            by = held.positions - self.positions[held.tokens]
            kept = own.keys.gather(1, index)
            if by.any():
                kept = self._decoder.moved_keys(i, kept, by)
            here = Cells(
                torch.cat([kept, own.keys[:, span.begin : span.end]], 1),
                torch.cat([own.values.gather(1, index), own.values[:, span.begin : span.end]], 1),
            )
            outs.append(self._decoder.read(q[:, :, span.begin : span.end], here, self._mask(index.shape[1], span.end - span.begin)))
            everything = Held(torch.cat([held.tokens, rows], 1), torch.cat([held.positions, self.positions[rows]], 1))
            before = SpanRead(q[:, :, : span.end], here, everything, self._decoder.hyper.attention_scale)
        return torch.cat(outs)

    def _moved(self, i: int, x: Tensor, to: Tensor) -> Tensor:
        """Queries or keys of layer i, [n, T, d], rotated to these positions, int64 [T]."""
        by = to - self.positions
        return self._decoder.moved_keys(i, x, by.expand(len(x), -1)) if by.any() else x

    def _mask(self, n_held: int, n_rows: int) -> Tensor:
        """What is added to the scores of rows that see all cells held, and of their own those up to themselves: [1, 1, n_rows, C]."""
        if (n_held, n_rows) not in self._masks:
            unseen = torch.ones(n_rows, n_held + n_rows, dtype=torch.bool, device=self._decoder.device).triu_(n_held + 1)
            mask = torch.zeros(unseen.shape, dtype=self._decoder.dtype, device=unseen.device)
            self._masks[n_held, n_rows] = mask.masked_fill_(unseen, float("-inf"))[None, None]
        return self._masks[n_held, n_rows]
