"""SequenceDecoder: what a conversation decodes with, a context of its own or a slot beside others."""

from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from kvlocal.llama.adapter import Adapter
from kvlocal.llama.model import Model

# for which tokens of a batch logits are kept
Outputs = Literal["last", "all", "none"]
T = TypeVar("T")


class SequenceDecoder(Protocol):
    """The cells of one conversation and the decoder over them, as kvlocal.llama.context.Context and kvlocal.llama.slots.Slot have them.

    Where a method takes a sequence, 0 is that of the conversation. Each method does and raises what the one of Context does.

    model: the weights
    seq: its number where others decode in the same llama_context
    n_cells, n_ubatch: cells, and tokens per decode call at most
    closed: whether the cells are freed
    """

    model: Model
    seq: int
    n_cells: int
    n_ubatch: int

    @property
    def closed(self) -> bool: ...

    @property
    def pointer(self) -> int:
        """The address of the llama_context."""
        ...

    def call(self, function: Callable[[], T]) -> T:
        """Calls what computes with the cells, in the thread that decodes."""
        ...

    def decode(self, tokens: npt.ArrayLike, pos: int, seq: int = 0, logits: Outputs = "last") -> None: ...

    def decode_embeddings(self, embd: npt.ArrayLike, pos: int, seq: int = 0, logits: Outputs = "none") -> None: ...

    def use_adapter(self, adapter: Adapter | None) -> None: ...

    def check_output(self, i: int = -1) -> None: ...

    def logits(self, i: int = -1) -> npt.NDArray[np.float32]: ...

    def logits_all(self) -> npt.NDArray[np.float32]: ...

    def remove(self, seq: int, p0: int, p1: int) -> None: ...

    def clear(self, seq: int = 0) -> None: ...

    def pos_min(self, seq: int = 0) -> int: ...

    def pos_max(self, seq: int = 0) -> int: ...

    def state_get(self, seq: int = 0, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]: ...

    def state_set(self, seq: int, state: npt.NDArray[np.uint8] | bytes) -> None: ...

    def recurrent_state(self, seq: int = 0) -> npt.NDArray[np.uint8]: ...

    def set_recurrent_state(self, seq: int, state: npt.NDArray[np.uint8]) -> None: ...

    def kv_bytes(self) -> int: ...

    def state_bytes(self) -> int: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...
