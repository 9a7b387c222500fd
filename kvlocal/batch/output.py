"""Where the results of a batch go, and what is there from a run that was cut off."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import kvlocal
from kvlocal.batch.line import Failure, Result
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import cannot_write
from kvlocal.files.fingerprint import fingerprint, run_key
from kvlocal.files.line_file import LineFile
from kvlocal.llama.model import Model
from kvlocal.nexus.tokens import NexusTokens

_KEY_BYTES = 8
_START = b'{"line": '  # of every record


def settings_key(model: Model, config: SessionConfig, nexus: NexusTokens | None) -> str:
    """Names what answers depend on, besides the conversation; the number of threads is not part of it, nor how many decode together, nor where an
    archive has its room."""
    settings = asdict(replace(config, policy_args=dict(config.policy_args), n_threads=None, archive=config.store, archive_ram=0, archive_dir=None))
    paths = [Path(model.path), *([Path(nexus.path)] if nexus else [])]
    files = [fingerprint(path) for path in paths]
    lora = {"lora": model.changed_by} if model.changed_by else {}
    return run_key({"kvlocal": kvlocal.__version__, "settings": settings, "files": files, **lora})


class Results:
    """Writes records as JSON lines, each whole and on the disk before the next one begins; a context manager.

    In a regular file, a record tells the number of its line and a key of the line and the settings; a run with the same file and settings goes on
    where the last one stopped, however that ended. What is there is kept in mind with 8 bytes a line. Nothing is created or replaced
    before the `with` block is entered.

    path: None for standard output; pipes and devices are written to as they are
    replace: drop what a file holds
    retry: want the lines again whose records tell of a failure; these are dropped when the first result of such a line is written
    n_done, n_failed: how many records a file held on entering that stay, and how many of them told of a failure
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: str, *, replace: bool = False, retry: bool = False) -> None:
        """settings: their key."""
        self._path = None if path is None else Path(path)
        self._settings, self._replace, self._retry = settings.encode(), replace, retry
        self._file: LineFile | None = None
        # by number, 0 for a line that has no record
        self._keys = array("Q")
        # numbers of the lines to be tried again, and whether the file has no records of them any more
        self._failed: set[int] = set()
        self._dropped = False
        # of the lines that are wanted and not written yet
        self._begun: dict[int, str] = {}
        self.n_done = self.n_failed = 0

    def __enter__(self) -> Self:
        """Raises KvlocalError if the file cannot be used, or holds something else than results."""
        if self._path is None:
            self._handle, self._name = os.dup(1), "standard output"
        elif self._path.is_file() or not self._path.exists():
            self._file = LineFile(self._path, _START, self._take, self._other, replace=self._replace).__enter__()
            if self._retry:
                self.n_done -= len(self._failed)
            else:
                self.n_failed = len(self._failed)
                self._failed.clear()
        else:
            self._handle, self._name = _open(self._path), str(self._path)
        return self

    def _take(self, line: bytes) -> None:
        """A record that is there."""
        record = json.loads(line)
        self._note(record["line"], int(record["key"], 16))
        if "error" in record:
            self._failed.add(record["line"])

    def _note(self, number: int, key: int) -> None:
        if number >= len(self._keys):
            self._keys.frombytes(bytes(_KEY_BYTES * (number + 1 - len(self._keys))))
        if number < 1 or self._keys[number]:
            raise ValueError("a line is counted from 1, and has one record")
        self._keys[number] = key
        self.n_done += 1

    @property
    def _other(self) -> str:
        return f"{self._path} holds something else than results of this input with these settings: name another file or replace it with --force"

    def wants(self, number: int, line: bytes) -> bool:
        """Whether there is no record of a line yet, or one of a failure that is to be tried again.

        Raises:
            KvlocalError: there is one with this number, but of another line or with other settings.
        """
        key = hashlib.blake2b(line.strip(), key=self._settings, digest_size=_KEY_BYTES).hexdigest()
        known = self._keys[number] if number < len(self._keys) else 0
        if known and known != int(key, 16):
            raise KvlocalError(self._other)
        if known and number not in self._failed:
            return False
        self._begun[number] = key
        return True

    def write(self, outcome: Result | Failure) -> None:
        """Appends the record of a line that was wanted.

        Raises:
            KvlocalError: it cannot be written; a file then ends where it did before.
            BrokenPipeError: nobody reads standard output any more.
        """
        if self._file and outcome.number in self._failed and not self._dropped:
            # not before: only now is it known that they are of this input and these settings
            self._file.drop(lambda line: json.loads(line)["line"] in self._failed)
            self._dropped = True
        record: dict[str, Any] = {"line": outcome.number, "key": self._begun.pop(outcome.number)} | outcome.record()
        # Escapes what is no character (half of a surrogate pair), as JSON does.
        text = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        if self._file:
            self._file.append_line(text)
            return
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise KvlocalError(f"{cannot_write(self._name, error)} and run it again; the lines before this one are there") from error

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.__exit__()
        else:
            os.close(self._handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise KvlocalError(f"cannot write {path} ({error.strerror}): name another file") from error
