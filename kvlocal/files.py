"""Writes files so that a reader, or a crash, never sees half of one."""

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from kvlocal.errors import KvlocalError
from kvlocal.lock import Busy, NoLocks, open_locked

PRIVATE = 0o600  # the mode of a file that only its owner may read

_HEAD = 256  # bytes that tell whether a file is ours
_MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put before a text


def text_of(data: bytes, errors: str = "strict") -> str:
    """The text that somebody's file, line or pipe holds in UTF-8, without a byte order mark, and with its lines ended as here.

    Args:
        errors: what to do with bytes that are not UTF-8, as `bytes.decode` takes it.

    Raises:
        UnicodeDecodeError: they are not, and `errors` is "strict".
    """
    return data.removeprefix(_MARK).decode("utf-8", errors).replace("\r\n", "\n")


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing, or nothing but a byte order mark and spaces."""
    return not line.removeprefix(_MARK).strip()


def remedy(error: OSError) -> str:
    """What to do about a failure to write a file, as the end of a sentence."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room"
        case errno.EFBIG:
            return "make room for larger files (`ulimit -f`)"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "choose a place that you can write"
        case errno.ENOENT | errno.ENOTDIR:
            return "make its directory"
        case _:
            return "check the disk"


def cannot_write(path: str | os.PathLike[str], error: OSError) -> str:
    """The sentence for a file that cannot be written."""
    return f"cannot write {path} ({error.strerror or error}): {remedy(error)}"


def atomic_write(path: str | os.PathLike[str], data: bytes | str, mode: int = 0o666) -> None:
    """Replace the file at `path` by `data` (text as UTF-8), or leave it exactly as it was.

    The directory must exist. A symbolic link is followed, and a file that is replaced keeps its mode.

    Args:
        mode: of a new file, less what the umask takes.

    Raises:
        KvlocalError: the file cannot be written (no such directory, no permission, disk full).
    """
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, mode) as staged, open(staged, "wb") as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """While the block lasts, an empty file to write to; at its end it replaces the file at `path`, as `atomic_write` does.

    If the block fails, the file at `path` stays exactly as it was.

    Raises:
        KvlocalError: the file cannot be written; an OSError of the block counts as that.
    """
    target = Path(os.path.realpath(path))
    staged = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            before = target.stat().st_mode & 0o7777 if target.exists() else None
            # nobody may read it who may not read what it replaces
            os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode if before is None else PRIVATE))
            yield staged
            if before is not None:
                staged.chmod(before)
            publish(staged, target)
        finally:
            # Once renamed, nothing is left under the temporary name.
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise KvlocalError(cannot_write(path, error)) from error


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
        raise KvlocalError(cannot_write(path, error)) from error


def staging_of(path: Path) -> Path:
    """Where `replace_at_leisure` keeps what is not whole yet."""
    return path.with_name(f".{path.name}.tmp")


class LineFile:
    """A file of JSON objects, one a line, that grows: every line is on the disk before the next one begins; a context manager.

    The file is made if it is not there. Of what it holds, `read` and `mend` have to make sure before it grows that it is ours, to the last byte.
    Only one process at a time has it.

    path: where it is
    start: how every line begins, up to white space
    """

    def __init__(self, path: Path, start: bytes) -> None:
        self.path = path
        self._start = start
        # of the whole lines, and whether the last one has its end
        self._size, self._ended = 0, True

    def __enter__(self) -> Self:
        """Raises KvlocalError if the file cannot be read and written, or another process has it."""
        try:
            self._handle = open_locked(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except Busy:
            raise KvlocalError(f"another run keeps its results in {self.path}: wait for its end or name another file") from None
        except NoLocks as error:
            raise KvlocalError(f"{self.path} cannot be kept to one run ({error.strerror}): name a file on another disk") from error
        except OSError as error:
            raise KvlocalError(f"cannot keep results in {self.path} ({error.strerror}): {remedy(error)}, or name another file") from error
        return self

    def read(self) -> Iterator[bytes]:
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
        start, found = (b"".join(part.split()) for part in (self._start, line[:_HEAD].removeprefix(_MARK)))
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

    def mend(self) -> None:
        """Drops a last line that was cut off, or ends one. To be called when all lines were read and are ours.

        Raises:
            KvlocalError: it cannot be written.
        """
        try:
            os.ftruncate(self._handle, self._size)
            if not self._ended:
                os.write(self._handle, b"\n")
        except OSError as error:
            raise self._failed(error) from error

    def clear(self) -> None:
        """Drops all there is, whoever wrote it."""
        os.ftruncate(self._handle, 0)

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
                with LineFile(staged, self._start) as fresh:
                    with open(fresh._handle, "ab", closefd=False) as file:
                        file.writelines(line for line in self.read() if not unwanted(line))
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
