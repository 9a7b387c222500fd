"""The arguments of Llama's constructor: what they become here, and which cannot be had."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from kvlocal import policies
from kvlocal.cache.fitting import CannotRecall, check_file
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.compat.errors import NotSupported
from kvlocal.llama.context import KV_TYPES, kv_type_of
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement, SplitMode

_DEFAULTS = SessionConfig()
_STRIDE_SHARE = 4  # a small cache is compressed when a quarter of it is new

# arguments that no answer depends on, beside those that kvlocal has too
_WITHOUT_EFFECT = {
    "draft_model", "flash_attn", "logits_all", "n_threads_batch", "no_perf", "numa", "op_offload", "swa_full", "use_mlock",
}  # fmt: skip

# arguments that change what is computed, or where, and the values of them that ask for what is so anyway
_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "attention_type": (-1,),
    "chat_handler": (None,),
    "kv_overrides": (None, {}),
    "lora_base": (None,),
    "rope_freq_base": (0,),
    "rope_freq_scale": (0,),
    "rope_scaling_type": (-1, None),
    "spm_infill": (False,),
    "tokenizer": (None,),
    "vocab_only": (False,),
    "yarn_attn_factor": (1, -1),
    "yarn_beta_fast": (32, -1),
    "yarn_beta_slow": (1, -1),
    "yarn_ext_factor": (-1,),
    "yarn_orig_ctx": (0,),
}


def check_others(arguments: Mapping[str, Any]) -> None:
    """Of the arguments that kvlocal has not: whether they ask for what is so anyway. Unknown ones are told of and ignored, as llama-cpp-python
    ignores them.

    Raises:
        NotSupported: one asks for something else.
    """
    for name, value in arguments.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _AS_IT_IS:
            warnings.warn(f"{name} is no argument of Llama, and has no effect", stacklevel=3)
        elif not any(value is each or (type(value) in (bool, int, float, dict) and value == each) for each in _AS_IT_IS[name]):
            raise NotSupported(f"kvlocal's Llama cannot do what {name} asks for: leave it out")


def placement_of(
    *, n_gpu_layers: int, main_gpu: int, split_mode: int, tensor_split: Sequence[float] | None, offload_kqv: bool
) -> Placement:
    """On which devices the model is put, by llama-cpp-python's arguments.

    Raises:
        NotSupported: it is to be split in a way that kvlocal has not.
        EngineError: a value is out of range.
    """
    # enum llama_split_mode
    if split_mode not in range(len(get_args(SplitMode))):
        raise NotSupported(f"kvlocal's Llama cannot split a model as split_mode {split_mode} asks for: use 0, 1 or 2")
    mode: SplitMode = get_args(SplitMode)[split_mode]
    return Placement(max(ALL, n_gpu_layers), None, main_gpu, mode, tuple(tensor_split or ()), bool(offload_kqv))


def session_config(
    model: Model, *, n_ctx: int, n_batch: int, n_ubatch: int, n_threads: int | None, type_k: int | str | None, type_v: int | str | None
) -> SessionConfig:
    """How conversations are kept in as many cells as llama-cpp-python's Llama has with these arguments.

    Raises:
        KvlocalError: the model cannot have such a cache.
    """
    if min(n_batch, n_ubatch) < 1:
        raise SessionError(f"n_batch is {n_batch} and n_ubatch {n_ubatch}: both have to be at least 1")
    n_cells = n_ctx or model.n_ctx_train
    if n_cells > model.n_ctx_train:
        warnings.warn(
            f"n_ctx is {n_ctx}, and the model was trained for {model.n_ctx_train}: there are so many cells, and chats go on past them", stacklevel=3
        )
        n_cells = model.n_ctx_train
    stride = min(_DEFAULTS.stride, n_cells // _STRIDE_SHARE)
    if n_cells - stride < _DEFAULTS.least_budget:
        least = -(-_DEFAULTS.least_budget * _STRIDE_SHARE // (_STRIDE_SHARE - 1))
        raise SessionError(f"n_ctx is {n_ctx}: give at least {least}, or 0 for what the model was trained for")
    config = SessionConfig(
        budget=n_cells - stride,
        stride=stride,
        # no more cells than were asked for, whatever the device
        read_stride=stride,
        n_ubatch=max(_DEFAULTS.window, min(n_batch, n_ubatch, n_cells)),
        n_threads=n_threads,
        type_k=_type("type_k", type_k),
        type_v=_type("type_v", type_v),
        # an answer without another limit ends where llama-cpp-python's does at the latest
        max_tokens=n_cells,
    )
    try:
        return check_file(model.path, config, model.placement)
    except CannotRecall:
        return check_file(model.path, replace(config, policy=policies.WITHOUT_NEXUS), model.placement)


def _type(name: str, value: int | str | None) -> str:
    """A type of cache, by llama.cpp's number or by its name."""
    if value is None:
        return _DEFAULTS.type_k
    kind = value if isinstance(value, str) else kv_type_of(value)
    if kind not in KV_TYPES:
        raise SessionError(f"{name} is {value!r}, which no cache can be made of: use the number of one of {', '.join(KV_TYPES)}")
    return kind
