"""Marks: what the cells held at some length of a conversation, small enough to be kept for every turn of it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from kvlocal.cache.ledger import Ledger


@dataclass(frozen=True)
class ArchivedMark:
    """All that the cells were when a conversation had n_tokens tokens, besides the keys and values, which its archive has.

    n_cells: cells of each layer and head
    next_position: where the next token went
    pace: when the cells were to be chosen again (ArchivedCells.pace)
    n_beside: bytes of what is beside the cells
    data: uint8 [bytes], what is beside the cells (kvlocal.cache.beside), and behind it which tokens were in them, packed
    """

    n_tokens: int
    n_cells: int
    next_position: int
    pace: tuple[int, ...]
    n_beside: int
    data: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    @classmethod
    def of(cls, ledger: Ledger, beside: npt.NDArray[np.uint8] | None, pace: tuple[int, ...]) -> Self:
        """What is there now."""
        parts = [np.zeros(0, np.uint8) if beside is None else beside, pack(ledger.tokens[..., : ledger.n_cells])]
        return cls(ledger.n_tokens, ledger.n_cells, ledger.next_position, pace, len(parts[0]), np.concatenate(parts))

    @property
    def beside(self) -> npt.NDArray[np.uint8] | None:
        """As Beside.get gave it."""
        return self.data[: self.n_beside] if self.n_beside else None

    def tokens(self, n_layer: int, n_head_kv: int) -> npt.NDArray[np.int32]:
        """The token in each cell, int32 [L, H, n_cells], ascending.

        Raises:
            ValueError: the data are none that `of` made.
        """
        tokens = unpack(self.data[self.n_beside :], (n_layer, n_head_kv, self.n_cells))
        if self.n_cells and (tokens[..., 0].min() < 0 or (np.diff(tokens, axis=-1) <= 0).any() or (tokens[..., -1] != self.n_tokens - 1).any()):
            raise ValueError("a mark is not what the archive holds")
        return tokens


def pack(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Ascending numbers of tokens, int32 [..., n], as bytes: the gaps between them, of which most are zero, compressed."""
    gaps = np.diff(tokens, axis=-1, prepend=np.int32(-1)) - 1
    # first the low bytes of all, then the higher ones, which are hardly ever set
    planes = np.ascontiguousarray(gaps.astype("<u4").reshape(-1, 1).view(np.uint8).T)
    return np.frombuffer(zlib.compress(planes.data, 1), np.uint8)


def unpack(data: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """The numbers of this shape that `pack` was given.

    Raises:
        ValueError: it was given something else.
    """
    n_bytes = 4 * int(np.prod(shape))
    try:
        planes = zlib.decompressobj().decompress(data.tobytes(), n_bytes + 1)
    except zlib.error as error:
        raise ValueError("packed tokens are damaged") from error
    if len(planes) != n_bytes:
        raise ValueError("packed tokens are of another number of cells")
    gaps = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, -1).T).view("<u4").reshape(shape).astype(np.int32)
    return np.cumsum(gaps + 1, axis=-1, dtype=np.int32) - 1
