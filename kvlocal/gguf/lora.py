"""Whether a LoRA adapter goes with a model, by what their files hold, found before llama.cpp reads it."""

from __future__ import annotations

import math

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from kvlocal.gguf.container import Container, Tensor

# what is behind the name of a tensor that is changed, for the halves A and B of its pair
HALF_A, HALF_B = ".lora_a", ".lora_b"
ALPHA = "adapter.lora.alpha"
_SWITCHED = "adapter.alora.invocation_tokens"
# left out by llama.cpp without a word
_NORM = "_norm.weight"
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
# what converters write
_KINDS = ("F32", "F16", "BF16", "Q8_0")
# its scales would be applied to the adapter too, so llama.cpp ends the process
_SCALED = "NVFP4"


def flaw_of_adapter(adapter: Container, base: Container) -> str | None:
    """Why this adapter cannot be used with this model, in a few words; None if llama.cpp can load it, or refuse it on its own.

    Asked is what llama.cpp asserts in gguf_get_val_* and ggml_mul_mat, which would end the process, and what it would leave out or compute
    nonsense with. An adapter has a pair A [r, n_in] and B [n_out, r] for each tensor [n_out, n_in] that it changes, with the experts in front if
    the tensor has some; for token embeddings [n_vocab, n_embd] they are A [n_vocab, r] and B [n_embd, r].
    """
    return _flaw_of_metadata(adapter, base) or _flaw_of_names(adapter, base) or _flaw_of_tensors(adapter, base)


def flaw_of_values(adapter: Container) -> str | None:
    """As flaw_of_adapter, of what takes a moment to look at: all numbers of an adapter that has no such flaw."""
    for name in changed_tensors(adapter):
        for half in (adapter.tensors[name + HALF_A], adapter.tensors[name + HALF_B]):
            if not np.isfinite(half.values()).all():
                return f"{half.name} holds values that are not finite"
    return None


def _flaw_of_metadata(adapter: Container, base: Container) -> str | None:
    metadata = adapter.metadata
    if metadata.get("general.type") != "adapter":
        return "it is no adapter"
    if (kind := metadata.get("adapter.type")) != "lora":
        return f"it is an adapter of the type {_short(kind)}, not lora"
    architecture, wanted = metadata.get("general.architecture"), base.metadata.get("general.architecture")
    if architecture != wanted:
        return f"it is for the architecture {_short(architecture)}, and the model has {_short(wanted)}"
    if _SWITCHED in adapter.kinds:
        return "it is to be switched on by certain tokens"
    if adapter.kinds.get(ALPHA, GGUFValueType.FLOAT32) != GGUFValueType.FLOAT32 or not math.isfinite(metadata.get(ALPHA, 0.0)):
        return "its alpha is no number"
    return None


def _flaw_of_names(adapter: Container, base: Container) -> str | None:
    names = adapter.tensors
    changed = changed_tensors(adapter)
    if not changed:
        return "it has no tensors"
    for name in changed:
        if name + HALF_A not in names or name + HALF_B not in names:
            return f"{_short(name)} has one half of its pair"
        if name not in base.tensors:
            return f"the model has no tensor {_short(name)}"
    other = [name for name in names if not name.endswith((HALF_A, HALF_B, _NORM))]
    if other:
        return f"{_short(other[0])} is no part of an adapter"
    if _EMBEDDING in changed and _OUTPUT not in base.tensors:
        return f"it changes {_EMBEDDING}, which is the output of this model too, and llama.cpp cannot have that"
    return None


def _flaw_of_tensors(adapter: Container, base: Container) -> str | None:
    for name in changed_tensors(adapter):
        a, b, changed = adapter.tensors[name + HALF_A], adapter.tensors[name + HALF_B], base.tensors[name]
        if changed.kind == getattr(GGMLQuantizationType, _SCALED, None):
            return f"{name} is of the type {_SCALED} in the model"
        if not _fits(name, a, b, changed):
            return f"{name} has the shape {list(changed.shape)}, and the adapter is for another one"
        for half in (a, b):
            if half.kind.name not in _KINDS:
                return f"{half.name} is of the type {half.kind.name}"
    return None


def _fits(name: str, a: Tensor, b: Tensor, changed: Tensor) -> bool:
    if len(changed.shape) < 2 or 0 in (*a.shape, *b.shape):
        return False
    (*outer_a, rows_a, columns_a), (*outer_b, rows_b, columns_b), (*outer, n_out, n_in) = (_in_full(tensor) for tensor in (a, b, changed))
    if not outer == outer_a == outer_b:
        return False
    if name == _EMBEDDING:
        return (rows_a, rows_b) == (n_out, n_in) and columns_a == columns_b
    return (columns_a, rows_b) == (n_in, n_out) and rows_a == columns_b


def _in_full(tensor: Tensor) -> tuple[int, ...]:
    """The shape with all dimensions that ggml has."""
    return (1,) * (4 - len(tensor.shape)) + tensor.shape


def changed_tensors(adapter: Container) -> list[str]:
    """The names of the model's tensors that an adapter changes."""
    return list(dict.fromkeys(name.removesuffix(HALF_A).removesuffix(HALF_B) for name in adapter.tensors if name.endswith((HALF_A, HALF_B))))


def _short(text: object) -> str:
    """What a file says, which can be anything."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:60])
