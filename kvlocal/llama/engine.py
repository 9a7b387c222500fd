"""Model and Context: a GGUF file and a KV cache of fixed size, over llama-cpp-python's low-level bindings."""

import ctypes
import os
import re
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import ALIGNMENT, ContainerError, Header
from kvlocal.gguf.safety import Alphabet, examine
from kvlocal.interrupts import CtrlCWaits
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.library import load

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

Outputs = Literal["last", "all", "none"]
T = TypeVar("T")

_GGUF_MAGIC = b"GGUF"
_KV_SIZE = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
# positions are 32-bit numbers
_MAX_CELLS = 2**31 - 1
# llama_rope_type: models that take several positions per token
_MULTI_SECTION_ROPE = {8, 24, 40}


class EngineError(KvlocalError):
    """llama.cpp could not do what was asked."""


class CacheFull(EngineError):
    """There are not enough free cells for the batch; the cache is as it was before the call."""


class _Log:
    """What llama.cpp says in a `with` block; besides, its messages go where they went before.

    Its log is the only place that tells why a file or a context is refused, and how large a cache is.
    """

    def __init__(self, llama_cpp: Any) -> None:
        self._lib = llama_cpp
        self._previous, self._user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        # an attribute, because llama.cpp keeps no reference
        self._callback = llama_cpp.llama_log_callback(self._take)
        self._lines: list[tuple[int, str]] = []

    def _take(self, level: int, text: bytes, _: Any) -> None:
        self._lines.append((level, text.decode("utf-8", "replace").strip()))
        if self._previous:
            self._previous(level, text, self._user_data)

    def __enter__(self) -> Self:
        # an exception in a callback is lost
        self._ctrl_c = CtrlCWaits().__enter__()
        self._lib.llama_log_get(ctypes.byref(self._previous), ctypes.byref(self._user_data))
        self._lib.llama_log_set(self._callback, ctypes.c_void_p())
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_log_set(self._previous, self._user_data)
        self._ctrl_c.__exit__()

    @property
    def reason(self) -> str:
        """The first error as " (message)", without the name of the function it comes from; "" if there is none."""
        error = next((text for level, text in self._lines if level == _ERROR_LEVEL), "")
        # it may quote from a damaged file
        error = "".join(c if c.isprintable() else "?" for c in error.partition(": ")[2] or error)
        return f" ({error.rstrip('.')})" if error else ""

    @property
    def kv_bytes(self) -> int:
        """The sum of the caches reported, in bytes, which llama.cpp rounds to hundredths of a MiB."""
        sizes = (_KV_SIZE.match(text) for _, text in self._lines)
        return int(sum(float(size[1]) for size in sizes if size) * 2**20)


class Model:
    """The weights and the vocabulary of one GGUF file.

    Closing it, or leaving its `with` block, closes its contexts first; a closed model raises EngineError.

    Args:
        path: the GGUF file.
        n_gpu_layers: how many layers go to the GPU, -1 for all; without a GPU backend it has no effect. With 0 everything is computed on the CPU.
        use_mmap: map the file instead of reading it.

    Raises:
        EngineError: no such file, not GGUF, not loadable, or a model without a plain KV cache.
    """

    def __init__(self, path: str | os.PathLike[str], *, n_gpu_layers: int = 0, use_mmap: bool = True) -> None:
        self.path = Path(path)
        self.n_gpu_layers = n_gpu_layers
        _check_is_gguf(self.path)
        header, self._alphabet = _sound(self.path)
        self._lib = lib = load().llama_cpp
        lib.llama_backend_init()

        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        # ggml aborts where tensors would be mapped to addresses with a smaller alignment
        mapped = use_mmap and lib.llama_supports_mmap() and header.alignment not in range(1, ALIGNMENT)
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mapped else lib.LLAMA_LOAD_MODE_NONE
        with _Log(lib) as log:
            pointer = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not pointer:
            raise EngineError(f"{self.path} cannot be loaded{log.reason}: fetch it again or choose another model")
        self._pointer: int = pointer
        self._free = weakref.finalize(self, lib.llama_model_free, pointer)
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._vocab = lib.llama_model_get_vocab(pointer)
        self._pieces: dict[tuple[int, bool], bytes] = {}

        self._has_vocabulary = lib.llama_vocab_type(self._vocab) != lib.LLAMA_VOCAB_TYPE_NONE
        self.has_encoder = bool(lib.llama_model_has_encoder(pointer))
        self.is_recurrent = bool(lib.llama_model_is_recurrent(pointer))
        self.is_hybrid = bool(lib.llama_model_is_hybrid(pointer))
        self.is_diffusion = bool(lib.llama_model_is_diffusion(pointer))
        self.has_decoder = bool(lib.llama_model_has_decoder(pointer))
        self._check_has_kv_cache()

        self.n_ctx_train: int = lib.llama_model_n_ctx_train(pointer)
        self.n_embd: int = lib.llama_model_n_embd(pointer)
        self.n_layer: int = lib.llama_model_n_layer(pointer)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_params: int = lib.llama_model_n_params(pointer)
        self.size_bytes: int = lib.llama_model_size(pointer)
        self.n_swa: int = lib.llama_model_n_swa(pointer)
        self.description = self._string(lib.llama_model_desc)
        self.metadata: dict[str, str] = {
            self._string(lib.llama_model_meta_key_by_index, i): self._string(lib.llama_model_meta_val_str_by_index, i)
            for i in range(lib.llama_model_meta_count(pointer))
        }
        bos = lib.llama_vocab_bos(self._vocab)
        self.bos: int | None = bos if bos >= 0 else None
        eos = lib.llama_vocab_eos(self._vocab)
        self.eos: int | None = eos if eos >= 0 else None
        self.add_bos = self.bos is not None and bool(lib.llama_vocab_get_add_bos(self._vocab))

    def _check_has_kv_cache(self) -> None:
        kinds = {
            "an encoder": self.has_encoder or not self.has_decoder,
            "a recurrent state": self.is_recurrent,
            "a partly recurrent state": self.is_hybrid,
            "diffusion": self.is_diffusion,
        }
        for kind, found in kinds.items():
            if found:
                self.close()
                raise EngineError(
                    f"{self.path} works with {kind} instead of a plain KV cache, so there is nothing to compress: "
                    "choose a decoder-only attention model"
                )

    def _string(self, function: Any, *args: int) -> str:
        """What a `(model, ..., buffer, size) -> length` function of llama.cpp writes."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = function(self.pointer, *args, buffer, size)
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    @property
    def pointer(self) -> int:
        """The address of the llama_model."""
        if not self._free.alive:
            raise EngineError(f"the model {self.path} is closed: load it again")
        return self._pointer

    @property
    def closed(self) -> bool:
        return not self._free.alive

    @property
    def vocab(self) -> int:
        """The address of the llama_vocab, whose functions abort where there is no vocabulary."""
        _ = self.pointer
        if not self._has_vocabulary:
            raise EngineError(f"{self.path} has no vocabulary: choose another model")
        return self._vocab

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a turn or a text: llama.cpp's end-of-generation set."""
        vocab = self.vocab
        is_end = self._lib.llama_vocab_is_eog
        return frozenset(token for token in range(self.n_vocab) if is_end(vocab, token))

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer puts a space before every text and after every control token."""
        first = self.tokenize("a", parse_special=False)
        return bool(len(first)) and self.token_bytes(int(first[0])).startswith(b" ")

    def tokenize(self, text: str, *, parse_special: bool, add_special: bool = False) -> npt.NDArray[np.int32]:
        """The tokens of a text, [n] int32.

        Args:
            text: any text. What a user typed must be read with `parse_special=False`.
            parse_special: turn the text of a control token into that token.
            add_special: put BOS (and EOS) where the model wants them.
        """
        # surrogates come from arguments and files that were not UTF-8
        data = text.encode("utf-8", "replace")
        if self._alphabet and (lacking := self._alphabet.lacks(data.decode())):
            raise EngineError(f"{self.path} has no token for {lacking!r}: leave it out or choose another model")
        tokens = np.empty(len(data) + 2, dtype=np.int32)
        n = self._tokenize_into(tokens, data, add_special, parse_special)
        if n < 0:
            tokens = np.empty(-n, dtype=np.int32)
            n = self._tokenize_into(tokens, data, add_special, parse_special)
        if n < 0:
            raise EngineError(f"a text of {len(data)} bytes cannot be tokenized: give it in smaller parts")
        return tokens[:n].copy()

    def _tokenize_into(self, tokens: npt.NDArray[np.int32], data: bytes, add_special: bool, parse_special: bool) -> int:
        pointer = tokens.ctypes.data_as(self._lib.llama_token_p)
        return self._lib.llama_tokenize(self.vocab, data, len(data), pointer, len(tokens), add_special, parse_special)

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for, which need not be whole UTF-8 characters.

        Args:
            token: a token of the vocabulary.
            special: also spell out control tokens, which are otherwise empty.
        """
        piece = self._pieces.get((token, special))
        if piece is None:
            self.check_token(token)
            size = 32
            while True:
                buffer = ctypes.create_string_buffer(size)
                length = self._lib.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
                if length >= 0:
                    break
                size = -length
            piece = self._pieces[token, special] = buffer.raw[:length]
        return piece

    def token_attributes(self, token: int) -> int:
        """The llama_token_attr bits of a token."""
        self.check_token(token)
        return self._lib.llama_vocab_get_attr(self.vocab, token)

    def check_token(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise EngineError(f"{token} is no token of {self.path}: tokens go from 0 to {self.n_vocab - 1}")

    def detokenize(self, tokens: npt.ArrayLike) -> str:
        """The text of tokens [n]; control tokens are left out, broken UTF-8 becomes U+FFFD."""
        pieces = (self.token_bytes(int(token)) for token in np.asarray(tokens, dtype=np.int32).ravel())
        return b"".join(pieces).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the contexts of this model, then the model. Closing twice is harmless."""
        for context in list(getattr(self, "_contexts", ())):
            context.close()
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Adapter:
    """A LoRA adapter of a model, from a GGUF file; it lives as long as the model. Contexts that use it are to be made after it.

    Raises:
        EngineError: no such file, or not an adapter for this model.
    """

    def __init__(self, model: Model, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _check_is_gguf(self.path)
        lib = load().llama_cpp
        with _Log(lib) as log:
            self.pointer = lib.llama_adapter_lora_init(model.pointer, os.fsencode(self.path))
        if not self.pointer:
            raise EngineError(f"{self.path} is no adapter for {model.path}{log.reason}: name another file")


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
        n_threads: threads for single tokens; by default one per core this process may use.
        n_threads_batch: threads for larger batches; `n_threads` by default.
        offload_kqv: keep the cache on the GPU, if there is one.
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
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        offload_kqv: bool = True,
        n_outputs: int | None = None,
        n_recorded: int = 0,
    ) -> None:
        for name, value in (("n_cells", n_cells), ("n_ubatch", n_ubatch), ("n_seq_max", n_seq_max)):
            if value < 1:
                raise EngineError(f"{name} is {value}, but must be at least 1")
        if n_cells * n_seq_max > _MAX_CELLS:
            raise EngineError(f"{n_seq_max} x {n_cells} cells are too many: choose a smaller budget")
        if not 0 <= n_recorded <= n_ubatch:
            raise EngineError(f"{n_recorded} queries cannot be recorded: a micro-batch has {n_ubatch}")
        self.model = model
        self._lib = lib = load().llama_cpp
        self.type_k, self.type_v = type_k, type_v
        self.n_outputs = n_ubatch if n_outputs is None else max(n_outputs, n_seq_max)
        threads = n_threads or _available_cores()

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
        params.offload_kqv = offload_kqv
        # else llama.cpp sends large batches to a GPU also where no layer lies there
        params.op_offload = model.n_gpu_layers != 0
        params.kv_unified = False
        params.swa_full = False
        params.no_perf = True
        with _Log(lib) as log:
            pointer = lib.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise EngineError(
                f"a {type_k}/{type_v} cache of {n_seq_max} x {n_cells} cells cannot be made{log.reason}: "
                "choose a smaller budget or another cache type"
            )
        self._pointer: int = pointer
        self._free = weakref.finalize(self, lib.llama_free, pointer)
        model._contexts.add(self)

        self._memory = lib.llama_get_memory(pointer)
        self._kv_bytes = log.kv_bytes
        self.n_cells: int = lib.llama_n_ctx_seq(pointer)
        self.n_ubatch: int = lib.llama_n_ubatch(pointer)
        self.n_seq_max: int = lib.llama_n_seq_max(pointer)
        # which tokens of the last batch have logits
        self._outputs: range = range(0)
        self._batch_size = 0
        self._build_batch()
        # llama.cpp makes micro-batches no larger than the cache
        self.n_recorded = min(n_recorded, self.n_ubatch)
        if self.n_recorded:
            try:
                NativeCache(pointer).enable_ring(self.n_recorded)
            except BaseException:
                self.close()
                raise

    def _build_batch(self) -> None:
        """One llama_batch for all decodes; its arrays are numpy's, so that filling it needs no loop."""
        lib, n = self._lib, self.n_ubatch
        self._tokens = np.zeros(n, dtype=np.int32)
        self._positions = np.zeros(n, dtype=np.int32)
        self._offsets = np.arange(n, dtype=np.int32)
        self._flags = np.zeros(n, dtype=np.int8)
        self._n_seq_ids = np.ones(n, dtype=np.int32)
        # every token points at its sequence's entry in this table
        self._seq_ids = np.arange(self.n_seq_max, dtype=np.int32)
        self._seq_id_pointers = np.zeros(n + 1, dtype=np.uintp)
        types = dict(lib.llama_batch._fields_)
        self._token_type, self._embd_type = types["token"], types["embd"]
        self._batch = lib.llama_batch(
            token=self._token_type(),
            embd=self._embd_type(),
            pos=ctypes.cast(self._positions.ctypes.data, types["pos"]),
            n_seq_id=ctypes.cast(self._n_seq_ids.ctypes.data, types["n_seq_id"]),
            seq_id=ctypes.cast(self._seq_id_pointers.ctypes.data, types["seq_id"]),
            logits=ctypes.cast(self._flags.ctypes.data, types["logits"]),
        )
        self._token_pointer = ctypes.cast(self._tokens.ctypes.data, self._token_type)
        self._seq_ids_address = self._seq_ids.ctypes.data

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
        n = self._fill_batch(len(array), pos, seq, logits)
        self._check_tokens(array)
        self._tokens[:n] = array
        self._batch.token, self._batch.embd = self._token_pointer, self._embd_type()
        self._run(n)

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
        n = len(token)
        self._check_batch(n, n)
        if pos.min() < 0:
            raise EngineError(f"a position is {pos.min()}, but must be at least 0")
        for outermost in (int(seq.min()), int(seq.max())):
            self._check_seq(outermost)
        self._check_tokens(token)
        self._batch.n_tokens = n
        self._tokens[:n], self._positions[:n] = token, pos
        np.multiply(seq, self._seq_ids.itemsize, out=self._seq_id_pointers[:n], casting="unsafe")
        self._seq_id_pointers[:n] += np.uintp(self._seq_ids_address)
        self._flags[:n] = 1
        self._batch.token, self._batch.embd = self._token_pointer, self._embd_type()
        self._run(n)

    def use_adapter(self, adapter: Adapter | None) -> None:
        """What is decoded from now on is computed with this adapter on top of the weights, or with the weights alone.

        Raises:
            EngineError: llama.cpp refused it.
        """
        lib, n = self._lib, 0 if adapter is None else 1
        pointers = (lib.llama_adapter_lora_p_ctypes * n)(*([] if adapter is None else [adapter.pointer]))
        if lib.llama_set_adapters_lora(self.pointer, pointers, n, (ctypes.c_float * n)(*[1.0] * n)):
            raise EngineError(f"the adapter {adapter.path if adapter else ''} cannot be used with this model: name another file")

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
        n = self._fill_batch(len(array), pos, seq, logits)
        self._batch.token, self._batch.embd = self._token_type(), ctypes.cast(array.ctypes.data, self._embd_type)
        self._run(n)

    def _fill_batch(self, n: int, pos: int, seq: int, logits: Outputs) -> int:
        n_outputs = {"last": 1, "all": n, "none": 0}.get(logits)
        if n_outputs is None:
            raise EngineError(f"logits are kept for 'last', 'all' or 'none' of the tokens, not for {logits!r}")
        self._check_batch(n, n_outputs)
        if pos < 0:
            raise EngineError(f"the position is {pos}, but must be at least 0")
        self._check_seq(seq)
        self._batch.n_tokens = n
        np.add(self._offsets[:n], pos, out=self._positions[:n])
        self._seq_id_pointers[:n] = self._seq_ids_address + seq * self._seq_ids.itemsize
        self._flags[: n - n_outputs] = 0
        self._flags[n - n_outputs : n] = 1
        return n

    def _check_batch(self, n: int, n_outputs: int) -> None:
        _ = self.pointer
        if not 1 <= n <= self.n_ubatch:
            raise EngineError(f"a batch holds 1 to {self.n_ubatch} tokens, not {n}: split it")
        if n_outputs > self.n_outputs:
            raise EngineError(f"the context keeps logits for {self.n_outputs} tokens: raise n_outputs or ask for fewer")

    def _check_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        if tokens.min() < 0 or tokens.max() >= self.model.n_vocab:
            raise EngineError(f"a token is outside the vocabulary: tokens go from 0 to {self.model.n_vocab - 1}")

    def _run(self, n: int) -> None:
        self._outputs = range(0)
        status = self._lib.llama_decode(self.pointer, self._batch)
        if status == 0:
            self._batch_size = n
            self._outputs = range(n - int(self._flags[:n].sum()), n)
        elif status == 1:
            seq, more = self._first_sequence(n)
            which = f"sequence {seq}" + (" or of another of this batch" if more else "")
            raise CacheFull(f"{n} more tokens do not fit into the {self.n_cells} cells of {which}: free some first")
        elif status == 2:
            raise EngineError("decoding was aborted: remove the unfinished tokens from the cache and decode again")
        elif status == -1:
            seq, more = self._first_sequence(n)
            raise EngineError(
                f"llama.cpp refused the batch: position {int(self._positions[0])} does not continue sequence {seq}, "
                f"which ends at {self.pos_max(seq)}" + (", or another sequence is not continued" if more else "")
            )
        else:
            raise EngineError(f"decoding failed with llama.cpp's code {status}: clear the cache and start again")

    def _first_sequence(self, n: int) -> tuple[int, bool]:
        """The sequence of the batch's first token, and whether there are others."""
        addresses = self._seq_id_pointers[:n]
        return int(addresses[0] - self._seq_ids_address) // self._seq_ids.itemsize, bool((addresses != addresses[0]).any())

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
        self._check_seq(seq)
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
        self._check_seq(seq)
        return self._lib.llama_memory_seq_pos_max(self.memory, seq)

    def pos_min(self, seq: int = 0) -> int:
        """The lowest position from which on all are there, also in the cache of a sliding window; -1 when the sequence is empty."""
        self._check_seq(seq)
        return self._lib.llama_memory_seq_pos_min(self.memory, seq)

    def state_get(self, seq: int = 0, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """The cells of a sequence in llama.cpp's own format, [bytes] uint8, without its logits.

        Args:
            seq: the sequence.
            out: memory to write to, if it is large enough.
        """
        self._check_seq(seq)
        size = self._lib.llama_state_seq_get_size(self.pointer, seq)
        state = out[:size] if out is not None and len(out) >= size else np.empty(size, dtype=np.uint8)
        if not size or self._lib.llama_state_seq_get_data(self.pointer, _bytes_of(state), size, seq) != size:
            raise EngineError(f"llama.cpp could not copy the state of sequence {seq}: decode something into it first")
        return state

    def state_set(self, seq: int, state: npt.NDArray[np.uint8] | bytes) -> None:
        """Replace the cells of a sequence by what `state_get` gave, from a context of the same kind.

        Logits are not part of it: decode a token before sampling. A refused state leaves the sequence empty.
        """
        self._check_seq(seq)
        array = np.frombuffer(state, dtype=np.uint8)
        self._outputs = range(0)
        if not self._lib.llama_state_seq_set_data(self.pointer, _bytes_of(array), len(array), seq):
            raise EngineError(
                f"the saved state does not fit this context: it needs the same model, the same cache types "
                f"and no more than {self.n_cells} cells"
            )

    def kv_bytes(self) -> int:
        """What the cache takes, all sequences and layers together, in bytes."""
        return self._kv_bytes

    def synchronize(self) -> None:
        """Wait until the backends are done."""
        self._lib.llama_synchronize(self.pointer)

    def close(self) -> None:
        """Free the cache. Closing twice is harmless."""
        self._free()

    def _check_seq(self, seq: int) -> None:
        if not 0 <= seq < self.n_seq_max:
            raise EngineError(f"there is no sequence {seq}: this context has {self.n_seq_max}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_is_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}): give the path of a GGUF file") from error
    if magic != _GGUF_MAGIC:
        raise EngineError(f"{path} is not a GGUF file: give the path of a model in GGUF format")


def _sound(path: Path) -> tuple[Header, Alphabet | None]:
    try:
        header = Header(path)
    except ContainerError as error:
        raise EngineError(str(error)) from error
    flaw, alphabet = examine(header)
    if flaw:
        raise EngineError(f"{path} cannot be loaded ({flaw}): fetch it again or choose another model")
    return header, alphabet


def _bytes_of(array: npt.NDArray[np.uint8]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def _ggml_type(lib: Any, name: str) -> int:
    if name not in KV_TYPES:
        raise EngineError(f"{name!r} is no cache type: choose one of {', '.join(KV_TYPES)}")
    return getattr(lib, KV_TYPES[name])


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
