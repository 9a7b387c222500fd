"""ArchivedCells: the cells of one conversation, which an archive brings back as they were at any turn, if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from kvlocal.cache.archive import Archive, ArchiveFailed
from kvlocal.cache.compression import Compressor
from kvlocal.cache.marks import ArchivedMark
from kvlocal.cache.noted_cells import NotedCells
from kvlocal.errors import KvlocalError


class ArchivedCells(NotedCells):
    """NotedCells, and the way back to all marks through an archive; what is exchanged between the two while the cells are held comes back too.

    It is made as NotedCells is; who makes it sets

    compressor: of these cells, with the archive, if there is one
    """

    compressor: Compressor
    _since_choice = 0  # tokens of an answer since the cells were last chosen

    @property
    def _archive(self) -> Archive | None:
        """The archive, if the cells can be filled from it: a sliding window, which it does not have, cannot."""
        return self.compressor.recaller.archive if self.compressor.recaller and not self.layout.is_swa else None

    def mark(self) -> None:
        """As NotedCells.mark, but where there is an archive the conversation can be made as long as it was at any mark."""
        if not (self._undo and self._mark_in_archive()):
            super().mark()

    def _mark_in_archive(self) -> bool:
        mark = self.compressor.mark(self.ledger, self._since_choice) if self._archive else None
        if mark is None or not self._archive:
            return False
        try:
            self._archive.add_mark(mark)
        except ArchiveFailed:
            return False
        return True

    @property
    def marked(self) -> list[int]:
        """The lengths that were marked and can be had again, in tokens, ascending."""
        return [*(mark.n_tokens for mark in (self._archive.marks if self._archive else [])), *super().marked]

    def set_length(self, n_tokens: int) -> bool:
        """As NotedCells.set_length, from the archive if there is one."""
        archive = self._archive
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
        self.context.clear()
        self.compressor.recaller.go_back(self.ledger, mark)
        self.compressor.chosen_at, self._since_choice = 0, mark.since_choice
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
            compressor.observer.before_removal(ledger)
        restore = self._before_exchange()
        # what is copied inside is not to overwrite the copy there is
        n_tokens, way_back.checkpoint, way_back.copy = ledger.n_tokens, None, copy[:0]
        compressor.held = True
        segments, begun, choices = ledger.segments_now(), self._begun, compressor.choices
        n_marks = len(self._archive.marks) if self._archive else 0
        try:
            with self.taken_back():
                yield
        finally:
            compressor.held = outer
            way_back.checkpoint, way_back.copy = checkpoint, copy
            if self._begun == begun:
                if compressor.choices > choices:
                    restore()
                if self._archive:
                    self._archive.keep_marks(n_marks)
            if not self.uncertain:
                self._truncate(n_tokens)
                self.ledger.segments[:] = segments

    def _before_exchange(self) -> Callable[[], None]:
        """Keeps what the cells are; what is returned brings that back."""
        mark = self.compressor.mark(self.ledger, self._since_choice)
        if mark is None:
            return self.doubt
        if not self.layout.is_swa:
            return lambda: self._fill_again(mark) if self._archive else self.doubt()
        state, ledger = self.context.state_get(), self.ledger.copy()

        def restore() -> None:
            self.ledger = ledger
            self._restore(state, mark.n_tokens, mark.ring)

        return restore

    def _truncate(self, n_tokens: int) -> None:
        super()._truncate(n_tokens)
        self.compressor.chosen_at = 0
        if self.compressor.recaller:
            self.compressor.recaller.archive.truncate(n_tokens)
