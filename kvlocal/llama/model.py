"""Model: the weights and the vocabulary of a GGUF file, over llama-cpp-python's low-level bindings."""

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from kvlocal.gguf.container import ALIGNMENT, ContainerError, Header, other_parts
from kvlocal.gguf.safety import Alphabet, examine
from kvlocal.llama.adapter import Adapter, Lora, checked_base
from kvlocal.llama.devices import Device, check_connected, devices_of
from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load
from kvlocal.llama.log import NativeLog
from kvlocal.llama.placement import NONE, Placement

_GGUF_MAGIC = b"GGUF"


class Closable(Protocol):
    """What is closed before its model."""

    def close(self) -> None: ...


class Model:
    """The weights and the vocabulary of one GGUF file.

    Closing it, or leaving its `with` block, closes its contexts first; a closed model raises EngineError.

    Args:
        path: the GGUF file.
        n_gpu_layers: how many layers go to the GPU, -1 for all; without a GPU backend it has no effect. With 0 everything is computed on the CPU.
        placement: the same and more of where the model lies, in place of n_gpu_layers.
        use_mmap: map the file instead of reading it.
        lora: adapters that everything is computed with.

    Attributes:
        adapters: the same as they are loaded.
        contexts: what was made with it and is closed first.
        placement: where it lies, and its caches do.
        devices: those beside the CPU that it may lie on.

    Raises:
        EngineError: no such file, not GGUF, not loadable, a model without a KV cache, an adapter for another one, no such device, or an RPC
            server that does not answer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        placement: Placement | None = None,
        use_mmap: bool = True,
        lora: Sequence[Lora] = (),
    ) -> None:
        self.path = Path(path)
        self.placement = placement or Placement(n_gpu_layers)
        check_is_gguf(self.path)
        alignments, self._alphabet = _sound(self.path)
        base = checked_base(self.path, lora)
        self._lib = lib = load().llama_cpp
        lib.llama_backend_init()

        params = lib.llama_model_default_params()
        self.devices, given = _put(params, self.placement)
        # ggml aborts where tensors would be mapped to addresses with a smaller alignment
        mapped = use_mmap and lib.llama_supports_mmap() and not any(alignment in range(1, ALIGNMENT) for alignment in alignments)
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mapped else lib.LLAMA_LOAD_MODE_NONE
        with NativeLog(lib) as log:
            pointer = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        del given
        if not pointer:
            check_connected(self.devices)
            raise EngineError(f"{self.path} cannot be loaded{log.reason}: fetch it again or choose another model")
        self._pointer: int = pointer
        self._free = weakref.finalize(self, lib.llama_model_free, pointer)
        try:
            check_connected(self.devices)
        except BaseException:
            self._free()
            raise
        self.contexts: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._vocab = lib.llama_model_get_vocab(pointer)
        self._pieces: dict[tuple[int, bool], bytes] = {}

        self._has_vocabulary = lib.llama_vocab_type(self._vocab) != lib.LLAMA_VOCAB_TYPE_NONE
        self.has_encoder = bool(lib.llama_model_has_encoder(pointer))
        self.is_recurrent = bool(lib.llama_model_is_recurrent(pointer))
        self.is_hybrid = bool(lib.llama_model_is_hybrid(pointer))
        self.is_diffusion = bool(lib.llama_model_is_diffusion(pointer))
        self.has_decoder = bool(lib.llama_model_has_decoder(pointer))
        self._check_has_kv_cache()
        try:
            self.adapters = tuple(Adapter(self, each.path, each.scale, base=base) for each in lora)
        except BaseException:
            self.close()
            raise

        self.n_ctx_train: int = lib.llama_model_n_ctx_train(pointer)
        self.n_embd: int = lib.llama_model_n_embd(pointer)
        self.n_embd_out: int = lib.llama_model_n_embd_out(pointer)
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
        newline = lib.llama_vocab_nl(self._vocab)
        self.newline: int | None = newline if newline >= 0 else None
        self.add_bos = self.bos is not None and bool(lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def n_gpu_layers(self) -> int:
        """How many layers go to the GPU, -1 for all."""
        return self.placement.n_gpu_layers

    def _check_has_kv_cache(self) -> None:
        kinds = {
            "an encoder": self.has_encoder or not self.has_decoder,
            "a recurrent state of fixed size": self.is_recurrent,
            "diffusion": self.is_diffusion,
        }
        for kind, found in kinds.items():
            if found:
                self.close()
                raise EngineError(
                    f"{self.path} works with {kind} instead of a plain KV cache, so there is nothing to compress: "
                    "choose a decoder-only model with attention"
                )

    @property
    def changed_by(self) -> list[list[str | float]]:
        """Fingerprint and scale of each adapter that has an effect: what is computed depends on it as on the file of the weights."""
        return [[adapter.fingerprint, adapter.scale] for adapter in self.adapters if adapter.scale]

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

    def detokenize(self, tokens: npt.ArrayLike, special: bool = False) -> str:
        """The text of tokens [n]; control tokens are left out unless they are asked for (token_bytes), broken UTF-8 becomes U+FFFD."""
        pieces = (self.token_bytes(int(token), special) for token in np.asarray(tokens, dtype=np.int32).ravel())
        return b"".join(pieces).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the contexts of this model, then the model. Closing twice is harmless."""
        for context in list(getattr(self, "contexts", ())):
            context.close()
        self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _put(params: Any, placement: Placement) -> tuple[list[Device], list[Any]]:
    """Writes into llama_model_params where a model goes. Returns the devices, and what has to live until it is loaded.

    Raises:
        EngineError: a device is named that there is not, or an RPC server that does not answer or gets nothing.
    """
    lib = load().llama_cpp
    used = devices_of(placement)
    if placement.rpc and not any(device.is_remote for device in used):
        raise EngineError("no layer of the model goes to the RPC servers: give more --gpu-layers, name them with --device, or leave them out")
    # without a list llama.cpp makes all devices ready, and takes their memory, also where no layer goes there
    array = (ctypes.c_void_p * (len(used) + 1))(*(device.address for device in used), None)
    params.devices = ctypes.cast(array, ctypes.c_void_p)
    params.n_gpu_layers = placement.n_gpu_layers
    params.split_mode = getattr(lib, f"LLAMA_SPLIT_MODE_{placement.split_mode.upper()}")
    # with the split mode none the list is that one
    params.main_gpu = 0 if placement.split_mode == NONE else placement.main_gpu
    split = (ctypes.c_float * lib.llama_max_devices())(*placement.tensor_split)
    if placement.tensor_split:
        params.tensor_split = ctypes.cast(split, ctypes.POINTER(ctypes.c_float))
    return used, [array, split]


def check_is_gguf(path: Path) -> None:
    """Raises EngineError unless the file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}): give the path of a GGUF file") from error
    if magic != _GGUF_MAGIC:
        raise EngineError(f"{path} is not a GGUF file: give the path of a model in GGUF format")


def _sound(path: Path) -> tuple[list[int], Alphabet | None]:
    """The alignments of a model's files, and what it may be asked to tokenize."""
    try:
        header = Header(path)
        alignments = [header.alignment, *(Header(part).alignment for part in other_parts(header))]
    except ContainerError as error:
        raise EngineError(str(error)) from error
    flaw, alphabet = examine(header)
    if flaw:
        raise EngineError(f"{path} cannot be loaded ({flaw}): fetch it again or choose another model")
    return alignments, alphabet
