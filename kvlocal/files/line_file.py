"""Files of JSON objects, one a line, that grow, and that are ours to the last byte before they do."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import cannot_write, publish, remedy, staging_of
from kvlocal.files.lock import Busy, NoLocks, open_locked
from kvlocal.files.text import BYTE_ORDER_MARK

_HEAD = 256  # bytes that tell whether a file is ours


class LineFile:
    """A file of JSON objects, one a line, that grows: every line is on the disk before the next one begins; a context manager.

    The file is made if it is not there. What it holds is read on entering the block, and has to be ours to the last byte: a last line that was cut
    off is dropped then, or ended if it lacks nothing but its end. Only one process at a time has the file.

    path: where it is
    start: how every line begins, up to white space
    take: gets each whole line that is there, with its end, one after another; it raises ValueError, KeyError, TypeError or OverflowError for one
        that is not ours
    other: the sentence for a file that holds something else; it is left as it is
    replace: drop all there is instead, whoever wrote it
    """

    def __init__(self, path: Path, start: bytes, take: Callable[[bytes], None], other: str, *, replace: bool = False) -> None:
        self.path = path
        self._start, self._take, self._other, self._replace = start, take, other, replace
        # of the whole lines, and whether the last one has its end
        self._size, self._ended = 0, True

    def __enter__(self) -> Self:
        """Raises KvlocalError if the file cannot be read and written, another process has it, or it holds something else."""
        try:
            self._handle = open_locked(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except Busy:
            raise KvlocalError(f"another run keeps its results in {self.path}: wait for its end or name another file") from None
        except NoLocks as error:
            raise KvlocalError(f"{self.path} cannot be kept to one run ({error.strerror}): name a file on another disk") from error
        except OSError as error:
            raise KvlocalError(f"cannot keep results in {self.path} ({error.strerror}): {remedy(error)}, or name another file") from error
        try:
            self._take_over()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _take_over(self) -> None:
        if self._replace:
            os.ftruncate(self._handle, 0)
        try:
            for line in self._read():
                self._take(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise KvlocalError(self._other) from None
        try:
            os.ftruncate(self._handle, self._size)
            if not self._ended:
                os.write(self._handle, b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def _read(self) -> Iterator[bytes]:
        """The whole lines, with their ends, one after another; a last one that lacks nothing but its end counts as whole.

        Raises:
            ValueError: the file begins with something else, or ends with it.
        """
        self._size, self._ended = 0, True
        with self.path.open("rb") as file:
            head = file.read(_HEAD)
            if head and not self._begins(head, first=True):
                # not read to the end of its line, which may be far
                raise ValueError("it begins with something else")
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    if self._is_torn(line):
                        break
                    line, self._ended = line + b"\n", False
                self._size += len(line) - (not self._ended)
                yield line

    def _begins(self, line: bytes, *, first: bool) -> bool:
        """Whether a line that may be cut off begins as ours do; less than that says nothing about the whole file."""
        start, found = (b"".join(part.split()) for part in (self._start, line[:_HEAD].removeprefix(BYTE_ORDER_MARK)))
        return found.startswith(start) or (not first and start.startswith(found))

    def _is_torn(self, line: bytes) -> bool:
        """Whether a line without an end is the first part of one of ours.

        Raises:
            ValueError: it is something else.
        """
        if self._size and not line.strip(b"\0"):
            # what a power failure can leave where a line was to be written
            return True
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            if self._begins(line, first=not self._size):
                return True
            raise ValueError("it ends with something else") from None
        return False

    def drop(self, unwanted: Callable[[bytes], bool]) -> None:
        """Takes whole lines out, with their ends, all at once: a crash leaves the file with each of them or with none. Half a last line goes too.

        Raises:
            KvlocalError: it cannot be written; the file is then as it was.
        """
        target = Path(os.path.realpath(self.path))
        staged = staging_of(target)
        try:
            try:
                staged.unlink(missing_ok=True)
                # other processes wait for this one, which keeps it
                with LineFile(staged, self._start, lambda _: None, "") as fresh:
                    with open(fresh._handle, "ab", closefd=False) as file:
                        file.writelines(line for line in self._read() if not unwanted(line))
                    os.fchmod(fresh._handle, os.fstat(self._handle).st_mode & 0o7777)
                    publish(staged, target)
                    self._handle, fresh._handle = fresh._handle, self._handle
            finally:
                staged.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> KvlocalError:
        return KvlocalError(f"{cannot_write(self.path, error)} and run the same command again")

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line.

        Raises:
            KvlocalError: it cannot be written; the file then ends where it did before.
        """
        self.append_line((json.dumps(record) + "\n").encode())

    def append_line(self, line: bytes) -> None:
        """Adds one line that is written out already, as `append` does."""
        before = os.fstat(self._handle).st_size
        try:
            if os.write(self._handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, before)
            raise self._failed(error) from error

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)
