"""The archive: keys and values of every token of a conversation, in memory of the host and then in a file, by the token's number."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from kvlocal.cache.archive_memory import ArchiveFailed, ArchiveMemory, Block
from kvlocal.cache.marks import ArchivedMark
from kvlocal.llama.layout import Layout
from kvlocal.llama.rows import Rows, RowTypes

__all__ = ["CHUNK", "STORES", "Archive", "ArchiveFailed", "ArchivePart", "Store"]

Store = Literal["off", "ram", "disk"]
STORES: tuple[Store, ...] = get_args(Store)

CHUNK = 256  # tokens that memory is taken for at once
_MARK_UNIT = 2**16  # marks take whole multiples of so many bytes, so that one finds room where another was


_keys = count()


class ArchivePart(NamedTuple):
    """Something in the archive, to be written to a file.

    key: of this content, in all archives of a process; what changes gets another one
    data: uint8 [bytes]
    """

    key: int
    data: npt.NDArray[np.uint8]


@dataclass
class _Chunk:
    """CHUNK tokens, zero where nothing is stored yet.

    k, v: uint8 [L, H, CHUNK, row size] each, which are the data
    block: that has them; None if they are somebody else's and may not be written to
    shared: they are somebody else's, too, and may not be written to either
    """

    key: int
    data: npt.NDArray[np.uint8]
    k: npt.NDArray[np.uint8]
    v: npt.NDArray[np.uint8]
    block: Block | None
    shared: bool = False


@dataclass
class _StoredMark:
    key: int
    mark: ArchivedMark
    block: Block | None
    shared: bool = False

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        return self.mark.data


class Archive:
    """Rows of the cache by token number, bit for bit as they were stored; never copied as it grows.

    layout: of the cache that the rows come from
    ram: how many bytes of memory it may take
    directory: where the file is that takes what is beyond; None for no file
    types: what the rows are stored in, None for what the cache has

    n_tokens: tokens 0 .. n_tokens - 1 are here
    positions: int32 [n_tokens], the RoPE position to which each key is rotated
    """

    def __init__(self, layout: Layout, ram: int, directory: Path | None, types: RowTypes | None = None) -> None:
        self._memory, self.types = ArchiveMemory(ram, directory), types or layout.row_types
        self._shapes = [(layout.n_layer, layout.n_head_kv, CHUNK, size) for size in (self.types.size_k, self.types.size_v)]
        self._chunks: list[_Chunk] = []
        self._marks: list[_StoredMark] = []
        self._positions = np.zeros(0, np.int32)
        self.n_tokens = 0

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        return self._positions[: self.n_tokens]

    @property
    def marks(self) -> list[ArchivedMark]:
        """Lengths that the cells can be filled for again, ascending."""
        return [stored.mark for stored in self._marks]

    @property
    def chunk_bytes(self) -> int:
        """What CHUNK tokens take."""
        return sum(int(np.prod(shape)) for shape in self._shapes)

    @property
    def bytes_in_memory(self) -> int:
        return self._memory.bytes_in_memory

    @property
    def bytes_on_disk(self) -> int:
        # what others have in memory can be written to, though not by us
        of_files = (len(chunk.data) for chunk in self._chunks if not chunk.block and not chunk.data.flags.writeable)
        return self._memory.bytes_on_disk + sum(of_files)

    def append(self, rows: Rows, positions: npt.NDArray[np.int32]) -> None:
        """Stores the next tokens, whose rows are of its types, with the positions of their keys, int32 [n].

        Raises:
            ArchiveFailed: there is no room for them, in memory or on the disk.
        """
        end = self.n_tokens + rows.n
        while len(self._chunks) * CHUNK < end:
            self._chunks.append(self._chunk(self._memory.take(self.chunk_bytes)))
        if end > len(self._positions):
            self._positions = np.concatenate([self._positions, np.zeros(len(self._chunks) * CHUNK, np.int32)])
        self._positions[self.n_tokens : end] = positions
        done = 0
        while self.n_tokens < end:
            number, at = divmod(self.n_tokens, CHUNK)
            chunk, n = self._writable(number), min(CHUNK - at, end - self.n_tokens)
            for stored, given in ((chunk.k, rows.k), (chunk.v, rows.v)):
                stored[:, :, at : at + n] = given[:, :, done : done + n]
            done += n
            self.n_tokens += n

    def _chunk(self, block: Block) -> _Chunk:
        k, v = self._rows_of(block.data)
        return _Chunk(next(_keys), block.data, k, v, block)

    def _rows_of(self, data: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        n_k = int(np.prod(self._shapes[0]))
        return data[:n_k].reshape(self._shapes[0]), data[n_k:].reshape(self._shapes[1])

    def _writable(self, number: int) -> _Chunk:
        """A chunk that is about to change, or a copy of it in its place if it is somebody else's."""
        chunk = self._chunks[number]
        if chunk.block and not chunk.shared:
            chunk.key = next(_keys)
            return chunk
        copy = self._chunks[number] = self._chunk(self._memory.take(self.chunk_bytes))
        copy.data[:] = chunk.data
        self._let_go(chunk)
        return copy

    def truncate(self, n_tokens: int) -> None:
        """Forgets the tokens from n_tokens on, and the marks behind it; their memory stays, for those that come next."""
        self.n_tokens = min(self.n_tokens, n_tokens)
        self.keep_marks(sum(stored.mark.n_tokens <= n_tokens for stored in self._marks))

    def chunks(self) -> list[Rows]:
        """All rows, CHUNK tokens each; zero where nothing is stored yet."""
        return [Rows(chunk.k, chunk.v, self.types) for chunk in self._chunks[: -(-self.n_tokens // CHUNK)]]

    def key_chunks(self) -> list[npt.NDArray[np.uint8]]:
        """The keys, [L, H, CHUNK, row size] for every CHUNK tokens."""
        return [chunk.k for chunk in self._chunks[: -(-self.n_tokens // CHUNK)]]

    def beside(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory for what is derived from the rows, which counts as theirs until `close`.

        Raises:
            ArchiveFailed: there is no room for it.
        """
        return self._memory.take(n_bytes).data

    # marks

    def add_mark(self, mark: ArchivedMark) -> None:
        """The cells can be filled again as they are at the end of what is stored. It takes the place of a mark that was there already.

        Raises:
            ArchiveFailed: there is no room for what that takes.
        """
        self.keep_marks(sum(stored.mark.n_tokens < mark.n_tokens for stored in self._marks))
        block = self._memory.take(-(-len(mark.data) // _MARK_UNIT) * _MARK_UNIT)
        data = block.data[: len(mark.data)]
        data[:] = mark.data
        self._marks.append(_StoredMark(next(_keys), replace(mark, data=data), block))

    def keep_marks(self, n: int) -> None:
        """Forgets all marks but the first n."""
        for stored in self._marks[n:]:
            self._let_go(stored)
        del self._marks[n:]

    def thin_marks(self, n_bytes: int) -> None:
        """Forgets marks until the others take no more than so many bytes, but never the last.

        The farther back, the larger the gaps that are left: what has to be read again to come back to where no mark is any more is a share of what
        would be taken back.
        """
        while len(self._marks) > 1 and sum(len(stored.data) for stored in self._marks) > n_bytes:
            n = [0, *(stored.mark.n_tokens for stored in self._marks)]
            costs = [(n[i + 1] - n[i - 1]) / (1 + n[-1] - n[i]) for i in range(1, len(n) - 1)]
            self._let_go(self._marks.pop(costs.index(min(costs))))

    # a copy that outlives the process

    def parts(self) -> list[ArchivePart]:
        """All that is stored, besides positions and what a mark says of itself: first the chunks, then the data of the marks."""
        chunks = self._chunks[: -(-self.n_tokens // CHUNK)]
        return [*(ArchivePart(chunk.key, chunk.data) for chunk in chunks), *(ArchivePart(stored.key, stored.mark.data) for stored in self._marks)]

    def share(self) -> list[ArchivePart]:
        """As `parts`, for somebody who keeps them: they stay as they are, whatever comes here."""
        for stored in self._stored():
            stored.shared = True
        return self.parts()

    def known_as(self, parts: Sequence[ArchivePart]) -> None:
        """These are the parts that it was restored from: what has not changed since keeps its key."""
        for stored, part in zip(self._stored(), parts, strict=True):
            stored.key = part.key

    def _stored(self) -> list[_Chunk | _StoredMark]:
        return [*self._chunks, *self._marks]

    def exchange(self, data: Mapping[int, npt.NDArray[np.uint8]]) -> None:
        """Uses these data, by the keys of the parts that they are copies of, in place of what it has, whose memory becomes free."""
        for chunk in self._chunks:
            if chunk.key in data:
                self._let_go(chunk)
                chunk.data, chunk.block, chunk.shared = data[chunk.key], None, False
                chunk.k, chunk.v = self._rows_of(chunk.data)
        for stored in self._marks:
            if stored.key in data:
                self._let_go(stored)
                stored.mark, stored.block, stored.shared = replace(stored.mark, data=data[stored.key]), None, False

    def restore(self, positions: npt.NDArray[np.int32], marks: Sequence[ArchivedMark], data: Sequence[npt.NDArray[np.uint8]], copy: bool) -> None:
        """An empty archive takes over what another one held.

        positions, marks: of the other; the marks without their data
        data: of its `parts`, in order
        copy: take memory for all of it, and do not use it where it is

        Raises:
            ArchiveFailed: there is no room for the copy.
            ValueError: they do not go together, and cannot have come from an archive.
        """
        n_chunks, lengths = -(-len(positions) // CHUNK), [mark.n_tokens for mark in marks]
        of_chunks, of_marks = data[:n_chunks], data[n_chunks:]
        if len(of_marks) != len(marks) or any(len(array) != self.chunk_bytes for array in of_chunks):
            raise ValueError("these are not all parts of an archive")
        fits = all(0 <= mark.n_cells <= mark.n_tokens and 0 <= mark.n_beside <= len(array) for mark, array in zip(marks, of_marks, strict=True))
        if not fits or lengths != sorted({*lengths}) or not all(0 <= n <= len(positions) for n in lengths):
            raise ValueError("the marks contradict each other")
        self._positions, self.n_tokens = positions.copy(), len(positions)
        for array in of_chunks:
            block = self._copy(array) if copy else None
            array = block.data if block else array
            k, v = self._rows_of(array)
            self._chunks.append(_Chunk(next(_keys), array, k, v, block))
        for mark, array in zip(marks, of_marks, strict=True):
            if copy:
                self.add_mark(replace(mark, data=array))
            else:
                self._marks.append(_StoredMark(next(_keys), replace(mark, data=array), None))

    def _copy(self, data: npt.NDArray[np.uint8]) -> Block:
        block = self._memory.take(len(data))
        block.data[:] = data
        return block

    def check(self) -> None:
        """To read what is missing in a file would end the process.

        Raises:
            ArchiveFailed: somebody has cut a file short that this archive has parts in.
        """
        files = {id(file): file for stored in self._stored() if not stored.block and (file := _file_of(stored.data)) is not None}
        if any(file.size() < len(file) for file in files.values()):
            raise ArchiveFailed("its file was cut short by another program")

    def _let_go(self, stored: _Chunk | _StoredMark) -> None:
        if stored.block:
            self._memory.give_back(stored.block, reusable=not stored.shared)

    def close(self) -> None:
        """Gives everything up. Closing twice is harmless."""
        self.n_tokens = 0
        self._chunks.clear()
        self._marks.clear()
        self._memory.close()


def _file_of(data: npt.NDArray[np.uint8]) -> mmap.mmap | None:
    """The mapped file that an array is in; None for one in memory."""
    base: object = data
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None
