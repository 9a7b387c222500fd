"""The C API of kvlocal.h on numpy arrays: scores, redundancy, removal and compaction of the KV cells of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvlocal.llama.c_arrays import floats, halves, ints, octets, pointers_to
from kvlocal.llama.errors import checked
from kvlocal.llama.host_queries import HostQueries, Stretches, check_chunks, check_stretches, shape_of_keys
from kvlocal.llama.layout import BLOCK, Layout
from kvlocal.llama.library import load
from kvlocal.llama.rows import Rows, RowTypes


class NativeCache:
    """The KV cache of one sequence of a llama_context, seen cell by cell.

    Layers L are the compressible ones, heads H the KV heads, cells C the used part of the sequence's stream, holes included. Every method raises
    NativeError when the native layer refuses; nothing is changed then, unless its code is KVL_ERR_COMPUTE.

    pointer: address of the llama_context, which must outlive this object
    seq: the sequence
    call: calls what computes a graph, and returns or raises what that did; a context has its own, with which it computes in the thread that decodes
    """

    def __init__(self, pointer: int, seq: int = 0, call: Callable[[Callable[[], int]], int] = lambda function: function()):
        library = load()
        self._call = call
        self._ffi, self._lib = library.ffi, library.lib
        self._context, self._seq = self._ffi.cast("struct llama_context *", pointer), seq

    def _compute(self, function: Callable[..., int], *args: Any) -> None:
        self._call(lambda: checked(function(self._context, self._seq, *args)))

    def enable_ring(self, n_window: int) -> None:
        """Keeps the last n_window queries of every layer, for all sequences of the context; 0 switches that off. What was recorded is forgotten, in
        all sequences: a context does it once, when it is made.
        """
        checked(self._lib.kvl_ring_enable(self._context, n_window))

    def enable_attention(self, on: bool) -> None:
        """Whether the attention of a few tokens to an f16 cache on the CPU is our own operation, as at first, or always ggml's."""
        checked(self._lib.kvl_attention_enable(self._context, on))

    def layout(self) -> Layout:
        out = self._ffi.new("struct kvl_layout *")
        checked(self._lib.kvl_get_layout(self._context, out))
        values = {name: getattr(out, name) for name in Layout.__dataclass_fields__}
        return Layout(**values | {name: bool(values[name]) for name in ("is_swa", "is_recurrent", "can_rotate", "is_on_device")})

    def layer_ids(self) -> np.ndarray:
        """Indices of the compressible layers in the model, int32 [L]."""
        ids = np.empty(self.layout().n_layer, np.int32)
        checked(self._lib.kvl_get_layers(self._context, ints(ids), len(ids)))
        return ids

    def positions(self) -> np.ndarray:
        """Positions of the cells for the causal mask, -1 for holes, int32 [C]."""
        pos = np.empty(checked(self._lib.kvl_get_cells(self._context, self._seq, self._ffi.NULL, 0)), np.int32)
        checked(self._lib.kvl_get_cells(self._context, self._seq, ints(pos), len(pos)))
        return pos

    def n_cells(self) -> int:
        """C: one more than the last used cell."""
        return checked(self._lib.kvl_get_cells(self._context, self._seq, self._ffi.NULL, 0))

    def query_positions(self) -> np.ndarray:
        """Positions of the recorded queries, ascending, int32 [at most n_window]."""
        pos = np.empty(checked(self._lib.kvl_get_queries(self._context, self._seq, self._ffi.NULL, 0)), np.int32)
        checked(self._lib.kvl_get_queries(self._context, self._seq, ints(pos), len(pos)))
        return pos

    def ring_state(self) -> np.ndarray | None:
        """What the ring holds of the sequence, uint8 [bytes]; None while it is off."""
        if not self.layout().n_window:
            return None
        state = np.empty(checked(self._lib.kvl_ring_get_state(self._context, self._seq, self._ffi.NULL, 0)), np.uint8)
        checked(self._lib.kvl_ring_get_state(self._context, self._seq, octets(state), len(state)))
        return state

    def set_ring_state(self, state: np.ndarray | None) -> None:
        """Puts back what `ring_state` gave. Queries whose positions are not at the sequence's end do not count."""
        if state is None:
            return
        state = np.ascontiguousarray(state, np.uint8)
        checked(self._lib.kvl_ring_set_state(self._context, self._seq, octets(state), len(state)))

    def _flags(self, portable: bool, largest: bool = False) -> int:
        return (self._lib.KVL_PORTABLE if portable else 0) | (self._lib.KVL_LARGEST if largest else 0)

    def scores(self, n_query: int = 0, portable: bool = False, largest: bool = False) -> np.ndarray:
        """Attention of the last n_query recorded queries (0: all) to each cell, float32 [L, H, C].

        The mean over the queries of the maximum over the group of query heads of the softmax weights; 0 for holes (G-KV, section Scores).

        portable: use ggml's own operations only, as GPU backends do
        largest: the maximum over the queries instead of the mean (KVzip)
        """
        layout, n_cells = self.layout(), self.n_cells()
        out = np.empty((layout.n_layer, layout.n_head_kv, n_cells), np.float32)
        flags = self._flags(portable, largest)
        self._compute(self._lib.kvl_get_scores, n_query, flags, floats(out), *out.shape)
        return out

    def copy_queries(self, n_query: int = 0, *, every: int = 1, stretches: Stretches | None = None, beside: bool = False) -> HostQueries:
        """The last n_query recorded queries (0: all), to score keys in host memory with.

        every: each every-th of them, the last one among them
        stretches: where the keys that they meet are at other positions than the queries expect, None for nowhere
        beside: what they compute is computed in the thread that asks for it, with half of the threads, while the context may decode; else it waits
            for its turn as what a context computes does
        """
        checked_stretches = check_stretches(stretches)
        shifts = checked_stretches[1]
        out = self._ffi.new("struct kvl_queries **")
        flags = self._lib.KVL_BESIDE if beside else 0
        self._compute(self._lib.kvl_copy_queries, n_query, every, flags, ints(shifts), len(shifts), out)
        return HostQueries(self._ffi.gc(out[0], self._lib.kvl_free_queries), self.layout(), checked_stretches, None if beside else self._call)

    def fill_boxes(self, keys: np.ndarray, blocks: range, boxes: np.ndarray, types: RowTypes | None = None) -> None:
        """Writes the boxes of these blocks of a chunk: the least and the largest number in each channel of the BLOCK keys of a block.

        keys: uint8 [L, H, chunk size, bytes of a key], chunk size a multiple of 256
        boxes: float16 [L, H, 2, head size, chunk size / BLOCK]
        types: what they are stored in, None for the cache's own
        """
        layout = self.layout()
        types = types or layout.row_types
        shape = shape_of_keys(layout, [keys], types)
        check_chunks([boxes], (*shape[:2], 2, layout.n_embd_head_k, shape[2] // BLOCK), np.dtype(np.float16))
        checked(
            self._lib.kvl_get_boxes(
                self._context, octets(keys), types.k, shape[2], blocks.start, len(blocks), halves(boxes), boxes.nbytes, *shape[:2]
            )
        )

    def attention_map(self, layers: list[int], n_query: int = 0) -> np.ndarray:
        """Softmax weights of the last n_query recorded queries (0: all), mean over the query heads, float32 [len(layers), n_query, C]."""
        n_query = n_query or len(self.query_positions())
        out = np.empty((len(layers), n_query, self.n_cells()), np.float32)
        chosen = np.asarray(layers, np.int32)
        self._compute(self._lib.kvl_get_attention_map, n_query, ints(chosen), len(chosen), floats(out), out.shape[2])
        return out

    def redundancy(self, portable: bool = False) -> np.ndarray:
        """How much each key repeats others of its head (R-KV), a softmax over cells, float32 [L, H, C]; 0 for holes.

        portable: use ggml's own operations only, with the whole similarity matrix, as GPU backends do
        """
        layout, n_cells = self.layout(), self.n_cells()
        out = np.empty((layout.n_layer, layout.n_head_kv, n_cells), np.float32)
        self._compute(self._lib.kvl_get_redundancy, self._flags(portable), floats(out), *out.shape)
        return out

    def remove(self, cells: np.ndarray) -> None:
        """Frees these cells, int [n], for all heads, and leaves holes."""
        cells = np.ascontiguousarray(cells, np.int32)
        checked(self._lib.kvl_remove_cells(self._context, self._seq, ints(cells), len(cells), self.n_cells()))

    def compact(
        self,
        gather: np.ndarray,
        positions: np.ndarray,
        delta: np.ndarray | None = None,
        rows: Rows | Sequence[Rows] | None = None,
        portable: bool = False,
    ) -> None:
        """Moves cell gather[l, h, j] of each layer and head to cell j, or writes a row that is brought along there, and frees the cells behind.

        What is not rotated is copied bit for bit, but for rows of other types; rotated keys of a quantised cache are quantised again.

        gather: int [L, H, n_keep], used cells, or C + r for row r of rows
        positions: int [n_keep], strictly ascending, for the causal mask
        delta: int [L, H, n_keep], by how many positions each kept key is rotated; None for none
        rows: keys and values that are not in the cache, or chunks of equal size of them, one after another; with them the sequence may be empty,
            and n_keep larger than C
        portable: use ggml's own operations only, as GPU backends do
        """
        gather = np.ascontiguousarray(gather, np.int32)
        positions = np.ascontiguousarray(positions, np.int32)
        if gather.ndim != 3 or positions.shape != gather.shape[2:]:
            raise ValueError(f"gather must be [L, H, n_keep] and positions [n_keep], not {gather.shape} and {positions.shape}")
        rotation = self._ffi.NULL
        if delta is not None:
            delta = np.ascontiguousarray(delta, np.int32)
            if delta.shape != gather.shape:
                raise ValueError(f"delta must have the shape of gather, {gather.shape}, not {delta.shape}")
            rotation = ints(delta)
        chunks = [rows] if isinstance(rows, Rows) else list(rows or ())
        chunks = [Rows(np.ascontiguousarray(chunk.k), np.ascontiguousarray(chunk.v), chunk.types) for chunk in chunks if chunk.n]
        brought, *_pointers = self._rows(chunks) if chunks else [self._ffi.NULL]
        self._compute(
            self._lib.kvl_compact, ints(gather), ints(positions), rotation, brought, self._flags(portable), *gather.shape, self.n_cells()
        )

    def read_rows(self, cells: np.ndarray, types: RowTypes | None = None) -> Rows:
        """Keys and values of these used cells, int [n], of all layers and heads: as they are stored, or in other types, rounded as ggml does."""
        cells = np.ascontiguousarray(cells, np.int32)
        layout = self.layout()
        shape, types = (layout.n_layer, layout.n_head_kv, len(cells)), types or layout.row_types
        rows = Rows(np.empty((*shape, types.size_k), np.uint8), np.empty((*shape, types.size_v), np.uint8), types)
        if len(cells):
            filled, *_pointers = self._rows([rows])
            self._compute(self._lib.kvl_read_rows, ints(cells), filled, *shape[:2], self.n_cells())
        return rows

    def _rows(self, chunks: Sequence[Rows]) -> list[Any]:
        """A struct kvl_rows of chunks of equal size and types, and what must live as long as it, besides the arrays."""
        layout, first = self.layout(), chunks[0]
        types = first.types or layout.row_types
        shapes = [(layout.n_layer, layout.n_head_kv, first.n, size) for size in (types.size_k, types.size_v)]
        for chunk in chunks:
            if (chunk.types or layout.row_types) != types:
                raise ValueError("rows of several types cannot be brought along together")
            for array, shape in zip((chunk.k, chunk.v), shapes, strict=True):
                if array.shape != shape or array.dtype != np.uint8:
                    raise ValueError(f"such rows of this cache must be uint8 {shape}, not {array.dtype} {array.shape}")
        out = self._ffi.new("struct kvl_rows *")
        out.k, out.v = pointers = [pointers_to([getattr(chunk, name) for chunk in chunks]) for name in ("k", "v")]
        out.n_bytes_k, out.n_bytes_v = first.k.nbytes, first.v.nbytes
        out.n_chunk, out.chunk_size, out.n_rows = len(chunks), first.n, len(chunks) * first.n
        out.type_k, out.type_v = types.k, types.v
        return [out, *pointers]

    def shift_beside(self, delta: int) -> None:
        """Shifts the positions of the sliding-window cache, or of the recurrent state, beside the compacted cache, if there is one."""
        checked(self._lib.kvl_shift_beside(self._context, self._seq, delta))

    def read_keys(self, layer: int) -> np.ndarray:
        """Stored keys of a compressible layer, float32 [H, C, head size]."""
        layout = self.layout()
        out = np.empty((layout.n_head_kv, self.n_cells(), layout.n_embd_head_k), np.float32)
        checked(self._lib.kvl_read_keys(self._context, self._seq, layer, floats(out), out.shape[1]))
        return out

    def read_values(self, layer: int) -> np.ndarray:
        """Stored values of a compressible layer, float32 [H, C, head size]."""
        layout = self.layout()
        out = np.empty((layout.n_head_kv, self.n_cells(), layout.n_embd_head_v), np.float32)
        checked(self._lib.kvl_read_values(self._context, self._seq, layer, floats(out), out.shape[1]))
        return out

    def read_queries(self, layer: int) -> np.ndarray:
        """Recorded queries of a compressible layer, float32 [n_query, query heads, head size], as query_positions() orders them."""
        layout = self.layout()
        out = np.empty((len(self.query_positions()), layout.n_head, layout.n_embd_head_k), np.float32)
        checked(self._lib.kvl_read_queries(self._context, self._seq, layer, floats(out), out.shape[0]))
        return out

    def kq_scale(self, layer: int) -> float:
        """The factor attention applies to q.k in a layer; known after the first decode with the ring on."""
        out = self._ffi.new("float *")
        checked(self._lib.kvl_get_kq_scale(self._context, layer, out))
        return out[0]
