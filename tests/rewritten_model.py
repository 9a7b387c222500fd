"""Copies of a GGUF whose vocabulary has other names for some tokens, or whose metadata says something else."""

from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter


def rewrite(source: Path, target: Path, *, names: Mapping[str, str] = {}, metadata: Mapping[str, object] = {}) -> None:
    """Writes a copy in which tokens have other texts, {old: new}, and keys other values."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = metadata.get(key, field.contents())
        if key == "tokenizer.ggml.tokens":
            value = [names.get(text, text) for text in value]
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(key, value, field.types[0], field.types[-1] if is_array else None)
    for tensor in reader.tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
