"""Files of data that somebody gives to measure or to train with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvlocal.errors import KvlocalError
from kvlocal.files.json_line import JsonError, json_value
from kvlocal.files.text import is_blank


class DataError(KvlocalError):
    """A file of data cannot be used."""


def read_data(path: Path, what: str) -> bytes:
    """All that a file holds.

    what: should be given, for the message

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give {what}") from error


def records(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """What each line of a file says in JSON, with its number from 1 on; blank lines are skipped.

    Raises:
        DataError: a line is no JSON.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        if not is_blank(line):
            try:
                record = json_value(line)
            except JsonError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
            yield number, record
