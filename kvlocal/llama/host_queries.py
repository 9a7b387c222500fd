"""Recorded queries in host memory, and what they pay to keys that are there too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvlocal.llama.c_arrays import floats, ints, pointers_to
from kvlocal.llama.errors import checked
from kvlocal.llama.layout import BLOCK, Layout
from kvlocal.llama.library import load
from kvlocal.llama.rows import RowTypes

# starts and shifts, int [n] each: the keys from starts[i] on, up to the next start, count as if rotated by shifts[i] more positions; starts ascend
# from 0
Stretches = tuple[np.ndarray, np.ndarray]


class HostQueries:
    """Queries of one sequence, as NativeCache.copy_queries gives them; they need its context no more. Every method raises NativeError when the
    native layer refuses.

    handle: the struct kvl_queries
    layout: of the cache that they come from
    stretches: of the keys that they meet, as check_stretches gives them
    call: calls what computes, and returns what that did; None for this very thread
    """

    def __init__(self, handle: Any, layout: Layout, stretches: Stretches, call: Callable[[Callable[[], int]], int] | None) -> None:
        library = load()
        self._ffi, self._lib = library.ffi, library.lib
        self._handle, self._layout, self._call = handle, layout, call
        self._starts, self._shifts = stretches

    def row_scores(
        self,
        chunks: Sequence[np.ndarray],
        n_rows: int,
        *,
        largest: bool = False,
        types: RowTypes | None = None,
    ) -> np.ndarray:
        """What NativeCache.scores is, for keys in host memory in place of the cells: float32 [L, H, n_rows]. The last of them are the queries' own.

        chunks: each uint8 [L, H, chunk size, bytes of a key], keys of so many tokens one after another, rotated as those in the cache are
        types: what they are stored in, None for the cache's own
        """
        layout = self._layout
        types = types or layout.row_types
        shape = shape_of_keys(layout, chunks, types)
        out = np.empty((layout.n_layer, layout.n_head_kv, n_rows), np.float32)
        self._compute(
            self._lib.kvl_get_row_scores,
            self._lib.KVL_LARGEST if largest else 0, pointers_to(chunks), types.k, len(chunks), shape[2],
            ints(self._starts), ints(self._shifts), len(self._starts), floats(out), *out.shape,
        )  # fmt: skip
        return out

    def best_rows(
        self,
        chunks: Sequence[np.ndarray],
        boxes: Sequence[np.ndarray],
        n_rows: int,
        *,
        first: int,
        last: int,
        n_blocks: int,
        n_bound: int = 2,
        types: RowTypes | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows that the queries may find most in, int32 [L, H, n] ascending, and their scores as if there were no others (`row_scores`).

        These are the rows before `first` and from `last` on, multiples of BLOCK, and n_blocks blocks of those between, for each head those whose
        boxes let n_bound of the queries expect most.

        chunks, types: as for `row_scores`
        boxes: of each chunk, as NativeCache.fill_boxes fills them, for all blocks before `last`
        """
        layout = self._layout
        types = types or layout.row_types
        shape = shape_of_keys(layout, chunks, types)
        check_chunks(boxes, (*shape[:2], 2, layout.n_embd_head_k, shape[2] // BLOCK), np.dtype(np.float16))
        if len(boxes) != len(chunks):
            raise ValueError(f"there must be as many chunks of boxes as of keys, {len(chunks)}, not {len(boxes)}")
        rows = np.empty((*shape[:2], first + n_blocks * BLOCK + n_rows - last), np.int32)
        scores = np.empty(rows.shape, np.float32)
        bounds = self._ffi.cast("uint16_t **", keep := pointers_to(boxes))
        self._compute(
            self._lib.kvl_get_best_rows,
            n_bound, pointers_to(chunks), types.k, bounds, len(chunks), shape[2], n_rows,
            ints(self._starts), ints(self._shifts), len(self._starts), first, last, ints(rows), floats(scores), *rows.shape,
        )  # fmt: skip
        del keep
        return rows, scores

    def _compute(self, function: Callable[..., int], *args: Any) -> None:
        def computed() -> int:
            return checked(function(self._handle, *args))

        if self._call:
            self._call(computed)
        else:
            computed()


def shape_of_keys(layout: Layout, chunks: Sequence[np.ndarray], types: RowTypes) -> tuple[int, ...]:
    """That of each chunk of keys in host memory, which are stored in these types; ValueError if they have another one."""
    shape = (layout.n_layer, layout.n_head_kv, chunks[0].shape[2] if chunks else 0, types.size_k)
    check_chunks(chunks, shape, np.dtype(np.uint8))
    return shape


def check_chunks(chunks: Sequence[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError unless the native layer can read them where they are."""
    if any(chunk.shape != shape or chunk.dtype != dtype or not chunk.flags.c_contiguous for chunk in chunks):
        raise ValueError(f"chunks of such keys must be contiguous {dtype} {shape}")


def check_stretches(stretches: Stretches | None) -> Stretches:
    """As the native layer reads them, int32 and empty for None; ValueError if they are no pair of equal length."""
    none = np.zeros(0, np.int32)
    starts, shifts = (np.ascontiguousarray(array, np.int32) for array in stretches or (none, none))
    if starts.ndim != 1 or starts.shape != shifts.shape:
        raise ValueError(f"starts and shifts must be [n] each, not {starts.shape} and {shifts.shape}")
    return starts, shifts
