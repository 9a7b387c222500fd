"""Placement: on which devices the layers of a model and their cells lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from kvlocal.llama.errors import EngineError

NONE = "none"
ALL = -1
SplitMode = Literal["none", "layer", "row"]


@dataclass(frozen=True)
class Placement:
    """On which devices the layers of a model and their cells lie, in llama.cpp's terms.

    n_gpu_layers: how many layers go to devices other than the CPU, the last ones of the model, with what makes logits as one more; ALL for all of
        them. Without such a device it has no effect. With 0 everything is computed on the CPU.
    devices: names of those that are used, in this order; None for what llama.cpp chooses, ("none",) for the CPU alone
    main_gpu: the device, counted from 0, that has all with the split mode "none", and intermediate results with "row"
    split_mode: "layer" gives each device whole layers, "row" rows of each matrix, "none" everything to one device
    tensor_split: how much of the model each device gets, in relation to the others; by default by the memory that is free
    kv_offload: the cells of a layer lie where the layer lies; else all of them on the CPU, where attention is computed then
    rpc: llama.cpp's RPC servers, each as HOST:PORT, whose devices get layers before others do

    Raises:
        EngineError: a value is out of range.
    """

    n_gpu_layers: int = 0
    devices: tuple[str, ...] | None = None
    main_gpu: int = 0
    split_mode: SplitMode = "layer"
    tensor_split: tuple[float, ...] = ()
    kv_offload: bool = True
    rpc: tuple[str, ...] = ()

    @property
    def servers(self) -> tuple[str, ...]:
        """The RPC servers, if layers go to devices at all."""
        return self.rpc if self.n_gpu_layers else ()

    def __post_init__(self) -> None:
        if self.main_gpu < 0:
            raise EngineError(f"the main GPU is {self.main_gpu}: devices are counted from 0")
        if self.split_mode not in get_args(SplitMode):
            raise EngineError(f"the split mode is {self.split_mode!r}: it must be one of {', '.join(get_args(SplitMode))}")
        named = self.devices
        if named is not None and (not all(named) or len(set(named)) != len(named) or not named or (NONE in named and len(named) > 1)):
            raise EngineError(f"the devices are {', '.join(named) or 'an empty list'}: name each once, or none for the CPU alone")
        if self.tensor_split and not (all(0 <= part < np.inf for part in self.tensor_split) and sum(self.tensor_split) > 0):
            raise EngineError("a model is split by numbers that are at least 0 and not all 0, such as 3 and 1")


def places_of_layers(n_layer: int, placement: Placement, free: Sequence[int]) -> npt.NDArray[np.intp]:
    """The device of each layer and, behind them, of what makes logits, [n_layer + 1]; -1 for the CPU.

    Args:
        n_layer: layers of the model.
        placement: how many of them go to devices, and how they are split.
        free: bytes that are free on each of the devices that are used (kvlocal.llama.devices.used_devices).

    Source: llama.cpp, llama_model_base::load_tensors.
    """
    places = np.full(n_layer + 1, -1, np.intp)
    n = n_layer + 1 if placement.n_gpu_layers < 0 else min(placement.n_gpu_layers, n_layer + 1)
    if n and len(free):
        # numbers that are not given are 0, as in llama.cpp's array
        parts = np.array(placement.tensor_split or free, np.float32)
        parts = np.pad(parts, (0, len(free) - len(parts)))
        ends = np.cumsum(parts, dtype=np.float32) / parts.sum(dtype=np.float32) if parts.any() else np.ones(len(free), np.float32)
        where = np.arange(n, dtype=np.float32) / np.float32(n)
        places[n_layer + 1 - n :] = np.searchsorted(ends, where, side="right").clip(max=len(free) - 1)
    return places
