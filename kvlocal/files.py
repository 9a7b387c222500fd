"""Writes files so that a reader, or a crash, never sees half of one."""

import os
import secrets
from pathlib import Path

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
