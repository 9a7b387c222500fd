"""Writes LoRA adapters as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from kvlocal.gguf.lora import ALPHA, HALF_A, HALF_B


def write_lora(
    path: Path,
    architecture: str,
    alpha: float,
    pairs: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    metadata: Mapping[str, int | str | Sequence[float]],
) -> None:
    """Writes an adapter to a GGUF file.

    Args:
        path: the file, which is written over.
        architecture: of the base model.
        alpha: B A is weighted with alpha / r.
        pairs: by name of the base model's tensor [n_out, n_in], A [r, n_in] and B [n_out, r], float16 or float32.
        metadata: what else the file says; numbers are written as uint32, sequences as float32.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(ALPHA, alpha)
    for name, value in metadata.items():
        if isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, [float(number) for number in value])
    for name, (a, b) in pairs.items():
        writer.add_tensor(name + HALF_A, np.ascontiguousarray(a))
        writer.add_tensor(name + HALF_B, np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
