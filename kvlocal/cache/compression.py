"""The one place that decides when to compress, and that carries a policy's plan out on the cache and the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from kvlocal.cache.archive import Archive, ArchiveFailed
from kvlocal.cache.attention_of_answer import AttentionOfAnswer
from kvlocal.cache.frames import first_position
from kvlocal.cache.later_choice import LaterChoice
from kvlocal.cache.ledger import Ledger
from kvlocal.cache.memory import give_back
from kvlocal.cache.recall import ChosenTokens, Recaller, Refill
from kvlocal.cache.score_sources import ScoreSources
from kvlocal.errors import KvlocalError
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.errors import NativeError
from kvlocal.llama.layout import Layout
from kvlocal.policies import Policy

Positions = Literal["auto", "original", "cache"]

T = TypeVar("T")


class PositionsExhausted(KvlocalError):
    """The conversation has reached the end of the trained context, and its keys may not be moved back."""


@dataclass
class Seconds:
    """Where the time of a session went, in seconds."""

    prefill: float = 0.0
    decode: float = 0.0
    sample: float = 0.0
    score: float = 0.0
    plan: float = 0.0
    compact: float = 0.0
    recall: float = 0.0
    reread: float = 0.0
    nexus: float = 0.0


def cells_to_keep(budget: int, ratio: float | None, n_pinned: int, window: int, n_tokens: int) -> int:
    """Cells of each layer and head after a compression of a conversation of n_tokens, with the other numbers as Compressor has them."""
    if ratio is None:
        return budget
    return min(budget, max(n_pinned + 2 * window, round((1 - ratio) * n_tokens)))


@dataclass
class Compressor:
    """Keeps one sequence within its budget.

    native, layout: the cache
    sources: what the policy wants to know
    policy: what to keep
    budget: the most cells of each layer and head after a compression
    ratio: the share of the history to remove, as long as what stays is less than the budget; None for the budget alone
    stride: a compression is due when the cache has grown this many cells past the target
    read_stride: the same while a text is read
    window: the most recent cells, which always stay
    positions: "original": keys keep the positions they were made for, to the end of the trained context; "cache": kept keys move to their
        place in the cache at every compression; "auto": as the policy says, and back to low positions when the trained context comes near
    n_batch: tokens that may come at once
    n_ctx_train: positions the model was trained for
    n_swa: size of the sliding window of the layers that are not compressed, 0 without any
    before: called before anything is removed or moved, with the ledger
    recaller: chooses from the archive, None without one
    n_recalled: cells that came back when they were last chosen, mean over layers and heads
    chosen_at: how many tokens there were then
    looked: what the choices for the last answer saw
    choices: how often they were
    lost: why the archive was given up, "" as long as it was not
    held: while set, nothing is removed or moved, but cells may be exchanged for others from the archive
    late: tokens of an answer before a choice made in it takes effect, which is found while they are decoded; 0 for at once
    observe: told the ledger after each change of what is in the cells; None for nobody
    """

    native: NativeCache
    layout: Layout
    sources: ScoreSources
    policy: Policy
    budget: int
    ratio: float | None
    stride: int
    read_stride: int
    window: int
    positions: Positions
    n_batch: int
    n_ctx_train: int
    n_swa: int
    before: Callable[[Ledger], None]
    recaller: Recaller | None = None
    lost: str = ""
    n_recalled: float = 0.0
    chosen_at: int = 0
    looked: AttentionOfAnswer = field(default_factory=AttentionOfAnswer)
    seconds: Seconds = field(default_factory=Seconds)
    compressions: int = 0
    rotations: int = 0
    choices: int = 0
    held: bool = False
    late: int = 0
    observe: Callable[[Ledger], None] | None = None
    _later: LaterChoice = field(default_factory=LaterChoice)

    def target(self, ledger: Ledger) -> int:
        """Cells of each layer and head after a compression now."""
        return cells_to_keep(self.budget, self.ratio, ledger.n_pinned, self.window, ledger.n_tokens - ledger.n_nexus)

    def make_room(self, ledger: Ledger, n: int) -> None:
        """Before n more tokens: moves the keys back if their positions would leave the trained context.

        Raises:
            PositionsExhausted: they would, and "original" positions are asked for.
        """
        if self.held:
            return
        started = time.perf_counter()
        self.sources.before_append(ledger, n)
        self.seconds.score += time.perf_counter() - started
        if ledger.next_position + n <= self.n_ctx_train or not self.policy.evicts:
            return
        if self.positions == "original":
            raise PositionsExhausted(
                f"the conversation has reached position {ledger.next_position} of {self.n_ctx_train} and its positions are to stay original: "
                "choose the positions auto or cache, or start a new conversation"
            )
        if self.layout.can_rotate:
            self.before(ledger)
            if not self._begin_frame(ledger, n):
                self._compact(ledger, np.broadcast_to(np.arange(ledger.n_cells), ledger.pinned().shape), rotate=True)

    def after_append(self, ledger: Ledger, reading: bool = False) -> None:
        """After new tokens: compresses if it is due.

        reading: they are of a text that is read, and no answer
        """
        if ledger.n_cells >= self.target(ledger) + (self.read_stride if reading else self.stride):
            self.compress(ledger)

    def compress(self, ledger: Ledger) -> None:
        """Compresses if the cache is over its target."""
        if ledger.n_cells <= self.target(ledger) or self.held or not self.policy.evicts:
            return
        self.before(ledger)
        near_end = ledger.next_position + self.read_stride + 2 * self.n_batch > self.n_ctx_train
        if self.recaller:
            self.recaller.look_everywhere()
        if self._recall(ledger, self.target(ledger), self.policy):
            if near_end and self.positions == "auto" and self.layout.can_rotate:
                self._begin_frame(ledger, 0)
            return
        started = time.perf_counter()
        state = self.sources.state(ledger)
        observed = time.perf_counter()
        plan = self.policy.plan(state, self.target(ledger))
        self.seconds.score += observed - started
        self.seconds.plan += time.perf_counter() - observed
        rotate = self.positions == "cache" or (self.positions == "auto" and (self.policy.rotates or near_end))
        ledger.scores("history")[:] = np.nan if plan.history is None else plan.history
        self._compact(ledger, plan.keep, rotate=rotate)
        self.compressions += 1
        del state, plan
        trimming = time.perf_counter()
        give_back()
        self.seconds.compact += time.perf_counter() - trimming

    def choose_again(self, ledger: Ledger, free: int, policy: Policy, closely: bool = False) -> bool:
        """A policy chooses the cells anew from the whole conversation, as many as leave `free` cells before the next compression.

        closely: as in Recaller.choice

        Where choices are late, one that is not close takes effect with `take_choice`. While cells are held their number stays. False if there is no
        archive, or nothing in it that the cache does not hold, or, where keys were rotated and no token came since, no query to choose by.
        """
        if self.recaller is None or ledger.n_tokens in (self.chosen_at, ledger.n_cells) or not len(self.native.query_positions()):
            return False
        self.before(ledger)
        n_full = self.target(ledger) + max(0, self.stride - free)
        n_keep = ledger.n_cells if self.held else min(n_full, ledger.n_tokens)
        return self._recall(ledger, n_keep, policy, closely, beside=self.late > 0 and not closely and not self.held)

    def tokens_before_choice(self, ledger: Ledger) -> int | None:
        """How many tokens are to come before the choice that is being found takes effect; None without one."""
        age = self._later.age(ledger.n_tokens)
        return None if age is None else max(0, self.late - age)

    def take_choice(self, ledger: Ledger) -> None:
        """After new tokens: the choice that was being found takes effect, if it is time. So many may have come at once, as of another text, that
        there is no room for it beside them: then it never does.
        """
        if self.tokens_before_choice(ledger) != 0:
            return
        started = time.perf_counter()
        choice = self._tried(self._later.take)
        if choice and choice.tokens.shape[-1] + ledger.n_tokens - choice.n_tokens < self.target(ledger) + self.stride:
            self.before(ledger)
            self._carry_out(ledger, choice)
        self.seconds.recall += time.perf_counter() - started

    def drop_choice(self) -> None:
        """The choice that is being found, if there is one, is for a conversation that is no more: it never takes effect."""
        self._later.drop()

    def _recall(self, ledger: Ledger, n_keep: int, policy: Policy, closely: bool = False, beside: bool = False) -> bool:
        """Fills n_keep cells from the whole conversation, or begins to look for what they shall hold. False without an archive, or if it had to be
        given up: nothing has changed then.
        """
        started = time.perf_counter()
        if not self.write_through(ledger) or self.recaller is None:
            return False
        recaller = self.recaller
        find = self._tried(lambda: recaller.choice(ledger, n_keep, policy, closely=closely, beside=beside))
        if find is None:
            return False
        if beside:
            self._later.begin(ledger.n_tokens, find)
        else:
            choice = self._tried(find)
            if choice is None or not self._carry_out(ledger, choice):
                return False
        self.seconds.recall += time.perf_counter() - started
        return True

    def _tried(self, call: Callable[[], T]) -> T | None:
        """What looks through the archive returns; None if the archive had to be given up, which nothing else has changed by."""
        try:
            return call()
        except (ArchiveFailed, NativeError) as error:
            if isinstance(error, NativeError) and not error.unsupported:
                raise
            self.give_up_archive(str(error))
            return None

    def _carry_out(self, ledger: Ledger, choice: ChosenTokens) -> bool:
        """Fills the cells with what was chosen and what has come since. False if the archive had to be given up: nothing has changed then."""
        recaller, choice = self.recaller, choice.with_new(ledger.n_tokens)
        assert recaller is not None
        refill = self._tried(lambda: recaller.refill(ledger, choice.tokens))
        if refill is None:
            return False
        self.looked.add(ledger, refill.tokens, refill.gather >= ledger.n_cells, choice.scores, choice.attention)
        self.compressions += refill.tokens.shape[-1] < ledger.n_cells
        self.choices += 1
        self._fill(ledger, refill, recaller.archive, ledger.next_position)
        self.n_recalled, self.chosen_at = refill.n_recalled, ledger.n_tokens
        return True

    def _begin_frame(self, ledger: Ledger, n: int) -> bool:
        """Goes on at lower positions, which leave room for n tokens at least, with the archive at hand (kvlocal.cache.frames).

        False without an archive, or if it had to be given up: nothing has changed then.
        """
        if self.recaller is None:
            return False
        started = time.perf_counter()
        room, least = max(n, 2 * (self.read_stride + 2 * self.n_batch)), max(ledger.n_cells, self.n_swa + 1)
        first = first_position(ledger.n_pinned, self.n_ctx_train, room, least)
        if first >= ledger.next_position:
            return True
        if not self.write_through(ledger):
            return False
        self._fill(ledger, self.recaller.move(ledger, first), self.recaller.archive, first)
        self.rotations += 1
        self.seconds.recall += time.perf_counter() - started
        return True

    def _fill(self, ledger: Ledger, refill: Refill, archive: Archive, next_position: int) -> None:
        """The cells hold what a refill says, and the conversation goes on at this position."""
        # the mask wants ascending positions; the window's are the true ones
        positions = np.arange(next_position - refill.gather.shape[-1], next_position)
        with ledger.changing():
            self.native.compact(refill.gather, positions, refill.delta, archive.chunks())
            self.native.shift_beside(next_position - ledger.next_position)
            ledger.refill(refill.gather, refill.tokens, refill.positions, next_position)
        self._changed(ledger)

    def write_through(self, ledger: Ledger) -> bool:
        """All tokens are in the archive, in which no choice is being looked for. False without one, or if it had to be given up."""
        self.drop_choice()
        if self.recaller is None:
            return False
        try:
            self.recaller.write_through(ledger)
        except ArchiveFailed as error:
            self.give_up_archive(str(error))
        return self.recaller is not None

    def open_archive(self, archive: Archive) -> None:
        """From now on what is evicted can be recalled; nothing must have been evicted yet."""
        self.recaller = Recaller(self.native, self.window, archive, self.n_ctx_train)

    def close_archive(self) -> None:
        self._later.close()
        if self.recaller:
            self.recaller.archive.close()
        self.recaller, self.lost, self.n_recalled, self.chosen_at = None, "", 0.0, 0
        self.looked.clear()

    def give_up_archive(self, reason: str) -> None:
        """What is evicted from now on is gone for good, and so is what was evicted."""
        if self.recaller:
            self.close_archive()
            self.lost = reason

    def _compact(self, ledger: Ledger, keep: np.ndarray, *, rotate: bool) -> None:
        started = time.perf_counter()
        n_keep = keep.shape[-1]
        if rotate and self.layout.can_rotate:
            # the sliding-window cache moves along, and none of its positions may fall below zero
            first = max(0, self.n_swa + 1 - n_keep)
            positions = np.arange(first, first + n_keep, dtype=np.int32)
            delta = positions - np.take_along_axis(ledger.positions, keep, axis=-1)
            shift = int(positions[-1]) + 1 - ledger.next_position
            # rotating empties the ring
            self.sources.before_removal(ledger)
            # cells are moved in place, layer by layer
            with ledger.changing():
                self.native.compact(keep, positions, delta)
                self.native.shift_beside(shift)
                ledger.compact(keep, positions)
            self.rotations += 1
        else:
            with ledger.changing():
                # the mask wants ascending positions; the window's are the true ones
                self.native.compact(keep, np.arange(ledger.next_position - n_keep, ledger.next_position))
                ledger.compact(keep, None)
        self._changed(ledger)
        self.seconds.compact += time.perf_counter() - started

    def _changed(self, ledger: Ledger) -> None:
        if self.observe:
            self.observe(ledger)
