"""Context: a KV cache of fixed size and the decoder over it."""

import ctypes
import time
import weakref
from collections.abc import Callable
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvlocal.llama.adapter import Adapter, use_adapters
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.devices import check_connected
from kvlocal.llama.errors import CacheFull, EngineError
from kvlocal.llama.free_cores import AUTO, FreeCores, Threads, available_cores, can_be_told, disk_reads
from kvlocal.llama.library import load
from kvlocal.llama.log import NativeLog
from kvlocal.llama.model import Model
from kvlocal.llama.sequence_decoder import Outputs
from kvlocal.llama.token_batch import TokenBatch

# What a KV cache can be made of, and ggml's name for it.
KV_TYPES: dict[str, str] = {
    "f32": "GGML_TYPE_F32",
    "f16": "GGML_TYPE_F16",
    "q8_0": "GGML_TYPE_Q8_0",
    "q5_1": "GGML_TYPE_Q5_1",
    "q5_0": "GGML_TYPE_Q5_0",
    "q4_1": "GGML_TYPE_Q4_1",
    "q4_0": "GGML_TYPE_Q4_0",
    "iq4_nl": "GGML_TYPE_IQ4_NL",
}

# llama.cpp allocates the cells of a sequence in multiples of it
CELL_BLOCK = 256
# Sequences that decode together in one context at most.
MAX_SEQUENCES = 64

T = TypeVar("T")

# positions are 32-bit numbers
_MAX_CELLS = 2**31 - 1
# llama_rope_type: models that take several positions per token
_MULTI_SECTION_ROPE = {8, 24, 40}


class Context:
    """A KV cache of fixed size and the decoder over it.

    Each sequence has its own stream of cells. One context serves one thread at a time.

    Attributes:
        seq: the sequence that is meant where none is named.

    Args:
        model: the weights.
        n_cells: cells per sequence; llama.cpp rounds up to a multiple of 256.
        n_ubatch: tokens per decode call at most.
        n_seq_max: sequences.
        type_k, type_v: the cache's data type, a key of KV_TYPES.
        n_threads: threads for single tokens; by default one per core this process may use; AUTO for one per core that other programs leave free,
            as it turns out while it is decoded. Sums are rounded in another order with other threads.
        n_threads_batch: threads for larger batches; `n_threads` by default.
        offload_kqv: keep the cells of a layer where the layer is, else in main memory; by default as the model's placement says.
        n_outputs: for how many tokens of a batch logits can be asked; `n_ubatch` by default. With a large vocabulary
            each costs memory on the device, and a chat needs one per sequence.
        n_recorded: how many queries of each layer and sequence are recorded, at most n_ubatch; never changed later, as that would forget what
            was recorded in every sequence.

    Raises:
        EngineError: wrong arguments, or not enough memory.
        NativeError: queries of this model cannot be recorded.
    """

    seq = 0

    def __init__(
        self,
        model: Model,
        *,
        n_cells: int,
        n_ubatch: int = 256,
        n_seq_max: int = 1,
        type_k: str = "f16",
        type_v: str = "f16",
        n_threads: Threads = None,
        n_threads_batch: int | None = None,
        offload_kqv: bool | None = None,
        n_outputs: int | None = None,
        n_recorded: int = 0,
    ) -> None:
        for name, value in (("n_cells", n_cells), ("n_ubatch", n_ubatch), ("n_seq_max", n_seq_max)):
            if value < 1:
                raise EngineError(f"{name} is {value}, but must be at least 1")
        for name, number in (("n_threads", n_threads), ("n_threads_batch", n_threads_batch)):
            # ggml ends the process for any that is smaller
            if number is not None and number != AUTO and number < 1:
                raise EngineError(f"{name} is {number}, but must be at least 1")
        if n_cells * n_seq_max > _MAX_CELLS:
            raise EngineError(f"{n_seq_max} x {n_cells} cells are too many: choose a smaller budget")
        if not 0 <= n_recorded <= n_ubatch:
            raise EngineError(f"{n_recorded} queries cannot be recorded: a micro-batch has {n_ubatch}")
        self.model = model
        self._lib = lib = load().llama_cpp
        self.type_k, self.type_v = type_k, type_v
        self.n_outputs = n_ubatch if n_outputs is None else max(n_outputs, n_seq_max)
        threads = available_cores() if n_threads in (None, AUTO) else int(n_threads)
        # a GPU is waited for, and one thread leaves no cores free
        follows = n_threads == AUTO and n_threads_batch is None and threads > 1 and can_be_told() and not model.devices
        self._free_cores = FreeCores(threads) if follows else None

        params = lib.llama_context_default_params()
        # without a unified cache llama.cpp divides n_ctx among the sequences
        params.n_ctx = n_cells * n_seq_max
        params.n_batch = params.n_ubatch = n_ubatch
        params.n_seq_max = n_seq_max
        params.n_outputs_max = self.n_outputs
        params.n_threads = threads
        params.n_threads_batch = n_threads_batch or threads
        # only flash attention keeps V in rows, which compaction needs
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = (_ggml_type(lib, name) for name in (type_k, type_v))
        params.offload_kqv = model.placement.kv_offload if offload_kqv is None else offload_kqv
        # else llama.cpp sends large batches to a GPU also where no layer lies there
        params.op_offload = model.n_gpu_layers != 0
        params.kv_unified = False
        params.swa_full = False
        params.no_perf = True
        check_connected(model.devices)
        with NativeLog(lib) as log:
            pointer = lib.llama_init_from_model(model.pointer, params)
        if not pointer:
            check_connected(model.devices)
            raise EngineError(
                f"a {type_k}/{type_v} cache of {n_seq_max} x {n_cells} cells cannot be made{log.reason}: "
                "choose a smaller budget or another cache type"
            )
        self._pointer: int = pointer
        self._free = weakref.finalize(self, lib.llama_free, pointer)
        model.contexts.add(self)

        self._memory = lib.llama_get_memory(pointer)
        self._kv_bytes, self._state_bytes = log.kv_bytes, log.state_bytes
        self.n_cells: int = lib.llama_n_ctx_seq(pointer)
        self.n_ubatch: int = lib.llama_n_ubatch(pointer)
        self.n_seq_max: int = lib.llama_n_seq_max(pointer)
        # which tokens of the last batch have logits
        self._outputs: range = range(0)
        self._batch_size = 0
        self._batch = TokenBatch(lib, self.n_ubatch, self.n_seq_max, self.n_outputs)
        # llama.cpp makes micro-batches no larger than the cache
        self.n_recorded = min(n_recorded, self.n_ubatch)
        try:
            if model.adapters:
                self.use_adapter(None)
            if self.n_recorded:
                NativeCache(pointer).enable_ring(self.n_recorded)
        except BaseException:
            self.close()
            raise

    @property
    def pointer(self) -> int:
        """The address of the llama_context."""
        if not self._free.alive:
            raise EngineError("the context is closed: make a new one")
        return self._pointer

    @property
    def memory(self) -> int:
        """The address of the llama_memory."""
        _ = self.pointer
        return self._memory

    @property
    def closed(self) -> bool:
        return not self._free.alive

    def call(self, function: Callable[[], T]) -> T:
        """Calls what computes with this context, in the thread that decodes: here in the one that is running."""
        return function()

    def decode(self, tokens: npt.ArrayLike, pos: int, seq: int = 0, logits: Outputs = "last") -> None:
        """Evaluate tokens and append them to a sequence.

        Args:
            tokens: [n] int32, 1 <= n <= n_ubatch.
            pos: the first token's position; the others follow it.
            seq: the sequence.
            logits: for which tokens logits are kept.

        Raises:
            CacheFull: fewer than n cells are free; nothing has changed.
            EngineError: wrong arguments, or llama.cpp failed.
        """
        array = np.asarray(tokens, dtype=np.int32)
        if array.ndim != 1:
            raise EngineError(f"tokens must be an array of one dimension, not {array.ndim}")
        self._batch.place(len(array), pos, seq, logits)
        self._check_tokens(array)
        self._batch.set_tokens(array)
        self._run(len(array))

    def decode_sequences(self, tokens: npt.ArrayLike, positions: npt.ArrayLike, sequences: npt.ArrayLike) -> None:
        """Evaluate tokens of several sequences in one batch and keep the logits of all of them.

        llama.cpp works on sequences with consecutive numbers and equally many tokens together, on others one after another.

        Args:
            tokens: [n] int32, 1 <= n <= n_ubatch.
            positions: [n] int32, each one behind the last of its sequence.
            sequences: [n] int32, the sequence of each token.

        Raises:
            CacheFull: a sequence has not enough free cells; nothing has changed.
            EngineError: wrong arguments, or llama.cpp failed.
        """
        arrays = [np.asarray(array, dtype=np.int32) for array in (tokens, positions, sequences)]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1 or arrays[0].ndim != 1:
            raise EngineError("tokens, positions and sequences must be arrays of one dimension and of the same length")
        token, pos, seq = arrays
        self._batch.place_each(pos, seq)
        self._check_tokens(token)
        self._batch.set_tokens(token)
        self._run(len(token))

    def use_adapter(self, adapter: Adapter | None) -> None:
        """What is decoded from now on is computed with this adapter on top of those of the model, or with those alone.

        Raises:
            EngineError: llama.cpp refused it.
        """
        use_adapters(self.pointer, [*self.model.adapters, *([adapter] if adapter else [])])

    def decode_embeddings(self, embd: npt.ArrayLike, pos: int, seq: int = 0, logits: Outputs = "none") -> None:
        """Evaluate vectors in place of token embeddings and append them to a sequence.

        Args:
            embd: [n, n_embd] float32, 1 <= n <= n_ubatch, taken as they are (no model-specific scaling).
            pos: the first vector's position; the others follow it.
            seq: the sequence.
            logits: for which vectors logits are kept.

        Raises:
            CacheFull: fewer than n cells are free; nothing has changed.
            EngineError: wrong arguments, or llama.cpp failed.
        """
        array = np.ascontiguousarray(embd, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != self.model.n_embd:
            raise EngineError(f"embeddings must have the shape [n, {self.model.n_embd}], not {list(array.shape)}")
        if self._lib.llama_model_rope_type(self.model.pointer) in _MULTI_SECTION_ROPE:
            raise EngineError(f"{self.model.path} takes several positions per vector: give it tokens instead")
        self._batch.place(len(array), pos, seq, logits)
        self._batch.set_vectors(array)
        self._run(len(array))

    def _check_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        if tokens.min() < 0 or tokens.max() >= self.model.n_vocab:
            raise EngineError(f"a token is outside the vocabulary: tokens go from 0 to {self.model.n_vocab - 1}")

    def _run(self, n: int) -> None:
        self._outputs = range(0)
        status = self._on_devices(self._decode)
        if status == 0:
            self._batch_size = n
            self._outputs = range(n - self._batch.n_outputs, n)
        elif status == 1:
            seq, more = self._batch.first_sequence()
            which = f"sequence {seq}" + (" or of another of this batch" if more else "")
            raise CacheFull(f"{n} more tokens do not fit into the {self.n_cells} cells of {which}: free some first")
        elif status == 2:
            raise EngineError("decoding was aborted: remove the unfinished tokens from the cache and decode again")
        elif status == -1:
            seq, more = self._batch.first_sequence()
            raise EngineError(
                f"llama.cpp refused the batch: position {self._batch.first_position} does not continue sequence {seq}, "
                f"which ends at {self.pos_max(seq)}" + (", or another sequence is not continued" if more else "")
            )
        else:
            raise EngineError(f"decoding failed with llama.cpp's code {status}: clear the cache and start again")

    def _on_devices(self, function: Callable[[], int]) -> int:
        """Call what computes with the devices, or copies from or to them.

        Raises EngineError if an RPC server that holds a part of the model was lost; before the call too, as llama.cpp may end the process where a
        graph had found no memory before.
        """
        check_connected(self.model.devices)
        result = function()
        if any(device.is_remote for device in self.model.devices):
            self.synchronize()
            check_connected(self.model.devices)
        return result

    def _decode(self) -> int:
        """llama.cpp's code for what became of the batch."""
        if self._free_cores is None:
            return self._lib.llama_decode(self.pointer, self._batch.batch)
        began, processor, reads = time.perf_counter(), time.process_time(), disk_reads()
        status = self._lib.llama_decode(self.pointer, self._batch.batch)
        # who waits for the disk has no processor either, and cores are free all the same
        if disk_reads() == reads and self._free_cores.note(time.perf_counter() - began, time.process_time() - processor):
            self._lib.llama_set_n_threads(self.pointer, self._free_cores.n, self._free_cores.n)
        return status

    def check_output(self, i: int = -1) -> None:
        """Raise EngineError unless the last decode kept logits for token `i` of its batch.

        llama.cpp gives no address instead.
        """
        _ = self.pointer
        index = i if i >= 0 else self._batch_size + i
        if index not in self._outputs:
            raise EngineError(
                f"there are no logits for token {i} of the last batch: decode with logits='last' or 'all'"
            )

    def logits(self, i: int = -1) -> npt.NDArray[np.float32]:
        """The logits after token `i` of the last batch (-1: its last token), [n_vocab] float32, a copy."""
        self.check_output(i)
        # llama.cpp counts from the end over outputs, which are the last tokens of the batch
        pointer = self._lib.llama_get_logits_ith(self.pointer, i)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,)).copy()

    def logits_all(self) -> npt.NDArray[np.float32]:
        """The logits of a batch decoded with `logits="all"`, [n, n_vocab] float32, a copy."""
        self.check_output(0)
        pointer = self._lib.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, (self._batch_size, self.model.n_vocab)).copy()

    def remove(self, seq: int, p0: int, p1: int) -> None:
        """Free the cells of a sequence at positions p0 to p1 - 1; a negative bound is open. Logits are forgotten."""
        self._batch.check_sequence(seq)
        self._outputs = range(0)
        if not self._lib.llama_memory_seq_rm(self.memory, seq, p0, p1):
            raise EngineError(f"llama.cpp cannot remove positions {p0} to {p1} of sequence {seq}: clear it instead")

    def clear(self, seq: int | None = None) -> None:
        """Free all cells, of one sequence or of all."""
        if seq is not None:
            self.remove(seq, -1, -1)
            return
        self._lib.llama_memory_clear(self.memory, False)
        self._outputs = range(0)

    def pos_max(self, seq: int = 0) -> int:
        """The highest position in a sequence, -1 when it is empty."""
        self._batch.check_sequence(seq)
        return self._lib.llama_memory_seq_pos_max(self.memory, seq)

    def pos_min(self, seq: int = 0) -> int:
        """The lowest position from which on all are there, also in the cache of a sliding window; -1 when the sequence is empty."""
        self._batch.check_sequence(seq)
        return self._lib.llama_memory_seq_pos_min(self.memory, seq)

    def state_get(self, seq: int = 0, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """The cells of a sequence in llama.cpp's own format, [bytes] uint8, without its logits.

        Args:
            seq: the sequence.
            out: memory to write to, if it is large enough.
        """
        self._batch.check_sequence(seq)
        size = self._lib.llama_state_seq_get_size(self.pointer, seq)
        state = out[:size] if out is not None and len(out) >= size else np.empty(size, dtype=np.uint8)
        if not size or self._on_devices(lambda: self._lib.llama_state_seq_get_data(self.pointer, _bytes_of(state), size, seq)) != size:
            raise EngineError(f"llama.cpp could not copy the state of sequence {seq}: decode something into it first")
        return state

    def state_set(self, seq: int, state: npt.NDArray[np.uint8] | bytes) -> None:
        """Replace the cells of a sequence by what `state_get` gave, from a context of the same kind.

        Logits are not part of it: decode a token before sampling. A refused state leaves the sequence empty.
        """
        self._batch.check_sequence(seq)
        array = np.frombuffer(state, dtype=np.uint8)
        self._outputs = range(0)
        if not self._on_devices(lambda: self._lib.llama_state_seq_set_data(self.pointer, _bytes_of(array), len(array), seq)):
            raise EngineError(
                f"the saved state does not fit this context: it needs the same model, the same cache types "
                f"and no more than {self.n_cells} cells"
            )

    def recurrent_state(self, seq: int = 0) -> npt.NDArray[np.uint8]:
        """What the recurrent layers of a hybrid model hold of a sequence, in llama.cpp's own format, [bytes] uint8.

        It stands for all tokens so far, and there is no other way back to it: `remove` cuts nothing off the end of such a sequence, unless an
        earlier state is put back before.
        """
        self._batch.check_sequence(seq)
        flags = self._lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = self._lib.llama_state_seq_get_size_ext(self.pointer, seq, flags)
        state = np.empty(size, dtype=np.uint8)
        if not size or self._lib.llama_state_seq_get_data_ext(self.pointer, _bytes_of(state), size, seq, flags) != size:
            raise EngineError(f"llama.cpp could not copy the recurrent state of sequence {seq}")
        return state

    def set_recurrent_state(self, seq: int, state: npt.NDArray[np.uint8]) -> None:
        """Puts back what `recurrent_state` gave, and leaves the cells as they are. Where it is refused, the sequence has none."""
        self._batch.check_sequence(seq)
        array, flags = np.ascontiguousarray(state, dtype=np.uint8), self._lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        self._outputs = range(0)
        if self._lib.llama_state_seq_set_data_ext(self.pointer, _bytes_of(array), len(array), seq, flags) != len(array):
            raise EngineError("the saved recurrent state does not fit this context: it needs the same model")

    def kv_bytes(self) -> int:
        """What the cache takes, all sequences and layers together, in bytes."""
        return self._kv_bytes

    def state_bytes(self) -> int:
        """The same for the states of recurrent layers, whose size does not depend on the number of cells; 0 without any."""
        return self._state_bytes

    def synchronize(self) -> None:
        """Wait until the backends are done."""
        self._lib.llama_synchronize(self.pointer)

    def close(self) -> None:
        """Free the cache. Closing twice is harmless."""
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_of(array: npt.NDArray[np.uint8]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def kv_type_of(number: int) -> str | None:
    """The key of KV_TYPES for one of the numbers that llama.cpp's programs name types by (ggml_type); None if a cache cannot be made of it."""
    lib = load().llama_cpp
    return next((name for name in KV_TYPES if _ggml_type(lib, name) == number), None)


def _ggml_type(lib: Any, name: str) -> int:
    if name not in KV_TYPES:
        raise EngineError(f"{name!r} is no cache type: choose one of {', '.join(KV_TYPES)}")
    return getattr(lib, KV_TYPES[name])
