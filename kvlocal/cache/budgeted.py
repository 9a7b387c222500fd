"""BudgetedCache: the tokens of one conversation in cells that never become more than a budget allows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from kvlocal import policies
from kvlocal.cache.archive import STORES, Archive, Store
from kvlocal.cache.compression import Compressor, Positions, Seconds
from kvlocal.cache.ledger import NEXUS, Ledger
from kvlocal.cache.recall import Recall
from kvlocal.cache.rollback import taken_back
from kvlocal.cache.score_sources import Observer, n_recorded
from kvlocal.errors import KvlocalError
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.engine import Adapter, Context, Model, Outputs

DEFAULT_BUDGET = 1024
DEFAULT_FULL = 8192

Progress = Callable[[int, int], None]

_EXCERPT = 60  # characters of a segment's text that are kept for showing


class CacheError(KvlocalError):
    """The cache cannot do this, now or with this configuration."""


class UncertainCache(CacheError):
    """The cells may not hold what is noted of them, so that nothing may be computed with them: the conversation must be read again."""


@dataclass(frozen=True)
class CacheConfig:
    """What is kept of a conversation.

    budget: cells each layer and head holds after a compression, DEFAULT_BUDGET if None; for the policy "full", all there ever are, and if
        None as many as the model was trained for, up to DEFAULT_FULL
    ratio: the share of the history to remove, 0 to 1: the budget grows with the conversation, (1 - ratio) of its tokens, up to `budget`, which
        is then as large as for "full" if None
    policy, policy_args: what to keep (kvlocal.policies), and its hyper-parameters
    positions: where kept keys are rotated to (kvlocal.cache.compression.Compressor)
    stride: the cache may grow by this many cells before it is compressed again
    window: the most recent cells, which always stay, and whose queries score the others
    n_sink: the first cells, which always stay
    type_k, type_v: types of the cache, of kvlocal.llama.engine.KV_TYPES
    n_ubatch: tokens evaluated at once
    n_threads: threads; None for all cores
    archive: whether what is evicted can be recalled: "off", "ram" with an archive in memory, "disk" with one that goes on in a file
    archive_ram: bytes of memory that the archive may take
    archive_dir: where its file is, the system's directory for temporary files if None

    Raises:
        CacheError: a value is out of range.
    """

    budget: int | None = None
    ratio: float | None = None
    policy: str = policies.DEFAULT_POLICY
    policy_args: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "auto"
    stride: int = 128
    window: int = 16
    n_sink: int = 4
    type_k: str = "f16"
    type_v: str = "f16"
    n_ubatch: int = 256
    n_threads: int | None = None
    archive: Store = "off"
    archive_ram: int = 2**30
    archive_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "stride", "window", "n_ubatch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CacheError(f"{name} is {value}: it must be at least 1")
        if self.n_sink < 0:
            raise CacheError(f"n_sink is {self.n_sink}: it must be at least 0")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise CacheError(f"the ratio is {self.ratio}: it must be at least 0 and below 1, the share of the history to remove")
        if self.positions not in get_args(Positions):
            raise CacheError(f"the positions are {self.positions!r}: they must be one of {', '.join(get_args(Positions))}")
        if self.archive not in STORES:
            raise CacheError(f"the archive is {self.archive!r}: it must be one of {', '.join(STORES)}")
        if self.archive_ram < 0:
            raise CacheError(f"archive_ram is {self.archive_ram}: it must be at least 0")
        if self.archive != "off" and (self.policy != "recall" or self.positions == "cache"):
            raise CacheError("only the policy recall chooses from an archive, and not with positions cache: change that or leave the archive off")
        if self.window > self.n_ubatch:
            raise CacheError(f"the window of {self.window} must not be larger than the micro-batch of {self.n_ubatch}: make it smaller")
        if self.budget is not None and self.budget < self.least_budget:
            raise CacheError(f"a budget of {self.budget} cells is too small: give at least {self.least_budget}")

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
    slack = config.stride if evicts else 0
    default = DEFAULT_BUDGET if evicts and config.ratio is None else DEFAULT_FULL
    budget = config.budget or min(default, n_ctx_train - slack)
    return Allocation(budget, budget + slack, evicts)


def queries_to_record(config: CacheConfig) -> int:
    """How many queries a context must record for this configuration."""
    return n_recorded(policies.make(config.policy, config.policy_args), config.window, config.n_ubatch)


class Passage(NamedTuple):
    """Tokens with one origin.

    role: of the segment that they belong to (kvlocal.cache.ledger.Segment)
    tokens: int32 [n], n may be 0
    text: what they say, if it was written by somebody, to show its beginning
    """

    role: str
    tokens: npt.NDArray[np.int32]
    text: str = ""


@dataclass
class _Checkpoint:
    """A length of the conversation that can be gone back to.

    The tail of the cache is simply cut off as long as nothing was removed since; before the first removal the cache is copied. The query ring
    is overwritten from the start, so it is copied at once.
    """

    n_tokens: int
    ring: npt.NDArray[np.uint8] | None
    state: npt.NDArray[np.uint8] | None = None
    ledger: Ledger | None = None


class _WayBack:
    """Keeps the checkpoint, with the one copy of the cache that it may need.

    n_bytes: what is allocated for the copy now, so that memory stays what it is from the first turn on
    """

    def __init__(self, context: Context, n_bytes: int) -> None:
        self._context = context
        self.copy = np.full(n_bytes, 0, np.uint8)
        self.checkpoint: _Checkpoint | None = None

    def keep(self, ledger: Ledger) -> None:
        """Copies the cache, once for a checkpoint, before something that cutting off the tail could not bring back."""
        checkpoint = self.checkpoint
        if checkpoint and checkpoint.state is None and ledger.n_cells:
            checkpoint.state, checkpoint.ledger = self._context.state_get(out=self.copy), ledger.copy()


class BudgetedCache:
    """The cache of one conversation, token by token.

    Every token is evaluated once. The cache is compressed when it exceeds the budget by the stride, also in the middle of a long text; what is
    pinned always stays. When positions come near the end of the trained context, kept keys are rotated back to low positions and the
    conversation goes on.

    After a failure in the middle of a change the cells are uncertain: every method that computes with them raises UncertainCache until `begin`
    or `resume`.

    model: the weights; must outlive the cache
    config: budget and policy
    spare: cells beyond those that budget and stride need, for what is read in hold()
    n_outputs: tokens of a micro-batch whose logits are kept
    undo: mark() keeps what the way back needs, a copy of the cache among it
    make_context: makes the cells: Context, or what gives a stream beside others (kvlocal.llama.slots)

    budget: the most cells of each layer and head after a compression
    capacity: the most cells there are room for outside hold()
    context, native, layout: the cells, as llama.cpp and as our own library see them
    ledger: which token is in which cell
    peak: the most cells it ever held

    Raises CacheError if the budget does not go together with the model, EngineError or NativeError if the model cannot be run or compressed.
    """

    def __init__(
        self,
        model: Model,
        config: CacheConfig,
        *,
        spare: int = 0,
        n_outputs: int = 1,
        undo: bool = True,
        make_context: Callable[..., Context] = Context,
    ) -> None:
        self.model, self.config = model, config
        self.policy = policies.make(config.policy, config.policy_args)
        self.budget, self.capacity, _ = allocation(config, model.n_ctx_train)
        if self.capacity > model.n_ctx_train:
            raise CacheError(
                f"a budget of {self.budget} cells is too large for a model trained on {model.n_ctx_train} positions: "
                f"give at most {model.n_ctx_train - (self.capacity - self.budget)}"
            )
        self._spare, self._undo = spare, undo
        with ExitStack() as opened:
            self.context = make_context(
                model,
                # llama.cpp cuts the sliding-window cache to the size of the other one, and it has to hold the window beside a micro-batch
                n_cells=max(self.capacity + spare, model.n_swa + config.n_ubatch if model.n_swa else 0),
                n_ubatch=config.n_ubatch,
                type_k=config.type_k,
                type_v=config.type_v,
                n_threads=config.n_threads,
                n_outputs=n_outputs,
                n_recorded=queries_to_record(config),
            )
            opened.callback(self.context.close)
            self.native = NativeCache(self.context.pointer, self.context.seq, self.context.call)
            self.layout = self.native.layout()
            self.observer = Observer(self.native, self.layout, self.policy, config.window, self.context.n_ubatch, model.token_bytes)
            self._exchanged: tuple[npt.NDArray[np.uint8], Ledger] | None = None  # in hold(): cells and ledger before any were exchanged
            self._way_back = _WayBack(self.context, _copy_bytes(self.context) if undo and self.policy.evicts else 0)
            self.compressor = Compressor(
                self.native,
                self.layout,
                self.observer,
                self.policy,
                self.budget,
                config.ratio,
                config.stride,
                config.window,
                config.positions,
                config.n_ubatch,
                model.n_ctx_train,
                model.n_swa if self.layout.is_swa else 0,
                before=self._keep,
            )
            opened.callback(self._close_archive)
            self.begin(0)
            self._opened = opened.pop_all()

    def _open_archive(self) -> None:
        """An empty archive for what the policy evicts, if one is asked for."""
        self._close_archive()
        config, compressor = self.config, self.compressor
        compressor.recall, compressor.lost, compressor.n_recalled = None, "", 0.0
        if config.archive != "off":
            directory = (config.archive_dir or Path(tempfile.gettempdir())) if config.archive == "disk" else None
            compressor.recall = Recall(self.native, self.policy, config.window, Archive(self.layout, config.archive_ram, directory))
        self._since_recall = 0

    def _close_archive(self) -> None:
        if self.compressor.recall:
            self.compressor.recall.archive.close()

    def begin(self, n_pinned: int) -> None:
        """An empty cache, in which the first n_pinned tokens will always stay, and the sinks at least."""
        self.context.clear()
        self._way_back.checkpoint = None
        self.peak = 0
        self.compressor.compressions = self.compressor.rotations = 0
        self._open_archive()
        self.ledger = self._empty_ledger(max(self.config.n_sink, n_pinned))

    def least_budget(self, n_pinned: int) -> int:
        """The smallest budget in which so many tokens can always stay."""
        return max(self.config.n_sink, n_pinned) + 2 * self.config.window if self.policy.evicts else 0

    def _empty_ledger(self, n_pinned: int) -> Ledger:
        ledger = Ledger(self.layout.n_layer, self.layout.n_head_kv, self.capacity + self._spare, self.observer.carries)
        ledger.n_pinned = n_pinned
        return ledger

    @property
    def seconds(self) -> Seconds:
        """Where the time went since the cache was made."""
        return self.compressor.seconds

    @property
    def target(self) -> int:
        """Cells of each layer and head after a compression now."""
        return self.compressor.target(self.ledger)

    @property
    def n_free(self) -> int:
        """Cells that can be used before something must be removed."""
        return self.capacity + self._spare - self.ledger.n_cells

    @property
    def room(self) -> int:
        """How many tokens may be evaluated at once; at least one, which is refused where no cell is free."""
        return min(self.context.n_ubatch, max(1, self.n_free))

    @property
    def kv_bytes(self) -> int:
        """What the cells and the recorded queries take, in bytes."""
        return self.context.kv_bytes() + self.layout.ring_bytes

    # what is certain

    @property
    def uncertain(self) -> bool:
        """Whether the cells may hold something else than the ledger says, after a failure in the middle of a change."""
        return not self.ledger.certain

    def doubt(self) -> None:
        """The cells are not to be used any more."""
        self.ledger.certain = False

    def check_certain(self) -> None:
        """Raises UncertainCache unless the cells hold what the ledger says."""
        if self.uncertain:
            raise UncertainCache("the cache was left in the middle of a change and is not used any more: read the conversation again")

    # what comes

    def read(self, parts: Sequence[Passage], progress: Progress = lambda done, total: None) -> int:
        """Evaluates parts one after another, micro-batch by micro-batch; returns the number of tokens.

        progress: called with (tokens done, tokens in all) after each
        """
        ids = np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)])
        ends = np.cumsum([len(part.tokens) for part in parts])
        start, breaks = 0, self._ends_of_user_text(parts)
        while True:
            stop = min([start + self.room, len(ids), *breaks[:1]])
            # what of each part is in this chunk; one without tokens counts where it stands
            inside = [
                (part, min(end, stop) - max(end - len(part.tokens), start))
                for part, end in zip(parts, ends, strict=True)
                if end - len(part.tokens) < stop and end > start or not len(part.tokens) and start <= end <= stop
            ]
            if start < stop:
                self.append(ids[start:stop], parts=inside)
            else:
                self._note(inside, ids)
            progress(stop, len(ids))
            if breaks and stop == breaks[0]:
                del breaks[0]
                self.choose_again()
            if stop == len(ids):
                return stop
            start = stop

    def _ends_of_user_text(self, parts: Sequence[Passage]) -> list[int]:
        """After how many of the tokens the user has said all and the markup of an answer begins: the last queries are about what was asked then."""
        if not self.compressor.recall:
            return []
        role, n, found = self.ledger.segments[-1].role if self.ledger.segments else "", 0, []
        for part in parts:
            if part.role == "assistant" and role == "user" and n:
                found.append(n)
            role, n = part.role, n + len(part.tokens)
        return found

    def choose_again(self) -> None:
        """Chooses the cells anew from the whole conversation, if there is an archive."""
        self.check_certain()
        self._since_recall = 0
        self.compressor.choose_again(self.ledger)

    def append(
        self,
        tokens: npt.NDArray[np.int32],
        phase: Literal["prefill", "decode"] = "prefill",
        logits: Outputs = "last",
        parts: Sequence[tuple[Passage, int]] = (),
    ) -> None:
        """Evaluates at most a micro-batch of tokens and compresses if that is due.

        phase: what its time is counted as
        parts: where they come from, with the number of tokens of each; if not given, they go on with the last segment

        Raises:
            CacheError: there is no room for them and nothing can be removed.
            UncertainCache: the cells are not certain.
        """
        self._make_room(len(tokens))
        started = time.perf_counter()
        self.context.decode(tokens, self.ledger.next_position, logits=logits)
        self._count(phase, started)
        if parts:
            self._note(parts, tokens)
        else:
            self.ledger.append(tokens)
        self._appended()
        if self.compressor.recall and phase == "decode":
            self._since_recall += len(tokens)
            if self._since_recall >= self.policy.refresh:
                self.choose_again()

    def append_vectors(self, vectors: npt.NDArray[np.float32], role: str, adapter: Adapter | None = None) -> int:
        """Evaluates vectors in place of token embeddings, float32 [n, n_embd], in a segment of their own: the first of them, as many as there is
        room for once the cache is compressed. Returns how many.

        adapter: is on for this alone
        """
        self.check_certain()
        if len(vectors) > self.n_free:
            self.compressor.compress(self.ledger)
        vectors = vectors[: self.n_free]
        self.compressor.make_room(self.ledger, len(vectors))
        started = time.perf_counter()
        self.context.use_adapter(adapter)
        try:
            for start in range(0, len(vectors), self.context.n_ubatch):
                self.context.decode_embeddings(vectors[start : start + self.context.n_ubatch], self.ledger.next_position + start)
        finally:
            self.context.use_adapter(None)
        self._count("nexus", started)
        self.ledger.begin_segment(role)
        self.ledger.append(np.full(len(vectors), NEXUS, np.int32))
        self._appended()
        return len(vectors)

    def _make_room(self, n: int) -> None:
        self.check_certain()
        if n > self.n_free:
            # the compression after the last tokens may have failed
            self.compressor.compress(self.ledger)
        if n > self.n_free:
            raise CacheError(
                "the text is longer than the spare cells of the cache: ask for more of them"
                if self.compressor.held
                else f"the cache of {self.capacity} cells is full and the policy {self.config.policy} removes nothing: "
                "choose another policy or a larger budget"
            )
        self.compressor.make_room(self.ledger, n)

    def make_positions(self, n: int) -> None:
        """Before n more tokens: moves the keys back if their positions would leave the trained context (Compressor.make_room)."""
        self.check_certain()
        self.compressor.make_room(self.ledger, n)

    def _count(self, phase: str, started: float) -> None:
        setattr(self.seconds, phase, getattr(self.seconds, phase) + time.perf_counter() - started)

    def _appended(self) -> None:
        self.peak = max(self.peak, self.ledger.n_cells)
        self.compressor.after_append(self.ledger)

    def _note(self, parts: Sequence[tuple[Passage, int]], ids: npt.NDArray[np.int32]) -> None:
        """Notes tokens that were evaluated in the ledger, the first of them from the first part, and so on."""
        done = 0
        for part, n in parts:
            segments = self.ledger.segments
            # an answer's closing markup still belongs to it
            if not segments or segments[-1].role != part.role:
                self.ledger.begin_segment(part.role)
            if part.text and not segments[-1].text:
                self.describe(part.text)
            self.ledger.append(ids[done : done + n])
            done += n

    def describe(self, text: str) -> None:
        """What the last segment says; its beginning is kept, for showing."""
        self.ledger.segments[-1].text = text.strip()[:_EXCERPT]

    def compress(self) -> None:
        """Compresses to the budget now, if the cache is over it."""
        self.check_certain()
        self.compressor.compress(self.ledger)

    # the way back

    def mark(self) -> None:
        """The conversation can be made as long again as it is now, by `cut`, until the next mark."""
        if self._undo:
            self._way_back.checkpoint = _Checkpoint(self.ledger.n_tokens, self.native.ring_state())
        if self.layout.is_swa:
            # what left the sliding window can't be brought back by cutting off the tail
            self._way_back.keep(self.ledger)

    @property
    def marked(self) -> int | None:
        """The length that was marked last, in tokens."""
        return self._way_back.checkpoint.n_tokens if self._way_back.checkpoint else None

    def cut(self, n_tokens: int) -> bool:
        """The conversation is now n_tokens long. Returns False where the cells of that time cannot be had any more: they are then uncertain, and the
        conversation must be read again.
        """
        checkpoint = self._way_back.checkpoint
        if checkpoint and checkpoint.n_tokens == n_tokens and (checkpoint.ledger or not self.uncertain):
            self._rewind(checkpoint)
            return not self.uncertain
        if self.uncertain or not self._cut_tail(n_tokens):
            self.doubt()
        elif checkpoint and checkpoint.n_tokens > n_tokens:
            self._way_back.checkpoint = None
        return not self.uncertain

    def _rewind(self, checkpoint: _Checkpoint) -> None:
        self.doubt()
        self._way_back.checkpoint = None
        if checkpoint.ledger:
            self.ledger = checkpoint.ledger
        self._restore(checkpoint.state, checkpoint.n_tokens, checkpoint.ring)

    def _restore(self, state: npt.NDArray[np.uint8] | None, n_tokens: int, ring: npt.NDArray[np.uint8] | None) -> None:
        """Cells from a copy that was made with the ledger there is, or those that are there if None, up to a length of the conversation."""
        self.doubt()
        if state is not None:
            self.context.clear()
            self.context.state_set(0, state)
        self._truncate(n_tokens)
        self.context.remove(0, self.ledger.next_position, -1)
        self.native.set_ring_state(ring)
        self.ledger.certain = self._agrees()

    def _keep(self, ledger: Ledger) -> None:
        """Before something that cutting off the tail could not bring back."""
        self._way_back.keep(ledger)
        if self.compressor.held and self._exchanged is None:
            self._exchanged = self.context.state_get(), ledger.copy()

    def _cut_tail(self, n_tokens: int) -> bool:
        """Removes the cells of the tokens from n_tokens on, and any behind that are not noted; False if that does not bring back what was before.

        They must be the last cells of every head, and few enough to leave some of the recorded queries.
        """
        ledger, end = self.ledger, self.context.pos_max(0) + 1
        n_drop = ledger.n_tokens - n_tokens
        n_removed = end - (ledger.next_position - n_drop)
        if n_removed == 0:
            return self._agrees()
        holds_tail = n_drop < ledger.n_cells and (n_drop == 0 or bool((ledger.tokens[..., ledger.n_cells - n_drop] == n_tokens).all()))
        leaves_queries = not self.layout.n_window or n_removed < self.layout.n_window
        if not (holds_tail and leaves_queries and 0 <= n_removed):
            return False
        self.doubt()
        self._truncate(n_tokens)
        self.context.remove(0, ledger.next_position, -1)
        ledger.certain = self._agrees() and self._has_window()
        return ledger.certain

    def _truncate(self, n_tokens: int) -> None:
        self.ledger.truncate(n_tokens)
        if self.compressor.recall:
            self.compressor.recall.archive.truncate(n_tokens)

    def _agrees(self) -> bool:
        """Whether there are as many cells as are noted, up to the position that is noted."""
        return self.native.n_cells() == self.ledger.n_cells and self.context.pos_max(0) == self.ledger.next_position - 1

    def _has_window(self) -> bool:
        """Whether the sliding window in front of the next token is whole."""
        return not self.layout.is_swa or self.context.pos_min(0) <= max(0, self.ledger.next_position - self.model.n_swa)

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """What is decoded inside is removed again on exit, and the query ring is as it was. Nothing else may be removed or moved inside."""
        self.check_certain()
        with taken_back(self.context, self.native, self.ledger):
            yield

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is compressed inside, and on exit cells and ledger are as they were. Can be nested.

        What is read inside must fit into the free and the spare cells. Where there is an archive cells may be exchanged, but their number stays.
        """
        self.check_certain()
        ledger, compressor, way_back = self.ledger, self.compressor, self._way_back
        outer, checkpoint, copy = compressor.held, way_back.checkpoint, way_back.copy
        if not outer:
            compressor.make_room(ledger, min(self.n_free, self.model.n_ctx_train // 2))
            self.observer.before_removal(ledger)
        # what is copied inside is not to overwrite the copy there is
        n_tokens, compressor.held, way_back.checkpoint, way_back.copy = ledger.n_tokens, True, None, copy[:0]
        segments = [replace(segment) for segment in ledger.segments]
        ring = self.native.ring_state() if compressor.recall else None
        outside, self._exchanged = self._exchanged, None
        try:
            with taken_back(self.context, self.native, ledger):
                yield
        finally:
            exchanged, self._exchanged = self._exchanged, outside
            compressor.held, way_back.checkpoint, way_back.copy = outer, checkpoint, copy
            if exchanged:
                state, self.ledger = exchanged
                self._restore(state, n_tokens, ring)
            self._truncate(n_tokens)
            self.ledger.segments[:] = segments

    # a copy that outlives the process

    @property
    def signature(self) -> dict[str, Any]:
        """All settings that decide what is in the cells besides the model and the tokens, as JSON can hold them."""
        names = ("policy", "ratio", "positions", "stride", "window", "n_sink", "type_k", "type_v", "n_ubatch")
        settings = {name: getattr(self.config, name) for name in names}
        return settings | {"policy_args": asdict(self.policy), "budget": self.budget, "cells": self.capacity + self._spare}

    def snapshot(self) -> dict[str, npt.NDArray[np.generic]]:
        """All that the tokens to come depend on, besides `signature`, the model and what is pinned; `resume` takes it.

        numbers: int64 [3]; cache, ring: uint8 [bytes]; ledger.*: Ledger.arrays; and for the mark, checkpoint.numbers: int64 [1], checkpoint.ring, and
        checkpoint.cache and checkpoint.ledger.* if need be
        """
        self.check_certain()
        if self.layout.is_swa:
            # the cells of the window get the order that they have after `resume`: sums of floats depend on it
            with self.taken_back():
                pass
        compressor, checkpoint = self.compressor, self._way_back.checkpoint
        arrays = {
            "numbers": np.array([compressor.compressions, compressor.rotations, self.peak], np.int64),
            "cache": self.context.state_get(),
            "ring": self.native.ring_state(),
            **_named("ledger", self.ledger),
        }
        if checkpoint:
            arrays |= {"checkpoint.numbers": np.array([checkpoint.n_tokens], np.int64), "checkpoint.ring": checkpoint.ring}
            if checkpoint.ledger:
                arrays |= {"checkpoint.cache": checkpoint.state, **_named("checkpoint.ledger", checkpoint.ledger)}
        return {name: array for name, array in arrays.items() if array is not None}

    def snapshot_limits(self, n_text: int) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
        """The type and the largest shape of each array of a `snapshot`, whose last dimension may be smaller. n_text: tokens there can be."""
        cells = self.ledger.tokens.shape
        n_ring = 0 if (ring := self.native.ring_state()) is None else len(ring)
        ledger = {"numbers": ("<i8", (4,)), "ids": ("<i4", (n_text,)), "block_of": ("<i4", (n_text,)), "segments": ("u1", (n_text,))}
        ledger |= {"tokens": ("<i4", cells), "positions": ("<i4", cells), **{name: ("<f4", cells) for name in self.ledger.carried}}
        limits = {"numbers": ("<i8", (3,)), "checkpoint.numbers": ("<i8", (1,))}
        for prefix in ("", "checkpoint."):
            limits |= {f"{prefix}cache": ("u1", (_copy_bytes(self.context),)), f"{prefix}ring": ("u1", (n_ring,))}
            limits |= {f"{prefix}ledger.{name}": limit for name, limit in ledger.items()}
        return limits

    def resume(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Goes on from a `snapshot` of a cache with the same signature, model and pinned tokens. Where it fails, the cells are uncertain.

        Raises:
            KvlocalError, LookupError, TypeError, ValueError, AttributeError: it does not fit.
        """
        self.doubt()
        if self.compressor.recall:
            raise CacheError("a snapshot does not hold what the archive had")
        # first, because whether it can be gone back to shows in the cells
        checkpoint = self._checkpoint_of(arrays) if "checkpoint.numbers" in arrays else None
        self.ledger.take(_of("ledger", arrays))
        self._fill(self.ledger, arrays["cache"], arrays.get("ring"))
        self.compressor.compressions, self.compressor.rotations, self.peak = arrays["numbers"].tolist()
        if checkpoint and not checkpoint.ledger:
            _check_tail(checkpoint, self.ledger)
        self._way_back.checkpoint = checkpoint
        self.ledger.certain = True

    def _fill(self, ledger: Ledger, cache: npt.NDArray[np.uint8], ring: npt.NDArray[np.uint8] | None) -> None:
        """Puts into the cells what a snapshot holds of them; ValueError, or an error of the engine, if that is not what the ledger says."""
        self.context.state_set(0, cache)
        self.native.set_ring_state(ring)
        end = ledger.next_position
        # the positions that the mask looks at; those of the window's cache end where they do
        if not np.array_equal(self.native.positions(), np.arange(end - ledger.n_cells, end)) or self.context.pos_max(0) != end - 1:
            raise ValueError("cache and ledger differ")

    def _checkpoint_of(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> _Checkpoint:
        """The checkpoint of a snapshot; its cache, if it has one, is in the cells then."""
        (n_tokens,) = arrays["checkpoint.numbers"].tolist()
        checkpoint = _Checkpoint(n_tokens, arrays.get("checkpoint.ring"))
        self.native.set_ring_state(checkpoint.ring)
        if "checkpoint.cache" in arrays:
            checkpoint.ledger = self._empty_ledger(self.ledger.n_pinned)
            checkpoint.ledger.take(_of("checkpoint.ledger", arrays))
            checkpoint.state = arrays["checkpoint.cache"]
            self._fill(checkpoint.ledger, checkpoint.state, checkpoint.ring)
            _check_tail(checkpoint, checkpoint.ledger)
        return checkpoint

    # the end

    def close(self) -> None:
        """Frees the cells. Closing twice is harmless."""
        self._opened.close()
        self._way_back.checkpoint = None

    def __enter__(self) -> BudgetedCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_tail(checkpoint: _Checkpoint, ledger: Ledger) -> None:
    """ValueError unless cutting off what came after the checkpoint leaves something that it can be."""
    if not 0 < checkpoint.n_tokens <= ledger.n_tokens or ledger.n_tokens - checkpoint.n_tokens > ledger.n_cells:
        raise ValueError("the last turn is not in the cache")


def _copy_bytes(context: Context) -> int:
    """What a copy of a cache takes at most."""
    return context.kv_bytes() + context.kv_bytes() // 50 + 2**16


def _named(prefix: str, ledger: Ledger) -> dict[str, npt.NDArray[np.generic]]:
    return {f"{prefix}.{name}": array for name, array in ledger.arrays().items()}


def _of(prefix: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
    return {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}
