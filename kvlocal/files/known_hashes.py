"""Hashes of large files that were computed before, kept in the cache directory for as long as the files stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import PRIVATE, atomic_write
from kvlocal.files.places import cache_dir

_SHA256 = re.compile(r"[0-9a-f]{64}")
# a file that was written so recently may be written again without another time: file systems count in steps of up to 2 seconds
_SETTLED = 3 * 10**9  # nanoseconds


def known_hash(path: Path, status: os.stat_result, kind: str, compute: Callable[[], str]) -> str:
    """The hash of a file, computed unless it is known.

    It is known if it was computed for a file of this path, device, inode and size, whose contents and status last changed at the same times, in
    nanoseconds. It is kept only if the file is still the same when it is computed, and was not written just before. A record that cannot be read
    or understood is none, and one that cannot be written is left out.

    Args:
        path: the file.
        status: of the file when it was opened.
        kind: what the hash covers.
        compute: gives it, 64 hexadecimal digits.
    """
    path = Path(os.path.realpath(path))
    try:
        record = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}-{kind}.json"
    except KvlocalError:
        return compute()
    state: list[str | int] = [str(path), *_identity(status)]
    found = _read(record, state)
    if found is None:
        found = compute()
        with suppress(OSError, KvlocalError):
            if _identity(path.stat()) == _identity(status) and time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED:
                record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                atomic_write(record, json.dumps({"state": state, "sha256": found}), PRIVATE)
    return found


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(record: Path, state: list[str | int]) -> str | None:
    try:
        found = json.loads(record.read_bytes())
        if found["state"] == state and _SHA256.fullmatch(found["sha256"]):
            return found["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
