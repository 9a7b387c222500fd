"""What in a model's file makes llama.cpp end the process instead of refusing the file, found before it reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvlocal.gguf.container import Header

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
_ROPE_SCALINGS = ("linear", "none", "yarn", "longrope")
_WITH_BYTES = "llama"  # the tokenizer that has a token for each byte
_EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon")
_NO_VOCABULARY = ("no_vocab", "none")


@dataclass(frozen=True)
class Alphabet:
    """What a tokenizer can read that splits characters without a token into bytes, where not all bytes have a token.

    characters: those that have a token
    bytes: likewise
    """

    characters: frozenset[str]
    bytes: frozenset[int]

    def lacks(self, text: str) -> str | None:
        """The first character of a text that cannot be read."""
        # the tokenizer writes spaces so, and puts one in front
        text = "\u2581" + text.replace(" ", "\u2581")
        return next((c for c in text if c not in self.characters and not self.bytes.issuperset(c.encode())), None)


def examine(header: Header) -> tuple[str | None, Alphabet | None]:
    """Why llama.cpp must not be given this file, in a few words, None if it can load it or refuse it on its own; and what it may be asked to
    tokenize then, None for anything.

    What is asked here is what llama.cpp asserts in llama_model_base::load_hparams, llama_vocab::impl::load, llama_model::create_memory
    and ggml_rope_impl, which never ends with no dimension.
    """
    names = _names(header)
    repeats = "a token twice in its vocabulary" if names is None else None
    return _flaw_of_layers(header) or _flaw_of_experts(header) or repeats, _alphabet(header, names or set())


def _flaw_of_layers(header: Header) -> str | None:
    n_layers = int(_numbers(header, "block_count", 1).max())
    if not 1 <= n_layers <= _MAX_LAYERS:
        return f"{n_layers} layers"
    if _numbers(header, "nextn_predict_layers", 0).max() > n_layers:
        return "more layers that predict than layers"
    pattern = header.metadata.get(f"{_architecture(header)}.attention.sliding_window_pattern", 0)
    local = pattern[:n_layers].any() if isinstance(pattern, np.ndarray) else pattern != 1
    if not local and _numbers(header, "attention.sliding_window", 0).max():
        return "a sliding window that no layer has"
    n_heads = int(_numbers(header, "attention.head_count", 0)[0])
    size = int(_numbers(header, "embedding_length", 0)[0]) // n_heads if n_heads > 0 else 0
    for kind in ("", "_swa"):
        # of a head in these layers
        size = int(_numbers(header, f"attention.key_length{kind}", size)[0])
        n_rotated = int(_numbers(header, f"rope.dimension_count{kind}", 2)[0])
        if n_rotated < 2 or n_rotated % 2 or n_rotated > size > 0:
            return f"{n_rotated} rotated dimensions"
    epsilons = [header.metadata.get(f"{_architecture(header)}.attention.{key}") for key in _EPSILONS]
    if not all(epsilon >= 0 for epsilon in epsilons if isinstance(epsilon, float)):
        return "norms with a negative epsilon"
    scaling = _text(header, f"{_architecture(header)}.rope.scaling.type", _ROPE_SCALINGS[0])
    return None if scaling in _ROPE_SCALINGS else "unknown scaling of its positions"


def _flaw_of_experts(header: Header) -> str | None:
    keys = "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"
    n, n_used, n_groups, n_groups_used = (int(_numbers(header, key, 0).max()) for key in keys)
    if n <= 1 and _architecture(header).startswith("hunyuan"):
        # llama.cpp takes a single expert of these for none
        n = n_used = 0
    grouped = n_groups <= 1 or (n % n_groups == 0 and 0 < n_groups_used < n_groups)
    sound = n <= _MAX_EXPERTS and 0 < n_used <= n and n_groups < n and grouped if n else n_used == n_groups == 0
    return None if sound else f"{n_used} of {n} experts in {n_groups} groups"


def _names(header: Header) -> set[bytes] | None:
    """The vocabulary as llama.cpp reads it; None if a token is in it twice."""
    if _text(header, "tokenizer.ggml.model", "") in _NO_VOCABULARY:
        return set()
    tokens = header.strings("tokenizer.ggml.tokens")
    names = set(tokens)
    if len(names) < len(tokens) or b"" in names or b"\0" in b"".join(tokens):
        # llama.cpp reads up to the first zero, and names those that are empty
        names = {token.partition(b"\0")[0] or b"[EMPTY_%d]" % i for i, token in enumerate(tokens)}
    return names if len(names) == len(tokens) else None


def _alphabet(header: Header, names: set[bytes]) -> Alphabet | None:
    if _text(header, "tokenizer.ggml.model", "") != _WITH_BYTES:
        return None
    found = frozenset(byte for byte in range(256) if b"<0x%02X>" % byte in names or bytes([byte]) in names)
    if len(found) == 256:
        return None
    return Alphabet(frozenset(c for name in names if len(name) <= 4 and len(c := name.decode("utf-8", "replace")) == 1), found)


def _architecture(header: Header) -> str:
    return _text(header, "general.architecture", "")


def _text(header: Header, key: str, default: str) -> str:
    return str(header.metadata.get(key, default)).partition("\0")[0]


def _numbers(header: Header, key: str, default: int) -> npt.NDArray[np.int64]:
    """A number of the architecture, or one for each layer, int64 [n]; the default for what llama.cpp refuses on its own, such as texts."""
    value = np.atleast_1d(header.metadata.get(f"{_architecture(header)}.{key}", default))
    return value.astype(np.int64) if value.dtype.kind in "iu" and value.size else np.array([default])
