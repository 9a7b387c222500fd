"""ArchivedCells: the cells of one conversation, which an archive brings back as they were at any turn, if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlocal.cache.archive import Archive, ArchiveFailed
from kvlocal.cache.compression import Compressor
from kvlocal.cache.ledger import Ledger
from kvlocal.cache.marks import ArchivedMark
from kvlocal.cache.noted_cells import Arrays, Limits, NotedCells
from kvlocal.errors import KvlocalError

# what the marks of a model with a recurrent state may take, each of which has a copy of it: from some 100 KB (LFM2) to some 75 MB (Qwen3-Next)
MOST_STATES = 2**29


class ArchivedCells(NotedCells):
    """NotedCells, and the way back to all marks through an archive; what is exchanged between the two while the cells are held comes back too.

    It is made as NotedCells is; who makes it sets

    compressor: of these cells, with the archive, if there is one
    """

    compressor: Compressor
    _since_choice = _interval = 0

    @property
    def pace(self) -> tuple[int, ...]:
        """When the cells are chosen again: tokens of an answer that came since they were last chosen, and how many are to come."""
        return self._since_choice, self._interval

    @pace.setter
    def pace(self, numbers: tuple[int, ...]) -> None:
        self._since_choice, self._interval = numbers

    @property
    def archive(self) -> Archive | None:
        """The archive, None without one, or if it was given up."""
        return self.compressor.recaller.archive if self.compressor.recaller else None

    @property
    def _way_back_archive(self) -> Archive | None:
        """The archive, if the cells can be filled from it: a sliding window, which it does not have, cannot."""
        return None if self.layout.is_swa else self.archive

    def mark(self) -> None:
        """As NotedCells.mark, but where there is an archive the conversation can be made as long as it was at any mark."""
        if not (self._undo and self._mark_in_archive()):
            super().mark()

    def _mark_in_archive(self) -> bool:
        now, archive = self._now() if self._way_back_archive else None, self._way_back_archive
        if now is None or archive is None:
            return False
        try:
            archive.add_mark(now)
            if self.layout.is_recurrent and not self.compressor.held:
                archive.thin_marks(MOST_STATES)
        except ArchiveFailed:
            return False
        return True

    def _now(self) -> ArchivedMark | None:
        """What the cells are now, to fill them so again; None without an archive, or if it had to be given up."""
        return ArchivedMark.of(self.ledger, self._beside.get(), self.pace) if self.compressor.write_through(self.ledger) else None

    @property
    def marked(self) -> list[int]:
        """The lengths that were marked and can be had again, in tokens, ascending."""
        return [*(mark.n_tokens for mark in (self._way_back_archive.marks if self._way_back_archive else [])), *super().marked]

    def set_length(self, n_tokens: int) -> bool:
        """As NotedCells.set_length, from the archive if there is one."""
        archive = self._way_back_archive
        at = next((i for i, mark in enumerate(archive.marks) if mark.n_tokens == n_tokens), None) if archive else None
        if archive is None or at is None:
            return super().set_length(n_tokens)
        with suppress(KvlocalError, ValueError):
            self._fill_again(archive.marks[at])
            archive.keep_marks(at)
        return not self.uncertain

    def _fill_again(self, mark: ArchivedMark) -> None:
        """Cells, ledger and archive as they were at a mark; the cells are uncertain if that fails."""
        assert self.compressor.recaller is not None
        self.doubt()
        self.compressor.drop_choice()
        self.context.clear()
        self.compressor.recaller.go_back(self.ledger, mark)
        self._beside.set(mark.beside)
        self.compressor.looked.truncate(self.ledger)
        self.compressor.chosen_at, self.pace = 0, mark.pace
        self.ledger.certain = self._agrees()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is compressed inside, and on exit cells and ledger are as they were. Can be nested.

        What is read inside must fit into the free and the spare cells. Where there is an archive cells may be exchanged, but their number stays.
        """
        self.check_certain()
        ledger, compressor, way_back = self.ledger, self.compressor, self._way_back
        outer, checkpoint, copy = compressor.held, way_back.checkpoint, way_back.copy
        if not outer:
            compressor.make_room(ledger, min(self.n_free, compressor.n_ctx_train // 2))
            compressor.sources.before_removal(ledger)
        restore = self._before_exchange()
        # what is copied inside is not to overwrite the copy there is
        n_tokens, way_back.checkpoint, way_back.copy = ledger.n_tokens, None, copy[:0]
        compressor.held = True
        segments, begun, choices, pace = ledger.segments_now(), self._begun, compressor.choices, self.pace
        n_marks = len(self.archive.marks) if self.archive else 0
        try:
            with self.taken_back():
                yield
        finally:
            compressor.held = outer
            way_back.checkpoint, way_back.copy = checkpoint, copy
            if self._begun == begun:
                if compressor.choices > choices:
                    restore()
                if self.archive:
                    self.archive.keep_marks(n_marks)
                self.pace = pace
            if not self.uncertain:
                self._truncate(n_tokens)
                self.ledger.segments[:] = segments

    def _before_exchange(self) -> Callable[[], None]:
        """Keeps what the cells are; what is returned brings that back."""
        mark = self._now()
        if mark is None:
            return self.doubt
        if not self.layout.is_swa:
            return lambda: self._fill_again(mark) if self.archive else self.doubt()
        state, ledger = self.context.state_get(), self.ledger.copy()

        def restore() -> None:
            self.ledger = ledger
            self._restore(state, mark.n_tokens, mark.beside)

        return restore

    def _truncate(self, n_tokens: int) -> None:
        self.compressor.drop_choice()
        super()._truncate(n_tokens)
        self.compressor.chosen_at = 0
        self.compressor.looked.truncate(self.ledger)
        if self.compressor.recaller:
            self.compressor.recaller.archive.truncate(n_tokens)

    # a copy that outlives the process

    def snapshot(self) -> Arrays:
        """As NotedCells.snapshot; with an archive its `parts` belong to it, and the cells are in these, unless there is a sliding window.

        archive.positions: int32 [n_tokens]; archive.marks: int64 [4 + n_pace, n_marks]; archive.pace: int64 [n_pace]
        """
        self.check_certain()
        self.compressor.write_through(self.ledger)
        arrays, archive = super().snapshot(), self.archive
        if archive is None:
            return arrays
        marks = [(mark.n_tokens, mark.n_cells, mark.next_position, mark.n_beside, *mark.pace) for mark in archive.marks]
        return arrays | {
            "archive.positions": archive.positions,
            "archive.marks": np.array(marks, np.int64).reshape(-1, 4 + len(self.pace)).T,
            "archive.pace": np.array(self.pace, np.int64),
        }

    def snapshot_limits(self, n_text: int) -> Limits:
        """As NotedCells.snapshot_limits."""
        limits = super().snapshot_limits(n_text)
        if self.archive:
            n_pace = len(self.pace)
            limits |= {"archive.positions": ("<i4", (n_text,)), "archive.marks": ("<i8", (4 + n_pace, n_text)), "archive.pace": ("<i8", (n_pace,))}
        return limits

    def resume(self, arrays: Mapping[str, npt.NDArray[Any]], parts: Sequence[npt.NDArray[np.uint8]] = (), copy: bool = True) -> None:
        """As NotedCells.resume; if the archive had been given up, so it is here.

        parts: the data of the `parts` that the archive had, if there was one
        copy: take memory for them, and do not use them where they are
        """
        self.doubt()
        self.compressor.drop_choice()
        if self.archive and "archive.positions" in arrays:
            marks = [ArchivedMark(n, cells, end, tuple(pace), beside) for n, cells, end, beside, *pace in arrays["archive.marks"].T.tolist()]
            self.archive.restore(arrays["archive.positions"], marks, parts, copy)
            self.pace = tuple(arrays["archive.pace"].tolist())
        elif self.archive:
            self.compressor.give_up_archive("it had been given up before")
        super().resume(arrays)

    def _cells(self) -> Arrays:
        return {} if self._way_back_archive else super()._cells()

    def _fill(self, ledger: Ledger, cache: npt.NDArray[np.uint8] | None, beside: npt.NDArray[np.uint8] | None) -> None:
        if cache is not None or self.compressor.recaller is None or self.layout.is_swa:
            super()._fill(ledger, cache, beside)
            return
        self.context.clear()
        self.compressor.recaller.fill(ledger)
        self._beside.set(beside)
