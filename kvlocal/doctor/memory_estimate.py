"""Whether a conversation fits into memory, from the model's file before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvlocal.cache.config import allocation
from kvlocal.chat.config import SessionConfig
from kvlocal.doctor.memory_limits import available_memory
from kvlocal.errors import KvlocalError
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.llama.adapter import Lora
from kvlocal.llama.context import CELL_BLOCK

# Python, numpy and llama.cpp without a model; and the numbers of a token that a micro-batch holds at once, in rows of n_embd
_PROCESS = 128 * 2**20
_ROWS_OF_A_TOKEN = 64
# what a chat with the default budget takes besides the weights: so much and a twentieth of them, for models of 0.5 to 14 B
_ROUGHLY_ALWAYS, _ROUGHLY_SHARE = 350 * 10**6, 20


class OutOfMemory(KvlocalError):
    """What is asked for takes more memory than there is."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of main memory that one conversation takes, all in all.

    weights: of the model and of the adapters beside it
    cell: of one cell of the cache in all layers and heads, with its copy for undo if the policy removes cells and no archive has them
    other: everything else
    """

    weights: int
    cell: int
    other: int

    @classmethod
    def of(cls, model: Container, config: SessionConfig, undo: bool = True, lora: Sequence[Lora] = ()) -> Self | None:
        """An estimate from the metadata; where some layers have a sliding window, as if they had none. None if they do not say enough; what is
        missing is for llama.cpp to complain about."""
        attention = Attention.of(model)
        if attention is None:
            return None
        has_way_back = config.store != "off" and not attention.window
        copies = 2 if undo and allocation(config, attention.n_ctx_train).evicts and not has_way_back else 1
        weights = sum(tensor.data.nbytes for tensor in model.tensors.values()) + sum(each.path.stat().st_size for each in lora)
        cell = copies * attention.cell_bytes(config.type_k, config.type_v)
        return cls(weights, cell, _PROCESS + config.n_ubatch * _ROWS_OF_A_TOKEN * attention.n_embd * 4)

    def total(self, n_cells: int) -> int:
        return self.weights + self.other + self.cell * -(-n_cells // CELL_BLOCK) * CELL_BLOCK

    def most_cells(self, free: int) -> int:
        """The most cells that fit into so many bytes, 0 if the model alone does not."""
        return max(0, (free - self.weights - self.other) // self.cell // CELL_BLOCK * CELL_BLOCK)


def check(
    path: Path, config: SessionConfig, parallel: int = 1, undo: bool = True, instead_of: SessionConfig | None = None, lora: Sequence[Lora] = ()
) -> None:
    """Whether so many conversations with this model and its adapters, with undo or without, fit into the memory that is free; nothing where that
    cannot be found out.

    instead_of: how a conversation is kept that ends before, whose memory is free then

    Raises:
        OutOfMemory: it does not; says the largest budget that fits.
        ContainerError: the file cannot be read.
    """
    free = available_memory()
    found = _estimate(path, config, undo, lora)
    if free is None or found is None:
        return
    estimate, n_ctx_train = found
    if instead_of and (ends := _estimate(path, instead_of, undo, lora)):
        free += ends[0].total(allocation(instead_of, n_ctx_train).n_cells) - ends[0].weights
    asked = allocation(config, n_ctx_train)
    need = estimate.total(parallel * asked.n_cells)
    if need <= free:
        return
    most = estimate.most_cells(free) // parallel - (asked.n_cells - asked.budget)
    times = f"{parallel} times " if parallel > 1 else ""
    wanted = f"{times}a budget of {asked.budget} cells with {path.name} takes about {_megabytes(need)} of memory and {_megabytes(free)} are free"
    if most >= config.least_budget:
        raise OutOfMemory(f"{wanted}: give --kv-budget {most} or less")
    fewer = "give a smaller --parallel, " if parallel > 1 else ""
    raise OutOfMemory(f"{wanted}, too little for any budget: {fewer}make more memory free, raise a limit on it, or choose a smaller model")


def rough_total(size: int) -> int:
    """Bytes of main memory that a chat with the default budget takes, by the size of the model's file alone, as for a model that is not here yet."""
    return size + _ROUGHLY_ALWAYS + size // _ROUGHLY_SHARE


def largest_budget(path: Path, config: SessionConfig, lora: Sequence[Lora] = ()) -> int | None:
    """The most cells that a conversation with this model and its adapters can keep in the memory that is free, at most what the model was trained
    for; 0 for none.

    None where that cannot be found out.

    Raises:
        ContainerError: the file cannot be read.
    """
    free = available_memory()
    found = _estimate(path, config, True, lora)
    if free is None or found is None:
        return None
    estimate, n_ctx_train = found
    slack = config.stride if allocation(config, n_ctx_train).evicts else 0
    return max(0, min(n_ctx_train, estimate.most_cells(free)) - slack)


def _estimate(path: Path, config: SessionConfig, undo: bool, lora: Sequence[Lora]) -> tuple[MemoryEstimate, int] | None:
    """With the model's trained context. None where the metadata do not say enough."""
    model = Container(path)
    attention, estimate = Attention.of(model), MemoryEstimate.of(model, config, undo, lora)
    return (estimate, attention.n_ctx_train) if attention and estimate else None


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.0f} MB"
