"""What a model's file says about the model, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import LlamaFileType

from kvlocal.files.parts import part_paths
from kvlocal.gguf.attention import Attention, block_of
from kvlocal.gguf.container import Container, other_parts
from kvlocal.gguf.recurrent import HYBRID_FAMILIES, Recurrent
from kvlocal.llama.context import KV_TYPES

# beginnings of keys, behind the name of the architecture, of models that have a state instead of a cache in some layers, or another cache beside it
_OTHER_MEMORY = ("ssm.", "wkv.", "shortconv.", "kda.", "attention.indexer.")


def model_facts(path: Path) -> dict[str, Any]:
    """What the file says, for JSON; None for what it does not say.

    Keys: path, files (how many), bytes (of all of them), title, architecture, parameters, quantization, trained_context (tokens), layers, heads,
    kv_heads (of the layer that has most), head_size (of a key), sliding_window (tokens, 0 for none), recurrent_layers (how many have a state in place
    of a KV cache or beside it), kv_bytes_per_token (in all layers, by cache
    type; None for a type that does not fit the heads), template (whether it has a chat template), licence, compressible and recalls (whether a chat
    can compress its cache and recall from an archive), why_not (why it cannot do one of these).

    Raises:
        ContainerError: the file cannot be read.
    """
    model = Container(path)
    attention, recurrent = Attention.of(model), Recurrent.of(model)
    metadata, family = model.metadata, str(model.metadata.get("general.architecture", ""))
    files = [path, *other_parts(model)]
    why_not = _why_not_compressible(model, attention, recurrent)
    cannot_recall = why_not or (None if attention and attention.plain else "its attention has a soft cap or sinks, which an archive cannot look up")
    return {
        "path": str(path),
        "files": len(files),
        "bytes": sum(part.stat().st_size for part in files),
        "title": metadata.get("general.name"),
        "architecture": family or None,
        "parameters": sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in model.tensors.values()),
        "quantization": _quantization(metadata.get("general.file_type")),
        "trained_context": attention and attention.n_ctx_train,
        "layers": metadata.get(f"{family}.block_count"),
        "heads": attention and attention.n_head,
        "kv_heads": attention and attention.n_head_kv,
        "head_size": attention and attention.size_k,
        "sliding_window": attention and attention.window,
        "recurrent_layers": recurrent.n_layer if recurrent else 0,
        "kv_bytes_per_token": attention and {kind: _cell_bytes(attention, kind) for kind in KV_TYPES},
        "template": "tokenizer.chat_template" in metadata,
        "licence": metadata.get("general.license"),
        "compressible": why_not is None,
        "recalls": cannot_recall is None,
        "why_not": cannot_recall,
    }


def size_on_disk(path: Path) -> int:
    """Bytes of a model's files, as far as they are there."""
    return sum(part.stat().st_size for part in part_paths(path) if part.is_file())


def _why_not_compressible(model: Container, attention: Attention | None, recurrent: Recurrent | None) -> str | None:
    family = model.metadata.get("general.architecture")
    if recurrent and not recurrent.attention_layers:
        return "it has recurrent layers alone, whose state has a fixed size: there is no KV cache to compress"
    is_hybrid = family in HYBRID_FAMILIES and not (attention and attention.window)
    if not is_hybrid and any(key.startswith(f"{family}.{beginning}") for key in model.metadata for beginning in _OTHER_MEMORY):
        return "it has something else than a plain attention cache"
    if attention is None:
        return "its file does not say what its attention looks like"
    n_head_kv = set(np.atleast_1d(model.metadata.get(f"{family}.attention.head_count_kv", 0)).tolist())
    if len(n_head_kv - {0} if is_hybrid else n_head_kv) > 1:
        return "its layers differ in their heads"
    return None


def _cell_bytes(attention: Attention, kind: str) -> int | None:
    fits = all(size % block_of(kind) == 0 for size in (attention.size_k, attention.size_v))
    return attention.cell_bytes(kind, kind) if fits else None


def _quantization(file_type: Any) -> str | None:
    """As files are named by it."""
    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return None
