"""Which files that are there already may be written over: those that the same command wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import cannot_write

_HEAD = 256  # bytes that tell whether it is worth reading the rest


def check_replaceable(path: Path, is_ours: Callable[[Path], bool], what: str, *, force: bool) -> None:
    """To be called before the work whose result replaces the file at `path`, so that nothing is computed in vain.

    What is not there, empty, or no regular file (a device, a pipe) may always be written to.

    Args:
        is_ours: whether the file is one that may be replaced; it may raise OSError.
        what: what such a file holds, for the message.
        force: replace whatever is there.

    Raises:
        KvlocalError: the file holds something else, or cannot be read.
    """
    try:
        if force or not path.is_file() or not path.stat().st_size or is_ours(path):
            return
    except OSError as error:
        raise KvlocalError(cannot_write(path, error)) from error
    raise KvlocalError(f"{path} holds something else than {what}: name another file or replace it with --force")


def holds_results(path: Path, setting: str) -> bool:
    """Whether a file is a JSON object {"rows": [...], "settings": {...}} that has this setting, as measurements are written.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not b"".join(file.read(_HEAD).split()).startswith(b'{"rows":['):
            return False
        file.seek(0)
        try:
            found = json.load(file)
        except (ValueError, RecursionError):
            return False
    return isinstance(found.get("settings"), dict) and setting in found["settings"]
