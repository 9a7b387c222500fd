"""NotedCells: the cells of one conversation and the ledger of what they hold, of which is known whether they agree."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.cache.beside import Beside, most_state_bytes
from kvlocal.cache.config import CacheError
from kvlocal.cache.ledger import Ledger
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.sequence_decoder import SequenceDecoder

Arrays = dict[str, npt.NDArray[Any]]
Limits = dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]


class UncertainCache(CacheError):
    """The cells may not hold what is noted of them, so that nothing may be computed with them: the conversation must be read again."""


@dataclass
class _Checkpoint:
    """A length of the conversation that can be gone back to.

    The tail of the cache is simply cut off as long as nothing was removed since; before the first removal the cache is copied. The query ring
    is overwritten from the start, and so is a recurrent state, so they are copied at once.

    beside: as Beside.get gives it
    """

    n_tokens: int
    beside: npt.NDArray[np.uint8] | None
    state: npt.NDArray[np.uint8] | None = None
    ledger: Ledger | None = None


class _WayBack:
    """Keeps the checkpoint, with the one copy of the cache that it may need.

    n_bytes: what is allocated for the copy now, so that memory stays what it is from the first turn on
    """

    def __init__(self, context: SequenceDecoder, n_bytes: int) -> None:
        self._context = context
        self.copy = np.full(n_bytes, 0, np.uint8)
        self.checkpoint: _Checkpoint | None = None

    def keep(self, ledger: Ledger) -> None:
        """Copies the cache, once for a checkpoint, before something that cutting off the tail could not bring back."""
        checkpoint = self.checkpoint
        if checkpoint and checkpoint.state is None and ledger.n_cells:
            checkpoint.state, checkpoint.ledger = self._context.state_get(out=self.copy), ledger.copy()


class NotedCells:
    """The cells of one conversation, what they hold, and the way back to an earlier length of it.

    After a failure in the middle of a change the cells are uncertain: what computes with them raises UncertainCache until `empty` or `resume`.

    context: the cells, and what decodes into them; it is not closed here
    capacity: the most cells that can be used
    carries: scores that cells carry along (kvlocal.cache.ledger.Ledger)
    undo: mark() keeps what the way back needs
    copies: allocate memory for a copy of the cells at once
    archived: what leaves the cells can be had again, so that a copy is needed only where there is a sliding window

    native, layout: the cells as our own library sees them
    ledger: which token is in which cell
    """

    def __init__(self, context: SequenceDecoder, capacity: int, carries: Collection[str], *, undo: bool, copies: bool, archived: bool) -> None:
        self.context = context
        self.native = NativeCache(context.pointer, context.seq, context.call)
        self.layout = self.native.layout()
        self._capacity, self._carries, self._undo = capacity, carries, undo
        self._beside = Beside(context, self.native, self.layout)
        self._way_back = _WayBack(context, _copy_bytes(context) if undo and copies and (self.layout.is_swa or not archived) else 0)
        self._begun = 0  # how often a conversation was
        self.empty(0)

    def empty(self, n_pinned: int) -> None:
        """Frees all cells; the first n_pinned tokens that come will always stay."""
        self.context.clear()
        self._begun += 1
        self._way_back.checkpoint = None
        self.ledger = self._empty_ledger(n_pinned)

    def _empty_ledger(self, n_pinned: int) -> Ledger:
        ledger = Ledger(self.layout.n_layer, self.layout.n_head_kv, self._capacity, self._carries)
        ledger.n_pinned = n_pinned
        return ledger

    @property
    def n_free(self) -> int:
        """Cells that can be used before something must be removed."""
        return self._capacity - self.ledger.n_cells

    @property
    def kv_bytes(self) -> int:
        """What the cells, the recurrent state and the recorded queries take, in bytes."""
        return self.context.kv_bytes() + self.context.state_bytes() + self.layout.ring_bytes

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

    # the way back

    def mark(self) -> None:
        """The conversation can be made as long again as it is now, by `set_length`, until the next mark."""
        if self._undo:
            self._way_back.checkpoint = _Checkpoint(self.ledger.n_tokens, self._beside.get())
        if self.layout.is_swa:
            # what left the sliding window can't be brought back by cutting off the tail
            self._way_back.keep(self.ledger)

    @property
    def marked(self) -> list[int]:
        """The lengths that were marked and can be had again, in tokens, ascending."""
        return [self._way_back.checkpoint.n_tokens] if self._way_back.checkpoint else []

    def set_length(self, n_tokens: int) -> bool:
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
        self._restore(checkpoint.state, checkpoint.n_tokens, checkpoint.beside)

    def _restore(self, state: npt.NDArray[np.uint8] | None, n_tokens: int, beside: npt.NDArray[np.uint8] | None) -> None:
        """Cells from a copy that was made with the ledger there is, or those that are there if None, up to a length of the conversation."""
        self.doubt()
        if state is not None:
            self.context.clear()
            self.context.state_set(0, state)
        self._truncate(n_tokens)
        # a recurrent state first: cells are not cut off in front of it
        self._beside.set(beside)
        self.context.remove(0, self.ledger.next_position, -1)
        self.ledger.certain = self._agrees()

    def _truncate(self, n_tokens: int) -> None:
        """All that is noted of the tokens from n_tokens on is forgotten."""
        self.ledger.truncate(n_tokens)

    def _cut_tail(self, n_tokens: int) -> bool:
        """Removes the cells of the tokens from n_tokens on, and any behind that are not noted; False if that does not bring back what was before.

        They must be the last cells of every head, and few enough to leave some of the recorded queries. From a recurrent state nothing is cut off.
        """
        ledger, end = self.ledger, self.context.pos_max(0) + 1
        n_drop = ledger.n_tokens - n_tokens
        n_removed = end - (ledger.next_position - n_drop)
        if n_removed == 0:
            return self._agrees()
        holds_tail = n_drop < ledger.n_cells and (n_drop == 0 or bool((ledger.tokens[..., ledger.n_cells - n_drop] == n_tokens).all()))
        leaves_queries = not self.layout.n_window or n_removed < self.layout.n_window
        if not (holds_tail and leaves_queries and n_removed >= 0) or self.layout.is_recurrent:
            return False
        self.doubt()
        self._truncate(n_tokens)
        self.context.remove(0, ledger.next_position, -1)
        ledger.certain = self._agrees() and self._has_window()
        return ledger.certain

    def _agrees(self) -> bool:
        """Whether there are as many cells as are noted, up to the position that is noted, and a recurrent state of that position if there is one."""
        end = self.ledger.next_position
        has_state = not self.layout.is_recurrent or self.context.pos_min(0) == end - 1
        return self.native.n_cells() == self.ledger.n_cells and self.context.pos_max(0) == end - 1 and has_state

    def _has_window(self) -> bool:
        """Whether the sliding window in front of the next token is whole."""
        return not self.layout.is_swa or self.context.pos_min(0) <= max(0, self.ledger.next_position - self.context.model.n_swa)

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """What is decoded inside is removed again on exit, and what is beside the cells is as it was. Nothing else may be removed or moved inside.

        Where that fails, the cells are uncertain.
        """
        self.check_certain()
        begun, end = self._begun, self.context.pos_max(0) + 1
        # what leaves a sliding window can't be brought back by cutting off the tail
        state, beside = self.context.state_get() if self.layout.is_swa else None, self._beside.get()
        try:
            yield
        finally:
            if self._begun == begun:
                with self.ledger.changing():
                    if state is not None:
                        self.context.clear()
                        self.context.state_set(0, state)
                    self._beside.set(beside)
                    self.context.remove(0, end, -1)
            else:
                # after a failure the conversation was begun anew
                self.doubt()

    # a copy that outlives the process

    def snapshot(self) -> Arrays:
        """What is in the cells, and the mark; `resume` takes it.

        cache: uint8 [bytes]; ring: uint8 [bytes], what is beside the cells (Beside.get); ledger.*: Ledger.arrays; and for the mark,
        checkpoint.numbers: int64 [1], checkpoint.ring, and checkpoint.cache and checkpoint.ledger.* if need be
        """
        self.check_certain()
        if self.layout.is_swa:
            # the cells of the window get the order that they have after `resume`: sums of floats depend on it
            with self.taken_back():
                pass
        checkpoint = self._way_back.checkpoint
        arrays = {
            **self._cells(),
            "ring": self._beside.get(),
            **_named("ledger", self.ledger),
        }
        if checkpoint:
            arrays |= {"checkpoint.numbers": np.array([checkpoint.n_tokens], np.int64), "checkpoint.ring": checkpoint.beside}
            if checkpoint.ledger:
                arrays |= {"checkpoint.cache": checkpoint.state, **_named("checkpoint.ledger", checkpoint.ledger)}
        return {name: array for name, array in arrays.items() if array is not None}

    def _cells(self) -> Arrays:
        """The cells themselves, for a snapshot."""
        return {"cache": self.context.state_get()}

    def snapshot_limits(self, n_text: int) -> Limits:
        """The type and the largest shape of each array of a `snapshot`, whose last dimension may be smaller. n_text: tokens there can be."""
        cells = self.ledger.tokens.shape
        ledger: Limits = {"numbers": ("<i8", (4,)), "ids": ("<i4", (n_text,)), "block_of": ("<i4", (n_text,)), "segments": ("u1", (n_text,))}
        ledger |= {"tokens": ("<i4", cells), "positions": ("<i4", cells), **dict.fromkeys(self.ledger.carried, ("<f4", cells))}
        limits: Limits = {"checkpoint.numbers": ("<i8", (1,))}
        for prefix in ("", "checkpoint."):
            limits |= {f"{prefix}cache": ("u1", (_copy_bytes(self.context),)), f"{prefix}ring": ("u1", (self._beside.n_most,))}
            limits |= {f"{prefix}ledger.{name}": limit for name, limit in ledger.items()}
        return limits

    def resume(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from a `snapshot` of cells of the same kind and number, with the same pinned tokens. Where it fails, the cells are uncertain.

        Raises:
            KvlocalError, LookupError, TypeError, ValueError, AttributeError: it does not fit.
        """
        self.doubt()
        # first, because whether it can be gone back to shows in the cells
        checkpoint = self._checkpoint_of(arrays) if "checkpoint.numbers" in arrays else None
        self.ledger.take(_of("ledger", arrays))
        self._fill(self.ledger, arrays.get("cache"), arrays.get("ring"))
        if checkpoint and not checkpoint.ledger:
            _check_tail(checkpoint, self.ledger)
        if not self._agrees():
            raise ValueError("cells and ledger differ")
        self._way_back.checkpoint = checkpoint
        self.ledger.certain = True

    def _fill(self, ledger: Ledger, cache: npt.NDArray[np.uint8] | None, beside: npt.NDArray[np.uint8] | None) -> None:
        """Puts into the cells what a snapshot holds of them; ValueError, or an error of the engine, if that is not what the ledger says."""
        if cache is None:
            raise ValueError("there are no cells")
        self.context.state_set(0, cache)
        end = ledger.next_position
        # the positions that the mask looks at; those of the window's cache end where they do
        if not np.array_equal(self.native.positions(), np.arange(end - ledger.n_cells, end)) or self.context.pos_max(0) != end - 1:
            raise ValueError("cache and ledger differ")
        # a checkpoint's is older than its cells
        self._beside.set(beside)

    def _checkpoint_of(self, arrays: Mapping[str, npt.NDArray[Any]]) -> _Checkpoint:
        """The checkpoint of a snapshot; its cache, if it has one, is in the cells then."""
        (n_tokens,) = arrays["checkpoint.numbers"].tolist()
        checkpoint = _Checkpoint(n_tokens, arrays.get("checkpoint.ring"))
        self._beside.set(checkpoint.beside)
        if "checkpoint.cache" in arrays:
            checkpoint.ledger = self._empty_ledger(self.ledger.n_pinned)
            checkpoint.ledger.take(_of("checkpoint.ledger", arrays))
            checkpoint.state = arrays["checkpoint.cache"]
            self._fill(checkpoint.ledger, checkpoint.state, checkpoint.beside)
            _check_tail(checkpoint, checkpoint.ledger)
        return checkpoint


def _check_tail(checkpoint: _Checkpoint, ledger: Ledger) -> None:
    """ValueError unless cutting off what came after the checkpoint leaves something that it can be."""
    if not 0 < checkpoint.n_tokens <= ledger.n_tokens or ledger.n_tokens - checkpoint.n_tokens > ledger.n_cells:
        raise ValueError("the last turn is not in the cache")


def _copy_bytes(context: SequenceDecoder) -> int:
    """What a copy of a cache takes at most."""
    return context.kv_bytes() + context.kv_bytes() // 50 + 2**16 + most_state_bytes(context)


def _named(prefix: str, ledger: Ledger) -> Arrays:
    return {f"{prefix}.{name}": array for name, array in ledger.arrays().items()}


def _of(prefix: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    return {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}
