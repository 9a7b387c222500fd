"""Memory for an archive: up to a limit of the host, and then in a file without a name."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvlocal.errors import KvlocalError


class ArchiveFailed(KvlocalError):
    """The archive can take no more; what was in it is given up."""


class Block(NamedTuple):
    """Some bytes, uint8 [n], and whether they are on the disk."""

    data: npt.NDArray[np.uint8]
    on_disk: bool


class ArchiveMemory:
    """Gives blocks and takes them back.

    The file has no name, so that nobody else can read it and nothing stays behind, however the process ends. Its blocks are taken before they are
    used: a full disk is an error, not a signal.

    ram: how many bytes of memory there may be
    directory: where the file is that takes what is beyond; None for no file

    bytes_in_memory, bytes_on_disk: what is given
    """

    def __init__(self, ram: int, directory: Path | None) -> None:
        self._ram, self._directory = ram, directory
        self._file: int | None = None
        self._end = 0  # of the file
        self._spare: list[Block] = []  # parts of it that were given back
        self.bytes_in_memory = self.bytes_on_disk = 0

    def take(self, n_bytes: int) -> Block:
        """A block of so many bytes.

        Raises:
            ArchiveFailed: there is no room for it, in memory or on the disk.
        """
        if self.bytes_in_memory + n_bytes <= self._ram:
            try:
                block = Block(np.zeros(n_bytes, np.uint8), False)
            except MemoryError:
                raise ArchiveFailed("there is not enough memory for the archive") from None
            self.bytes_in_memory += n_bytes
            return block
        if self._directory is None:
            raise ArchiveFailed(f"the archive has filled the {self._ram / 1e6:,.0f} MB of memory that it may take")
        spare = next((i for i, block in enumerate(self._spare) if len(block.data) == n_bytes), None)
        if spare is not None:
            return self._spare.pop(spare)
        try:
            return self._grow(n_bytes)
        except (OSError, ValueError) as error:
            raise ArchiveFailed(f"the archive cannot be written in {self._directory} ({error})") from error

    def give_back(self, block: Block, reusable: bool = True) -> None:
        """This block is not used here any more, and if it is reusable by nobody."""
        if block.on_disk and reusable:
            self._spare.append(block)
        elif block.on_disk:
            self.bytes_on_disk -= len(block.data)
        else:
            self.bytes_in_memory -= len(block.data)

    def _grow(self, n_bytes: int) -> Block:
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
        return Block(np.frombuffer(mapped, np.uint8, n_bytes), True)

    def close(self) -> None:
        """Gives the file up. Closing twice is harmless."""
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
