"""Whether a conversation fits into memory, of the host and of each device, from the model's file before anything is loaded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from kvlocal.cache.config import allocation
from kvlocal.chat.config import SessionConfig
from kvlocal.doctor.memory_limits import available_memory
from kvlocal.doctor.memory_shares import MemoryShare, ModelSizes, padded, shares
from kvlocal.errors import KvlocalError
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.gguf.recurrent import Recurrent
from kvlocal.llama.adapter import Lora
from kvlocal.llama.context import CELL_BLOCK
from kvlocal.llama.devices import Device, devices_of
from kvlocal.llama.placement import ALL, Placement

# Python, numpy and llama.cpp without a model
_PROCESS = 128 * 2**20
# what notes and plans take of the host for each cell of a layer and head: tokens, positions and scores, and what they are sorted by
_NOTED = 64
# what is left free of a device for what else goes on there, as llama.cpp leaves it
_LEFT_FREE = 2**30
# what a chat with the default budget takes besides the weights: so much and a twentieth of them, for models of 0.5 to 14 B
_ROUGHLY_ALWAYS, _ROUGHLY_SHARE = 350 * 10**6, 20
# positions are 32-bit numbers
_MOST_CELLS = 2**31
_CPU = Placement()


class OutOfMemory(KvlocalError):
    """What is asked for takes more memory than there is."""


@dataclass(frozen=True)
class Free:
    """Memory that can be had, in bytes.

    host: None where it cannot be found out
    devices: on each of those that layers go to; None where one does not tell
    of_host: whether each of them has its memory from the host's
    names: of the devices
    """

    host: int | None
    devices: tuple[int | None, ...] = ()
    of_host: tuple[bool, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def now(cls, used: Sequence[Device]) -> Self:
        """On the host, and on these devices."""
        return cls(
            available_memory(),
            tuple(device.memory_free if device.memory_total else None for device in used),
            tuple(device.kind == "integrated gpu" for device in used),
            tuple(device.name for device in used),
        )

    @property
    def places(self) -> list[tuple[str, int | None]]:
        """Of the host and of each device a name for a sentence, and what is free."""
        return [("memory", self.host), *((f"memory on {name}", free) for name, free in zip(self.names, self.devices, strict=True))]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that conversations take, all in all, on the host and on each device.

    host, devices: what llama.cpp has there
    of_host: whether each device has its memory from the host's
    noted: for each cell, on the host, what is noted of it
    copied: whether the host has a copy of all cells for undo, as where the policy removes cells and no archive has them
    archive, archive_ram: for each cell, on the host: its row in an archive; and what all archives have together at most
    least_cells: that a sequence is given
    states: of each conversation, on the host: its recurrent state, and what that was before the last turn
    """

    host: MemoryShare
    devices: tuple[MemoryShare, ...]
    of_host: tuple[bool, ...]
    noted: int
    copied: bool
    archive: int
    archive_ram: int
    least_cells: int
    states: int = 0

    @classmethod
    def of(
        cls,
        model: Container,
        config: SessionConfig,
        undo: bool = True,
        lora: Sequence[Lora] = (),
        placement: Placement = _CPU,
        free: Free | None = None,
    ) -> Self | None:
        """An estimate from the metadata; where nobody knows which layers have a sliding window, as if none had one. None if they do not say enough;
        what is missing is for llama.cpp to complain about.

        free: what is free on the devices that layers go to, by which they are divided; without any all is on the host
        """
        attention = Attention.of(model)
        if attention is None:
            return None
        sizes = ModelSizes.of(model, attention, config)
        host, parts = shares(sizes, placement, [size or 0 for size in free.devices] if free else [])
        adapters = sum(each.path.stat().st_size for each in lora)
        has_way_back = config.store != "off" and not attention.window
        copied = undo and allocation(config, attention.n_ctx_train).evicts and not has_way_back
        heads = sum(n for n, windowed in zip(attention.n_head_kv_each, attention.windowed, strict=True) if not windowed)
        kind, recurrent = config.archive_type, Recurrent.of(model)
        return cls(
            host=replace(host, weights=host.weights + adapters),
            devices=tuple(parts),
            of_host=free.of_host if free else (),
            noted=_NOTED * heads,
            copied=copied,
            archive=heads * attention.row_bytes(kind or config.type_k, kind or config.type_v) if config.store != "off" else 0,
            archive_ram=config.archive_ram,
            least_cells=attention.window + config.n_ubatch if attention.window else 0,
            states=2 * recurrent.state_bytes if recurrent else 0,
        )

    def total(self, n_cells: int, parallel: int = 1) -> list[int]:
        """On the host and on each device, with so many conversations of so many cells each. The archive is counted as far as it is as long as the
        cells are full: what comes then goes to the disk if there is no more memory."""
        n = padded(max(n_cells, self.least_cells))
        on_devices = [share.total(n, parallel) for share in self.devices]
        archives = min(self.archive_ram, parallel * self.archive * n)
        of_host = sum(size for size, shared in zip(on_devices, self.of_host, strict=True) if shared)
        copy = sum(share.cache(n) for share in (self.host, *self.devices)) if self.copied else 0
        return [_PROCESS + self.host.total(n, parallel) + parallel * (self.noted * n + copy + self.states) + archives + of_host, *on_devices]

    def lacks(self, free: Free, n_cells: int, parallel: int = 1) -> tuple[str, int, int] | None:
        """The first place that has too little: its name in a sentence, what it would take and what is free there. None if all have enough."""
        for (name, size), need in zip(free.places, self.total(n_cells, parallel), strict=True):
            if size is not None and need > size:
                return name, need, size
        return None

    def most_cells(self, free: Free, parallel: int = 1) -> int:
        """The most cells of each conversation that fit, in whole blocks, 0 if the model alone does not."""
        return CELL_BLOCK * _largest(lambda blocks: self.lacks(free, CELL_BLOCK * blocks, parallel) is None, _MOST_CELLS // CELL_BLOCK)


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to most that something holds for which holds for all smaller ones; 0 if it holds for none."""
    return bisect_left(range(1, most + 1), True, key=lambda n: not holds(n))


def check(
    path: Path,
    config: SessionConfig,
    parallel: int = 1,
    undo: bool = True,
    instead_of: SessionConfig | None = None,
    lora: Sequence[Lora] = (),
    placement: Placement = _CPU,
) -> None:
    """Whether so many conversations with this model and its adapters, with undo or without, fit into the memory that is free; nothing where that
    cannot be found out.

    instead_of: how a conversation is kept that ends before, whose memory is free then

    Raises:
        OutOfMemory: it does not; says the largest budget that fits, or how many layers do.
        EngineError: there is no such device.
        ContainerError: the file cannot be read.
    """
    free = Free.now(devices_of(placement))
    found = _estimate(path, config, undo, lora, placement, free)
    if found is None:
        return
    estimate, n_ctx_train = found
    if instead_of and (before := _estimate(path, instead_of, undo, lora, placement, free)):
        free = _with_back(free, before[0], allocation(instead_of, n_ctx_train).n_cells)
    asked = allocation(config, n_ctx_train)
    lacking = estimate.lacks(free, asked.n_cells, parallel)
    if lacking is None:
        return
    name, need, size = lacking
    most = estimate.most_cells(free, parallel) - (asked.n_cells - asked.budget)
    times = f"{parallel} times " if parallel > 1 else ""
    wanted = f"{times}a budget of {asked.budget} cells with {path.name} takes about {_megabytes(need)} of {name} and {_megabytes(size)} are free"
    fewer = "give a smaller --parallel, " if parallel > 1 else ""
    if name != free.places[0][0]:
        n = layers_that_fit(path, config, placement, parallel, undo, lora)
        less = f"--kv-budget {most} or less, or " if most >= config.least_budget else ""
        raise OutOfMemory(f"{wanted}: {fewer}give {less}--gpu-layers {'auto' if n else 0}{f', which is {n} here' if n else ''}")
    if most >= config.least_budget:
        raise OutOfMemory(f"{wanted}: give --kv-budget {most} or less")
    raise OutOfMemory(f"{wanted}, too little for any budget: {fewer}make more memory free, raise a limit on it, or choose a smaller model")


def _with_back(free: Free, estimate: MemoryEstimate, n_cells: int) -> Free:
    """With what a conversation gives back when it ends; and with the weights on devices, which are there already. Those on the host are a mapped
    file, which counts as free.
    """
    host, *others = estimate.total(n_cells)
    host -= estimate.host.weights
    parts = tuple(None if size is None else size + more for size, more in zip(free.devices, others, strict=True))
    return replace(free, host=None if free.host is None else free.host + host, devices=parts)


def rough_total(size: int) -> int:
    """Bytes of main memory that a chat with the default budget takes, by the size of the model's file alone, as for a model that is not here yet."""
    return size + _ROUGHLY_ALWAYS + size // _ROUGHLY_SHARE


def layers_that_fit(
    path: Path,
    config: SessionConfig,
    placement: Placement,
    parallel: int = 1,
    undo: bool = True,
    lora: Sequence[Lora] = (),
    free: Free | None = None,
) -> int:
    """How many layers the devices of a placement have room for, with their cells: as Placement counts them, ALL for all. Some memory is left free on
    each, as llama.cpp leaves it.

    placement: n_gpu_layers of it is not looked at
    free: what the devices have; by default as it is now

    Raises:
        EngineError: there is no such device.
        ContainerError: the file cannot be read.
    """
    placement = replace(placement, n_gpu_layers=ALL)
    free = free or Free.now(devices_of(placement))
    if all(size is None for size in free.devices):
        return ALL
    model = Container(path)
    attention = Attention.of(model)
    if attention is None:
        return ALL
    n_cells = allocation(config, attention.n_ctx_train).n_cells
    left = replace(free, host=None, devices=tuple(None if size is None else max(0, size - _LEFT_FREE) for size in free.devices))

    def fits(n: int) -> bool:
        estimate = MemoryEstimate.of(model, config, undo, lora, replace(placement, n_gpu_layers=n), free)
        return estimate is not None and estimate.lacks(left, n_cells, parallel) is None

    n_all = len(attention.n_head_kv_each) + 1
    n = _largest(fits, n_all)
    return ALL if n == n_all else n


def largest_budget(path: Path, config: SessionConfig, lora: Sequence[Lora] = (), placement: Placement = _CPU) -> int | None:
    """The most cells that a conversation with this model and its adapters can keep in the memory that is free, at most what the model was trained
    for; 0 for none.

    None where that cannot be found out.

    Raises:
        EngineError: there is no such device.
        ContainerError: the file cannot be read.
    """
    free = Free.now(devices_of(placement))
    found = _estimate(path, config, True, lora, placement, free)
    if free.host is None or found is None:
        return None
    estimate, n_ctx_train = found
    asked = allocation(config, n_ctx_train)
    return max(0, min(n_ctx_train, estimate.most_cells(free)) - (asked.n_cells - asked.budget))


def _estimate(
    path: Path, config: SessionConfig, undo: bool, lora: Sequence[Lora], placement: Placement, free: Free
) -> tuple[MemoryEstimate, int] | None:
    """With the model's trained context. None where the metadata do not say enough."""
    model = Container(path)
    attention, estimate = Attention.of(model), MemoryEstimate.of(model, config, undo, lora, placement, free)
    return (estimate, attention.n_ctx_train) if attention and estimate else None


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.0f} MB"
