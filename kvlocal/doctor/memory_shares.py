"""What of a model and of its cells lies on each device, from the model's file before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvlocal.cache.config import CacheConfig, queries_to_record
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.llama.context import CELL_BLOCK
from kvlocal.llama.placement import Placement, places_of_layers

# what a token of a micro-batch takes in graphs, in numbers of n_ff and of n_embd, as llama.cpp reserves them for models of 0.1 to 12 B
_OF_FF, _OF_EMBD = 2, 9
# a mask has a half precision number for each cell and token of a micro-batch
_MASK = 2
_NUMBER = 4  # float32


@dataclass(frozen=True)
class ModelSizes:
    """Of a model's file and of how its cache is kept; sizes in bytes.

    layers: weights of each layer
    output: weights of what makes logits
    embeddings: weights that always lie on the host
    shared: of these what makes logits too, and is there a second time where that is on a device
    cells: one cell in each layer
    rings: recorded queries of one sequence in each layer
    windows: the most cells of each layer, 0 for as many as there are
    token: what a token of a micro-batch takes in graphs
    n_ubatch: tokens of a micro-batch
    """

    layers: tuple[int, ...]
    output: int
    embeddings: int
    shared: int
    cells: tuple[int, ...]
    rings: tuple[int, ...]
    windows: tuple[int, ...]
    token: int
    n_ubatch: int

    @classmethod
    def of(cls, model: Container, attention: Attention, config: CacheConfig) -> Self:
        n_layer = len(attention.n_head_kv_each)
        layers, output, embeddings, shared = [0] * n_layer, 0, 0, 0
        for name, tensor in model.tensors.items():
            beginning, _, rest = name.partition(".")
            number, size = rest.partition(".")[0], tensor.data.nbytes
            if beginning == "blk" and number.isdecimal() and int(number) < n_layer:
                layers[int(number)] += size
            elif beginning.startswith("output"):
                output += size
            else:
                embeddings += size
            if name == "token_embd.weight" and "output.weight" not in model.tensors:
                shared = size
        n_ff = int(np.max(model.metadata.get(f"{model.metadata['general.architecture']}.feed_forward_length", 4 * attention.n_embd)))
        row, query = attention.row_bytes(config.type_k, config.type_v), attention.n_head * attention.size_k * _NUMBER
        window = padded(attention.window + config.n_ubatch)
        return cls(
            layers=tuple(layers),
            output=output,
            embeddings=embeddings,
            shared=shared,
            cells=tuple(heads * row for heads in attention.n_head_kv_each),
            rings=tuple(0 if windowed else (queries_to_record(config) + 1) * query for windowed in attention.windowed),
            windows=tuple(window if windowed else 0 for windowed in attention.windowed),
            token=(_OF_FF * n_ff + _OF_EMBD * max(attention.n_embd, attention.n_head * attention.size_k)) * _NUMBER,
            n_ubatch=config.n_ubatch,
        )


@dataclass(frozen=True)
class MemoryShare:
    """What lies on one device, or on the host; sizes in bytes.

    weights: of the model
    cell: one cell in all layers there that have as many as there are
    window: the cells of the other layers, of one sequence, if there are at least as many
    window_cell: one cell in these layers
    ring: recorded queries of one sequence
    graph: what is computed with, but for masks; 0 if nothing is computed there
    n_ubatch: tokens of a micro-batch
    """

    weights: int = 0
    cell: int = 0
    window: int = 0
    window_cell: int = 0
    ring: int = 0
    graph: int = 0
    n_ubatch: int = 0

    def cache(self, n_cells: int) -> int:
        """Bytes of the cells of one sequence that has so many."""
        n = padded(n_cells)
        return self.cell * n + min(self.window, self.window_cell * n)

    def total(self, n_cells: int, parallel: int = 1) -> int:
        """Bytes of all that lies there, with so many sequences of so many cells each."""
        masks = _MASK * self.n_ubatch * padded(n_cells) if self.graph else 0
        return self.weights + parallel * (self.cache(n_cells) + self.ring) + self.graph + masks


def shares(sizes: ModelSizes, placement: Placement, free: Sequence[int]) -> tuple[MemoryShare, list[MemoryShare]]:
    """That of the host, and those of the devices.

    Args:
        sizes: of the model.
        placement: where it is put.
        free: bytes that are free on each of the devices that are used.
    """
    places = places_of_layers(len(sizes.layers), placement, free)
    cells = places[:-1] if placement.kv_offload else np.full(len(sizes.layers), -1)
    weights = np.array([*sizes.layers, sizes.output], np.int64)
    found = []
    for device in (-1, *range(len(free))):
        here = cells == device
        of_weights = int(weights[places == device].sum())
        if device < 0:
            of_weights += sizes.embeddings
        elif places[-1] == device:
            of_weights += sizes.shared
        windowed = np.array(sizes.windows, np.int64) > 0
        # the host looks up the embeddings, and copies what goes from one device to another
        computes = device < 0 or bool((places == device).any())
        found.append(MemoryShare(
            weights=of_weights,
            cell=_sum(sizes.cells, here & ~windowed),
            window=_sum(np.multiply(sizes.cells, sizes.windows), here & windowed),
            window_cell=_sum(sizes.cells, here & windowed),
            ring=_sum(sizes.rings, here),
            graph=sizes.n_ubatch * sizes.token if computes else 0,
            n_ubatch=sizes.n_ubatch,
        ))  # fmt: skip
    return found[0], found[1:]


def _sum(sizes: npt.ArrayLike, where: npt.NDArray[np.bool_]) -> int:
    return int(np.asarray(sizes, np.int64)[where].sum())


def padded(n: int) -> int:
    """As many cells as llama.cpp allocates for so many."""
    return -(-n // CELL_BLOCK) * CELL_BLOCK
