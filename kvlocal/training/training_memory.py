"""How much memory training takes, known before it starts."""

from __future__ import annotations

import math

from kvlocal.gguf.container import Container
from kvlocal.training.weights import LINEAR, HyperParameters

_PYTORCH = 700e6  # of the library itself, and of what it keeps for later
_CHUNK = 64 * 4 * 4  # bytes for each entry of the vocabulary: rows whose predictions are compared at a time, in float32, four times
_FLOAT32 = 4


def training_memory(base: Container, n_tokens: int, rank: int, dtype: str) -> int:
    """Bytes that an update takes at its peak, for a chat of n_tokens; counted from what the backward pass needs of each layer, and measured within
    a fifth.

    dtype: that matrices are multiplied in, "float32" or "bfloat16"

    Raises WeightsError if the model is not one that the decoder knows.
    """
    hyper = HyperParameters.of(base)
    size = 2 if dtype == "bfloat16" else _FLOAT32
    layers = [tensor for name, tensor in base.tensors.items() if name.startswith("blk.") and name.split(".")[2] in LINEAR]
    weights = sum(math.prod(tensor.shape) for tensor in base.tensors.values()) * size
    # parameters, gradients, two moments of AdamW
    trained = sum(rank * sum(tensor.shape) for tensor in layers if len(tensor.shape) == 2) * _FLOAT32 * 4
    heads, heads_kv = hyper.n_head * hyper.n_embd_head, hyper.n_head_kv * hyper.n_embd_head
    n_ff = base.tensors["blk.0.ffn_gate.weight"].shape[0]
    of_row = _FLOAT32 * (4 * hyper.n_embd + 3 * heads + 3 * heads_kv) + size * (3 * hyper.n_embd + 5 * heads + 6 * heads_kv + 5 * n_ff)
    return round(_PYTORCH + weights + trained + hyper.n_layer * n_tokens * of_row + hyper.n_vocab * _CHUNK)
