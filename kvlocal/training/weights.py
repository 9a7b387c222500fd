"""The weights of a GGUF model as PyTorch tensors, with the hyper-parameters that its metadata gives, for kvlocal.training.decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")

# The linear layers of a block, which an adapter has a part for each.
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

_ROPE_BASE = 10000.0  # llama.cpp's, where the metadata have none
_WINDOW_PATTERN = 6  # of gemma3: every sixth layer sees everything
_LAYERS_OF_GEMMA3_27B = 62


class WeightsError(KvlocalError):
    """A model that Nexus tokens cannot be trained for."""


@dataclass(frozen=True)
class HyperParameters:
    """What the decoder computes with, besides the weights.

    rope_neighbours: a rotation turns numbers 2i and 2i + 1 (ggml's NORM), otherwise i and i + d/2 (NEOX)
    rope_bases, rope_scales: of each layer; a scale multiplies positions
    attention_scale: of the scores before the softmax
    embedding_scale: of token embeddings; vectors that are given in place of tokens are taken as they are
    windows: of each layer, how far back it sees, in positions; None is everything
    gelu: GELU (tanh) instead of SiLU
    softcap: logits become softcap * tanh(logits / softcap); 0 is off
    """

    family: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_vocab: int
    eps: float
    rope_neighbours: bool
    rope_bases: tuple[float, ...]
    rope_scales: tuple[float, ...]
    attention_scale: float
    embedding_scale: float
    windows: tuple[int | None, ...]
    gelu: bool
    softcap: float

    @property
    def n_swa(self) -> int:
        """Size of the sliding window of the layers that have one, 0 if none has."""
        return max((window for window in self.windows if window), default=0)

    @classmethod
    def of(cls, base: Container) -> HyperParameters:
        """Raises WeightsError if the model is of a family or has a feature that the decoder does not know."""
        family = base.metadata.get("general.architecture")
        if family not in FAMILIES:
            raise WeightsError(f"{base.path.name} is a {family} model, and Nexus tokens are trained for {', '.join(FAMILIES)}: choose another one")
        values = _Values(base, family)
        n_layer, n_embd, n_head = (int(values.need(name)) for name in ("block_count", "embedding_length", "attention.head_count"))
        n_embd_head = int(values.get("attention.key_length", n_embd // n_head))
        values.only("attention.value_length", n_embd_head)
        values.only("rope.dimension_count", n_embd_head)
        values.only("rope.scaling.type", "linear", "none")
        values.only("expert_count", 0)
        scaling = values.get("rope.scaling.factor", values.get("rope.scale_linear", 0.0)) or 1.0
        gemma = family == "gemma3"
        windowed = _windowed(values, n_layer) if gemma else (False,) * n_layer
        rope_base = values.get("rope.freq_base", _ROPE_BASE)
        window_base = values.get("rope.freq_base_swa", _ROPE_BASE)
        return cls(
            family=family,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=int(values.get("attention.head_count_kv", n_head)),
            n_embd_head=n_embd_head,
            n_vocab=base.tensors["token_embd.weight"].shape[0],
            eps=values.need("attention.layer_norm_rms_epsilon"),
            rope_neighbours=family == "llama",
            rope_bases=tuple(window_base if window else rope_base for window in windowed),
            rope_scales=tuple(1.0 if window else 1.0 / scaling for window in windowed),
            attention_scale=1 / math.sqrt(n_embd // n_head if gemma and n_layer == _LAYERS_OF_GEMMA3_27B else n_embd_head),
            embedding_scale=math.sqrt(n_embd) if gemma else 1.0,
            windows=tuple(values.get("attention.sliding_window", 0) if window else None for window in windowed),
            gelu=gemma,
            softcap=values.get("final_logit_softcapping", 0.0),
        )


class _Values:
    """The metadata of one architecture."""

    def __init__(self, base: Container, family: str) -> None:
        self._base, self._family = base, family

    def get(self, name: str, default: Any = None) -> Any:
        return self._base.metadata.get(f"{self._family}.{name}", default)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None or isinstance(value, str) or np.ndim(value):
            raise WeightsError(f"{self._base.path.name} does not say its {name} in one number: choose another GGUF file")
        return value

    def only(self, name: str, *known: Any) -> None:
        value = self.get(name, known[0])
        if value not in known:
            raise WeightsError(f"{self._base.path.name} has {name} {value}, with which Nexus tokens cannot be trained: choose another model")


def _windowed(values: _Values, n_layer: int) -> tuple[bool, ...]:
    """Which layers see only a window."""
    if not values.get("attention.sliding_window", 0):
        return (False,) * n_layer
    pattern = values.get("attention.sliding_window_pattern", _WINDOW_PATTERN)
    if getattr(pattern, "ndim", 0):
        return tuple(map(bool, pattern[:n_layer]))
    return tuple(not pattern or i % pattern < pattern - 1 for i in range(n_layer))


@dataclass(frozen=True)
class Weights:
    """Dequantised weights, all without gradient.

    embedding, output: [n_vocab, n_embd] in the compute type; one and the same where the model ties them
    output_norm: [n_embd] float32
    rope_factors: [n_embd_head / 2] float32 that frequencies are divided by, or None
    layers: of each layer by GGUF's name without "blk.N.": linear weights [n_out, n_in] in the compute type, norms and biases float32
    """

    hyper: HyperParameters
    embedding: Tensor
    output: Tensor
    output_norm: Tensor
    rope_factors: Tensor | None
    layers: tuple[dict[str, Tensor], ...]

    @classmethod
    def load(cls, base: Container, dtype: torch.dtype, device: str | torch.device) -> Weights:
        """Raises WeightsError if the model is not one that the decoder knows."""
        hyper = HyperParameters.of(base)

        def tensor(name: str) -> Tensor:
            if name not in base.tensors:
                raise WeightsError(f"{base.path.name} has no {name}: choose another GGUF file of the model")
            # a copy, since what is float32 in the file is a view of it
            values = torch.from_numpy(base.tensors[name].values().copy())
            return values.to(device, dtype if values.ndim == 2 else torch.float32)

        norms = _norms(hyper.family)
        known = {"token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight"}
        needed = [{f"blk.{i}.{name}.weight" for name in (*LINEAR, *norms)} for i in range(hyper.n_layer)]
        biases = [{f"blk.{i}.{name}.bias" for name in LINEAR} & set(base.tensors) for i in range(hyper.n_layer)]
        unknown = set(base.tensors) - known.union(*needed, *biases)
        if unknown:
            raise WeightsError(f"{base.path.name} has a {min(unknown)}, with which Nexus tokens cannot be trained: choose another model")
        embedding = tensor("token_embd.weight")
        layers = [
            {name.split(".", 2)[2]: tensor(name) for name in sorted(own | extra)} for own, extra in zip(needed, biases, strict=True)
        ]
        return cls(
            hyper=hyper,
            embedding=embedding,
            output=tensor("output.weight") if "output.weight" in base.tensors else embedding,
            output_norm=tensor("output_norm.weight"),
            rope_factors=tensor("rope_freqs.weight") if "rope_freqs.weight" in base.tensors else None,
            layers=tuple(layers),
        )


def _norms(family: str) -> tuple[str, ...]:
    norms = ["attn_norm", "ffn_norm"]
    if family in ("qwen3", "gemma3"):
        norms += ["attn_q_norm", "attn_k_norm"]
    if family == "gemma3":
        norms += ["post_attention_norm", "post_ffw_norm"]
    return tuple(norms)
