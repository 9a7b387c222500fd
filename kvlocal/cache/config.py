"""CacheConfig: what is kept of a conversation, and how many cells that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

from kvlocal import policies
from kvlocal.cache.archive import STORES, Store
from kvlocal.cache.compression import Positions
from kvlocal.cache.score_sources import n_recorded
from kvlocal.errors import KvlocalError
from kvlocal.llama.context import KV_TYPES
from kvlocal.llama.free_cores import Threads
from kvlocal.llama.model import Model

DEFAULT_BUDGET = 1024
DEFAULT_FULL = 8192
AUTO = "auto"  # the type of cache that memory chooses


class CacheError(KvlocalError):
    """The cache cannot do this, now or with this configuration."""


@dataclass(frozen=True)
class CacheConfig:
    """What is kept of a conversation.

    budget: cells each layer and head holds after a compression, DEFAULT_BUDGET if None; for the policy "full", all there ever are, and if
        None as many as the model was trained for, up to DEFAULT_FULL
    memory: bytes for the cells in place of a budget, which becomes what fits in (kvlocal.cache.fitting); where layers have a sliding window, as if
        they had none
    ratio: the share of the history to remove, 0 to 1: the budget grows with the conversation, (1 - ratio) of its tokens, up to `budget`, which
        is then as large as for "full" if None
    policy, policy_args: what to keep (kvlocal.policies), and its hyper-parameters
    positions: where kept keys are rotated to (kvlocal.cache.compression.Compressor)
    stride: the cache may grow by this many cells before it is compressed again
    read_stride: the same while a text is read, at least the stride; None for the stride, or where the cells lie on a device for what goes with that
        (kvlocal.cache.fitting)
    window: the most recent cells, which always stay, and whose queries score the others
    n_sink: the first cells, which always stay
    type_k, type_v: types of the cache, of kvlocal.llama.context.KV_TYPES, or with memory AUTO
    n_ubatch: tokens evaluated at once
    n_threads: threads; None for all cores, "auto" for those that other programs leave free, as it turns out (kvlocal.llama.free_cores)
    archive: whether what is evicted can be recalled: "off", "ram" with an archive in memory, "disk" with one that goes on in a file; None is "disk"
        with the policy that recalls, wherever it can, and else "off" (`store`)
    archive_ram: bytes of memory that the archive may take
    archive_dir: where its file is, the system's directory for temporary files if None
    archive_type: what it stores keys and values in, of kvlocal.llama.context.KV_TYPES; None for the types of the cache

    Raises:
        CacheError: a value is out of range.
    """

    budget: int | None = None
    memory: int | None = None
    ratio: float | None = None
    policy: str = policies.DEFAULT_POLICY
    policy_args: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "auto"
    stride: int = 128
    read_stride: int | None = None
    window: int = 16
    n_sink: int = 4
    type_k: str = "f16"
    type_v: str = "f16"
    n_ubatch: int = 256
    n_threads: Threads = None
    archive: Store | None = None
    archive_ram: int = 2**30
    archive_dir: Path | None = None
    archive_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "memory", "stride", "read_stride", "window", "n_ubatch", "n_threads"):
            value = getattr(self, name)
            if value is not None and value != AUTO and value < 1:
                raise CacheError(f"{name} is {value}: it must be at least 1")
        if self.memory is not None and self.budget is not None:
            raise CacheError("a budget of cells and memory for them are given: leave one of them out")
        if self.memory is None and AUTO in (self.type_k, self.type_v):
            raise CacheError("a cache of the type auto needs memory to choose by: name a type")
        if self.read_stride is not None and self.read_stride < self.stride:
            raise CacheError(f"the stride while a text is read is {self.read_stride}: it must be at least the stride of {self.stride}")
        if self.n_sink < 0:
            raise CacheError(f"n_sink is {self.n_sink}: it must be at least 0")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise CacheError(f"the ratio is {self.ratio}: it must be at least 0 and below 1, the share of the history to remove")
        if self.ratio and self.policy in policies.POLICIES and not policies.make(self.policy).evicts:
            raise CacheError(f"the policy {self.policy} removes nothing, and a ratio says how much to remove: leave one of them out")
        if self.positions not in get_args(Positions):
            raise CacheError(f"the positions are {self.positions!r}: they must be one of {', '.join(get_args(Positions))}")
        if self.archive is not None and self.archive not in STORES:
            raise CacheError(f"the archive is {self.archive!r}: it must be one of {', '.join(STORES)}")
        if self.archive_ram < 0:
            raise CacheError(f"archive_ram is {self.archive_ram}: it must be at least 0")
        if self.archive_type is not None and self.archive_type not in KV_TYPES:
            raise CacheError(f"the archive's type is {self.archive_type!r}: it must be one of {', '.join(KV_TYPES)}")
        if self.store != "off" and not self._may_recall:
            raise CacheError("only the policy recall chooses from an archive, and not with positions cache: change that or leave the archive off")
        if self.window > self.n_ubatch:
            raise CacheError(f"the window of {self.window} must not be larger than the micro-batch of {self.n_ubatch}: make it smaller")
        if self.budget is not None and self.budget < self.least_budget:
            raise CacheError(f"a budget of {self.budget} cells is too small: give at least {self.least_budget}")

    @property
    def _may_recall(self) -> bool:
        return self.policy == "recall" and self.positions != "cache"

    @property
    def store(self) -> Store:
        """Where the archive is."""
        return self.archive or ("disk" if self._may_recall else "off")

    @property
    def slack(self) -> int:
        """By how many cells the cache may grow past its budget where cells are ever removed."""
        return self.read_stride or self.stride

    def with_policy(self, name: str, args: Mapping[str, Any]) -> Self:
        """The same with another policy. An archive goes if that does not recall, and stays away if there was to be none.

        Raises:
            CacheError: a value is out of range.
        """
        return replace(self, policy=name, policy_args=args, archive="off" if self.archive == "off" else None)

    def shared_by(self, n: int) -> Self:
        """The same for each of n conversations at once, whose archives have the memory for one together."""
        return replace(self, archive_ram=self.archive_ram // n)

    @property
    def least_budget(self) -> int:
        """The smallest budget there can be."""
        return 2 * self.window + self.n_sink


class Allocation(NamedTuple):
    """What a configuration needs for a model.

    budget: the most cells of each layer and head after a compression
    n_cells: cells that are allocated
    evicts: whether cells are ever removed
    """

    budget: int
    n_cells: int
    evicts: bool


def allocation(config: CacheConfig, n_ctx_train: int) -> Allocation:
    """How large a cache is made for a model that was trained on so many positions; a budget that is too large for it is left as it is."""
    evicts = policies.make(config.policy, config.policy_args).evicts
    slack = config.slack if evicts else 0
    default = DEFAULT_BUDGET if evicts and config.ratio is None else DEFAULT_FULL
    budget = config.budget or min(default, n_ctx_train - slack)
    return Allocation(budget, budget + slack, evicts)


def check_budget(model: Model, config: CacheConfig) -> Allocation:
    """The allocation for a model; CacheError if the budget is too large for it."""
    return check_allocation(model.n_ctx_train, config)


def check_allocation(n_ctx_train: int, config: CacheConfig) -> Allocation:
    """As check_budget, for a model that was trained on so many positions."""
    asked = allocation(config, n_ctx_train)
    if asked.n_cells > n_ctx_train:
        raise CacheError(
            f"a budget of {asked.budget} cells is too large for a model trained on {n_ctx_train} positions: "
            f"give at most {n_ctx_train - (asked.n_cells - asked.budget)}"
        )
    return asked


def least_budget(config: CacheConfig, n_pinned: int) -> int:
    """The smallest budget in which so many tokens can always stay."""
    evicts = policies.make(config.policy, config.policy_args).evicts
    return max(config.n_sink, n_pinned) + 2 * config.window if evicts else 0


def queries_to_record(config: CacheConfig) -> int:
    """How many queries a context must record for this configuration."""
    return n_recorded(policies.make(config.policy, config.policy_args), config.window, config.n_ubatch)
