"""Writes files so that a reader, or a crash, never sees half of one."""

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from kvlocal.errors import KvlocalError


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text as UTF-8), or leave it exactly as it was.

    The directory must exist. A symbolic link is followed, and a file that is replaced keeps its mode.

    Raises:
        KvlocalError: the file cannot be written (no such directory, no permission, disk full).
    """
    target = Path(os.path.realpath(path))
    staged = target.with_name(f".{secrets.token_hex(8)}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        try:
            with open(staged, "xb") as file:
                file.write(content)
            if target.exists():
                staged.chmod(target.stat().st_mode & 0o7777)
            publish(staged, target)
        finally:
            # Once renamed, nothing is left under the temporary name.
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise KvlocalError(f"cannot write {path}: {error.strerror or error}") from error


def replace_at_leisure(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Replace the file at `path`, which only its owner may read, by these chunks one after another, or leave it exactly as it was.

    It does not wait for the disk: after a power failure the file may hold anything, and who reads it has to check. What a killed process leaves
    behind has `staging_of(path)` for its name and goes the next time; the caller sees to it that no two write at once.

    Raises:
        KvlocalError: the file cannot be written.
    """
    staged = staging_of(path)
    try:
        try:
            staged.unlink(missing_ok=True)
            with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
                for chunk in chunks:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[file.write(rest) :]
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise KvlocalError(f"cannot write {path}: {error.strerror or error}") from error


def staging_of(path: Path) -> Path:
    """Where `replace_at_leisure` keeps what is not whole yet."""
    return path.with_name(f".{path.name}.tmp")


class LineFile:
    """A file of JSON objects, one a line, that grows: every line is on the disk before the next one begins; a context manager.

    The file is made if it is not there. One that ends with half a line has to be mended before it grows. Only one process at a time has it.

    path: where it is
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._n_bytes = 0  # of the lines that were read

    def __enter__(self) -> Self:
        """Raises KvlocalError if the file cannot be read and written, or another process has it."""
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise KvlocalError(f"cannot keep results in {self.path} ({error.strerror}): name another file") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise KvlocalError(f"another run keeps its results in {self.path}: wait for its end or name another file") from None
        except OSError:
            # a file system without locks
            pass
        return self

    @property
    def lines(self) -> Iterator[bytes]:
        """The whole lines, with their ends, one after another."""
        self._n_bytes = 0
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    self._n_bytes += len(line)
                    yield line

    def mend(self) -> None:
        """Drops what was not read from `lines`: a last line that was cut off, or all if nothing was read."""
        os.ftruncate(self._handle, self._n_bytes)

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
                with LineFile(staged) as fresh:
                    with open(fresh._handle, "ab", closefd=False) as file:
                        file.writelines(line for line in self.lines if not unwanted(line))
                    os.fchmod(fresh._handle, os.fstat(self._handle).st_mode & 0o7777)
                    publish(staged, target)
                    self._handle, fresh._handle = fresh._handle, self._handle
            finally:
                staged.unlink(missing_ok=True)
        except OSError as error:
            raise KvlocalError(f"cannot write {self.path} ({error.strerror}): make room and run the same command again") from error

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
                raise OSError(None, "the disk is full")
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, before)
            raise KvlocalError(f"cannot write {self.path} ({error.strerror}): make room and run the same command again") from error

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def publish(staged: Path, target: Path) -> None:
    """Give the finished file `staged` its final name, durably; both must be on the same file system.

    Raises:
        OSError: as `os.fsync` and `os.replace` do.
    """
    _fsync(staged)
    os.replace(staged, target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
