"""Goes through all chats and variants, keeps every result as it comes, and goes on where a run was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from kvlocal.errors import KvlocalError
from kvlocal.evaluation.variants import Variant
from kvlocal.files.atomic import atomic_write
from kvlocal.files.line_file import LineFile


@dataclass(frozen=True)
class Measurement:
    """One chat with one variant.

    compression: share of the history's cells that were removed
    values: of each metric, one for each thing measured in the chat
    """

    compression: float
    values: dict[str, list[float]]


@dataclass(frozen=True)
class ChatFailure:
    """A chat that could not be measured with a variant, and why."""

    chat: int
    variant: Variant
    error: KvlocalError


class Task(Protocol):
    """What is measured.

    name: as rows name it
    metrics: in the order in which they are shown
    n_chats: the chats are numbered from 0
    """

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> Sequence[str]: ...

    @property
    def n_chats(self) -> int: ...

    def measure(self, index: int, variant: Variant) -> Measurement: ...


# By variant (spec and ratio) and chat.
Measurements = dict[tuple[str, float], dict[int, Measurement]]


class WorkFile:
    """The finished measurements of a run, a JSON line each, so that nothing is measured twice; a context manager.

    A line carries the key of its run, and lines of another key are left alone. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        other = f"{path} is no file of unfinished results: remove it or name another file"
        self._file = LineFile(path, b'{"run": "', self._take, other)
        self._key = key
        self._others: list[bytes] = []
        self.results: Measurements = {}

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def _take(self, line: bytes) -> None:
        record = json.loads(line)
        measurement = Measurement(record["compression"], record["values"])
        place = record["policy"], record["ratio"]
        if record["run"] == self._key:
            self.results.setdefault(place, {})[record["chat"]] = measurement
        else:
            self._others.append(line)

    def add(self, chat: int, variant: Variant, measurement: Measurement) -> None:
        """Keeps one more measurement.

        Raises:
            KvlocalError: it cannot be written; the file then ends where it did before.
        """
        self._file.append({"run": self._key, "chat": chat, "policy": variant.spec, "ratio": variant.ratio} | vars(measurement))
        self.results.setdefault((variant.spec, variant.ratio), {})[chat] = measurement

    def has(self, chat: int, variant: Variant) -> bool:
        return chat in self.results.get((variant.spec, variant.ratio), {})

    def remove(self) -> None:
        """Removes the file, as its run is finished; other runs' lines stay."""
        if self._others:
            atomic_write(self.path, b"".join(self._others))
        else:
            self.path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()


def outcomes(task: Task, variants: Sequence[Variant], work: WorkFile) -> Iterator[Measurement | ChatFailure]:
    """Measures what the work file does not hold yet, all variants of one chat before the next chat, and yields what became of each.

    Stopped at any point, it has the same chats for every variant, but for the last one.
    """
    for index, variant in pending(task, variants, work):
        try:
            measurement = task.measure(index, variant)
        except KvlocalError as error:
            yield ChatFailure(index, variant, error)
            continue
        work.add(index, variant, measurement)
        yield measurement


def pending(task: Task, variants: Sequence[Variant], work: WorkFile) -> list[tuple[int, Variant]]:
    """Chat and variant of each measurement that is still to be made, in order."""
    return [(index, variant) for index in range(task.n_chats) for variant in variants if not work.has(index, variant)]
