"""BudgetedCache: the tokens of one conversation in cells that never become more than a budget allows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from kvlocal import policies
from kvlocal.cache.archive import Archive
from kvlocal.cache.archived_cells import ArchivedCells
from kvlocal.cache.compression import Compressor, Seconds
from kvlocal.cache.config import CacheConfig, CacheError, check_budget, queries_to_record
from kvlocal.cache.evaluate_again import SecondEvaluation
from kvlocal.cache.fitting import archive_types, fitted
from kvlocal.cache.ledger import NEXUS
from kvlocal.cache.noted_cells import Arrays, Limits
from kvlocal.cache.score_sources import ScoreSources, carried_scores
from kvlocal.llama.adapter import Adapter
from kvlocal.llama.context import Context, Outputs
from kvlocal.llama.model import Model
from kvlocal.llama.sequence_decoder import SequenceDecoder

Progress = Callable[[int, int], None]

_EXCERPT = 60  # characters of a segment's text that are kept for showing


class Passage(NamedTuple):
    """Tokens with one origin.

    role: of the segment that they belong to (kvlocal.cache.ledger.Segment)
    tokens: int32 [n], n may be 0
    text: what they say, if it was written by somebody, to show its beginning
    """

    role: str
    tokens: npt.NDArray[np.int32]
    text: str = ""


class BudgetedCache(ArchivedCells):
    """The cache of one conversation, token by token.

    Every token is evaluated once, but the end of what the user says a second time where there is an archive. The cache is compressed when it
    exceeds the budget by the stride, also in the middle of a long text; what is pinned always stays. When positions come near the end of the
    trained context, kept keys are rotated back to low positions and the conversation goes on.

    After a failure in the middle of a change the cells are uncertain: every method that computes with them raises UncertainCache until `begin`
    or `resume`.

    model: the weights; must outlive the cache
    config: budget and policy
    spare: cells beyond those that budget and stride need, for what is read in hold()
    n_outputs: tokens of a micro-batch whose logits are kept
    undo: mark() keeps what the way back needs: with an archive what was in the cells, without one a copy of them
    make_context: makes the cells: Context, or what gives a slot beside others (kvlocal.llama.slots)

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
        make_context: Callable[..., SequenceDecoder] = Context,
    ) -> None:
        self.model, self.config = model, fitted(model.path, config, model.placement)
        config = self.config
        self.policy = policies.make(config.policy, config.policy_args)
        self.budget, self.capacity, evicts = check_budget(model, config)
        self._spare, self._for_texts = spare, config.slack - config.stride if evicts else 0
        # only this policy has an archive (CacheConfig)
        self._recall = self.policy if isinstance(self.policy, policies.Recall) else policies.Recall()
        with ExitStack() as opened:
            context = make_context(
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
            opened.callback(context.close)
            super().__init__(
                context,
                self.capacity + spare,
                carried_scores(self.policy),
                undo=undo,
                copies=self.policy.evicts,
                archived=config.store != "off",
            )
            self._again = SecondEvaluation(context, self.layout.is_recurrent)
            self._archive_types = archive_types(config, self.layout)
            self.sources = ScoreSources(self.native, self.layout, self.policy, config.window, context.n_ubatch, model.token_bytes)
            self.compressor = Compressor(
                self.native,
                self.layout,
                self.sources,
                self.policy,
                self.budget,
                config.ratio,
                config.stride,
                config.slack,
                config.window,
                config.positions,
                config.n_ubatch,
                model.n_ctx_train,
                model.n_swa if self.layout.is_swa else 0,
                before=self._way_back.keep,
                late=min(self._recall.late, self._recall.refresh) if self.layout.is_on_device else 0,
            )
            opened.callback(self.compressor.close_archive)
            self.begin(0)
            self._opened = opened.pop_all()

    def begin(self, n_pinned: int) -> None:
        """An empty cache, in which the first n_pinned tokens will always stay, and the sinks at least."""
        self.empty(max(self.config.n_sink, n_pinned))
        self.peak = 0
        self.compressor.compressions = self.compressor.rotations = 0
        self.compressor.close_archive()
        if self.config.store != "off":
            self.compressor.open_archive(self._empty_archive())
        self._begin_turn()
        self._again.forget()

    def _begin_turn(self) -> None:
        """Tokens of an answer: how many came since the cells were chosen, and after how many they are chosen again."""
        self._since_choice, self._interval = 0, self._recall.refresh

    def mark(self) -> None:
        """As ArchivedCells.mark, before a turn of the user: what is chosen in it does not depend on when it was in the last one."""
        super().mark()
        self._begin_turn()
        if self.archive:
            self._again.note(self.ledger)

    def _empty_archive(self) -> Archive:
        config = self.config
        directory = config.archive_dir or Path(tempfile.gettempdir())
        return Archive(self.layout, config.archive_ram, directory if config.store == "disk" else None, self._archive_types)

    @property
    def seconds(self) -> Seconds:
        """Where the time went since the cache was made."""
        return self.compressor.seconds

    @property
    def target(self) -> int:
        """Cells of each layer and head after a compression now."""
        return self.compressor.target(self.ledger)

    @property
    def room(self) -> int:
        """How many tokens may be evaluated at once; at least one, which is refused where no cell is free."""
        return min(self.context.n_ubatch, max(1, self.n_free))

    @property
    def room_in_answer(self) -> int:
        """As `room`, for tokens of an answer that is given: no more than may come before the cells are compressed or chosen anew."""
        room = self.room if self.compressor.held else min(self.room, max(1, self.n_free - self._for_texts))
        if not self.compressor.recaller:
            return room
        return min(room, self._interval - self._since_choice, self.compressor.tokens_before_choice(self.ledger) or room)

    # what comes

    def read(self, parts: Sequence[Passage], progress: Progress = lambda done, total: None) -> int:
        """Evaluates parts one after another, micro-batch by micro-batch; returns the number of tokens.

        progress: called with (tokens done, tokens in all) after each
        """
        ids = np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)])
        ends = list(accumulate(len(part.tokens) for part in parts))
        texts = self._user_texts(parts)
        breaks = [end for _, end in texts]
        # what is evaluated a second time begins where the recurrent state, if there is one, was copied
        copies = [max(begin, end - self.n_again) for begin, end in texts] if self.layout.is_recurrent else []
        start = 0
        while True:
            if copies and start == copies[0]:
                del copies[0]
                self._again.note(self.ledger)
            stop = min([start + self._room_at(start, parts, ends), len(ids), *copies[:1], *breaks[:1]])
            # what of each part is in this chunk; one without tokens counts where it stands
            inside = [
                (part, min(end, stop) - max(end - len(part.tokens), start))
                for part, end in zip(parts, ends, strict=True)
                if (end - len(part.tokens) < stop and end > start) or (not len(part.tokens) and start <= end <= stop)
            ]
            if start < stop:
                self.append(ids[start:stop], parts=inside)
            else:
                self._note(inside, ids)
            progress(stop, len(ids))
            if breaks and stop == breaks[0]:
                del breaks[0]
                self.recall_for_answer()
            if stop == len(ids):
                return stop
            start = stop

    def _user_texts(self, parts: Sequence[Passage]) -> list[tuple[int, int]]:
        """Which of the tokens the user says, for each time that all is said and the markup of an answer begins: the last queries are about what was
        asked then.
        """
        if not self.compressor.recaller:
            return []
        role, n, begin, found = self.ledger.segments[-1].role if self.ledger.segments else "", 0, 0, []
        for part in parts:
            if part.role != role:
                if part.role == "assistant" and role == "user" and n:
                    found.append((begin, n))
                begin = n
            role, n = part.role, n + len(part.tokens)
        return found

    def _room_at(self, start: int, parts: Sequence[Passage], ends: Sequence[int]) -> int:
        """How many of the tokens of parts, which end at `ends`, may be evaluated at once from `start` on.

        An answer that is given is read as one that is generated; and where there is an archive, what else comes finds its room at once.
        """
        of_answer = 0
        for part, end in zip(parts, ends, strict=True):
            if end > start + of_answer:
                if part.role != "assistant":
                    break
                of_answer = end - start
        if of_answer > self.room_in_answer:
            return self.room_in_answer
        if self.compressor.recaller and self.n_free < min(max(ends, default=0) - start, self.context.n_ubatch):
            self.compressor.compress(self.ledger)
        return self.room

    def choose_again(self) -> bool:
        """Chooses the cells anew from the whole conversation; False without an archive, or where the cache holds all of it."""
        self._interval = min(2 * self._interval, self._recall.refresh)
        return self._choose()

    def _choose(self, closely: bool = False) -> bool:
        self.check_certain()
        self._since_choice = 0
        policy = self._recall.for_question if self._interval < self._recall.refresh else self._recall
        return self.compressor.choose_again(self.ledger, self._recall.refresh + 1 + self.compressor.late, policy, closely)

    @property
    def n_again(self) -> int:
        """The most tokens that `recall_for_answer` evaluates a second time.

        From a recurrent state they can be no fewer: then they are so many as every head is sure to have among its newest.
        """
        if not self.compressor.recaller:
            return 0
        recall = self._recall
        newest = max(self.config.window, round(min(recall.recent, recall.asked) * self.target))
        return min(recall.again, self.context.n_ubatch, newest if self.layout.is_recurrent else recall.again)

    def recall_for_answer(self) -> None:
        """Behind what the user says, which was just read: brings what it is about into the cells. Without an archive there is nothing to bring.

        Queries of deep layers only ask for what shallower ones have found. So the end of the text is evaluated a second time with what it recalled,
        and then the cells are chosen once more. The queries of an answer's beginning say more again: what comes next is chosen for soon.
        """
        if not self.compressor.recaller:
            return
        self._interval = max(1, self._recall.refresh // 4)
        # a compression just now chose for what is read, not for what is asked
        self.compressor.chosen_at = 0
        if self._choose(closely=True):
            self._evaluate_again(min(self.n_again, self.ledger.n_tokens - self.ledger.segments[-1].start))
            self._choose(closely=True)

    def _evaluate_again(self, n: int) -> None:
        """Evaluates the last n tokens a second time with the cells that there are now, where that can be (SecondEvaluation.run)."""
        started = time.perf_counter()
        if self.archive and self._again.run(self.ledger, self.archive, n):
            self.compressor.chosen_at = 0
            self._count("recall", started)

    def append(
        self,
        tokens: npt.NDArray[np.int32],
        phase: Literal["prefill", "decode"] = "prefill",
        logits: Outputs = "last",
        parts: Sequence[tuple[Passage, int]] = (),
    ) -> None:
        """Evaluates at most a micro-batch of tokens and compresses if that is due.

        phase: what its time is counted as
        parts: where they come from, with the number of tokens of each; if not given, they go on with the last segment. Where there is an archive the
            cells are chosen anew after some tokens of an answer

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
        self._appended(reading=bool(parts) and all(part.role != "assistant" for part, _ in parts))
        self.compressor.take_choice(self.ledger)
        if self.compressor.recaller:
            self._since_choice += sum(n for part, n in parts if part.role == "assistant") if parts else len(tokens)
            if self._since_choice >= self._interval:
                self.choose_again()

    def append_vectors(self, vectors: npt.NDArray[np.float32], role: str, adapter: Adapter | None = None) -> int:
        """Evaluates vectors in place of token embeddings, float32 [n, n_embd], in a segment of their own: the first of them, as many as there is
        room for once the cache is compressed. Returns how many.

        adapter: is on for this alone, besides those of the model
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

    def _appended(self, reading: bool = False) -> None:
        self.peak = max(self.peak, self.ledger.n_cells)
        self.compressor.after_append(self.ledger, reading)

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
        if self.ledger.segments:
            self.ledger.segments[-1].text = text.strip()[:_EXCERPT]

    def compress(self) -> None:
        """Compresses to the budget now, if the cache is over it."""
        self.check_certain()
        self.compressor.compress(self.ledger)

    # a copy that outlives the process

    @property
    def signature(self) -> dict[str, Any]:
        """All settings that decide what is in the cells besides the model and the tokens, as JSON can hold them."""
        # read_stride is not among them: a conversation goes on where its cells lie elsewhere
        names = ("policy", "ratio", "positions", "stride", "window", "n_sink", "type_k", "type_v", "n_ubatch")
        own = self._archive_types == self.layout.row_types
        settings = {name: getattr(self.config, name) for name in names}
        settings |= {"archive": self.config.store != "off", "archive_type": None if own else self.config.archive_type}
        return settings | {"policy_args": asdict(self.policy), "budget": self.budget, "cells": self.capacity - self._for_texts + self._spare}

    def snapshot(self) -> Arrays:
        """All that the tokens to come depend on, besides `signature`, the model and what is pinned; `resume` takes it.

        As ArchivedCells.snapshot, and numbers: int64 [3]
        """
        numbers = np.array([self.compressor.compressions, self.compressor.rotations, self.peak], np.int64)
        return {"numbers": numbers} | super().snapshot()

    def snapshot_limits(self, n_text: int) -> Limits:
        """As ArchivedCells.snapshot_limits."""
        return {"numbers": ("<i8", (3,))} | super().snapshot_limits(n_text)

    def resume(self, arrays: Mapping[str, npt.NDArray[Any]], parts: Sequence[npt.NDArray[np.uint8]] = (), copy: bool = True) -> None:
        """As ArchivedCells.resume, for a cache with the same signature."""
        compressions, rotations, peak = arrays["numbers"].tolist()
        super().resume(arrays, parts, copy)
        self.compressor.compressions, self.compressor.rotations, self.peak = compressions, rotations, peak

    # the end

    def close(self) -> None:
        """Frees the cells. Closing twice is harmless."""
        self._opened.close()
        self._way_back.checkpoint = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
