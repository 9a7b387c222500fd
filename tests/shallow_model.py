"""A GGUF cut to its first layers, which is as fast as it has few, with all of its vocabulary and its chat template."""

from pathlib import Path

from gguf import GGMLQuantizationType
from gguf_copy import Source, copy


def write_shallow_model(source: Path, target: Path, n_layer: int, *, quantized: bool = False) -> None:
    """Writes the first n_layer layers of source.

    quantized: with the weights as they are; else as float32: without quantised activations rounding stays small, so that results can be compared
        closely.
    """
    whole = Source(source)
    tensors = []
    for name, tensor in whole.tensors.items():
        if not name.startswith("blk.") or int(name.split(".")[1]) < n_layer:
            values = (tensor.data, tensor.kind) if quantized else (tensor.values(), GGMLQuantizationType.F32)
            tensors.append((name, *values, tensor.shape))
    copy(whole, target, metadata={f"{whole.metadata['general.architecture']}.block_count": n_layer}, tensors=tensors)
