"""Copies of a GGUF with other metadata, other names of tokens, or fewer and other tensors.

What stays is copied as bytes: the reader and the writer of the gguf package take seconds for a vocabulary.
"""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from kvlocal.gguf.container import ALIGNMENT, Container

_FORMS = {
    GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i", GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?", GGUFValueType.UINT64: "<Q",
}  # fmt: skip


class Source(Container):
    """A GGUF file.

    pairs: each key with its value, as the bytes that the file has
    kinds: the type of each value
    """

    def _read(self) -> None:
        super()._read()
        self._at = 16
        (n_keys,) = self._unpack("<Q")
        self.pairs: dict[str, bytes] = {}
        self.kinds: dict[str, GGUFValueType] = {}
        for _ in range(n_keys):
            begin = self._at
            key = self._string()
            self.kinds[key] = GGUFValueType(*self._unpack("<I"))
            if self.kinds[key] == GGUFValueType.ARRAY:
                self._array(key)
            else:
                self._value(self.kinds[key])
            self.pairs[key] = self._data[begin : self._at]


def copy(
    source: Source,
    target: Path,
    *,
    metadata: Mapping[str, Any] = {},
    added: Mapping[str, Any] = {},
    without: str = "",
    names: Mapping[str, str] = {},
    tensors: Iterable[tuple[str, np.ndarray, GGMLQuantizationType, tuple[int, ...]]] | None = None,
) -> None:
    """Writes a copy.

    Args:
        metadata: other values of keys that are there, of the same types.
        added: keys that are not there; bool, float or uint32, or a list of int32.
        without: keys that begin with this are left out; none if it is empty.
        names: of tokens, {old: new}.
        tensors: name, data, type and shape of each, outermost dimension first; those of the source by default.
    """
    pairs = {key: pair for key, pair in source.pairs.items() if not (without and key.startswith(without))}
    for key, value in metadata.items():
        if key in pairs:
            pairs[key] = _text(key) + struct.pack("<I", source.kinds[key]) + _value(source.kinds[key], value)
    for key, value in added.items():
        if isinstance(value, list):
            pairs[key] = _text(key) + struct.pack(f"<IIQ{len(value)}i", GGUFValueType.ARRAY, GGUFValueType.INT32, len(value), *value)
            continue
        kinds = {bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
        pairs[key] = _text(key) + struct.pack("<I", kinds[type(value)]) + _value(kinds[type(value)], value)
    if names:
        key = "tokenizer.ggml.tokens"
        texts = [names.get(text, text) for text in (text.decode("utf-8", "surrogateescape") for text in source.strings(key))]
        pairs[key] = _text(key) + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(texts)) + b"".join(map(_text, texts))
    if tensors is None:
        tensors = [(name, tensor.data, tensor.kind, tensor.shape) for name, tensor in source.tensors.items()]
    infos, datas, offset = [], [], 0
    for name, data, kind, shape in tensors:
        infos.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset))
        datas.append(data)
        offset += _padded(data.nbytes)
    with target.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs.values()) + b"".join(infos))
        for data in datas:
            file.write(bytes(_padded(file.tell()) - file.tell()))
            file.write(memoryview(np.ascontiguousarray(data)).cast("B"))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(kind: GGUFValueType, value: Any) -> bytes:
    return _text(value) if kind == GGUFValueType.STRING else struct.pack(_FORMS[kind], value)
