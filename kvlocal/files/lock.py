"""The one lock: a file that one process at a time may change, locked by its own descriptor.

The `filelock` package, which comes with huggingface-hub, locks a second file beside the one that is meant, and leaves it there. Here the lock lies on
the file itself, which is renamed, replaced and removed while others wait for it, and which a child process can inherit with the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os

# what a file system without locks says
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Busy(Exception):
    """Another process has the lock."""


class NoLocks(OSError):
    """The file system has no locks, so nobody can tell whether another process has the file."""


def open_locked(path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, wait: bool = False) -> int:
    """Opens a file as `os.open` does and locks it for as long as the descriptor is open, here or in a process that inherits it.

    Between opening and locking, the process that had the lock may have renamed, replaced or removed the file; it is then opened anew, so that
    the descriptor is of the file that has this name.

    Args:
        path: the file; a symbolic link is followed.
        flags, mode: as `os.open` takes them; the descriptor is not inherited unless that is asked for.
        wait: for the lock, instead of failing.

    Raises:
        Busy: another process has it.
        NoLocks: the file system has no locks.
        OSError: it cannot be opened.
    """
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
        try:
            lock(descriptor, wait=wait)
            if _has_name(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool = False) -> None:
    """Locks an open file, as `open_locked` does.

    Raises:
        Busy, NoLocks: as there.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Busy from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(error.errno, "its file system has no locks") from error
        raise


def _has_name(descriptor: int, path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False

