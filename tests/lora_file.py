"""LoRA adapters that were not trained, and what a model is with them when they are added to its weights."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_copy import Source, copy

from kvlocal.gguf.container import Container

EMBEDDING = "token_embd.weight"


def matrices(base: Path) -> list[str]:
    """The names of what adapters usually change: the matrices of the layers."""
    return [name for name, tensor in Container(base).tensors.items() if name.startswith("blk.") and len(tensor.shape) == 2]


def write_lora(
    target: Path, base: Path, names: Iterable[str] = (), *, rank: int = 4, alpha: float | None = 8.0, seed: int = 0, kind: type = np.float32,
    strength: float = 0.2, **changes: object,
) -> Path:
    """Writes a random adapter for these tensors of a model, all matrices of its layers unless they are named.

    alpha: None for a file without
    strength: how large the change is about, against weights of deviation 1 / sqrt(n_in)
    changes: other metadata, `general_type`, `architecture` or `adapter_type`
    """  # fmt: skip
    container, rng = Container(base), np.random.default_rng(seed)
    writer = GGUFWriter(target, str(changes.get("architecture", container.metadata["general.architecture"])))
    writer.add_type(str(changes.get("general_type", "adapter")))
    writer.add_string("adapter.type", str(changes.get("adapter_type", "lora")))
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name in names or matrices(base):
        n_out, n_in = container.tensors[name].shape
        a, b = rng.standard_normal((rank, n_in)) / n_in**0.5, strength * rng.standard_normal((n_out, rank)) / rank**0.5
        if name == EMBEDDING:
            a, b = rng.standard_normal((n_out, rank)), strength * rng.standard_normal((n_in, rank)) / n_in**0.5
        writer.add_tensor(f"{name}.lora_a", a.astype(kind))
        writer.add_tensor(f"{name}.lora_b", b.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def merge(target: Path, base: Path, *adapters: tuple[Path, float]) -> Path:
    """Writes the model whose float32 weights are W + the sum of scale * alpha / r * B A."""
    source = Source(base)
    weights = {name: tensor.values().astype(np.float64) for name, tensor in source.tensors.items()}
    for path, scale in adapters:
        adapter = Container(path)
        alpha = adapter.metadata.get("adapter.lora.alpha", 0.0)
        for name in {name.rpartition(".")[0] for name in adapter.tensors}:
            a, b = (adapter.tensors[f"{name}.lora_{half}"].values().astype(np.float64) for half in "ab")
            change = a @ b.T if name == EMBEDDING else b @ a
            weights[name] += scale * (alpha / b.shape[1] if alpha else 1) * change
    f32 = GGMLQuantizationType.F32
    copy(source, target, tensors=[(name, values.astype(np.float32), f32, values.shape) for name, values in weights.items()])
    return target
