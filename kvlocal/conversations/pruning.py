"""What past conversations take on the disk, and making room of it.

Beside a transcript lie its caches, the snapshot and the archive: with them a conversation is gone on with at once, and without them it is read again
from the transcript. So they can go at any time, and nothing that was said is lost. A conversation that a process has is left alone.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from kvlocal.conversations.named_sessions import alone, beside, chats_dir
from kvlocal.conversations.past_chats import transcripts
from kvlocal.conversations.snapshot import snapshot_path
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import staging_of

KEPT_CHATS = 5  # chats without a name that keep their caches


class Prunable(NamedTuple):
    """A conversation that is old enough to make room.

    path: of its transcript
    last_used: when something was said last
    cache_bytes: of its snapshot and its archive
    transcript_bytes: of what was said
    """

    path: Path
    last_used: datetime
    cache_bytes: int
    transcript_bytes: int


def prunable(directory: Path, *, older_than: timedelta | None = None, keep: int = 0) -> list[Prunable]:
    """The conversations of a directory that were not used for so long, and are none of the so many that were used last; these first."""
    found, now = [], datetime.now()
    for path in transcripts(directory)[keep:]:
        with suppress(OSError):
            status = path.stat()
            used = datetime.fromtimestamp(status.st_mtime)
            if older_than is None or now - used > older_than:
                found.append(Prunable(path, used, sum(map(_size, _caches(path))), status.st_size))
    return found


def prune(one: Prunable, *, transcript: bool = False) -> int:
    """Removes the caches of a conversation, and with `transcript` all of it; returns how many bytes that were.

    Raises:
        KvlocalError: a process has it, it was used meanwhile, or it cannot be removed.
    """
    with alone(one.path):
        if datetime.fromtimestamp(one.path.stat().st_mtime) != one.last_used:
            raise KvlocalError(f"{one.path} was used just now, so it is left alone")
        freed = 0
        for part in (*_caches(one.path), *([one.path] if transcript else [])):
            size = _size(part)
            part.unlink(missing_ok=True)
            freed += size
        return freed


def bound_chats() -> None:
    """Leaves the caches of those chats without a name that were used last, and all transcripts. What cannot be removed stays."""
    for one in prunable(chats_dir(), keep=KEPT_CHATS):
        if one.cache_bytes:
            with suppress(KvlocalError):
                prune(one)


def _caches(path: Path) -> tuple[Path, ...]:
    """The archive, the snapshot, and what a killed process left of one; the snapshot last, which names the parts of the archive."""
    return (*beside(path), staging_of(snapshot_path(path)))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
