"""TokenBatch: the tokens of a decode and their places, in llama.cpp's own form."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt


class TokenBatch:
    """One llama_batch for all decodes of a context; its arrays are numpy's, so that filling it needs no loop.

    llama_cpp: the bindings
    n_max: the most tokens
    n_seq_max: sequences

    batch: the llama_batch
    n_outputs: tokens whose logits are kept, the last ones
    """

    def __init__(self, llama_cpp: Any, n_max: int, n_seq_max: int) -> None:
        self._tokens = np.zeros(n_max, dtype=np.int32)
        self._positions = np.zeros(n_max, dtype=np.int32)
        self._offsets = np.arange(n_max, dtype=np.int32)
        self._flags = np.zeros(n_max, dtype=np.int8)
        self._n_seq_ids = np.ones(n_max, dtype=np.int32)
        # every token points at its sequence's entry in this table
        self._seq_ids = np.arange(n_seq_max, dtype=np.int32)
        self._seq_id_pointers = np.zeros(n_max + 1, dtype=np.uintp)
        types = dict(llama_cpp.llama_batch._fields_)
        self._token_type, self._embd_type = types["token"], types["embd"]
        self.batch = llama_cpp.llama_batch(
            token=self._token_type(),
            embd=self._embd_type(),
            pos=ctypes.cast(self._positions.ctypes.data, types["pos"]),
            n_seq_id=ctypes.cast(self._n_seq_ids.ctypes.data, types["n_seq_id"]),
            seq_id=ctypes.cast(self._seq_id_pointers.ctypes.data, types["seq_id"]),
            logits=ctypes.cast(self._flags.ctypes.data, types["logits"]),
        )
        self._token_pointer = ctypes.cast(self._tokens.ctypes.data, self._token_type)
        self._seq_ids_address = self._seq_ids.ctypes.data
        self.n_outputs = 0

    def place(self, n: int, pos: int, seq: int, n_outputs: int) -> None:
        """n tokens of a sequence at the positions from `pos` on."""
        self.batch.n_tokens, self.n_outputs = n, n_outputs
        np.add(self._offsets[:n], pos, out=self._positions[:n])
        self._seq_id_pointers[:n] = self._seq_ids_address + seq * self._seq_ids.itemsize
        self._flags[: n - n_outputs] = 0
        self._flags[n - n_outputs : n] = 1

    def place_each(self, positions: npt.NDArray[np.int32], sequences: npt.NDArray[np.int32]) -> None:
        """A token at each of these positions, int32 [n], of these sequences, int32 [n]; the logits of all are kept."""
        self.batch.n_tokens = self.n_outputs = n = len(positions)
        self._positions[:n] = positions
        np.multiply(sequences, self._seq_ids.itemsize, out=self._seq_id_pointers[:n], casting="unsafe")
        self._seq_id_pointers[:n] += np.uintp(self._seq_ids_address)
        self._flags[:n] = 1

    def set_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        """The tokens at these places, int32 [n]."""
        self._tokens[: len(tokens)] = tokens
        self.batch.token, self.batch.embd = self._token_pointer, self._embd_type()

    def set_vectors(self, vectors: npt.NDArray[np.float32]) -> None:
        """Vectors in place of token embeddings, float32 [n, n_embd], contiguous; they must live until they are decoded."""
        self.batch.token, self.batch.embd = self._token_type(), ctypes.cast(vectors.ctypes.data, self._embd_type)

    @property
    def first_position(self) -> int:
        """The position of the first token."""
        return int(self._positions[0])

    def first_sequence(self) -> tuple[int, bool]:
        """The sequence of the first token, and whether there are others."""
        addresses = self._seq_id_pointers[: self.batch.n_tokens]
        return int(addresses[0] - self._seq_ids_address) // self._seq_ids.itemsize, bool((addresses != addresses[0]).any())
