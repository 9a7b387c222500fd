"""TokenBatch: the tokens of a decode and their places, in llama.cpp's own form."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.llama.errors import EngineError
from kvlocal.llama.sequence_decoder import Outputs


class TokenBatch:
    """One llama_batch for all decodes of a context; its arrays are numpy's, so that filling it needs no loop.

    llama_cpp: the bindings
    n_max: the most tokens
    n_seq_max: sequences
    n_outputs_max: the most tokens whose logits are kept

    batch: the llama_batch
    n_outputs: tokens whose logits are kept, the last ones
    """

    def __init__(self, llama_cpp: Any, n_max: int, n_seq_max: int, n_outputs_max: int) -> None:
        self._n_max, self._n_seq_max, self._n_outputs_max = n_max, n_seq_max, n_outputs_max
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

    def place(self, n: int, pos: int, seq: int, logits: Outputs) -> None:
        """n tokens of a sequence at the positions from `pos` on, and for which of them logits are kept.

        Raises:
            EngineError: wrong arguments.
        """
        n_outputs = {"last": 1, "all": n, "none": 0}.get(logits)
        if n_outputs is None:
            raise EngineError(f"logits are kept for 'last', 'all' or 'none' of the tokens, not for {logits!r}")
        self._check(n, n_outputs, pos, seq, seq)
        self.batch.n_tokens, self.n_outputs = n, n_outputs
        np.add(self._offsets[:n], pos, out=self._positions[:n])
        self._seq_id_pointers[:n] = self._seq_ids_address + seq * self._seq_ids.itemsize
        self._flags[: n - n_outputs] = 0
        self._flags[n - n_outputs : n] = 1

    def place_each(self, positions: npt.NDArray[np.int32], sequences: npt.NDArray[np.int32]) -> None:
        """A token at each of these positions, int32 [n], of these sequences, int32 [n]; the logits of all are kept.

        Raises:
            EngineError: wrong arguments.
        """
        n = len(positions)
        self._check(n, n, positions.min(initial=0), sequences.min(initial=0), sequences.max(initial=0))
        self.batch.n_tokens = self.n_outputs = n
        self._positions[:n] = positions
        np.multiply(sequences, self._seq_ids.itemsize, out=self._seq_id_pointers[:n], casting="unsafe")
        self._seq_id_pointers[:n] += np.uintp(self._seq_ids_address)
        self._flags[:n] = 1

    def _check(self, n: int, n_outputs: int, first_position: int, first_seq: int, last_seq: int) -> None:
        if not 1 <= n <= self._n_max:
            raise EngineError(f"a batch holds 1 to {self._n_max} tokens, not {n}: split it")
        if n_outputs > self._n_outputs_max:
            raise EngineError(f"the context keeps logits for {self._n_outputs_max} tokens: raise n_outputs or ask for fewer")
        if first_position < 0:
            raise EngineError(f"a position is {first_position}, but must be at least 0")
        for seq in (first_seq, last_seq):
            self.check_sequence(seq)

    def check_sequence(self, seq: int) -> None:
        """Raise EngineError unless there is such a sequence."""
        if not 0 <= seq < self._n_seq_max:
            raise EngineError(f"there is no sequence {seq}: this context has {self._n_seq_max}")

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
