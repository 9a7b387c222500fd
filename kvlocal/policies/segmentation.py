"""Where blocks of tokens end: at fixed intervals, at every delimiter, or at the delimiters attention says are good ones (DynSplit-KV)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

# how strong an end of a block a delimiter is
CLAUSE, SENTENCE, LINE, ITEM, BREAK = 0.2, 0.4, 0.6, 0.8, 1.0

NEUTRAL = 0.5  # the importance of a boundary that attention says nothing about


class Splitter(Protocol):
    """Divides a stretch of a conversation into blocks."""

    def split(self, texts: Sequence[bytes], attention: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int32]:
        """The exclusive ends of consecutive blocks that cover the stretch, int32 [n_block], ascending; the last is the number of tokens.

        texts: the bytes of each token, which need not be whole characters
        attention: float32 [n, n], what token q of the stretch pays to token j of it, mean over heads and some layers, 0 for j > q; a row
            sums to at most 1, the rest goes to what lies before the stretch. None if it is not known.
        """
        ...


@dataclass(frozen=True)
class FixedInterval:
    """Blocks of `length` tokens, the last as long as what is left."""

    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")

    def split(self, texts: Sequence[bytes], attention: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int32]:
        return _cut(np.arange(0), len(texts), self.length)


@dataclass(frozen=True)
class FixedDelimiters:
    """Every end of a sentence or a line ends a block; one of more than `max_block` tokens is cut into pieces of that length."""

    max_block: int = 32

    def __post_init__(self) -> None:
        if self.max_block < 1:
            raise ValueError(f"max_block must be at least 1, not {self.max_block}")

    def split(self, texts: Sequence[bytes], attention: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int32]:
        return _cut(np.flatnonzero(delimiter_strength(texts) >= SENTENCE) + 1, len(texts), self.max_block)


@dataclass(frozen=True)
class Dynamic:
    """Blocks that end at the delimiters that are worth most together (DynSplit-KV, section Dynamic splitting).

    A delimiter is worth (1 - weight) * strength + weight * rank, its strength alone if attention is not known; rank is its place among the
    delimiters of the stretch by importance, from 0 to 1. Other tokens are worth 0. The boundaries chosen are those of highest sum of
    worth - cost, so what is worth less than the cost ends a block only where the longest block forces a boundary.

    min_block, max_block: tokens of a block; the last may be shorter where it can't be otherwise
    reach: tokens on each side of a delimiter that its importance is taken from
    weight: how much of the worth is importance, 0 to 1
    cost: what a delimiter must be worth to be a boundary where none is forced, 0 to 1
    """

    min_block: int = 4
    max_block: int = 32
    reach: int = 8
    weight: float = 0.5
    cost: float = 0.3

    def __post_init__(self) -> None:
        if not 1 <= self.min_block <= self.max_block:
            raise ValueError(f"min_block must be at least 1 and at most max_block, not {self.min_block} with {self.max_block}")
        if self.reach < 1:
            raise ValueError(f"reach must be at least 1, not {self.reach}")
        for name in ("weight", "cost"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    def split(self, texts: Sequence[bytes], attention: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int32]:
        n = len(texts)
        worth = np.zeros(n + 1, np.float32)
        worth[1:] = delimiter_strength(texts)
        candidates = np.flatnonzero(worth[:n])  # there is a boundary at n whatever it is worth
        if attention is not None and len(candidates):
            rank = _rank(boundary_importance(attention, candidates, self.reach))
            worth[candidates] = (1 - self.weight) * worth[candidates] + self.weight * rank
        return _best_ends(worth - np.float32(self.cost), self.min_block, self.max_block)


def boundary_importance(attention: npt.NDArray[np.float32], ends: npt.NDArray[np.integer], reach: int) -> npt.NDArray[np.float32]:
    """How little the tokens after a boundary need the stretch just before it, float32 [m], 0 to 1.

    For a boundary before token b, over the queries b .. b + reach - 1 that there are:

        near = attention to tokens b - reach .. b - 1
        far  = 1 - near - attention to tokens b .. q, each query's own side of the boundary
        importance = far / (near + far), each summed over the queries; NEUTRAL if there is no query or nothing to compare

    attention: float32 [n, n] (Splitter.split)
    ends: int [m], the boundaries b, 1 to n
    """
    n, ends = len(attention), np.asarray(ends)
    if not n:
        return np.full(len(ends), NEUTRAL, np.float32)
    # recent[q, k]: what token q pays to the last k tokens, itself included
    behind = np.arange(n)[:, None] - np.arange(2 * reach)
    diagonals = np.where(behind >= 0, np.take_along_axis(attention, np.maximum(behind, 0), axis=1), 0)
    recent = np.zeros((n, 2 * reach + 1), np.float32)
    np.cumsum(diagonals, axis=1, out=recent[:, 1:])
    steps = np.arange(reach)
    queries = ends[:, None] + steps
    seen, queries = queries < n, np.minimum(queries, n - 1)
    own = recent[queries, steps + 1]
    near = np.where(seen, recent[queries, steps + 1 + reach] - own, 0).sum(axis=1)
    far = np.where(seen, np.maximum(1 - recent[queries, steps + 1 + reach], 0), 0).sum(axis=1)
    either = near + far
    return np.divide(far, either, out=np.full(len(ends), NEUTRAL, np.float32), where=either > 0)


def delimiter_strength(texts: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """How strong an end of a block each token is, from the tokens' bytes alone, float32 [n].

    0 for none, else CLAUSE, SENTENCE, LINE, ITEM (before and after a line of a list) or BREAK (a blank line; before and after fenced code).
    A delimiter that a line end follows gives way to it. Where a token holds both a delimiter and text after it, the delimiter ends nothing.
    """
    text = b"".join(texts)
    strength = np.zeros(len(texts), np.float32)
    found = np.array([*_inline_delimiters(text), *_line_ends(text)], np.float64).reshape(-1, 4)
    first, best, last = found[:, :3].astype(np.int64).T
    # of the tokens that end between first and last, the last one up to best, or else the next
    token_ends = np.cumsum([len(part) for part in texts], dtype=np.int64)
    padded = np.concatenate([[-1], token_ends, [len(text) + 1]])  # token i ends at padded[i + 1]
    before = np.searchsorted(token_ends, best, side="right")
    token = np.where(padded[before] >= first, before, before + 1)
    fits = padded[token] <= last
    np.maximum.at(strength, token[fits] - 1, found[fits, 3].astype(np.float32))
    return strength


def _one_of(characters: str) -> bytes:
    """A pattern for one of these characters; UTF-8 finds it only where a character begins."""
    return b"(?:" + b"|".join(re.escape(character.encode()) for character in characters) + b")"


_CLOSING = _one_of("\"')]}*_`’”»」』】》〉）］") + b"*+"
_INLINE = re.compile(
    # the number of a list item ends nothing, nor does the last dot of "e.g."
    rb"^[ \t]*+\d{1,3}[.)](?=[ \t])"
    rb"|(?:(?P<sentence>(?<![.!?])(?<!\.\w)(?:[.!?]|\xe2\x80\xa6)++" + _CLOSING + rb"(?=\s|\Z)"
    rb"|" + _one_of("。！？｡।॥؟۔") + b"++" + _CLOSING + b")"
    rb"|(?P<clause>[,;:]" + _CLOSING + rb"(?=\s|\Z)|" + _one_of("，、；：､،؛") + _CLOSING + b"))"
    # spaces, but no line end, after it
    rb"[ \t]*+(?!\r?\n)",
    re.MULTILINE,
)
_LINE_END = re.compile(rb"(?<![ \t\r])[ \t\r]*+\n\s*+")
_ITEM = re.compile(rb"^[ \t]*+(?:[-*+]|\xe2\x80\xa2|\d{1,3}[.)])[ \t]", re.MULTILINE)
_FENCE = re.compile(rb"^[ \t]*+(?:```|~~~)", re.MULTILINE)


def _inline_delimiters(text: bytes) -> list[tuple[int, int, int, float]]:
    """Ends of sentences and clauses inside a line: (first, best, last place to end a block, strength)."""
    strengths = {"sentence": SENTENCE, "clause": CLAUSE}
    matches = ((match, match.lastgroup) for match in _INLINE.finditer(text))
    return [(match.end(group), match.end(group), match.end(), strengths[group]) for match, group in matches if group]


def _line_ends(text: bytes) -> list[tuple[int, int, int, float]]:
    """Ends of lines, those of blank lines after them included: (first, best, last place to end a block, strength)."""
    matches = list(_LINE_END.finditer(text))
    next_lines = [text.rindex(b"\n", 0, match.end()) + 1 for match in matches]
    items = {match.start() for match in _ITEM.finditer(text)}
    fences = [match.start() for match in _FENCE.finditer(text)]
    opening, closing = set(fences[::2]), set(fences[1::2])
    found = []
    for match, line, next_line in zip(matches, [0, *next_lines], next_lines, strict=False):
        if match[0].count(b"\n") > 1 or line in closing or next_line in opening:
            strength = BREAK
        elif line in items or next_line in items:
            strength = ITEM
        else:
            strength = LINE
        found.append((match.start(), next_line, match.end(), strength))
    return found


def _rank(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The share of values below each, float32 [m], equal ones counted half."""
    ordered = np.sort(values)
    return ((np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right")) / (2 * len(values))).astype(np.float32)


def _cut(ends: npt.NDArray[np.integer], n: int, max_block: int) -> npt.NDArray[np.int32]:
    """Blocks of n tokens that end at `ends`, int [m] ascending, and at n, those of more than max_block cut every max_block tokens."""
    ends = np.unique(np.append(ends, n))
    starts = np.concatenate([[0], ends[:-1]])
    pieces = -(-(ends - starts) // max_block)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 1
    return np.minimum(np.repeat(starts, pieces) + nth * max_block, np.repeat(ends, pieces)).astype(np.int32)


def _best_ends(worth: npt.NDArray[np.float32], min_block: int, max_block: int) -> npt.NDArray[np.int32]:
    """The boundaries of highest summed worth [n + 1] whose blocks have min_block to max_block tokens, int32 [n_block] up to n.

    A dynamic programme, because the choices depend on each other: of two good boundaries closer than min_block only one can be, and where a
    long stretch forces one, the best place depends on the next. The totals of min_block neighbours depend on none of each other and are
    computed at once. Of equals, the longer block is taken.
    """
    n = len(worth) - 1
    # total[max_block + e]: the best sum of a division of the first e tokens; before is where its last block begins
    total = np.full(max_block + n + 1, -np.inf, np.float32)
    total[max_block] = 0
    before = np.zeros(n + 1, np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(total, max_block - min_block + 1)
    for first in range(min_block, n + 1, min_block):
        stop = min(first + min_block, n + 1)
        choice = windows[first:stop].argmax(axis=1)
        ends = np.arange(first, stop)
        before[ends] = ends - max_block + choice
        total[max_block + first : max_block + stop] = total[ends + choice] + worth[first:stop]
    if n and total[-1] == -np.inf:
        before[n] = n - max_block + total[n : n + max_block].argmax()
    chosen, end = [], n
    while end:
        chosen.append(end)
        end = int(before[end])
    return np.array(chosen[::-1], np.int32)
