"""The file beside a transcript that holds the archive of its conversation: what a snapshot names in it is never written over.

New parts go to where nothing is that the last snapshot, or the archive in use, needs. So the snapshot on the disk can be gone on with at any moment,
however the process ends. Each part is named with its XXH3 hash of 128 bits, by which damage is seen: against an attacker it does not help, who could
change the snapshot as well, but it is several times as fast as SHA-256, and the parts of a long conversation are gigabytes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kvlocal.cache.archive import ArchivePart
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import PRIVATE, cannot_write

_ALIGNMENT = mmap.ALLOCATIONGRANULARITY
N_DIGEST = xxhash.xxh3_128().digest_size


class Extent(NamedTuple):
    """Where in the file a part is.

    start, size: in bytes
    digest: its XXH3 hash, 16 bytes
    """

    start: int
    size: int
    digest: bytes


def archive_path(snapshot: Path) -> Path:
    """Where the archive of a conversation is, beside its snapshot."""
    return snapshot.with_suffix(".archive")


class ArchiveFile:
    """Writes parts of an archive, and gives them back.

    path: of the file; whoever uses it has the transcript locked
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._named: list[Extent] = []  # by the snapshot on the disk
        self._written: dict[int, Extent] = {}  # by the keys of parts
        self._mapped: set[int] = set()  # of these, what the archive has in the file and nowhere else
        self._inode: tuple[int, int] | None = None

    def write(self, parts: Sequence[ArchivePart], stop: Callable[[], bool] = lambda: False) -> list[Extent] | None:
        """Writes those of these parts that are not there yet, which are all of an archive, and returns where each is.

        stop: asked before each; True gives it up, and None is returned

        Raises:
            KvlocalError: it cannot be written.
        """
        keys = {part.key for part in parts}
        self._written = {key: extent for key, extent in self._written.items() if key in keys}
        if parts:
            try:
                with open(os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE), "r+b", buffering=0) as file:
                    self._know(file.fileno())
                    if not (self._named or self._written):
                        # of an archive that is no more
                        file.truncate(0)
                    for part in parts:
                        if part.key not in self._written:
                            if stop():
                                return None
                            self._written[part.key] = _write(file.fileno(), self._free(len(part.data)), part.data)
            except OSError as error:
                self._drop_new()
                raise KvlocalError(cannot_write(self.path, error)) from error
        return [self._written[part.key] for part in parts]

    def _drop_new(self) -> None:
        """What no snapshot names takes no room from the words of the conversation."""
        self._written = {key: extent for key, extent in self._written.items() if extent in self._named or key in self._mapped}
        end = max((extent.start + extent.size for extent in (*self._named, *self._written.values())), default=0)
        with suppress(OSError):
            if end:
                os.truncate(self.path, end)
            else:
                self.path.unlink(missing_ok=True)

    def _know(self, file: int) -> None:
        """Nothing is in a file that is another than before."""
        status = os.fstat(file)
        if self._inode not in (None, (status.st_dev, status.st_ino)):
            self._named, self._written = [], {}
            self._mapped.clear()
        self._inode = status.st_dev, status.st_ino

    def _free(self, size: int) -> int:
        """Where so many bytes have room."""
        start = 0
        for extent in sorted({*self._named, *self._written.values()}):
            if start + size <= extent.start:
                break
            start = max(start, -(-(extent.start + extent.size) // _ALIGNMENT) * _ALIGNMENT)
        return start

    def keep(self, extents: Sequence[Extent]) -> None:
        """The snapshot on the disk names these from now on, and no others. Without any the file goes."""
        self._named = list(extents)
        if not extents:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def mapped(self, parts: Sequence[ArchivePart]) -> dict[int, npt.NDArray[np.uint8]]:
        """The data of these parts, which were written, as they are in the file, by their keys; they cannot be written to. Those that it gave before
        are left out.

        Raises:
            KvlocalError: it cannot be read.
        """
        try:
            whole = self._map()
        except (OSError, ValueError) as error:
            raise KvlocalError(f"cannot read {self.path} ({error})") from error
        new = [part.key for part in parts if part.key not in self._mapped]
        if not self._written.keys() >= {*new}:
            raise KvlocalError(f"{self.path} is another file now")
        self._mapped = {part.key for part in parts}
        return {key: _within(whole, self._written[key]) for key in new}

    def read(self, extents: Sequence[Extent]) -> list[npt.NDArray[np.uint8]]:
        """What is there, checked; uint8 [size] each, which cannot be written to.

        Raises:
            KvlocalError: it is not what it was.
            OSError: it cannot be read.
        """
        if not extents:
            return []
        try:
            whole = self._map()
        except (FileNotFoundError, ValueError):
            raise KvlocalError("the archive is gone") from None
        if any(not 0 <= extent.start <= extent.start + extent.size <= len(whole) for extent in extents):
            raise KvlocalError("the archive is incomplete")
        found = [_within(whole, extent) for extent in extents]
        with ThreadPoolExecutor() as threads:
            if list(threads.map(_digest, found)) != [extent.digest for extent in extents]:
                raise KvlocalError("the archive is damaged")
        return found

    def take_up(self, parts: Sequence[ArchivePart], extents: Sequence[Extent]) -> None:
        """These parts are what `read` gave for these extents, or copies of it, and the snapshot on the disk names them."""
        self._named = list(extents)
        self._mapped = {part.key for part in parts if not part.data.flags.writeable}
        self._written = {part.key: extent for part, extent in zip(parts, extents, strict=True)}

    def _map(self) -> npt.NDArray[np.uint8]:
        with open(self.path, "rb") as file:
            self._know(file.fileno())
            # it is unmapped when its last array has gone
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _within(whole: npt.NDArray[np.uint8], extent: Extent) -> npt.NDArray[np.uint8]:
    return whole[extent.start : extent.start + extent.size]


def _write(file: int, start: int, data: npt.NDArray[np.uint8]) -> Extent:
    rest, at = data.data, start
    while rest:
        n = os.pwrite(file, rest, at)
        rest, at = rest[n:], at + n
    return Extent(start, len(data), _digest(data))


def _digest(data: npt.NDArray[np.uint8]) -> bytes:
    return xxhash.xxh3_128(data.data).digest()
