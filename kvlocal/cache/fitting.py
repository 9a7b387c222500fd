"""Whether a configuration goes together with a model, and how many cells its memory holds, from the model's file before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from kvlocal import policies
from kvlocal.cache.config import AUTO, CacheConfig, CacheError, allocation, check_allocation
from kvlocal.gguf.attention import Attention, block_of
from kvlocal.gguf.container import Container
from kvlocal.llama.cache_types import device_without_attention, row_types
from kvlocal.llama.context import CELL_BLOCK
from kvlocal.llama.devices import devices_of
from kvlocal.llama.layout import Layout
from kvlocal.llama.placement import Placement
from kvlocal.llama.rows import RowTypes

C = TypeVar("C", bound=CacheConfig)


class CannotRecall(CacheError):
    """The attention of a model is none that an archive can be looked up by."""


# what `memory` chooses from: it holds about twice the cells of f16, at a small loss
_SMALLER = "q8_0"
# a device reads a micro-batch in little more than a token's time, and each compression takes as long as many of them: it has room for two
READ_STRIDE = 512
# of the trained context, most of which shall pass before keys are moved back
_READ_SHARE = 8


def check_file(path: Path, config: C, placement: Placement) -> C:
    """The configuration as `fitted` gives it, if the model of this file can have such a cache. Where its metadata do not say enough, nobody knows.

    placement: where the model is put

    Raises:
        CannotRecall: it cannot have an archive.
        CacheError: it cannot have such a cache.
        EngineError: there is no such device.
        ContainerError: the file cannot be read.
    """
    attention = Attention.of(Container(path))
    config = _fitted(path, attention, config, placement, _reads_on_device(config, placement))
    if attention is None:
        return config
    check_allocation(attention.n_ctx_train, config)
    type_k, type_v = config.type_k, config.type_v
    if attention.latent and type_k != type_v:
        raise CacheError(f"the values of {path.name} are parts of its keys (latent attention): give --ctk {type_k} --ctv {type_k}")
    _check_blocks(path, attention, (("--ctk", type_k), ("--ctv", type_v)))
    if device := _without_attention(attention, type_k, type_v, placement):
        raise CacheError(f"the device {device} has no attention for keys of type {type_k} and values of type {type_v}: give f16 for both")
    if config.store != "off" and not attention.plain:
        raise CannotRecall(
            f"{path.name} has a soft cap or attention sinks, and cannot recall from an archive: give --archive off, and no other option of it"
        )
    if config.store != "off" and config.archive_type:
        _check_blocks(path, attention, 2 * (("--archive-type", config.archive_type),))
    return config


def _check_blocks(path: Path, attention: Attention, kinds: Sequence[tuple[str, str]]) -> None:
    """Whether heads are whole blocks of the types of keys and of values, given with the options that say them.

    Raises:
        CacheError: they are not.
    """
    for (option, kind), size, what in zip(kinds, (attention.size_k, attention.size_v), ("keys", "values"), strict=True):
        if size % block_of(kind):
            raise CacheError(
                f"the {what} of {path.name} have {size} numbers in each head, which is no multiple of the {block_of(kind)} that {kind} "
                f"stores together: give {option} f16"
            )


def fitted(path: Path, config: C, placement: Placement) -> C:
    """The configuration with as many cells as its memory holds in place of the memory, with types in place of AUTO, and with the stride while a text
    is read that goes with the devices that the cells lie on.

    The type is f16 where that holds all that the model was trained for; else q8_0 where heads and devices take it: of f16, q8_0 and q4_0 at the same
    bytes it had the lowest KL to the full context (docs/results.md).

    placement: where the model is put

    Raises:
        CacheError: it holds too little, or nobody knows how much.
        EngineError: there is no such device.
        ContainerError: the file cannot be read.
    """
    reads_on_device = _reads_on_device(config, placement)
    if config.memory is None and not reads_on_device:
        return config
    return _fitted(path, Attention.of(Container(path)), config, placement, reads_on_device)


def archive_types(config: CacheConfig, layout: Layout) -> RowTypes:
    """What the archive of a cache stores its rows in, if there is one.

    Raises:
        CacheError: the heads are no whole blocks of the type that is asked for.
    """
    if config.store == "off" or config.archive_type is None:
        return layout.row_types
    try:
        return row_types(config.archive_type, layout)
    except ValueError as error:
        raise CacheError(f"an archive of the type {config.archive_type} cannot be made: {error}") from None


def _fitted(path: Path, attention: Attention | None, config: C, placement: Placement, reads_on_device: bool) -> C:
    if config.memory is not None:
        return _in_memory(path, attention, config, config.memory, placement, reads_on_device)
    if attention is None or not reads_on_device:
        return config
    n_ctx_train = attention.n_ctx_train
    # a budget that is given stays
    most = n_ctx_train if config.budget is None else n_ctx_train - config.budget
    return _with_read_stride(config, min(allocation(config, n_ctx_train).budget // 2, most), n_ctx_train)


def _in_memory(path: Path, attention: Attention | None, config: C, memory: int, placement: Placement, reads_on_device: bool) -> C:
    if attention is None:
        raise CacheError(f"{path.name} does not say how much memory a cell takes: give a budget of cells instead of memory")
    kinds = [config.type_k, config.type_v]
    if AUTO in kinds:
        f16, smaller = ([given if given != AUTO else kind for given in kinds] for kind in ("f16", _SMALLER))
        holds_all = memory // attention.cell_bytes(f16[0], f16[1]) >= attention.n_ctx_train
        kinds = smaller if not holds_all and _takes(attention, smaller, placement) else f16
    cell = attention.cell_bytes(kinds[0], kinds[1])
    n_cells = min(memory // cell // CELL_BLOCK * CELL_BLOCK, attention.n_ctx_train)
    if reads_on_device:
        config = _with_read_stride(config, n_cells // 3, attention.n_ctx_train)
    slack = config.slack if _evicts(config) else 0
    if n_cells - slack < config.least_budget:
        need = -(-(config.least_budget + slack) // CELL_BLOCK) * CELL_BLOCK * cell
        raise CacheError(
            f"{memory / 1e6:,.1f} MB are too little for the cache of {path.name} with {kinds[0]} keys and {kinds[1]} values: "
            f"give at least {need / 1e6:,.1f} MB"
        )
    return replace(config, memory=None, budget=n_cells - slack, type_k=kinds[0], type_v=kinds[1])


def _evicts(config: CacheConfig) -> bool:
    return policies.make(config.policy, config.policy_args).evicts


def _reads_on_device(config: CacheConfig, placement: Placement) -> bool:
    """Whether the stride while a text is read goes with devices, because cells lie on some and nobody said how large it is."""
    return config.read_stride is None and _evicts(config) and placement.kv_offload and bool(devices_of(placement))


def _with_read_stride(config: C, share: int, n_ctx_train: int) -> C:
    """With the stride that devices have while a text is read: whole blocks of cells, of which so large a share may be for that."""
    most = min(READ_STRIDE, share // CELL_BLOCK * CELL_BLOCK, n_ctx_train // _READ_SHARE)
    return replace(config, read_stride=max(config.stride, most))


def _takes(attention: Attention, kinds: list[str], placement: Placement) -> bool:
    sizes = (attention.size_k, attention.size_v)
    stores = all(size % block_of(kind) == 0 for size, kind in zip(sizes, kinds, strict=True))
    return stores and _without_attention(attention, kinds[0], kinds[1], placement) is None


def _without_attention(attention: Attention, type_k: str, type_v: str, placement: Placement) -> str | None:
    return device_without_attention(
        type_k,
        type_v,
        n_head=attention.n_head,
        n_head_kv=attention.n_head_kv,
        size_k=attention.size_k,
        size_v=attention.size_v,
        placement=placement,
    )
