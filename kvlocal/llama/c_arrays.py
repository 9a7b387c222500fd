"""Arrays as functions of kvlocal.h take them: pointers to their data, which they must outlive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvlocal.llama.library import load


def floats(array: np.ndarray) -> Any:
    """float *, of a contiguous array that can be written to."""
    return load().ffi.from_buffer("float[]", array, require_writable=True)


def halves(array: np.ndarray) -> Any:
    """uint16_t *, of a contiguous array of float16 that can be written to."""
    ffi = load().ffi
    return ffi.cast("uint16_t *", ffi.from_buffer(array, require_writable=True))


def ints(array: np.ndarray) -> Any:
    """int32_t *, of a contiguous array."""
    return load().ffi.from_buffer("int32_t[]", array)


def octets(array: np.ndarray) -> Any:
    """uint8_t *, of a contiguous array."""
    return load().ffi.from_buffer("uint8_t[]", array)


def pointers_to(arrays: Sequence[np.ndarray]) -> Any:
    """uint8_t **, of arrays of any type, each contiguous; it must itself be kept as long as it is used."""
    ffi = load().ffi
    return ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", array.ctypes.data) for array in arrays])
