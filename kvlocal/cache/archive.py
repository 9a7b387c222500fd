"""The archive: keys and values of every token of a conversation, in memory of the host and then in a file, by the token's number."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from kvlocal.cache.marks import ArchivedMark
from kvlocal.errors import KvlocalError
from kvlocal.llama.cells import Layout, Rows

Store = Literal["off", "ram", "disk"]
STORES: tuple[Store, ...] = get_args(Store)

CHUNK = 256  # tokens that memory is taken for at once
_MARK_UNIT = 2**16  # marks take whole multiples of so many bytes, so that one finds room where another was


class ArchiveFailed(KvlocalError):
    """The archive can take no more; what was in it is given up."""


@dataclass(frozen=True)
class _Chunk:
    """CHUNK tokens: uint8 [L, H, CHUNK, row size] each, zero where nothing is stored yet."""

    k: npt.NDArray[np.uint8]
    v: npt.NDArray[np.uint8]


class Archive:
    """Rows of the cache by token number, bit for bit as they were stored; never copied as it grows.

    The file has no name, so that nobody else can read it and nothing stays behind, however the process ends. Its blocks are taken before they are
    used: a full disk is an error, not a signal.

    layout: of the cache that the rows come from
    ram: how many bytes of memory it may take
    directory: where the file is that takes what is beyond; None for no file

    n_tokens: tokens 0 .. n_tokens - 1 are here
    positions: int32 [n_tokens], the RoPE position to which each key is rotated
    marks: lengths that the cells can be filled for again, ascending, each at most n_tokens
    """

    def __init__(self, layout: Layout, ram: int, directory: Path | None) -> None:
        self._layout, self._ram, self._directory = layout, ram, directory
        self._shapes = [(layout.n_layer, layout.n_head_kv, CHUNK, size) for size in (layout.row_size_k, layout.row_size_v)]
        self._chunks: list[_Chunk] = []
        self._file: int | None = None
        self._end = 0  # of the file
        self._memory_of_marks: list[npt.NDArray[np.uint8]] = []
        self._spare: list[npt.NDArray[np.uint8]] = []  # of marks that are gone
        self._positions = np.zeros(0, np.int32)
        self.n_tokens = self.bytes_in_memory = self.bytes_on_disk = 0
        self.marks: list[ArchivedMark] = []

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        return self._positions[: self.n_tokens]

    @property
    def chunk_bytes(self) -> int:
        """What CHUNK tokens take."""
        return sum(int(np.prod(shape)) for shape in self._shapes)

    def append(self, rows: Rows, positions: npt.NDArray[np.int32]) -> None:
        """Stores the next tokens, with the positions of their keys, int32 [n].

        Raises:
            ArchiveFailed: there is no room for them, in memory or on the disk.
        """
        end = self.n_tokens + rows.n
        while len(self._chunks) * CHUNK < end:
            self._chunks.append(self._grow())
        if end > len(self._positions):
            self._positions = np.concatenate([self._positions, np.zeros(len(self._chunks) * CHUNK, np.int32)])
        self._positions[self.n_tokens : end] = positions
        done = 0
        while self.n_tokens < end:
            chunk, at = divmod(self.n_tokens, CHUNK)
            n = min(CHUNK - at, end - self.n_tokens)
            for stored, given in ((self._chunks[chunk].k, rows.k), (self._chunks[chunk].v, rows.v)):
                stored[:, :, at : at + n] = given[:, :, done : done + n]
            done += n
            self.n_tokens += n

    def truncate(self, n_tokens: int) -> None:
        """Forgets the tokens from n_tokens on, and the marks behind it; their memory stays, for those that come next."""
        self.n_tokens = min(self.n_tokens, n_tokens)
        self.keep_marks(sum(mark.n_tokens <= n_tokens for mark in self.marks))

    def add_mark(self, mark: ArchivedMark) -> None:
        """The cells can be filled again as they are at the end of what is stored.

        Raises:
            ArchiveFailed: there is no room for what that takes.
        """
        n_units = -(-len(mark.data) // _MARK_UNIT)
        spare = next((i for i, memory in enumerate(self._spare) if len(memory) == n_units * _MARK_UNIT), None)
        memory = self._take(n_units * _MARK_UNIT) if spare is None else self._spare.pop(spare)
        data = memory[: len(mark.data)]
        data[:] = mark.data
        self.marks.append(replace(mark, data=data))
        self._memory_of_marks.append(memory)

    def keep_marks(self, n: int) -> None:
        """Forgets all marks but the first n."""
        self._spare += self._memory_of_marks[n:]
        del self.marks[n:], self._memory_of_marks[n:]

    def rows(self, tokens: npt.NDArray[np.intp]) -> Rows:
        """The rows of token tokens[l, h, j] of each layer and head, int [L, H, n]."""
        n_layer, n_head, n = tokens.shape
        out = Rows(*(np.empty((n_layer * n_head * n, shape[-1]), np.uint8) for shape in self._shapes))
        chunk, at = np.divmod(tokens.ravel(), CHUNK)
        head = np.repeat(np.arange(n_layer * n_head), n)
        order = np.argsort(chunk, kind="stable")
        bounds = np.searchsorted(chunk[order], np.arange(len(self._chunks) + 1))
        for stored, start, stop in zip(self._chunks, bounds[:-1], bounds[1:], strict=True):
            if start < stop:
                which = order[start:stop]
                for target, source in ((out.k, stored.k), (out.v, stored.v)):
                    target[which] = source.reshape(-1, *source.shape[2:])[head[which], at[which]]
        return Rows(*(array.reshape(n_layer, n_head, n, array.shape[-1]) for array in (out.k, out.v)))

    def key_chunks(self) -> list[npt.NDArray[np.uint8]]:
        """The keys, [L, H, CHUNK, row size] for every CHUNK tokens."""
        return [chunk.k for chunk in self._chunks[: -(-self.n_tokens // CHUNK)]]

    def _grow(self) -> _Chunk:
        memory, n_k = self._take(self.chunk_bytes), int(np.prod(self._shapes[0]))
        return _Chunk(memory[:n_k].reshape(self._shapes[0]), memory[n_k:].reshape(self._shapes[1]))

    def _take(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Memory with zeros, or a part of the file where there is to be no more memory; ArchiveFailed without room."""
        if self.bytes_in_memory + n_bytes <= self._ram:
            try:
                memory = np.zeros(n_bytes, np.uint8)
            except MemoryError:
                raise ArchiveFailed("there is not enough memory for the archive") from None
            self.bytes_in_memory += n_bytes
            return memory
        if self._directory is None:
            raise ArchiveFailed(f"the archive has filled the {self._ram / 1e6:,.0f} MB of memory that it may take")
        try:
            return self._take_on_disk(n_bytes)
        except (OSError, ValueError) as error:
            raise ArchiveFailed(f"the archive cannot be written in {self._directory} ({error})") from error

    def _take_on_disk(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        if self._file is None:
            with tempfile.TemporaryFile(dir=self._directory, prefix="kvlocal-archive-") as file:
                self._file = os.dup(file.fileno())
        # a mapping begins at a multiple of the granularity
        stride = -(-n_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file, self._end, stride)
        else:
            _fill(self._file, self._end, stride)
        # it is unmapped when its last array has gone
        mapped = mmap.mmap(self._file, stride, offset=self._end)
        self._end += stride
        self.bytes_on_disk += n_bytes
        return np.frombuffer(mapped, np.uint8, n_bytes)

    def close(self) -> None:
        """Gives everything up. Closing twice is harmless."""
        self.n_tokens = 0
        self._chunks.clear()
        self.marks.clear()
        self._memory_of_marks.clear()
        self._spare.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _fill(file: int, start: int, n_bytes: int) -> None:
    """Takes blocks of the disk where the system has no call for it."""
    block = bytes(2**20)
    while n_bytes:
        n = os.pwrite(file, block[:n_bytes], start)
        start, n_bytes = start + n, n_bytes - n
