"""Writes files so that a reader, or a crash, never sees half of one."""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlocal.errors import KvlocalError

PRIVATE = 0o600  # the mode of a file that only its owner may read


def remedy(error: OSError) -> str:
    """What to do about a failure to write a file, as the end of a sentence."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room"
        case errno.EFBIG:
            return "make room for larger files (`ulimit -f`)"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "choose a place that you can write"
        case errno.EEXIST | errno.EISDIR:
            return "choose another name"
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
