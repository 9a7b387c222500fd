"""What the attention of a model looks like, from its file alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kvlocal.gguf.container import Container

# the family whose attention llama.cpp gives a soft cap
_SOFT_CAP = "gemma2"


@dataclass(frozen=True)
class Attention:
    """Its heads, and how long a context it was trained for.

    n_ctx_train: positions
    n_embd: numbers of an embedding
    n_head: query heads of the layer that has most
    n_head_kv: KV heads of the layer that has most
    n_head_kv_all: of all layers together
    size_k, size_v: numbers of a key and of a value of one head
    window: of the sliding-window layers, 0 without any
    plain: whether it has neither a soft cap nor sinks in every layer
    """

    n_ctx_train: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_head_kv_all: int
    size_k: int
    size_v: int
    window: int
    plain: bool

    @classmethod
    def of(cls, model: Container) -> Self | None:
        """None where the metadata do not say enough; what is missing is for llama.cpp to complain about."""
        try:
            return cls._of(model)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return None

    @classmethod
    def _of(cls, model: Container) -> Self:
        metadata = model.metadata
        family = metadata["general.architecture"]

        def number(name: str, default: Any = None) -> Any:
            return metadata.get(f"{family}.{name}", default)

        n_embd, n_layer = int(number("embedding_length")), int(number("block_count"))
        n_head = int(np.max(number("attention.head_count")))
        # one number for all layers, or one for each
        each = np.atleast_1d(number("attention.head_count_kv", n_head))
        n_head_kv, n_head_kv_all = int(each.max()), int(each.sum()) if len(each) > 1 else int(each[0]) * n_layer
        size_k, size_v = (int(number(f"attention.{name}_length", n_embd // n_head)) for name in ("key", "value"))
        if min(n_embd, n_layer, n_head, n_head_kv_all, size_k, size_v) < 1 or len(each) not in (1, n_layer):
            raise ValueError("no attention")
        sinks = all(f"blk.{i}.attn_sinks.weight" in model.tensors for i in range(n_layer))
        window, plain = int(number("attention.sliding_window", 0)), family != _SOFT_CAP and not sinks
        return cls(int(number("context_length")), n_embd, n_head, n_head_kv, n_head_kv_all, size_k, size_v, window, plain)

    def cell_bytes(self, type_k: str, type_v: str) -> int:
        """What one cell takes in all layers and heads, with these types of cache."""
        sizes = ((self.size_k, type_k), (self.size_v, type_v))
        return self.n_head_kv_all * sum(-(-size * _bytes_of(kind) // block_of(kind)) for size, kind in sizes)


def block_of(kind: str) -> int:
    """How many numbers a type stores together."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]][0]


def _bytes_of(kind: str) -> int:
    """What such a block takes."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]][1]
