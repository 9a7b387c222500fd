"""Rows: keys and values of cells in host memory, in the types of the cache or in others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["RowTypes", "Rows"]


@dataclass(frozen=True)
class RowTypes:
    """What keys and values are stored in.

    k, v: types, as ggml numbers them
    size_k, size_v: bytes of a key and of a value of one head
    """

    k: int
    v: int
    size_k: int
    size_v: int


@dataclass(frozen=True)
class Rows:
    """Keys and values of n cells: in the cache's own types they come back bit for bit, in others as these round them.

    k: uint8 [L, H, n, bytes of a key of one head]
    v: uint8 [L, H, n, bytes of a value of one head]
    types: what they are stored in, None for the cache's own
    """

    k: np.ndarray
    v: np.ndarray
    types: RowTypes | None = None

    @property
    def n(self) -> int:
        return self.k.shape[2]
