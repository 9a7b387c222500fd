"""What the attention of a model looks like, from its file alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kvlocal.gguf.container import Container
from kvlocal.gguf.recurrent import Recurrent

# the family whose attention llama.cpp gives a soft cap
_SOFT_CAP = "gemma2"
# families of which llama.cpp knows how many layers there are to one without a sliding window, where a file does not say it
_PERIODS = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2, "olmo2": 4}
# more than any model has; a file may say anything
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Attention:
    """Its heads, and how long a context it was trained for.

    n_ctx_train: positions
    n_embd: numbers of an embedding
    n_head: query heads of the layer that has most
    n_head_kv: KV heads of the layer that has most
    n_head_kv_each: KV heads of each layer, 0 of one without a KV cache
    size_k, size_v: numbers of a key and of a value of one head
    window: of the sliding-window layers, 0 without any
    windowed: whether each layer has a sliding window, as far as it is known; a layer of which it is not counts as one without
    plain: whether it has neither a soft cap nor sinks in every layer
    latent: whether a value is the beginning of its key (multi-head latent attention), and not stored
    """

    n_ctx_train: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_head_kv_each: tuple[int, ...]
    size_k: int
    size_v: int
    window: int
    windowed: tuple[bool, ...]
    plain: bool
    latent: bool

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
        recurrent = Recurrent.of(model)
        size_k, size_v = (int(number(f"attention.{name}_length", n_embd // n_head)) for name in ("key", "value"))
        if min(n_embd, n_layer, n_head, int(each.sum()), size_k, size_v) < 1 or len(each) not in (1, n_layer) or n_layer > _MOST_LAYERS:
            raise ValueError("no attention")
        heads = tuple(np.broadcast_to(each, n_layer).tolist())
        if recurrent:
            heads = tuple(n if i in recurrent.attention_layers else 0 for i, n in enumerate(heads))
        sinks = all(f"blk.{i}.attn_sinks.weight" in model.tensors for i in range(n_layer))
        window, plain = int(number("attention.sliding_window", 0)), family != _SOFT_CAP and not sinks
        latent = bool(number("attention.key_length_mla", 0))
        windowed = _windowed(number("attention.sliding_window_pattern", _PERIODS.get(family, 1)), n_layer) if window else (False,) * n_layer
        return cls(int(number("context_length")), n_embd, n_head, max(heads), heads, size_k, size_v, window, windowed, plain, latent)

    def cell_bytes(self, type_k: str, type_v: str) -> int:
        """What one cell takes in all layers and heads, with these types of cache."""
        return sum(self.n_head_kv_each) * self.row_bytes(type_k, type_v)

    def row_bytes(self, type_k: str, type_v: str) -> int:
        """What a key and a value of one head take, with these types of cache."""
        sizes = ((self.size_k, type_k), (0 if self.latent else self.size_v, type_v))
        return sum(-(-size * _bytes_of(kind) // block_of(kind)) for size, kind in sizes)


def _windowed(pattern: Any, n_layer: int) -> tuple[bool, ...]:
    """Of a flag for each layer, or of the number of layers that have one without a window, the last of them; 0 if there is none.

    Source: llama.cpp, load_swa_pattern and set_swa_pattern.
    """
    flags = np.atleast_1d(pattern)
    if len(flags) > 1 or flags.dtype == np.bool_:
        return tuple(bool(flag) for flag in flags[:n_layer]) + (False,) * (n_layer - len(flags))
    period = int(flags[0])
    return tuple(period == 0 or i % period < period - 1 for i in range(n_layer))


def block_of(kind: str) -> int:
    """How many numbers a type stores together."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]][0]


def _bytes_of(kind: str) -> int:
    """What such a block takes."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]][1]
