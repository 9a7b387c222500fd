"""A GGUF cut to its first layers with the weights dequantised to float32: without quantised activations rounding stays small.

So results can be compared closely.
"""

from pathlib import Path

import gguf
from gguf import GGUFReader, GGUFValueType, GGUFWriter


def write_shallow_model(source: Path, target: Path, n_layer: int) -> None:
    """Writes the first n_layer layers of source as float32."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, arch)
    skipped = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key in skipped:
            continue
        value = n_layer if key == f"{arch}.block_count" else field.contents()
        kind = field.types[0]
        writer.add_key_value(key, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= n_layer:
            continue
        data = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, data.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
