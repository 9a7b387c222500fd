"""Reads a GGUF file as it is mapped: metadata and tensors, and of the vocabulary only what is asked for, which takes the gguf package seconds."""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from kvlocal.errors import KvlocalError
from kvlocal.files.parts import part_paths

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
ALIGNMENT = 32  # unless general.alignment says otherwise
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class ContainerError(KvlocalError):
    """A file cannot be read as GGUF."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file holds it.

    shape: outermost dimension first, as numpy has it
    data: uint8 [bytes], a view of the mapped file
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def values(self) -> npt.NDArray[np.float32]:
        """The dequantised tensor, float32 [*shape]."""
        block, size = GGML_QUANT_SIZES[self.kind]
        rows = self.data.reshape(*self.shape[:-1], self.shape[-1] // block * size)
        return np.asarray(dequantize(rows, self.kind), np.float32).reshape(self.shape)


class Header:
    """What a GGUF file, mapped for as long as this object lives, says about itself in front of its tensors.

    path: where it was opened
    status: of the file when it was
    metadata: numbers, booleans and strings as Python has them, arrays of numbers as numpy arrays; arrays of strings are left out
    kinds: the types of all values

    Raises:
        ContainerError: no such file, not GGUF, or cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.status = os.fstat(file.fileno())
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise ContainerError(f"{self.path} is not a GGUF file: name one")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ContainerError(f"{self.path} cannot be read ({error.strerror}): name a GGUF file") from error
        self.metadata: dict[str, Any] = {}
        self.kinds: dict[str, GGUFValueType] = {}
        # where the first of each array is, and how many there are
        self._string_arrays: dict[str, tuple[int, int]] = {}
        try:
            self._read()
        except (struct.error, ValueError, KeyError, TypeError, ArithmeticError, MemoryError):
            raise ContainerError(f"{self.path} is damaged or cut off: fetch it again") from None

    def _read(self) -> None:
        self._at = len(_MAGIC)
        version, self._n_tensors, n_keys = self._unpack("<IQQ")
        if version not in _VERSIONS:
            readable = " and ".join(map(str, _VERSIONS))
            raise ContainerError(f"{self.path} is GGUF of version {version}, and this kvlocal reads {readable}: convert it anew or update kvlocal")
        for _ in range(n_keys):
            key = self._string()
            kind = self.kinds[key] = GGUFValueType(*self._unpack("<I"))
            if kind != GGUFValueType.ARRAY:
                self.metadata[key] = self._value(kind)
            else:
                self._array(key)

    @property
    def alignment(self) -> int:
        """Of the tensors in the file, in bytes."""
        value = self.metadata.get("general.alignment", ALIGNMENT)
        return value if isinstance(value, int) else ALIGNMENT

    def strings(self, key: str) -> list[bytes]:
        """An array of strings, none if there is no such array."""
        begin, n = self._string_arrays.get(key, (0, 0))
        unpack, data, at, texts = struct.Struct("<Q").unpack_from, self._data, begin, []
        for _ in range(n):
            start = at + 8
            at = start + unpack(data, at)[0]
            texts.append(data[start:at])
        return texts

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _bytes(self, begin: int, size: int) -> npt.NDArray[np.uint8]:
        # numpy refuses what reaches beyond the end with a ValueError
        return np.frombuffer(self._data, np.uint8, size, begin)

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        # llama.cpp takes any bytes
        text = self._bytes(self._at, length).tobytes().decode("utf-8", "replace")
        self._at += length
        return text

    def _value(self, kind: GGUFValueType) -> Any:
        return self._string() if kind == GGUFValueType.STRING else self._numbers(kind, 1)[0].item()

    def _numbers(self, kind: GGUFValueType, n: int) -> npt.NDArray[Any]:
        numbers = np.frombuffer(self._data, _SCALARS[kind], n, self._at)
        self._at += numbers.nbytes
        return numbers

    def _array(self, key: str) -> None:
        kind, n = self._unpack("<IQ")
        if kind != GGUFValueType.STRING:
            self.metadata[key] = self._numbers(GGUFValueType(kind), n)
            return
        self._string_arrays[key] = self._at, n
        unpack, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        for _ in range(n):
            at += 8 + unpack(data, at)[0]
        self._at = at


class Container(Header):
    """A GGUF file, mapped for as long as this object or one of its tensors lives; of a model in several files, opened by its first, all of them.

    tensors: by name, in the file's order

    Raises:
        ContainerError: no such file, not GGUF, or cut off; or another file of the model is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        for other in other_parts(self):
            self.tensors.update(Container(other).tensors)

    def _read(self) -> None:
        super()._read()
        infos = [self._tensor_info() for _ in range(self._n_tensors)]
        begin = -(-self._at // self.alignment) * self.alignment
        self.tensors: dict[str, Tensor] = {}
        for name, kind, shape, offset in infos:
            block, size = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(name)
            self.tensors[name] = Tensor(name, kind, shape, self._bytes(begin + offset, math.prod(shape) // block * size))

    def _tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        (n_dims,) = self._unpack("<I")
        if not 1 <= n_dims <= _MAX_DIMENSIONS:
            raise ValueError(name)
        shape = self._unpack(f"<{n_dims}Q")
        kind, offset = self._unpack("<IQ")
        return name, GGMLQuantizationType(kind), tuple(reversed(shape)), offset


def other_parts(header: Header) -> list[Path]:
    """The files that a model consists of besides its first, which this is; none if it is another, or the whole."""
    n_parts, number = (header.metadata.get(f"split.{key}") for key in ("count", "no"))
    paths = part_paths(header.path)
    # what does not fit together is for llama.cpp to complain about
    return paths[1:] if number == 0 and n_parts == len(paths) and header.path == paths[0] else []
